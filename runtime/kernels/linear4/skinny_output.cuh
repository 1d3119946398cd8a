// Of skinny.cu: from the sums of the warps to outputs.

// A warp's sums over its part of a tile, for each token those of 32 rows; tile and warp together make a place unique.
__device__ inline void store_partial(const Shared& sh, int place, int tokens, float (&sums)[2][4],
                                     int lane) {
    float* to = sh.sums + place * tokens * SUM_STRIDE + (lane >> 2);
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int token = (lane & 3) * 2 + (i & 1);
            if (token < tokens) to[token * SUM_STRIDE + 16 * rt + 8 * (i >> 1)] = sums[rt][i];
            sums[rt][i] = 0;
        }
}

// Four rows of a tile from the warps that have a part of it.
__device__ inline float4 reduced(const Shared& sh, int width, int total, int tokens, int tile, int row, int token) {
    float4 sum = {};
    int begin = tile * width, end = begin + width;
    for (int w = quotient((begin + 1) * WARPS - 1, total); w < WARPS && w * total / WARPS < end; ++w) {
        if (w * total / WARPS == (w + 1) * total / WARPS) continue;  // fewer chunks than warps
        float4 part = *(const float4*)(sh.sums + ((tile + w) * tokens + token) * SUM_STRIDE + row);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    return sum;
}

__device__ inline float silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }

__device__ inline void write_rows(const Args& a, const Segment& seg, int pair, int n, float4 y) {
    bool aligned = a.N % 4 == 0;
    if (a.epilogue == GATE_UP || a.epilogue == TO_BFLOAT16) {
        store_bfloat16((unsigned short*)a.out + (long long)pair * a.N + n, y, a.N - n, aligned);
    } else if (a.epilogue == DOWN) {
        int token = token_of(a, pair), choice = (pair - token * a.active) * a.splits + seg.split;
        float weight = a.weights[pair];
        y.x *= weight, y.y *= weight, y.z *= weight, y.w *= weight;
        store_floats((float*)a.out + ((long long)choice * a.M + token) * a.N + n, y, a.N - n, aligned);
    } else {
        store_floats((float*)a.out + ((long long)seg.split * a.M + pair) * a.N + n, y, a.N - n, aligned);
    }
}

__device__ void write_outputs(const Args& a, const Shared& sh, const Segment& seg) {
    int width = split_start(a, seg, seg.split + 1) - split_start(a, seg, seg.split), tiles = seg.used(a);
    int total = tiles * width, shift = a.epilogue == GATE_UP ? 2 : 3, of_token = tiles << shift;  // four rows each
    if (DIVIDED && !tiles) return;
    for (int i = threadIdx.x, token = 0;; i += THREADS) {
        while (i >= of_token) i -= of_token, ++token;
        if (token >= seg.tokens) break;
        int tile = i >> shift, row = (i - (tile << shift)) * 4, n = ((seg.tile + tile) << (shift + 2)) + row;
        if (n >= a.N) continue;
        float4 y = reduced(sh, width, total, seg.tokens, tile, row, token);
        if (a.epilogue == GATE_UP) {
            float4 up = reduced(sh, width, total, seg.tokens, tile, row + 16, token);
            y.x = silu(y.x) * up.x, y.y = silu(y.y) * up.y, y.z = silu(y.z) * up.z, y.w = silu(y.w) * up.w;
        }
        write_rows(a, seg, sh.pairs[seg.job * TOKENS + token], n, y);
    }
}
