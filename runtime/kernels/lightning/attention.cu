// Lightning attention of many tokens for heads of 128: what prefill.py's Triton kernels do, with the work of a block of
// 64 tokens laid out by hand. Axes: H heads, t tokens of a block, i features of q and k, j features of v.
//
// Four warps, two blocks of threads to an SM. A warp owns 32 columns j of the state and holds them transposed, S^T[j][i],
// as float32 sums of m16n8k16 products. So held, two neighbours rounded to a pair are at once an operand of q S: the
// state passes through no memory. q, k and v lie in shared memory where the copy of their bfloat16 put them, turned in
// place into silu as float16, while the next block is copied beside. A row of 16-byte chunks is swizzled by its number.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int K = 128, TOKENS = 64, THREADS = 128;
constexpr u32 TILE = TOKENS * K * 2;  // bytes of q, k or v
constexpr float LOG2E = 1.4426950408889634f;
constexpr float V_UNIT = 16.f, LEAST_UNIT = 1e-12f, LEAST = 1e-30f;  // as in prefill.py

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 half_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 half_product(u32 a, u32 b) {
    u32 y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ u32 larger_magnitudes(u32 a, u32 x) {  // of bfloat16 pairs
    u32 y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(x & 0x7FFF7FFFu));
    return y;
}

