// Of attention.cu: a block of tokens in shared memory, its units, and the state of a warp.

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
        float x = largest_in_warp(fmaxf(low_of(most[m]), high_of(most[m])));
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

// Where a head's results go, and what they are multiplied by on the way; each pointer is to the first token.
struct Output {
    const u16* gate;
    const float* weights;
    u16* to;
    float* squares;
    int count;
    static constexpr int AT_ONCE = 2;  // rows of gates under way, as far as registers go

    // Have the gates of a block of tokens in the L2 cache when it is written.
    __device__ __forceinline__ void prefetch(int start) const {
        int t = start + (threadIdx.x >> 1);
        const u16* line = gate + (long long)t * TOKEN + (threadIdx.x & 1) * 64;
        if (t < count) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }

    // The warp's 32 features of a block, which lie as float16 in `tile`, in `unit`.
    __device__ __forceinline__ void write(u32 tile, int start, float unit) const {
        // Rows four apart at once: their chunks lie in different banks.
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        int t = (lane >> 3) + (lane & 4), chunk = 4 * warp + (lane & 3), first = start + t;
        const u16* gate_row = gate + (long long)first * TOKEN + chunk * 8;
        float w[8];
#pragma unroll
        for (int i = 0; i < 8; i += 4) *(float4*)(w + i) = *(const float4*)(weights + chunk * 8 + i);
#pragma unroll
        for (int some = 0; some < TOKENS / 8; some += AT_ONCE) {
            uint4 gates[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (first + 8 * (some + i) < count) gates[i] = *(const uint4*)(gate_row + (some + i) * 8 * TOKEN);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                int step = some + i;
                uint4 row = read(tile + place(t, chunk) + step * 8 * ROW);
                float sum = 0.f;
                row.x = gated(row.x, gates[i].x, unit, w, sum), row.y = gated(row.y, gates[i].y, unit, w + 2, sum);
                row.z = gated(row.z, gates[i].z, unit, w + 4, sum), row.w = gated(row.w, gates[i].w, unit, w + 6, sum);
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                if (first + 8 * step >= count) continue;
                *(uint4*)(to + (long long)(first + 8 * step) * H * K + chunk * 8) = row;
                if ((lane & 3) == 0) squares[(long long)(first + 8 * step) * H * 4 + warp] = sum;
            }
        }
    }

    static __device__ __forceinline__ u32 gated(u32 pair, u32 gate, float unit, const float* w, float& sum) {
        float2 o = floats_of(pair);
        o.x *= unit, o.y *= unit;
        sum = fmaf(o.x, o.x, fmaf(o.y, o.y, sum));
        return pair_of(o.x * w[0] * sigmoid(low_of(gate)), o.y * w[1] * sigmoid(high_of(gate)));
    }
};
