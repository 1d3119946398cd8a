// What happens to the sums of a tile: handed to another block, taken from others, written to the output.

struct Sums {
    float of[TOKENS / 2];  // a lane's of [16 rows][tokens]

    __device__ __forceinline__ void fence() {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) keep(of[i]);
    }
};

// Sums of another block's share of the tile, float4 [TOKENS / 8][multiplying threads].
__device__ __forceinline__ float4* partial_of(const Problem& p, int block, int thread) {
    return (float4*)(p.partials + (u64)block * ROWS * TOKENS) + thread;
}

__device__ __forceinline__ void hand_over(const Problem& p, const Sums& sums, int thread) {
    float4* to = partial_of(p, blockIdx.x, thread);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        const float* from = sums.of + 4 * i;
        __stcg(to + 32 * CONSUMERS * i, make_float4(from[0], from[1], from[2], from[3]));
    }
    named_barrier(1 + thread / 128, 128);
    if (thread % 128 == 0) publish(p.flags + 4 * blockIdx.x + thread / 128);
}

// Add the sums that are not staged. They end at about the same time, so all are waited for at once.
__device__ __forceinline__ void take_over(const Problem& p, Sums& sums, int thread, const Others& others) {
    int rank = blockIdx.x % CLUSTER;
    for (int member = others.last - thread % 128; member >= others.first; member -= 128)
        await(p.flags + 4 * (member * CLUSTER + rank) + thread / 128);
    named_barrier(1 + thread / 128, 128);
    for (int member = others.last; member >= others.first; member--) {
        const float4* from = partial_of(p, member * CLUSTER + rank, thread);
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            float* to = sums.of + 4 * i;
            float4 v = __ldcg(from + 32 * CONSUMERS * i);
            to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
        }
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ __forceinline__ u64 output_row(const Problem& p, int token) { return SCATTERED ? p.rows[token] : token; }

// Eight neighbouring outputs of a token.
__device__ __forceinline__ void store_eight(const Problem& p, uint4 v, int token, int n) {
    unsigned short* to = (unsigned short*)p.out + output_row(p, token) * p.N + n;
    if (n + 8 <= p.N && p.N % 8 == 0) {
        *(uint4*)to = v;
        return;
    }
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (n + i < p.N) to[i] = (unsigned short)(words[i / 2] >> 16 * (i & 1));
}

__device__ __forceinline__ void apply_factors(const Problem& p, Sums& sums, const Place& place) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        int token = place.token + 8 * i + 2 * t;
        float even = token < place.tokens ? p.factors[token] : 0.0f;
        float odd = token + 1 < place.tokens ? p.factors[token + 1] : 0.0f;
        float* s = sums.of + 4 * i;
        s[0] *= even, s[1] *= odd, s[2] *= even, s[3] *= odd;
    }
}

__device__ __forceinline__ void store_float(const Problem& p, const Sums& sums, const Place& place, int row) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        int token = place.token + 8 * (i / 4) + 2 * t + (i & 1), n = row + g + 8 * (i >> 1 & 1);
        if (token >= place.tokens) continue;
        if (n < p.N) ((float*)p.out)[output_row(p, token) * p.N + n] = sums.of[i];
    }
}

#if SILU
// 16 rows of W of 16 tokens, eight sums of a lane, turned in the warp's own shared memory to rows of the output.
__device__ __forceinline__ void store_16_rows(const Problem& p, const float (&s)[8], int token, int tokens, int row,
                                              u32 staging) {
    int lane = threadIdx.x & 31, mine = token + lane / 2;
    __syncwarp();
    store_matrices_transposed(staging + (8 * (lane >> 4) + (lane & 7)) * STAGING_PITCH + 16 * (lane >> 3 & 1),
                              pair_of(s[0], s[1]), pair_of(s[2], s[3]), pair_of(s[4], s[5]), pair_of(s[6], s[7]));
    __syncwarp();
    uint4 values = load_shared4(staging + lane / 2 * STAGING_PITCH + 16 * (lane & 1));
    if (mine < tokens) store_eight(p, values, mine, row + 8 * (lane & 1));
}

// A warp holds gate, its neighbour up of the same rows: they swap 16 tokens of each 32, and each makes half of the
// output. Of 16 tokens the first makes all.
__device__ __forceinline__ void store_pairs(const Problem& p, const Sums& sums, const Place& place, int row, u32 staging) {
    int lane = threadIdx.x & 31, pair = (threadIdx.x - 128) / 64;
    constexpr bool BOTH = TOKENS >= 32;
    bool up = threadIdx.x & 32;
    u32 mine = staging + 16 * lane, other = mine + (up ? -STAGING_NBYTES : STAGING_NBYTES);
#pragma unroll
    for (int i = 0; i < (TOKENS + 31) / 32; i++) {
        int token = place.token + 32 * i;
        if (token >= place.tokens) continue;
        const float* s = sums.of + 16 * i;
        float kept[8], given[8], made[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float first = s[j], second = s[BOTH ? 8 + j : j];
            kept[j] = up ? second : first, given[j] = up ? first : second;
        }
        __syncwarp();
        store_floats4(mine, given[0], given[1], given[2], given[3]);
        store_floats4(mine + 512, given[4], given[5], given[6], given[7]);
        named_barrier(8 + pair, 64);
        uint4 got[2] = {load_shared4(other), load_shared4(other + 512)};
        u32 words[8] = {got[0].x, got[0].y, got[0].z, got[0].w, got[1].x, got[1].y, got[1].z, got[1].w};
        named_barrier(8 + pair, 64);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float theirs = __uint_as_float(words[j]);
            made[j] = silu(up ? theirs : kept[j]) * (up ? kept[j] : theirs);
        }
        if (BOTH || !up) store_16_rows(p, made, token + (up ? 16 : 0), place.tokens, row, staging);
    }
}
#else
// 64 rows of W of 16 tokens at a time, turned in the shared memory of a warpgroup to rows of the output.
__device__ __forceinline__ void store_pairs(const Problem& p, const Sums& sums, const Place& place, int row, u32 staging) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3, mine = threadIdx.x / 8 & 15;
    int barrier = threadIdx.x / 128, n = row - 16 * warp + 8 * (threadIdx.x & 7);
    u32 group = staging - warp * STAGING_NBYTES;
    u32 to = group + (8 * (lane >> 4) + (lane & 7)) * STAGING_PITCH + 32 * warp + 16 * (lane >> 3 & 1);
    u32 from = group + mine * STAGING_PITCH + 16 * (threadIdx.x & 7);
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) {
        const float* s = sums.of + 8 * i;
        named_barrier(barrier, 128);
        store_matrices_transposed(to, pair_of(s[0], s[1]), pair_of(s[2], s[3]), pair_of(s[4], s[5]), pair_of(s[6], s[7]));
        named_barrier(barrier, 128);
        uint4 values = load_shared4(from);
        int token = place.token + 16 * i + mine;
        if (token < place.tokens) store_eight(p, values, token, n);
    }
}
#endif
