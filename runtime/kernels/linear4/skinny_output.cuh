// Of skinny.cu: from the sums of the warps to outputs.

__device__ inline float& left(const Shared& sh, int i) { return *(float*)(sh.lut + i / 32 * LUT_STRIDE + 128 + i % 32 * 4); }

// A warp's sums over its part of a tile, [32 rows][tokens]; the parts of a warp and a tile are unique by their sum.
__device__ inline void store_partial(const Shared& sh, int slot, int tokens, float (&sums)[2][4], int lane) {
    int to = slot * 32 * tokens;
    int g = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int col = column + (i & 1);
            if (col < tokens) left(sh, to + (16 * rt + g + 8 * (i >> 1)) * tokens + col) = sums[rt][i];
            sums[rt][i] = 0;
        }
}

__device__ inline float reduced(const Shared& sh, int width, int total, int tokens, int tile, int row, int token) {
    float sum = 0;
    int begin = tile * width, end = begin + width;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        int from = max(w * total / WARPS, begin), to = min((w + 1) * total / WARPS, end);
        if (from < to) sum += left(sh, ((tile + w) * 32 + row) * tokens + token);
    }
    return sum;
}

__device__ void write_outputs(const Args& a, const Shared& sh, const Segment& seg) {
    int width = split_start(a, seg.split + 1) - split_start(a, seg.split), total = seg.count * width;
    int rows = a.epilogue == GATE_UP ? 16 : 32, shift = a.epilogue == GATE_UP ? 4 : 5;
    for (int token = 0; token < seg.tokens; ++token) {
        int pair = sh.pairs[seg.job * TOKENS + token];
        for (int i = threadIdx.x; i < seg.count << shift; i += THREADS) {
            int row = i & (rows - 1), tile = i >> shift, n = (seg.tile + tile) * rows + row;
            if (n >= a.N) continue;
            float y = reduced(sh, width, total, seg.tokens, tile, row, token);
            if (a.epilogue == GATE_UP) {
                float up = reduced(sh, width, total, seg.tokens, tile, row + 16, token);
                y = __fdividef(y, 1.0f + __expf(-y)) * up;
            }
            if (a.epilogue == GATE_UP || (a.epilogue == TO_BFLOAT16 && a.splits == 1)) {
                ((unsigned short*)a.out)[(long long)pair * a.N + n] = to_bfloat16(y);
            } else if (a.epilogue == DOWN) {
                int choice = (pair - token_of(a, pair) * a.active) * a.splits + seg.split;
                ((float*)a.out)[((long long)choice * a.M + token_of(a, pair)) * a.N + n] = y * a.weights[pair];
            } else {
                float* to = a.epilogue == TO_PARTS ? (float*)a.out : a.parts;
                to[((long long)seg.split * a.M + pair) * a.N + n] = y;
            }
        }
    }
}

// Of a tile whose K is split among blocks, the block that ends last adds the parts, always in the same order.
__device__ void add_parts(const Args& a, const Shared& sh, const Segment& seg) {
    __threadfence();
    __syncthreads();
    for (int i = threadIdx.x; i < seg.count; i += THREADS) {
        int* arrived = a.arrived + seg.job * a.tiles + seg.tile + i;
        sh.last[i] = atomicAdd(arrived, 1) == a.splits - 1;
        if (sh.last[i]) *arrived = 0;
    }
    __syncthreads();
    __threadfence();
    int tokens = seg.tokens;
    for (int i = threadIdx.x; i < seg.count * 32 * tokens; i += THREADS) {
        int row = i % 32, tile = i / 32 % seg.count, token = i / (32 * seg.count);
        int pair = sh.pairs[seg.job * TOKENS + token], n = (seg.tile + tile) * 32 + row;
        if (n >= a.N || !sh.last[tile]) continue;
        float sum = 0;
        for (int s = 0; s < a.splits; ++s) sum += __ldcg(a.parts + ((long long)s * a.M + pair) * a.N + n);
        ((unsigned short*)a.out)[(long long)pair * a.N + n] = to_bfloat16(sum);
    }
}
