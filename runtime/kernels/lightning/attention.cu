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

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int H = HEADS, K = 128, TOKENS = 64, THREADS = 128;
constexpr int TOKEN = 4 * H * K;      // elements from one token of the projections to the next
constexpr u32 ROW = 128;              // bytes
constexpr u32 HALF = TOKENS * ROW;    // of 64 columns of q, k or v, and of the scores
constexpr u32 TILE = 2 * HALF;
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

// Of magnitudes, whose bits are ordered as they are.
__device__ __forceinline__ float largest_in_warp(float x) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));
}

__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// What the matrix units read of a tile: `across` is the distance of its halves where columns are the outer axis.
__device__ __forceinline__ u64 descriptor(u32 tile, u32 across = 16) {
    return 1ull << 62 | (u64)(8 * ROW >> 4) << 32 | (u64)(across >> 4) << 16 | (tile & 0x3FFFF) >> 4;
}

// Of columns 16 step to 16 step + 15.
__device__ __forceinline__ u64 columns(u64 tile, int step) {
    return tile + (step / 4 * HALF + step % 4 * 32 >> 4);
}

// The products wgmma may begin to read registers and shared memory; all of a group; all but the last `LEFT` groups.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Ordinary writes to shared memory come before what the matrix units read of it.
__device__ __forceinline__ void publish() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
}

// d = a b^T, added to d if KEEP: 64 rows of a tile and 64 of another; 64 rows in registers and 64 of a tile. And
// d = a b, 64 rows in registers and 16 of a tile.
template <int KEEP>
__device__ __forceinline__ void multiply_tiles(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1, 0, 0;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "n"(KEEP));
}

template <int KEEP>
__device__ __forceinline__ void multiply_rows(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(KEEP));
}

template <int KEEP>
__device__ __forceinline__ void multiply_columns(float (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
        "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
          "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
          "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
          "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),
          "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),
          "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(KEEP));
}

// Where 16-byte chunk `chunk` of row `row` of q, k, v or o lies in its tile.
__device__ __forceinline__ u32 place(int row, int chunk) {
    return chunk / 8 * HALF + row * ROW + ((chunk % 8 ^ (row & 7)) << 4);
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

// The tokens of a head and which of them are real.
struct Tokens {
    const u16* x;     // q of the first one
    const u8* valid;  // of the first one; null where all are real
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
        const u16* from = x + (long long)(start + t) * TOKEN + (3 - MATRICES) * K + chunk * 8;
        real >>= t;
#pragma unroll
        for (int step = 0; step < TOKENS / 8; step++) {
            bool is_real = real >> 8 * step & 1;
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + m * TILE + step * 8 * ROW),
                             "l"(from + step * 8 * TOKEN + m * K), "r"(is_real ? 16 : 0)
                             : "memory");
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
};

// What a block's values are divided by.
struct Units {
    float q, k, v;
};

// The largest magnitudes of a block, of which each thread sees its part; the last MATRICES of q, k and v lie at
// `stage`. Contains a barrier.
template <int MATRICES>
__device__ __forceinline__ Units largest(u32 stage, float (*shared)[4]) {
    u32 most[MATRICES] = {}, at = stage + place(threadIdx.x >> 4, threadIdx.x & 15);
#pragma unroll 4
    for (int step = 0; step < TOKENS / 8; step++, at += 8 * ROW)
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
    uint4 x[MATRICES], next[MATRICES];
#pragma unroll
    for (int m = 0; m < MATRICES; m++) x[m] = read(at + m * TILE);
#pragma unroll 1
    for (int step = 0; step < TOKENS / 8; step++, at += 8 * ROW) {
        if (step + 1 < TOKENS / 8)  // on their way meanwhile
#pragma unroll
            for (int m = 0; m < MATRICES; m++) next[m] = read(at + 8 * ROW + m * TILE);
#pragma unroll
        for (int m = 0; m < MATRICES; m++) {
            float factor = factors[3 - MATRICES + m];
            x[m].x = silu_pair(x[m].x, factor), x[m].y = silu_pair(x[m].y, factor);
            x[m].z = silu_pair(x[m].z, factor), x[m].w = silu_pair(x[m].w, factor);
            write(at + m * TILE, x[m]);
            x[m] = next[m];
        }
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

// S^T of a warp: element (j, i) with j = 32 warp + 16 m + lane / 4 + 8 (e / 2), i = 8 n + 2 (lane % 4) + e % 2, as
// [m][4 n + e]: the sums of two products whose rows are 16 of each warp.
typedef float State[2][64];

#define FOR_STATE                      \
    _Pragma("unroll") for (int m = 0; m < 2; m++) \
    _Pragma("unroll") for (int n = 0; n < 16; n++) \
    _Pragma("unroll") for (int e = 0; e < 4; e++)

__device__ __forceinline__ int state_offset(int m, int n, int e) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int j = 32 * warp + 16 * m + lane / 4 + 8 * (e / 2), i = 8 * n + 2 * (lane & 3) + (e & 1);
    return i * K + j;
}

// Where a lane's row of the four 8x8 matrices of 16 rows and this warp's first 16 columns j lies in a tile: rows 0-7 of
// both chunks, then rows 8-15. The other 16 columns are one exclusive or away, other rows an addition.
__device__ __forceinline__ u32 own_columns() {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    return place((lane & 7) + (lane >> 4 << 3), 4 * warp + (lane >> 3 & 1));
}

// Rows 16 step to 16 step + 15 of v's own columns, transposed, and the same decayed to the block's end.
struct Values {
    u32 plain[2][4], decayed[2][4];

    __device__ __forceinline__ Values(u32 v_at, const float* ages, float last, float slope, int step) {
        u32 decay[2];
#pragma unroll
        for (int m = 0; m < 2; m++) load_transposed(plain[m], (v_at ^ m << 5) + step * 16 * ROW);
#pragma unroll
        for (int part = 0; part < 2; part++) {
            float2 age = *(const float2*)(ages + 16 * step + 8 * part + 2 * (threadIdx.x & 3));
            decay[part] =
                half_pair(exp2_approximate(slope * (age.x - last)), exp2_approximate(slope * (age.y - last)));
        }
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int r = 0; r < 4; r++) decayed[m][r] = half_product(plain[m][r], decay[r / 2]);
    }
};

// A state between launches, in the order of threads: `index` is of its groups of four.
__device__ __forceinline__ float4* slot_part(float* slot, int index) {
    return (float4*)slot + index * THREADS + threadIdx.x;
}

__device__ __forceinline__ void store_slot(float* slot, const State& state, float factor) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const float* s = &state[i / 16][i % 16 * 4];
        *slot_part(slot, i) = make_float4(s[0] * factor, s[1] * factor, s[2] * factor, s[3] * factor);
    }
}

