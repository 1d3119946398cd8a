// Of skinny.cu: a chunk of weights times up to 8 tokens.

// A's registers of one step from the codes of 8 weights. B must be in the same order of columns: see `order_b`.
struct Levels {
    u32 a[4];
#if SCALE_KIND == 2
    // Integers: a nibble under 0x4300 is the bfloat16 128 + code. Even columns come together, and odd ones.
    __device__ inline Levels(const char*, u32 codes, u32) {
        a[0] = centred(codes >> 4);
        a[1] = centred(codes >> 12);
        a[2] = centred(codes);
        a[3] = centred(codes >> 8);
    }
    __device__ static inline u32 centred(u32 codes) {
        return fma_pairs((codes & 0x000f000f) | 0x43004300, 0x3f803f80, 0xc308c308);  // - 136
    }
    __device__ static inline void order_b(u32& b0, u32& b1) {
        u32 even = __byte_perm(b0, b1, 0x5410), odd = __byte_perm(b0, b1, 0x7632);
        b0 = even, b1 = odd;
    }
#else
    // By the table: a byte's two levels are one look-up.
    __device__ inline Levels(const char* lut, u32 codes, u32 lane4) {
        a[0] = *(const u32*)(lut + __byte_perm(codes, lane4, 0x5504));
        a[1] = *(const u32*)(lut + __byte_perm(codes, lane4, 0x5514));
        a[2] = *(const u32*)(lut + __byte_perm(codes, lane4, 0x5524));
        a[3] = *(const u32*)(lut + __byte_perm(codes, lane4, 0x5534));
    }
    __device__ static inline void order_b(u32&, u32&) {}
#endif
};

// The scales of one row in one chunk, of which `get` gives that of some 64 (or 32) columns.
struct RowScales {
#if SCALE_KIND == 0
    u32 codes;
    float nested, offset;
    __device__ inline void load(const Args& a, const Shared& sh, const char* scales, int row, int m16, int first) {
        codes = *(const u32*)(scales + row * 4);
        float2 meta = sh.meta[m16];
        int block = __float_as_int(meta.x) + first;
        nested = sh.nested[m16 * a.nested_span + (block >> 8)];
        offset = meta.y * a.unscale;
    }
    __device__ inline float get(const Shared& sh, int i) const {
        return sh.map[(codes >> (8 * i)) & 255] * nested + offset;
    }
#elif SCALE_KIND == 1
    float values[4];
    __device__ inline void load(const Args& a, const Shared& sh, const char* scales, int row, int m16, int first) {
        float4 v = *(const float4*)(scales + row * 16);
        values[0] = v.x * a.unscale, values[1] = v.y * a.unscale, values[2] = v.z * a.unscale, values[3] = v.w * a.unscale;
    }
    __device__ inline float get(const Shared& sh, int i) const { return values[i]; }  // loaded times unscale
#else
    u32 halves[SCALES_PER_ROW / 2];
    __device__ inline void load(const Args& a, const Shared& sh, const char* scales, int row, int m16, int first) {
#pragma unroll
        for (int i = 0; i < SCALES_PER_ROW / 2; ++i)
            halves[i] = *(const u32*)(scales + row * 2 * SCALES_PER_ROW + 4 * i);
    }
    __device__ inline float get(const Shared& sh, int i) const { return half_to_float(halves[i / 2] >> (16 * (i & 1))); }
#endif
};

// Steps of 16 columns whose sums share a scale, at most those of 64 columns.
#define STEPS_PER_SCALE (SCALE_COLUMNS < 64 ? SCALE_COLUMNS / 16 : 4)

__device__ inline void load_scales(const Args& a, const Shared& sh, const char* stage, int tile, int k_chunk,
                                   RowScales (&scales)[2][2], int lane) {
    int g = lane >> 2, per_row = a.K / 64;
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = g + 8 * half;
            scales[rt][half].load(a, sh, stage + CODES_NBYTES, 16 * rt + row, 2 * tile + rt,
                                  row * per_row + 4 * k_chunk);
        }
}

template <int HALF>
__device__ inline void multiply_half(const Shared& sh, const char* stage, int c, const RowScales (&scales)[2][2],
                                     float (&sums)[2][4], int lane, u32 lane4, int x_lane, int tokens) {
#pragma unroll
    for (int kb = 2 * HALF; kb < 2 * HALF + 2; ++kb) {
        const char* xb = sh.x + (c * 4 + kb) * tokens * 128 + x_lane;
        uint4 b01 = *(const uint4*)xb, b23 = *(const uint4*)(xb + tokens * 64);
        u32 bs[8] = {b01.x, b01.y, b01.z, b01.w, b23.x, b23.y, b23.z, b23.w};
#pragma unroll
        for (int s = 0; s < 4; ++s) Levels::order_b(bs[2 * s], bs[2 * s + 1]);
        uint4 w0 = *(const uint4*)(stage + kb * 1024 + lane * 16), w1 = *(const uint4*)(stage + kb * 1024 + 512 + lane * 16);
        u32 words[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
#pragma unroll
        for (int s0 = 0; s0 < 4; s0 += STEPS_PER_SCALE) {
            float part[2][4] = {};
#pragma unroll
            for (int s = s0; s < s0 + STEPS_PER_SCALE; ++s)
#pragma unroll
                for (int rt = 0; rt < 2; ++rt) {  // two chains of products side by side
                    mma(part[rt], Levels(sh.lut, words[rt][s], lane4).a, bs[2 * s], bs[2 * s + 1]);
                }
#pragma unroll
            for (int rt = 0; rt < 2; ++rt) {
                int index = (kb * 64 + s0 * 16) / SCALE_COLUMNS;
                float low = scales[rt][0].get(sh, index), high = scales[rt][1].get(sh, index);
                sums[rt][0] += part[rt][0] * low;
                sums[rt][1] += part[rt][1] * low;
                sums[rt][2] += part[rt][2] * high;
                sums[rt][3] += part[rt][3] * high;
            }
        }
    }
}