__device__ __forceinline__ float low_half(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(u32 x) { return __uint_as_float(x & 0xFFFF0000u); }

// silu of a pair of bfloat16, times `factor`, as float16. One reciprocal for both: 1/a = b/(ab); exponents end at 60.
__device__ __forceinline__ u32 silu_pair(u32 x, float factor) {
    float x0 = low_half(x), x1 = high_half(x);
    float a = 1.f + exp2_approximate(fminf(x0 * -LOG2E, 60.f));
    float b = 1.f + exp2_approximate(fminf(x1 * -LOG2E, 60.f));
    float r = reciprocal(a * b) * factor;
    return half_pair(x0 * (b * r), x1 * (a * r));
}

__device__ __forceinline__ float largest_in_warp(float x) {
    for (int lanes = 16; lanes; lanes >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
    return x;
}

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where 16-byte chunk `chunk` of row `row` lies in a tile whose rows are `chunks` long.
__device__ __forceinline__ u32 place(u32 tile, int row, int chunk, int chunks) {
    return tile + (row * chunks + (chunk ^ (row & 7))) * 16;
}

__device__ __forceinline__ uint4 read(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void write(u32 address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

__device__ __forceinline__ void write(u32 address, u32 x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// The tokens of a head and which of them are real.
struct Tokens {
    const u16* x;     // q of the first one
    const u8* valid;  // of the first one; null where all are real
    long long row;    // elements between tokens
    int count;

    // Bit t: whether token `start` + t is real.
    __device__ __forceinline__ u64 real(int start) const {
        int left = count - start;
        if (left <= 0) return 0;
        u64 inside = left >= TOKENS ? ~0ull : (1ull << left) - 1;
        if (!valid) return inside;
        int lane = threadIdx.x & 31;
        bool low = lane < left && valid[start + lane], high = lane + 32 < left && valid[start + lane + 32];
        return (u64)__ballot_sync(~0u, high) << 32 | __ballot_sync(~0u, low);
    }

    // Begin to copy `MATRICES` of q, k and v, the last ones, of a block; zeros where tokens are not real.
    template <int MATRICES>
    __device__ __forceinline__ void copy(u32 to, int start, u64 real) const {
        int chunk = threadIdx.x & 15;
#pragma unroll
        for (int step = 0; step < TOKENS / 8; step++) {
            int t = (threadIdx.x >> 4) + 8 * step;
            bool is_real = real >> t & 1;
            const u16* from = x + (is_real ? (start + t) * row : 0) + (3 - MATRICES) * K + chunk * 8;
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place(to + m * TILE, t, chunk, 16)),
                             "l"(from + m * K), "r"(is_real ? 16 : 0)
                             : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
};

// The largest magnitude among this thread's part of a tile of bfloat16.
__device__ __forceinline__ float largest(u32 tile) {
    u32 most = 0;
#pragma unroll
    for (int step = 0; step < TOKENS / 8; step++) {
        uint4 x = read(place(tile, (threadIdx.x >> 4) + 8 * step, threadIdx.x & 15, 16));
        most = larger_magnitudes(larger_magnitudes(most, x.x), x.y);
        most = larger_magnitudes(larger_magnitudes(most, x.z), x.w);
    }
    return fmaxf(low_half(most), high_half(most));
}

// silu of this thread's part of a tile, times `factor`, in place.
__device__ __forceinline__ void activate(u32 tile, float factor) {
#pragma unroll
    for (int step = 0; step < TOKENS / 8; step++) {
        u32 at = place(tile, (threadIdx.x >> 4) + 8 * step, threadIdx.x & 15, 16);
        uint4 x = read(at);
        x.x = silu_pair(x.x, factor), x.y = silu_pair(x.y, factor);
        x.z = silu_pair(x.z, factor), x.w = silu_pair(x.w, factor);
        write(at, x);
    }
}

// S^T of a warp: element (j, i) with j = 32 warp + 16 m + lane / 4 + 8 (e / 2), i = 8 n + 2 (lane % 4) + e % 2.
typedef float State[2][16][4];

__device__ __forceinline__ int state_offset(int m, int n, int e) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int j = 32 * warp + 16 * m + lane / 4 + 8 * (e / 2), i = 8 * n + 2 * (lane & 3) + (e & 1);
    return i * K + j;
}

// S^T = factor S^T + (decayed v)^T k. `ages`: the number of real tokens up to and with each one.
__device__ __forceinline__ void add_block(State& state, float factor, u32 k, u32 v, const float* ages, float last,
                                          float slope) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) state[m][n][e] *= factor;
#pragma unroll
    for (int step = 0; step < TOKENS / 16; step++) {
        u32 decay[2], a[2][4], b[4];
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float2 age = *(const float2*)(ages + 16 * step + 8 * part + 2 * (lane & 3));
            decay[part] =
                half_pair(exp2_approximate(slope * (age.x - last)), exp2_approximate(slope * (age.y - last)));
        }
#pragma unroll
        for (int m = 0; m < 2; m++) {
            int t = 16 * step + (lane & 7) + (lane >> 4 << 3), chunk = 4 * warp + 2 * m + (lane >> 3 & 1);
            load_transposed(a[m], place(v, t, chunk, 16));
#pragma unroll
            for (int r = 0; r < 4; r++) a[m][r] = half_product(a[m][r], decay[r / 2]);
        }
#pragma unroll
        for (int n = 0; n < 16; n += 2) {
            load_transposed(b, place(k, 16 * step + (lane & 15), n + (lane >> 4), 16));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply(state[m][n], a[m], b[0], b[1]);
                multiply(state[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// What `piece` tokens give to the state, with how many are real: start float32 [B, H, 1 + pieces, K, K], slot 0 a copy
// of the state before all, and count float32 [B, H, 1 + pieces]. Grid: heads times pieces, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_pieces(const u16* x, const float* slopes, const float* before, const u8* valid, float* start,
                     float* count, int T, int piece, int H, int pieces) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ float ages[2][TOKENS], k_most[4];
    int h = blockIdx.x % H, number = blockIdx.x / H, b = blockIdx.y, warp = threadIdx.x >> 5;
    long long row = 4ll * H * K, slot = (long long)(b * H + h) * (1 + pieces);
    Tokens tokens = {x + b * T * row + h * 3 * K, valid ? valid + (long long)b * T : valid, row, T};
    float slope = slopes[h] * LOG2E;
    if (number == 0)
        for (int i = threadIdx.x; i < K * K / 4; i += THREADS)
            ((float4*)(start + slot * K * K))[i] = ((const float4*)(before + (long long)(b * H + h) * K * K))[i];

    State state = {};
    float unit = 1.f, total = 0.f;
    int first = number * piece, stop = first + piece;
    u32 stage = shared_address(memory), other = stage + 2 * TILE;
    u64 real = tokens.real(first);
    tokens.copy<2>(stage, first, real);
    for (int at = first, parity = 0; at < stop; at += TOKENS, parity ^= 1) {
        u32 k = stage, v = stage + TILE;
        if (threadIdx.x < TOKENS) ages[parity][threadIdx.x] = (float)__popcll(real & (2ull << threadIdx.x) - 1);
        float last = (float)__popcll(real);
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        float most = largest_in_warp(largest(k));
        if (threadIdx.x % 32 == 0) k_most[warp] = most;
        __syncthreads();  // all have left the block before: its memory takes the next one
        float k_unit = fmaxf(fmaxf(fmaxf(k_most[0], k_most[1]), fmaxf(k_most[2], k_most[3])), LEAST_UNIT);
        if (at + TOKENS < stop) {
            real = tokens.real(at + TOKENS);
            tokens.copy<2>(other, at + TOKENS, real);
        }
        activate(k, reciprocal(k_unit));
        activate(v, 1 / V_UNIT);
        __syncthreads();
        add_block(state, exp2_approximate(-slope * last) * (unit / k_unit), k, v, ages[parity], last, slope);
        unit = k_unit;
        total += last;
        stage = other, other = k;
    }
    slot += 1 + number;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) start[slot * K * K + state_offset(m, n, e)] = state[m][n][e] * (unit * V_UNIT);
    if (threadIdx.x == 0) count[slot] = total;
}

// o up to units: float16 [B, T, H, K] and, for each 32 features, float32 [B, T, H, 4]; the state after all tokens.
// A segment is `each` pieces, the last what is left. With one segment `start` may be `after`. Grid: heads times
// segments, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_attention(const u16* x, const float* slopes, float* after, const u8* valid, const float* start,
                        const float* count, u16* out, float* units, int T, int segment, int H, int pieces, int each) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ float ages[2][TOKENS], q_most[4], k_most[4];
    int h = blockIdx.x % H, number = blockIdx.x / H, b = blockIdx.y;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, pair = 2 * (lane & 3);
    long long row = 4ll * H * K, slot = (long long)(b * H + h) * (1 + pieces);
    Tokens tokens = {x + b * T * row + h * 3 * K, valid ? valid + (long long)b * T : valid, row, T};
    float slope = slopes[h] * LOG2E;

    int first = number * segment, stop = min(first + segment, T);
    u32 stage = shared_address(memory), other = stage + 3 * TILE, scores = stage + 6 * TILE;
    u64 real = tokens.real(first);
    tokens.copy<3>(stage, first, real);

    // Kept divided by V_UNIT and by the unit of the block before.
    State state = {};
    float unit = 1.f;
    for (int i = 0; i <= number * each; i++) {
        float decay = i ? exp2_approximate(-slope * count[slot + i]) : 0.f;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 16; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    state[m][n][e] =
                        state[m][n][e] * decay + start[(slot + i) * K * K + state_offset(m, n, e)] * (1 / V_UNIT);
    }

    for (int at = first, parity = 0; at < stop; at += TOKENS, parity ^= 1) {
        u32 q = stage, k = stage + TILE, v = stage + 2 * TILE;
        const float* age = ages[parity];
        if (threadIdx.x < TOKENS) ages[parity][threadIdx.x] = (float)__popcll(real & (2ull << threadIdx.x) - 1);
        float last = (float)__popcll(real);
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        // No silu is larger than what goes into it. Where that is a large negative number only range is lost.
        float most = largest_in_warp(largest(q));
        if (lane == 0) q_most[warp] = most;
        most = largest_in_warp(largest(k));
        if (lane == 0) k_most[warp] = most;
        __syncthreads();  // all have left the block before: its memory takes the next one
        float q_unit = fmaxf(fmaxf(fmaxf(q_most[0], q_most[1]), fmaxf(q_most[2], q_most[3])), LEAST_UNIT);
        float k_unit = fmaxf(fmaxf(fmaxf(k_most[0], k_most[1]), fmaxf(k_most[2], k_most[3])), LEAST_UNIT);
        if (at + TOKENS < stop) {
            real = tokens.real(at + TOKENS);
            tokens.copy<3>(other, at + TOKENS, real);
        }
        activate(q, reciprocal(q_unit));
        activate(k, reciprocal(k_unit));
        activate(v, 1 / V_UNIT);
        __syncthreads();

        // Scores of the warp's 16 tokens with those before them, decayed.
        {
            float score[8][4] = {};
#pragma unroll
            for (int step = 0; step < K / 16; step++) {
                u32 a[4], c[4];
                load_matrices(a, place(q, 16 * warp + (lane & 15), 2 * step + (lane >> 4), 16));
#pragma unroll
                for (int n = 0; n < 4; n++)
                    if (n <= warp) {
                        int t = 16 * n + (lane & 7) + (lane >> 4 << 3);
                        load_matrices(c, place(k, t, 2 * step + (lane >> 3 & 1), 16));
                        multiply(score[2 * n], a, c[0], c[1]);
                        multiply(score[2 * n + 1], a, c[2], c[3]);
                    }
            }
            int t = 16 * warp + g;
            float age0 = age[t], age1 = age[t + 8];
#pragma unroll
            for (int n = 0; n < 8; n++)
                if (n / 2 <= warp) {
                    int s = 8 * n + pair;
                    float2 from = *(const float2*)(age + s);
                    float w0 = s <= t ? exp2_approximate(slope * (from.x - age0)) : 0.f;
                    float w1 = s + 1 <= t ? exp2_approximate(slope * (from.y - age0)) : 0.f;
                    float w2 = s <= t + 8 ? exp2_approximate(slope * (from.x - age1)) : 0.f;
                    float w3 = s + 1 <= t + 8 ? exp2_approximate(slope * (from.y - age1)) : 0.f;
                    write(place(scores, t, n, 8) + 2 * pair, half_pair(score[n][0] * w0, score[n][1] * w1));
                    write(place(scores, t + 8, n, 8) + 2 * pair, half_pair(score[n][2] * w2, score[n][3] * w3));
                }
        }

        // o = q S for all tokens and the warp's 32 columns.
        float o[4][4][4] = {};
        float state_unit = LEAST;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 16; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) state_unit = fmaxf(state_unit, fabsf(state[m][n][e]));
        state_unit = largest_in_warp(state_unit);
        float factor = reciprocal(state_unit);
#pragma unroll
        for (int step = 0; step < K / 16; step++) {
            u32 a[4], c[4][2];
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float* s = &state[n / 2][2 * step + r][2 * (n & 1)];
                    c[n][r] = half_pair(s[0] * factor, s[1] * factor);
                }
#pragma unroll
            for (int t = 0; t < 4; t++) {
                load_matrices(a, place(q, 16 * t + (lane & 15), 2 * step + (lane >> 4), 16));
#pragma unroll
                for (int n = 0; n < 4; n++) multiply(o[t][n], a, c[n][0], c[n][1]);
            }
        }
        factor = state_unit * (unit / k_unit);
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float low = factor * exp2_approximate(-slope * age[16 * t + g]);
            float high = factor * exp2_approximate(-slope * age[16 * t + g + 8]);
#pragma unroll
            for (int n = 0; n < 4; n++) o[t][n][0] *= low, o[t][n][1] *= low, o[t][n][2] *= high, o[t][n][3] *= high;
        }
        __syncthreads();  // all scores are there, and q is no longer needed

        // o += scores v: of q / q_unit, k / k_unit, v / V_UNIT.
#pragma unroll
        for (int step = 0; step < TOKENS / 16; step++) {
            u32 a[4], c[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_transposed(c[n], place(v, 16 * step + (lane & 15), 4 * warp + 2 * n + (lane >> 4), 16));
#pragma unroll
            for (int t = step; t < 4; t++) {
                load_matrices(a, place(scores, 16 * t + (lane & 15), 2 * step + (lane >> 4), 8));
#pragma unroll
                for (int n = 0; n < 4; n++) multiply(o[t][n], a, c[n / 2][2 * (n & 1)], c[n / 2][2 * (n & 1) + 1]);
            }
        }

        // Through the place of q, so that memory is written in whole sectors. A warp has its columns to itself.
        factor = q_unit * k_unit * V_UNIT;
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float row_unit = LEAST;
#pragma unroll
                for (int n = 0; n < 4; n++)
                    row_unit = fmaxf(row_unit, fmaxf(fabsf(o[t][n][2 * half]), fabsf(o[t][n][2 * half + 1])));
                row_unit = fmaxf(row_unit, __shfl_xor_sync(~0u, row_unit, 1));
                row_unit = fmaxf(row_unit, __shfl_xor_sync(~0u, row_unit, 2));
                float inverse = reciprocal(row_unit);
                int in_block = 16 * t + 8 * half + g;
#pragma unroll
                for (int n = 0; n < 4; n++)
                    write(place(q, in_block, 4 * warp + n, 16) + 2 * pair,
                          half_pair(o[t][n][2 * half] * inverse, o[t][n][2 * half + 1] * inverse));
                if (pair == 0 && at + in_block < T)
                    units[(((long long)b * T + at + in_block) * H + h) * 4 + warp] = row_unit * factor;
            }
        __syncwarp();
#pragma unroll
        for (int step = 0; step < TOKENS / 8; step++) {
            int in_block = (lane >> 2) + 8 * step, chunk = 4 * warp + (lane & 3);
            if (at + in_block < T)
                *(uint4*)(out + (((long long)b * T + at + in_block) * H + h) * K + chunk * 8) =
                    read(place(q, in_block, chunk, 16));
        }

        add_block(state, exp2_approximate(-slope * last) * (unit / k_unit), k, v, age, last, slope);
        unit = k_unit;
        stage = other, other = q;
    }

    if (stop == T)
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < 16; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    after[(long long)(b * H + h) * K * K + state_offset(m, n, e)] = state[m][n][e] * (unit * V_UNIT);
}
