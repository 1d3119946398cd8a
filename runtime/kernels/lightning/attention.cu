// Lightning attention of many tokens for heads of 128: what prefill.py's Triton kernels do, with the work of a block of
// 64 tokens laid out by hand. Axes: H heads, t tokens of a block, i features of q and k, j features of v.
//
// Four warps, two blocks of threads to an SM. A warp owns 32 columns j of the state and holds them transposed, S^T[j][i],
// as float32 sums of m16n8k16 products. So held, two neighbours rounded to a pair are at once an operand of q S: the
// state passes through no memory. q, k and v lie in shared memory where the copy of their bfloat16 put them, turned in
// place into silu as float16, while the next block is copied beside. A row's 16-byte chunks are exchanged by its number,
// so that eight rows' chunks of one number lie in different banks.
//
// float16 has 11 bits but little range. So q and k of a block are divided by their largest magnitudes, and the state by a
// unit under which its products cannot overflow; v by what makes k v one of these. Loops stay rolled where registers
// allow: straight on, the block's 4,800 instructions came no faster than a third of the time from the cache.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int K = 128, TOKENS = 64, THREADS = 128;
constexpr u32 TILE = TOKENS * K * 2;  // bytes of q, k or v
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LEAST_UNIT = 1e-12f;       // what zeros are divided by
constexpr float LARGEST_STATE = 16384.f;  // in its unit, before a block's own products are added

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

__device__ __forceinline__ float tanh_approximate(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// silu of a pair of bfloat16, x/2 (1 + tanh(x/2)), times `factor`, as float16. The tanh is off by 2^-11 at most: one
// instruction of the special function unit for an element instead of two, which would bound the kernel.
__device__ __forceinline__ u32 silu_pair(u32 x, float factor) {
    u32 half;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(half) : "r"(x), "r"(0x3F003F00u), "r"(0x80008000u));  // x / 2 - 0
    float x0 = low_half(half), x1 = high_half(half);
    float t0 = tanh_approximate(x0), t1 = tanh_approximate(x1);
    x0 *= factor, x1 *= factor;
    return half_pair(fmaf(x0, t0, x0), fmaf(x1, t1, x1));
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

// Where 16-byte chunk `chunk` of row `row` of q, k, v or o lies in its tile.
__device__ __forceinline__ u32 place(int row, int chunk) { return row * 256 + ((chunk ^ (row & 7)) << 4); }

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
        int t = threadIdx.x >> 4, chunk = threadIdx.x & 15;
        to += place(t, chunk);
        const u16* from = x + (start + t) * row + (3 - MATRICES) * K + chunk * 8;
        real >>= t;
#pragma unroll 2
        for (int step = 0; step < TOKENS / 8; step++) {
            bool is_real = real & 1;
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + m * TILE),
                             "l"((is_real ? from : x) + m * K), "r"(is_real ? 16 : 0)
                             : "memory");
            to += 8 * 256, from += 8 * row, real >>= 8;
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
};

// What a block's values are divided by.
struct Units {
    float q, k, v;
};

// The largest magnitudes of a block, of which each thread sees its part; the last MATRICES of q, k and v lie at `stage`.
// Contains a barrier.
template <int MATRICES>
__device__ __forceinline__ Units largest(u32 stage, float (*shared)[4]) {
    u32 most[MATRICES] = {}, at = stage + place(threadIdx.x >> 4, threadIdx.x & 15);
#pragma unroll 2
    for (int step = 0; step < TOKENS / 8; step++, at += 8 * 256)
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            uint4 x = read(at + m * TILE);
            most[m] = larger_magnitudes(larger_magnitudes(most[m], x.x), x.y);
            most[m] = larger_magnitudes(larger_magnitudes(most[m], x.z), x.w);
        }
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        float x = largest_in_warp(fmaxf(low_half(most[m]), high_half(most[m])));
        if (threadIdx.x % 32 == 0) shared[m][threadIdx.x / 32] = x;
    }
    __syncthreads();
    float found[3] = {};
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        float4 x = *(const float4*)shared[m];
        found[3 - MATRICES + m] = fmaxf(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)), LEAST_UNIT);
    }
    return {found[0], found[1], found[2]};
}