// Bit t of `real` says whether token t is: the number of real ones up to and with each.
__device__ __forceinline__ void count_ages(float* ages, u64 real) {
    if (threadIdx.x < TOKENS) ages[threadIdx.x] = (float)__popcll(real & ((2ull << threadIdx.x) - 1));
}

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
    float total = 0.f;
    int first = number * piece, stop = first + piece;
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

// o up to units: float16 [B, T, H, K] and, for each 32 features, float32 [B, T, H, 4]; the state after all tokens.
// A segment is `each` pieces, the last what is left. With one segment, of no pieces, it begins from `after`. Grid:
// heads times segments, sequences.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lightning_attention(const u16* x, const float* slopes, float* after, const u8* valid, float* start,
                        const float* count, u16* out, float* units_out, int T, int segment, int pieces,
                        int each) {
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
        unit *= units.q * range.unit;
        float* unit_row = units_out + (((long long)b * T + at) * H + h) * 4 + warp;
        if (at + lane < T) unit_row[lane * H * 4] = unit;
        if (at + lane + 32 < T) unit_row[(lane + 32) * H * 4] = unit;
        __syncwarp();
        {
            // Rows four apart at once: their chunks lie in different banks.
            int t = (lane >> 3) + (lane & 4), chunk = 4 * warp + (lane & 3);
            u16* to_row = out + (((long long)b * T + at + t) * H + h) * K + chunk * 8;
            uint4 rows[TOKENS / 8];
#pragma unroll
            for (int step = 0; step < TOKENS / 8; step++) rows[step] = read(q + place(t, chunk) + step * 8 * ROW);
#pragma unroll
            for (int step = 0; step < TOKENS / 8; step++)
                if (at + t + 8 * step < T) *(uint4*)(to_row + step * 8 * H * K) = rows[step];
        }
        stage = other, other = q;
    }

    if (stop == T) FOR_STATE from[state_offset(m, n, e)] = state[m][4 * n + e] * range.unit;
}
