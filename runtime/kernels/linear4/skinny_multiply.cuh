// Of skinny.cu: a chunk of weights times the tokens of a job.

// The scales of one row in one chunk, of which `get` gives that of some 64 (or 32) columns.
struct RowScales {
#if SCALE_KIND == 0
    u32 codes;
    float nested, offset;
    __device__ inline void load(const Args& a, const Shared& sh, const char* scales, int row, int m16, int first) {
        codes = *(const u32*)(scales + row * 4);
        float2 meta = sh.meta[m16];
        int block = __float_as_int(meta.x) + first;
        nested = sh.nested[m16 * a.codes.nested_span + (block >> 8)];
        offset = meta.y * a.codes.unscale;
    }
    __device__ inline float get(const Shared& sh, int i) const {
        return sh.map[(codes >> (8 * i)) & 255] * nested + offset;
    }
    __device__ inline u32 read() const { return codes; }
#elif SCALE_KIND == 1
    float values[4];
    __device__ inline void load(const Args& a, const Shared& sh, const char* scales, int row, int m16, int first) {
        float4 v = *(const float4*)(scales + row * 16);
        float unscale = a.codes.unscale;
        values[0] = v.x * unscale, values[1] = v.y * unscale, values[2] = v.z * unscale, values[3] = v.w * unscale;
    }
    __device__ inline float get(const Shared& sh, int i) const { return values[i]; }  // loaded times unscale
    __device__ inline u32 read() const { return __float_as_uint(values[0]); }
#else
    u32 halves[SCALES_PER_ROW / 2];
    __device__ inline void load(const Args& a, const Shared& sh, const char* scales, int row, int m16, int first) {
#pragma unroll
        for (int i = 0; i < SCALES_PER_ROW / 2; ++i)
            halves[i] = *(const u32*)(scales + row * 2 * SCALES_PER_ROW + 4 * i);
    }
    __device__ inline float get(const Shared& sh, int i) const { return float_of_half(halves[i / 2] >> (16 * (i & 1))); }
    __device__ inline u32 read() const {
        u32 all = 0;
#pragma unroll
        for (int i = 0; i < SCALES_PER_ROW / 2; ++i) all ^= halves[i];
        return all;
    }
#endif
};

// Gives what it has read, for `nothing_of`.
__device__ inline u32 load_scales(const Args& a, const Shared& sh, const char* found, int tile, int k_chunk,
                                   RowScales (&scales)[2][2], int lane) {
    int g = lane >> 2, per_row = a.K / 64;
    u32 read = 0;
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = g + 8 * half;
            scales[rt][half].load(a, sh, found, 16 * rt + row, 2 * tile + rt,
                                  row * per_row + 4 * k_chunk);
            read ^= scales[rt][half].read();
        }
    return read;
}

// What a lane needs of half a chunk: codes of 32 rows, and B's registers.
struct Operands {
    u32 words[2][2][4];  // [64 columns][16 rows]
    u32 b[2][2][4];      // [64 columns][32 columns]
};

// `x` is where the lane's row of load_matrices begins. Gives what of codes it has read.
__device__ inline u32 load_operands(Operands& o, const char* codes, const char* x, int lane) {
#pragma unroll
    for (int kb = 0; kb < 2; ++kb) {
#pragma unroll
        for (int rt = 0; rt < 2; ++rt) {
            uint4 w = *(const uint4*)(codes + kb * 1024 + rt * 512 + lane * 16);
            o.words[kb][rt][0] = w.x, o.words[kb][rt][1] = w.y, o.words[kb][rt][2] = w.z, o.words[kb][rt][3] = w.w;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) load_matrices(o.b[kb][i], x + kb * 128 + i * 64);
    }
    return o.words[0][0][0] ^ o.words[0][1][0] ^ o.words[1][0][0] ^ o.words[1][1][0];
}

// What the sums over some columns begin with: for integers, which are 136 too large, -136 times those of x.
template <int STEPS>
__device__ inline void bias(const Operands& o, int kb, int s0, float (&sums)[4]) {
#if SCALE_KIND == 2
    const u32 minus_bias[4] = {MINUS_BIAS, MINUS_BIAS, MINUS_BIAS, MINUS_BIAS};
#pragma unroll
    for (int s = s0; s < s0 + STEPS; ++s) {
        const u32* b = o.b[kb][s / 2] + s % 2 * 2;
        mma(sums, minus_bias, b[0], b[1]);
    }
#endif
}

template <int HALF>
__device__ inline void multiply_half(const Shared& sh, const Operands& o, const RowScales (&scales)[2][2],
                                     float (&sums)[2][4], u32 key) {
#pragma unroll
    for (int s0 = 0; s0 < 4; s0 += STEPS_PER_SCALE) {
        float part[2][2][4];  // four chains of products side by side
#pragma unroll
        for (int kb = 0; kb < 2; ++kb) {
            float first[4] = {};
            bias<STEPS_PER_SCALE>(o, kb, s0, first);
#pragma unroll
            for (int i = 0; i < 4; ++i) part[kb][0][i] = part[kb][1][i] = first[i];
        }
#pragma unroll
        for (int s = s0; s < s0 + STEPS_PER_SCALE; ++s)
#pragma unroll
            for (int kb = 0; kb < 2; ++kb) {
#pragma unroll
                for (int rt = 0; rt < 2; ++rt) {
                    Levels levels(sh.lut, o.words[kb][rt][s], key);
                    const u32* b = o.b[kb][s / 2] + s % 2 * 2;
                    mma(part[kb][rt], levels.a, b[0], b[1]);
                }
            }
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int rt = 0; rt < 2; ++rt) {
                int index = ((2 * HALF + kb) * 64 + s0 * 16) / SCALE_COLUMNS;
                float low = scales[rt][0].get(sh, index), high = scales[rt][1].get(sh, index);
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[rt][i] += part[kb][rt][i] * (i & 2 ? high : low);
            }
    }
}
