// Lightning attention of many tokens for heads of 128 on Hopper: what prefill.py's Triton kernels do, with the work of
// a block of 64 tokens laid out by hand. Axes: H heads, t tokens of a block (s those before t), i features of q and k,
// j features of v.
//
// Four warps, one to a quarter of an SM, two blocks of threads to an SM. A warp owns 32 columns j of the state and
// holds them transposed, S^T[j][i], as float32 sums of wgmma. So held, two neighbours rounded to a pair are at once an
// operand of o^T = S^T q^T: the state passes through no memory. q, k and v lie in shared memory where the copy of their
// bfloat16 put them, turned in place into silu as float16, while the next block is copied beside. A tile is halves of
// 64 columns, whose rows of 128 bytes have their 16-byte chunks exchanged by the row's number, as wgmma wants them
// (128B swizzle).
//
// float16 has 11 bits but little range. So q and k of a block are divided by their largest magnitudes, and the state by
// a unit under which its products cannot overflow; v by what makes k v one of these. Loops stay rolled where registers
// allow: straight on, a block's 4,800 instructions spent a fifth of the time waiting for the instruction cache.

// What `piece` tokens give to the state, with how many are real: start float32 [B, H, 1 + pieces, K, K] as slots, the
// first a copy of the state before all, and count float32 [B, H, 1 + pieces]. Grid: heads times pieces, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_pieces(const u16* x, const float* slopes, const float* before, const u8* valid, float* start,
                     float* count, int T, int piece, int pieces) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ float ages[2][TOKENS];
    __shared__ __align__(16) float most[2][4];
    int h = blockIdx.x % H, number = blockIdx.x / H, b = blockIdx.y;
    long long slot = (long long)(b * H + h) * (1 + pieces);
    Tokens tokens = {x + (long long)b * T * TOKEN + h * 3 * K, valid ? valid + (long long)b * T : valid, T};
    float slope = slopes[h] * LOG2E;
    State state = {};
    Range range = {1.f, 0.f};
    int first = number * piece, stop = first + piece;
    float total = 0.f;
    if (!valid) {  // what has decayed below 2^-64 by the end adds nothing that float32 could show
        int seen = ((int)fminf(FORGOTTEN / slope, (float)piece) / TOKENS + 1) * TOKENS;
        total = (float)max(piece - seen, 0);
        first += (int)total;
    }
    u32 stage = (shared_address(memory) + 1023) & ~1023u, other = stage + 2 * TILE;
    u64 real = tokens.real(first);
    tokens.copy<2>(stage, first, real);
    for (int at = first, parity = 0; at < stop; at += TOKENS, parity ^= 1) {
        count_ages(ages[parity], real);
        float last = (float)__popcll(real), decay = exp2_approximate(-slope * last);
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        Units units = largest<2>(stage, most);
        if (at + TOKENS < stop) {  // all have left the block before: its memory takes the next one
            real = tokens.real(at + TOKENS);
            tokens.copy<2>(other, at + TOKENS, real);
        }
        float ratio = range.next(units, decay, last);
        activate<2>(stage, 0.f, reciprocal(units.k), units.k * reciprocal(range.unit));
        publish();
        float factor = decay * ratio;
        FOR_STATE state[m][4 * n + e] *= factor;
        u64 k_rows = descriptor(stage, HALF);
        u32 v_at = stage + TILE + own_columns();
#pragma unroll
        for (int step = 0; step < TOKENS / 16; step++) {
            Values v(v_at, ages[parity], last, slope, step);
            products_begin();
#pragma unroll
            for (int m = 0; m < 2; m++) multiply_columns<1>(state[m], v.decayed[m], k_rows + (step * 16 * ROW >> 4));
            products_end();
        }
        products_wait<0>();
        total += last;
        u32 done = stage;
        stage = other, other = done;
    }
    store_slot(start + (slot + 1 + number) * K * K, state, range.unit);
    if (threadIdx.x == 0) count[slot + 1 + number] = total;
    if (number == 0) {
        before += (long long)(b * H + h) * K * K;
        FOR_STATE state[m][4 * n + e] = before[state_offset(m, n, e)];
        store_slot(start + slot * K * K, state, 1.f);
    }
}