// silu of this thread's part of a block in place, times a factor each.
template <int MATRICES>
__device__ __forceinline__ void activate(u32 stage, float q_factor, float k_factor, float v_factor) {
    u32 at = stage + place(threadIdx.x >> 4, threadIdx.x & 15);
    float factors[3] = {q_factor, k_factor, v_factor};
#pragma unroll 1
    for (int step = 0; step < TOKENS / 8; step++, at += 8 * 256) {
        uint4 x[MATRICES];
#pragma unroll
        for (int m = 0; m < MATRICES; m++) x[m] = read(at + m * TILE);
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            float factor = factors[3 - MATRICES + m];
            x[m].x = silu_pair(x[m].x, factor), x[m].y = silu_pair(x[m].y, factor);
            x[m].z = silu_pair(x[m].z, factor), x[m].w = silu_pair(x[m].w, factor);
        }
#pragma unroll
        for (int m = 0; m < MATRICES; m++) write(at + m * TILE, x[m]);
    }
}

// The unit of the state and, in it, a bound of its elements.
struct Range {
    float unit, bound;

    // For a block whose `last` real tokens decay the state by `decay`: the old unit over the new one.
    __device__ __forceinline__ float next(const Units& units, float decay, float last) {
        float before = unit;
        unit = fmaxf(units.k * units.v, bound * decay * before * (1 / LARGEST_STATE));
        float ratio = fminf(before * reciprocal(unit), 1e30f);
        bound = bound * decay * ratio + last;
        return ratio;
    }
};

// S^T of a warp: element (j, i) with j = 32 warp + 16 m + lane / 4 + 8 (e / 2), i = 8 n + 2 (lane % 4) + e % 2.
typedef float State[2][16][4];

#define FOR_STATE                      \
    _Pragma("unroll") for (int m = 0; m < 2; m++) \
    _Pragma("unroll") for (int n = 0; n < 16; n++) \
    _Pragma("unroll") for (int e = 0; e < 4; e++)

__device__ __forceinline__ int state_offset(int m, int n, int e) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int j = 32 * warp + 16 * m + lane / 4 + 8 * (e / 2), i = 8 * n + 2 * (lane & 3) + (e & 1);
    return i * K + j;
}

// Where a lane's row of the four 8x8 matrices of a 16x16 tile begins: rows 0-7, rows 8-15, then both of the next chunk;
// or rows 0-7 of both chunks, then rows 8-15. Other chunks are one exclusive or away, other rows one addition.
__device__ __forceinline__ u32 down_first() {
    int lane = threadIdx.x & 31;
    return place(lane & 15, lane >> 4);
}

