// Of skinny.cu: from the sums of the warps to outputs.

// A warp's sums over its part of a tile, for each token those of 32 rows; tile and warp together make a place unique.
__device__ inline void store_partial(const Shared& sh, int place, int tokens, float (&sums)[2][4 * FRAGMENTS],
                                     int lane) {
    float* to = sh.sums + place * tokens * SUM_STRIDE + (lane >> 2);
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int i = 0; i < 4 * FRAGMENTS; ++i) {
            int token = i / 4 * 8 + (lane & 3) * 2 + (i & 1);
            if (token < tokens) to[token * SUM_STRIDE + 16 * rt + 8 * (i >> 1 & 1)] = sums[rt][i];
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

// The sums of four rows, of which there may be fewer.
__device__ inline void store_floats(float* to, float4 y, int rows, bool aligned) {
    if (aligned) {
        *(float4*)to = y;
        return;
    }
    if (rows > 0) to[0] = y.x;
    if (rows > 1) to[1] = y.y;
    if (rows > 2) to[2] = y.z;
    if (rows > 3) to[3] = y.w;
}

__device__ inline void store_bfloat16(unsigned short* to, float4 y, int rows, bool aligned) {
    unsigned short h[4] = {to_bfloat16(y.x), to_bfloat16(y.y), to_bfloat16(y.z), to_bfloat16(y.w)};
    if (aligned) {
        *(uint2*)to = {h[0] | (u32)h[1] << 16, h[2] | (u32)h[3] << 16};
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < rows) to[i] = h[i];
}

// Where the part of a split waits for the others: the sums of four rows.
__device__ inline uint4* part_of(const Args& a, int split, int pair, int n) {
    return (uint4*)(a.parts + ((long long)split * a.M + pair) * (a.tiles * 32) + n);
}

// A part says by itself that it has come, so nobody has to fence or to count.
__device__ inline u32 bits_of(float sum) {
    u32 bits = __float_as_uint(sum);
    return bits == NO_SUM ? NAN_BITS : bits;
}

__device__ inline uint4 bits_of(float4 y) { return {bits_of(y.x), bits_of(y.y), bits_of(y.z), bits_of(y.w)}; }

__device__ inline bool has_come(uint4 v) { return v.x != NO_SUM && v.y != NO_SUM && v.z != NO_SUM && v.w != NO_SUM; }

__device__ inline void write_rows(const Args& a, const Segment& seg, int pair, int n, float4 y) {
    bool aligned = a.N % 4 == 0;
    if (a.epilogue == GATE_UP || (a.epilogue == TO_BFLOAT16 && a.splits == 1)) {
        store_bfloat16((unsigned short*)a.out + (long long)pair * a.N + n, y, a.N - n, aligned);
    } else if (a.epilogue == DOWN) {
        int token = token_of(a, pair), choice = (pair - token * a.active) * a.splits + seg.split;
        float weight = a.weights[pair];
        y.x *= weight, y.y *= weight, y.z *= weight, y.w *= weight;
        store_floats((float*)a.out + ((long long)choice * a.M + token) * a.N + n, y, a.N - n, aligned);
    } else if (a.epilogue == TO_PARTS) {
        store_floats((float*)a.out + ((long long)seg.split * a.M + pair) * a.N + n, y, a.N - n, aligned);
    } else {
        store_part(part_of(a, seg.split, pair, n), bits_of(y));
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
        if (n >= a.N && !(a.epilogue == TO_BFLOAT16 && a.splits > 1)) continue;
        float4 y = reduced(sh, width, total, seg.tokens, tile, row, token);
        if (a.epilogue == GATE_UP) {
            float4 up = reduced(sh, width, total, seg.tokens, tile, row + 16, token);
            y.x = silu(y.x) * up.x, y.y = silu(y.y) * up.y, y.z = silu(y.z) * up.z, y.w = silu(y.w) * up.w;
        }
        write_rows(a, seg, sh.pairs[seg.job * TOKENS + token], n, y);
    }
}

// The parts of four rows of a token.
struct Parts {
    uint4 of[MAX_SPLITS];

    __device__ inline void load(const Args& a, int at) {
#pragma unroll
        for (int s = 0; s < MAX_SPLITS; ++s)
            if (s < a.splits) of[s] = load_part((const uint4*)a.parts + at + s * (a.M * a.tiles * 8));
    }

    __device__ inline bool are_there(const Args& a) const {
        bool all = true;
#pragma unroll
        for (int s = 0; s < MAX_SPLITS; ++s)
            if (s < a.splits) all &= has_come(of[s]);
        return all;
    }

    // Leaves their places empty.
    __device__ inline float4 sum(const Args& a, int at) const {
        float4 y = {};
#pragma unroll
        for (int s = 0; s < MAX_SPLITS; ++s)
            if (s < a.splits) {
                store_part((uint4*)a.parts + at + s * (a.M * a.tiles * 8), {NO_SUM, NO_SUM, NO_SUM, NO_SUM});
                y.x += __uint_as_float(of[s].x), y.y += __uint_as_float(of[s].y);
                y.z += __uint_as_float(of[s].z), y.w += __uint_as_float(of[s].w);
            }
        return y;
    }
};

// Who has the last split of a tile adds its parts, in their order. All are units of this block or of blocks before it, so
// it waits for nothing that waits for it.
__device__ void add_parts(const Args& a, const Shared& sh, const Segment& seg) {
    int of_token = seg.count * 8, items = of_token * seg.tokens;
    // One after the other: to ask for more at once takes what the weights of other blocks need.
    for (int i = threadIdx.x; i < items; i += THREADS) {
        int token = quotient(i, of_token);
        int at = (sh.pairs[seg.job * TOKENS + token] * a.tiles + seg.tile) * 8 + i - token * of_token;
        Parts parts;
        do parts.load(a, at);
        while (!parts.are_there(a));
        float4 y = parts.sum(a, at);
        int pair = quotient(at, a.tiles * 8), n = (at - pair * a.tiles * 8) * 4;
        if (n < a.N) store_bfloat16((unsigned short*)a.out + (long long)pair * a.N + n, y, a.N - n, a.N % 4 == 0);
    }
}