// Scores of a warp's 16 tokens t with all tokens s of the block: decayed, none with later ones, float16 into `scores`.
__device__ __forceinline__ void store_scores(float (&score)[32], u32 scores, const float* ages, float slope) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = 16 * warp + (lane >> 2), pair = 2 * (lane & 3);
    float age0 = ages[t], age1 = ages[t + 8];
    u32 to = scores + (16 * warp + (lane & 15)) * ROW + (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
    for (int n = 0; n < 4; n++) {
        u32 packed[4] = {};
        if (n <= warp)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                int s = 16 * n + 8 * part + pair;
                float2 from = *(const float2*)(ages + s);
                float w[4] = {from.x - age0, from.y - age0, from.x - age1, from.y - age1};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    bool earlier = s + (e & 1) <= t + 8 * (e / 2);
                    w[e] = earlier ? exp2_approximate(slope * w[e]) * score[8 * n + 4 * part + e] : 0.f;
                }
                packed[2 * part] = half_pair(w[0], w[1]);
                packed[2 * part + 1] = half_pair(w[2], w[3]);
            }
        store_matrices(to ^ n << 5, packed[0], packed[1], packed[2], packed[3]);
    }
}

// o * weight * sigmoid(gate) as bfloat16 [B, T, H, K], and of o, for each 32 features, the sum of squares, float32
// [B, T, H, 4], which a norm over all heads wants; the state after all tokens. A segment is `each` pieces, the last what
// is left. With one segment, of no pieces, it begins from `after`. Grid: heads times segments, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_attention(const u16* x, const float* slopes, float* after, const u8* valid, float* start,
                        const float* count, const float* weights, u16* out, float* squares, int T, int segment,
                        int pieces, int each) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ float ages[2][TOKENS];
    __shared__ __align__(16) float most[3][4];
    int h = blockIdx.x % H, number = blockIdx.x / H, b = blockIdx.y;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pair = 2 * (lane & 3);
    long long slot = (long long)(b * H + h) * (1 + pieces);
    Tokens tokens = {x + (long long)b * T * TOKEN + h * 3 * K, valid ? valid + (long long)b * T : valid, T};
    float slope = slopes[h] * LOG2E;

    int first = number * segment, stop = min(first + segment, T);
    u32 stage = (shared_address(memory) + 1023) & ~1023u, other = stage + 3 * TILE, scores = stage + 6 * TILE;
    u64 real = tokens.real(first);
    tokens.copy<3>(stage, first, real);

    State state = {};
    float* from = after + (long long)(b * H + h) * K * K;
    if (pieces == 0) FOR_STATE state[m][4 * n + e] = from[state_offset(m, n, e)];
    for (int i = 0; pieces && i <= number * each; i++) {
        float decay = i ? exp2_approximate(-slope * count[slot + i]) : 0.f;
#pragma unroll
        for (int part = 0; part < 32; part++) {
            float4 x = *slot_part(start + (slot + i) * K * K, part);
            float* s = &state[part / 16][part % 16 * 4];
            s[0] = s[0] * decay + x.x, s[1] = s[1] * decay + x.y, s[2] = s[2] * decay + x.z, s[3] = s[3] * decay + x.w;
        }
    }
    Range range = {0.f, 1.f};
    FOR_STATE range.unit = fmaxf(range.unit, fabsf(state[m][4 * n + e]));
    range.unit = largest_in_warp(range.unit);
    if (lane == 0) most[0][warp] = range.unit;
    __syncthreads();
    range.unit = fmaxf(fmaxf(fmaxf(most[0][0], most[0][1]), fmaxf(most[0][2], most[0][3])), LEAST_UNIT);
    float factor = reciprocal(range.unit);
    FOR_STATE state[m][4 * n + e] *= factor;
    __syncthreads();

    for (int at = first, parity = 0; at < stop; at += TOKENS, parity ^= 1) {
        u32 q = stage, k = stage + TILE, v = stage + 2 * TILE;
        const float* age = ages[parity];
        // Made anew for every block: kept, its addresses would take registers that the state wants.
        Output output = {x + (long long)b * T * TOKEN + (3 * H + h) * K, weights + h * K,
                         out + ((long long)b * T * H + h) * K, squares + ((long long)b * T * H + h) * 4, T};
        output.prefetch(at);
        count_ages(ages[parity], real);
        float last = (float)__popcll(real), decay = exp2_approximate(-slope * last);
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        // No silu is larger than what goes into it. Where that is a large negative number only range is lost.
        Units units = largest<3>(stage, most);
        if (at + TOKENS < stop) {  // all have left the block before: its memory takes the next one
            real = tokens.real(at + TOKENS);
            tokens.copy<3>(other, at + TOKENS, real);
        }
        float ratio = range.next(units, decay, last);
        activate<3>(stage, reciprocal(units.q), reciprocal(units.k), units.k * reciprocal(range.unit));
        publish();
        u64 q_tile = descriptor(q), k_tile = descriptor(k);
        {
            float score[32];
            products_begin();
            multiply_tiles<0>(score, q_tile, k_tile);
#pragma unroll
            for (int step = 1; step < K / 16; step++)
                multiply_tiles<1>(score, columns(q_tile, step), columns(k_tile, step));
            products_end();
            products_wait<0>();
            store_scores(score, scores, age, slope);
        }

        // o^T = S^T q^T for the warp's 32 columns j and all tokens, two steps of 16 features i at a time.
        float o[2][32];
#pragma unroll
        for (int step = 0; step < K / 16; step++) {
            u32 a[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int r = 0; r < 4; r++)
                    a[m][r] = half_pair(state[m][8 * step + 2 * r], state[m][8 * step + 2 * r + 1]);
            products_begin();
#pragma unroll
            for (int m = 0; m < 2; m++)
                if (step == 0)
                    multiply_rows<0>(o[m], a[m], q_tile);
                else
                    multiply_rows<1>(o[m], a[m], columns(q_tile, step));
            products_end();
            products_wait<1>();
        }
        products_wait<0>();
#pragma unroll
        for (int n = 0; n < 8; n++) {
            float2 ages_of = *(const float2*)(age + 8 * n + pair);
            float low = ratio * exp2_approximate(-slope * ages_of.x);
            float high = ratio * exp2_approximate(-slope * ages_of.y);
#pragma unroll
            for (int m = 0; m < 2; m++)
                o[m][4 * n] *= low, o[m][4 * n + 1] *= high, o[m][4 * n + 2] *= low, o[m][4 * n + 3] *= high;
        }
        factor = decay * ratio;
        FOR_STATE state[m][4 * n + e] *= factor;
        publish();  // all scores are there, and q is no longer needed

        // o^T += v^T scores^T, of q / units.q and the state's unit; S^T += (decayed v)^T k.
        u64 k_rows = descriptor(k, HALF), score_tile = descriptor(scores);
        u32 own = own_columns();
#pragma unroll
        for (int step = 0; step < TOKENS / 16; step++) {
            Values values(v + own, age, last, slope, step);
            products_begin();
#pragma unroll
            for (int m = 0; m < 2; m++) multiply_rows<1>(o[m], values.plain[m], columns(score_tile, step));
#pragma unroll
            for (int m = 0; m < 2; m++)
                multiply_columns<1>(state[m], values.decayed[m], k_rows + (step * 16 * ROW >> 4));
            products_end();
            products_wait<1>();
        }
        products_wait<0>();

        // Through the place of q, so that memory is written in whole sectors. A warp has its columns to itself.
        float unit = 1e-30f;
#pragma unroll
        for (int n = 0; n < 32; n++) unit = fmaxf(unit, fmaxf(fabsf(o[0][n]), fabsf(o[1][n])));
        unit = largest_in_warp(unit);
        factor = reciprocal(unit);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 4; n++) {
                u32 packed[4];
#pragma unroll
                for (int r = 0; r < 4; r++)
                    packed[r] = half_pair(o[m][8 * n + 2 * r] * factor, o[m][8 * n + 2 * r + 1] * factor);
                store_transposed((q + own ^ m << 5) + n * 16 * ROW, packed[0], packed[1], packed[2], packed[3]);
            }
        __syncwarp();
        output.write(q, at, unit * units.q * range.unit);
        stage = other, other = q;
    }

    if (stop == T) FOR_STATE from[state_offset(m, n, e)] = state[m][4 * n + e] * range.unit;
}