__device__ __forceinline__ u32 across_first() {
    int lane = threadIdx.x & 31;
    return place((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
}

// S^T = factor S^T + (decayed v)^T k. `ages`: the number of real tokens up to and with each one.
__device__ __forceinline__ void add_block(State& state, float factor, u32 k, u32 v, const float* ages, float last,
                                          float slope) {
    int warp = threadIdx.x >> 5;
    u32 k_at = k + down_first(), v_at = v + across_first();
    ages += 2 * (threadIdx.x & 3);
    FOR_STATE state[m][n][e] *= factor;
#pragma unroll 1
    for (int step = 0; step < TOKENS / 16; step++, ages += 16, k_at += 16 * 256, v_at += 16 * 256) {
        u32 decay[2], a[2][4], b[4];
#pragma unroll
        for (int m = 0; m < 2; m++) load_transposed(a[m], v_at ^ (4 * warp + 2 * m) << 4);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float2 age = *(const float2*)(ages + 8 * part);
            decay[part] =
                half_pair(exp2_approximate(slope * (age.x - last)), exp2_approximate(slope * (age.y - last)));
        }
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int r = 0; r < 4; r++) a[m][r] = half_product(a[m][r], decay[r / 2]);
#pragma unroll
        for (int n = 0; n < 16; n += 2) {
            load_transposed(b, k_at ^ n << 4);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                multiply(state[m][n], a[m], b[0], b[1]);
                multiply(state[m][n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Bit t of `real` says whether token t is: the number of real ones up to and with each.
__device__ __forceinline__ void count_ages(float* ages, u64 real) {
    if (threadIdx.x < TOKENS) ages[threadIdx.x] = (float)__popcll(real & ((2ull << threadIdx.x) - 1));
}

// What `piece` tokens give to the state, with how many are real: start float32 [B, H, 1 + pieces, K, K], slot 0 a copy
// of the state before all, and count float32 [B, H, 1 + pieces]. Grid: heads times pieces, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_pieces(const u16* x, const float* slopes, const float* before, const u8* valid, float* start,
                     float* count, int T, int piece, int H, int pieces) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ float ages[2][TOKENS];
    __shared__ __align__(16) float most[2][4];
    int h = blockIdx.x % H, number = blockIdx.x / H, b = blockIdx.y;
    long long row = 4ll * H * K, slot = (long long)(b * H + h) * (1 + pieces);
    Tokens tokens = {x + b * T * row + h * 3 * K, valid ? valid + (long long)b * T : valid, row, T};
    float slope = slopes[h] * LOG2E;
    if (number == 0)
        for (int i = threadIdx.x; i < K * K / 4; i += THREADS)
            ((float4*)(start + slot * K * K))[i] = ((const float4*)(before + (long long)(b * H + h) * K * K))[i];

    State state = {};
    Range range = {1.f, 0.f};
    float total = 0.f;
    int first = number * piece, stop = first + piece;
    u32 stage = shared_address(memory), other = stage + 2 * TILE;
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
        __syncthreads();
        add_block(state, decay * ratio, stage, stage + TILE, ages[parity], last, slope);
        total += last;
        u32 done = stage;
        stage = other, other = done;
    }
    slot += 1 + number;
    FOR_STATE start[slot * K * K + state_offset(m, n, e)] = state[m][n][e] * range.unit;
    if (threadIdx.x == 0) count[slot] = total;
}

// The scores of a warp's 16 tokens with those before them, decayed, float16 into a tile of 128-byte rows.
__device__ __forceinline__ void score_block(u32 q, u32 k, u32 scores, const float* ages, float slope) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, pair = 2 * (lane & 3);
    u32 a[8][4], q_at = q + down_first() + 16 * 256 * warp, k_at = k + across_first();
#pragma unroll
    for (int step = 0; step < 8; step++) load_matrices(a[step], q_at ^ step << 5);
    int t = 16 * warp + g;
    float age0 = ages[t], age1 = ages[t + 8];
    u32 to = scores + t * 128 + 2 * pair;
    for (int n = 0; n <= warp; n++, k_at += 16 * 256) {
        float score[2][2][4] = {};  // even and odd steps, which need not wait for each other
#pragma unroll
        for (int step = 0; step < 8; step++) {
            u32 c[4];
            load_matrices(c, k_at ^ step << 5);
            multiply(score[step & 1][0], a[step], c[0], c[1]);
            multiply(score[step & 1][1], a[step], c[2], c[3]);
        }
#pragma unroll
        for (int part = 0; part < 2; part++) {
            int s = 16 * n + 8 * part + pair;
            float2 from = *(const float2*)(ages + s);
            float w[4] = {from.x - age0, from.y - age0, from.x - age1, from.y - age1};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                bool earlier = s + (e & 1) <= t + 8 * (e / 2);
                w[e] = earlier ? exp2_approximate(slope * w[e]) * (score[0][part][e] + score[1][part][e]) : 0.f;
            }
            u32 chunk = ((2 * n + part) ^ g) << 4;
            write(to + chunk, half_pair(w[0], w[1]));
            write(to + 8 * 128 + chunk, half_pair(w[2], w[3]));
        }
    }
}

// o up to units: float16 [B, T, H, K] and, for each 32 features, float32 [B, T, H, 4]; the state after all tokens.
// A segment is `each` pieces, the last what is left. With one segment `start` may be `after`. Grid: heads times
// segments, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_attention(const u16* x, const float* slopes, float* after, const u8* valid, const float* start,
                        const float* count, u16* out, float* units_out, int T, int segment, int H, int pieces,
                        int each) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ float ages[2][TOKENS];
    __shared__ __align__(16) float most[3][4];
    int h = blockIdx.x % H, number = blockIdx.x / H, b = blockIdx.y;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, pair = 2 * (lane & 3);
    long long row = 4ll * H * K, slot = (long long)(b * H + h) * (1 + pieces);
    Tokens tokens = {x + b * T * row + h * 3 * K, valid ? valid + (long long)b * T : valid, row, T};
    float slope = slopes[h] * LOG2E;

    int first = number * segment, stop = min(first + segment, T);
    u32 stage = shared_address(memory), other = stage + 3 * TILE, scores = stage + 6 * TILE;
    u64 real = tokens.real(first);
    tokens.copy<3>(stage, first, real);

    State state = {};
    for (int i = 0; i <= number * each; i++) {
        float decay = i ? exp2_approximate(-slope * count[slot + i]) : 0.f;
        const float* from = start + (slot + i) * K * K;
        FOR_STATE state[m][n][e] = state[m][n][e] * decay + from[state_offset(m, n, e)];
    }
    Range range = {0.f, 1.f};
    FOR_STATE range.unit = fmaxf(range.unit, fabsf(state[m][n][e]));
    range.unit = largest_in_warp(range.unit);
    if (lane == 0) most[0][warp] = range.unit;
    __syncthreads();
    range.unit = fmaxf(fmaxf(fmaxf(most[0][0], most[0][1]), fmaxf(most[0][2], most[0][3])), LEAST_UNIT);
    float factor = reciprocal(range.unit);
    FOR_STATE state[m][n][e] *= factor;
    __syncthreads();

    // Per row of a block: o and the units of this warp.
    u16* o_row = out + (((long long)b * T + first) * H + h) * K;
    float* unit_row = units_out + (((long long)b * T + first) * H + h) * 4 + warp;
    for (int at = first, parity = 0; at < stop; at += TOKENS, parity ^= 1) {
        u32 q = stage, k = stage + TILE, v = stage + 2 * TILE;
        const float* age = ages[parity];
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
        __syncthreads();
        score_block(q, k, scores, age, slope);

        // o = q S for all tokens and the warp's 32 columns.
        float o[4][4][4] = {};
        u32 q_at = q + down_first();
#pragma unroll
        for (int step = 0; step < K / 16; step++) {
            u32 a[4], c[4][2];
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float* s = &state[n / 2][2 * step + r][2 * (n & 1)];
                    c[n][r] = half_pair(s[0], s[1]);
                }
#pragma unroll
            for (int t = 0; t < 4; t++) {
                load_matrices(a, (q_at ^ step << 5) + t * 16 * 256);
#pragma unroll
                for (int n = 0; n < 4; n++) multiply(o[t][n], a, c[n][0], c[n][1]);
            }
        }
