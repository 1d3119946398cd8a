// Of slices.cu: what a warp reads, and 32 rows of it times its activations.

__device__ inline u64* barrier_of(char* slot) { return (u64*)(slot + SLOT_NBYTES); }

// A slice of a tile: one half of a chunk and the scales of both, which follow the second one.
__device__ inline void copy_slice(char* slot, const char* from, bool second, int lane) {
#if __CUDA_ARCH__ >= 900
    if (elected()) {
        barrier_expect(barrier_of(slot), SLOT_NBYTES);
        copy_bulk(slot, from, HALF_NBYTES, barrier_of(slot));
        // Two warps read the scales of a chunk.
        copy_bulk(slot + HALF_NBYTES, from + (second ? HALF_NBYTES : CODES_NBYTES), SCALES_NBYTES, barrier_of(slot),
                  EVICT_NORMAL);
    }
#else
    for (int i = lane * 16; i < SLOT_NBYTES; i += 512)
        copy_16(slot + i, from + i + (second || i < HALF_NBYTES ? 0 : HALF_NBYTES), true);
    barrier_arrive_after_copies(barrier_of(slot));
#endif
}

// A warp's 128 columns of x, as B's registers: [64 columns][8 tokens][32 columns].
struct Slice {
    u32 b[2][FRAGMENTS][2][4];

    // Of 16 columns.
    __device__ inline const u32* step(int kb, int f, int s) const { return b[kb][f][s / 2] + s % 2 * 2; }

    // Rows of 256 bytes pass through the warp's part of two buffers; pieces of 16 bytes change places so that lanes meet
    // in no bank.
    __device__ inline char* place(const Shared& sh, int warp, int row, int piece) {
        return buffer_of(sh, row / (TOKENS / 2), warp) + row % (TOKENS / 2) * 256 + (piece ^ (row & 7)) * 16;
    }

    __device__ inline void ask(const Args& a, const Shared& sh, int slice, int warp, int lane) {
        int piece = lane & 15;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
            int row = 2 * i + (lane >> 4);
            const char* from = a.x + ((long long)min(row, a.M - 1) * a.K + slice * 128) * 2 + piece * 16;
            copy_16(place(sh, warp, row, piece), from, true);
        }
    }

    __device__ inline void take(const Shared& sh, int warp, int lane) {
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    load_matrices(b[kb][f][i], place(sh, warp, 8 * f + (lane & 7), 8 * kb + 4 * i + (lane >> 3)));
#if SCALE_KIND == 2
#pragma unroll
                    for (int s = 0; s < 4; s += 2) {  // columns in the order of Levels
                        u32 low = b[kb][f][i][s], high = b[kb][f][i][s + 1];
                        b[kb][f][i][s] = __byte_perm(low, high, 0x5410);
                        b[kb][f][i][s + 1] = __byte_perm(low, high, 0x7632);
                    }
#endif
                }
    }
};

// What the sums over the columns of a scale begin with: for integers, which are 136 too large, -136 times those of x.
struct Bias {
    float of[2][GROUPS][4 * FRAGMENTS];

    __device__ inline Bias(const Slice& x) {
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) {
                    float* sums = of[kb][group] + 4 * f;
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[i] = 0;
#if SCALE_KIND == 2
                    const u32 minus_bias[4] = {MINUS_BIAS, MINUS_BIAS, MINUS_BIAS, MINUS_BIAS};
#pragma unroll
                    for (int s = group * STEPS_PER_SCALE; s < (group + 1) * STEPS_PER_SCALE; ++s) {
                        const u32* b = x.step(kb, f, s);
                        mma(sums, minus_bias, b[0], b[1]);
                    }
#endif
                }
    }
};

// The scales of a lane's four rows: g, g + 8, g + 16, g + 24.
struct Scales {
    float of[2][GROUPS][4];  // [64 columns]
    u32 read = 0;  // of all that was

    __device__ inline Scales(const Args& a, const Shared& sh, const char* found, int tile, int slice, int lane) {
        int g = lane >> 2, half = slice & 1;
#if SCALE_KIND == 0
        // Each lane has one row's, and gets others' from their lanes.
        u32 codes = *(const unsigned short*)(found + lane * 4 + half * 2);
        read = codes;
        int m16 = 2 * tile + (lane >> 4);
        float2 meta = sh.meta[m16];
        int block = __float_as_int(meta.x) + (lane & 15) * (a.K / 64) + 4 * (slice >> 1);
        float nested = sh.nested[m16 * a.codes.nested_span + (block >> 8)], offset = meta.y * a.codes.unscale;
#pragma unroll
        for (int kb = 0; kb < 2; ++kb) {
            float mine = sh.map[codes >> (8 * kb) & 255] * nested + offset;
#pragma unroll
            for (int i = 0; i < 4; ++i) of[kb][0][i] = __shfl_sync(0xffffffff, mine, g + 8 * i);
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const char* row = found + ((g + 8 * i) * SCALES_PER_ROW + half * (128 / SCALE_COLUMNS)) * SCALE_NBYTES;
#if SCALE_KIND == 1
            float2 v = *(const float2*)row;
            read ^= __float_as_uint(v.x);
            of[0][0][i] = v.x * a.codes.unscale, of[1][0][i] = v.y * a.codes.unscale;
#else
#pragma unroll
            for (int kb = 0; kb < 2; ++kb)
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) {
                    int column = kb * 64 + group * 16 * STEPS_PER_SCALE;
                    u32 bits = ((const unsigned short*)row)[column / SCALE_COLUMNS];
                    of[kb][group][i] = float_of_half(bits);
                    read ^= bits;
                }
#endif
        }
#endif
    }
};

// Rows of a tile from the `rt`-th 16 on times the slice; words are those of [64 columns][16 rows].
__device__ inline void multiply(const Shared& sh, const uint4 (&words)[2][2], int rt, const Slice& x, const Bias& bias,
                                const Scales& scales, float (&sums)[ROWS16][4 * FRAGMENTS], u32 key) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float part[2][ROWS16][4 * FRAGMENTS];
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int r = 0; r < ROWS16; ++r)
#pragma unroll
                for (int i = 0; i < 4 * FRAGMENTS; ++i) part[kb][r][i] = bias.of[kb][group][i];
#pragma unroll
        for (int s = group * STEPS_PER_SCALE; s < (group + 1) * STEPS_PER_SCALE; ++s)
#pragma unroll
            for (int kb = 0; kb < 2; ++kb)
#pragma unroll
                for (int r = 0; r < ROWS16; ++r) {
                    const uint4& w = words[kb][rt + r];
                    Levels levels(sh.lut, s == 0 ? w.x : s == 1 ? w.y : s == 2 ? w.z : w.w, key);
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; ++f) {
                        const u32* b = x.step(kb, f, s);
                        mma(part[kb][r] + 4 * f, levels.a, b[0], b[1]);
                    }
                }
#pragma unroll
        for (int r = 0; r < ROWS16; ++r)
#pragma unroll
            for (int i = 0; i < 4 * FRAGMENTS; ++i) {
                int row = 2 * (rt + r) + (i >> 1 & 1);
                float both = part[0][r][i] * scales.of[0][group][row] + part[1][r][i] * scales.of[1][group][row];
                sums[r][i] = group ? sums[r][i] + both : both;
            }
    }
}