#pragma unroll
        for (int t = 0; t < 4; t++) {
            float low = ratio * exp2_approximate(-slope * age[16 * t + g]);
            float high = ratio * exp2_approximate(-slope * age[16 * t + g + 8]);
#pragma unroll
            for (int n = 0; n < 4; n++) o[t][n][0] *= low, o[t][n][1] *= low, o[t][n][2] *= high, o[t][n][3] *= high;
        }
        __syncthreads();  // all scores are there, and q is no longer needed

        // o += scores v: of q / units.q and the state's unit.
        u32 score_at = scores + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4), v_at = v + down_first();
#pragma unroll
        for (int step = 0; step < TOKENS / 16; step++) {
            u32 a[4], c[2][4];
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_transposed(c[n], (v_at ^ (4 * warp + 2 * n) << 4) + step * 16 * 256);
#pragma unroll
            for (int t = step; t < 4; t++) {
                load_matrices(a, (score_at ^ step << 5) + t * 16 * 128);
#pragma unroll
                for (int n = 0; n < 4; n++) multiply(o[t][n], a, c[n / 2][2 * (n & 1)], c[n / 2][2 * (n & 1) + 1]);
            }
        }

        // Through the place of q, so that memory is written in whole sectors. A warp has its columns to itself.
        factor = units.q * range.unit;
        u32 to = q + g * 256 + 2 * pair;
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float unit = 1e-30f;
#pragma unroll
                for (int n = 0; n < 4; n++)
                    unit = fmaxf(unit, fmaxf(fabsf(o[t][n][2 * half]), fabsf(o[t][n][2 * half + 1])));
                unit = fmaxf(unit, __shfl_xor_sync(~0u, unit, 1));
                unit = fmaxf(unit, __shfl_xor_sync(~0u, unit, 2));
                float inverse = reciprocal(unit);
#pragma unroll
                for (int n = 0; n < 4; n++)
                    write(to + (16 * t + 8 * half) * 256 + (((4 * warp + n) ^ g) << 4),
                          half_pair(o[t][n][2 * half] * inverse, o[t][n][2 * half + 1] * inverse));
                int in_block = 16 * t + 8 * half + g;
                if (pair == 0 && at + in_block < T) unit_row[in_block * H * 4] = unit * factor;
            }
        __syncwarp();
        {
            int t = lane >> 2, chunk = 4 * warp + (lane & 3);
            u32 from = q + place(t, chunk);
            u16* to_row = o_row + (long long)t * H * K + chunk * 8;
#pragma unroll
            for (int step = 0; step < TOKENS / 8; step++)
                if (at + t + 8 * step < T) *(uint4*)(to_row + step * 8 * H * K) = read(from + step * 8 * 256);
        }
        o_row += TOKENS * H * K, unit_row += TOKENS * H * 4;

        add_block(state, decay * ratio, k, v, age, last, slope);
        stage = other, other = q;
    }

    float* to = after + (long long)(b * H + h) * K * K;
    if (stop == T) FOR_STATE to[state_offset(m, n, e)] = state[m][n][e] * range.unit;
}
