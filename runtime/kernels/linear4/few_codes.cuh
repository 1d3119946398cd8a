// Of the kernels for few tokens: chunks of codes in shared memory, and what the tensor cores take of them.
//
// Macros: TABLE_STRIDE, 128 or 256; SCALE_KIND 0 double quantization, 1 float32, 2 float16; SCALE_COLUMNS of one scale.

#define CODES_NBYTES 4096    // of a chunk: 32 rows of 256 columns
#define HALF_NBYTES 2048
#define LUT_NBYTES (SCALE_KIND == 2 ? 0 : 256 * TABLE_STRIDE)  // of 256 entries, each once for every lane
#define SCALES_PER_ROW (256 / SCALE_COLUMNS)
#if SCALE_KIND == 0
#define SCALE_NBYTES 1
#elif SCALE_KIND == 1
#define SCALE_NBYTES 4
#else
#define SCALE_NBYTES 2
#endif
#define SCALES_NBYTES (32 * SCALES_PER_ROW * SCALE_NBYTES)
#define CHUNK_NBYTES (CODES_NBYTES + SCALES_NBYTES)
#define SLOT_NBYTES (HALF_NBYTES + SCALES_NBYTES)  // half a chunk, and room for the scales of the whole
// Steps of 16 columns whose sums share a scale, at most those of 64 columns.
#define STEPS_PER_SCALE (SCALE_COLUMNS < 64 ? SCALE_COLUMNS / 16 : 4)

#define BIASED_ZERO 0x43004300  // two bfloat16 of 128; with a nibble in its last bits, 128 + code
#define MINUS_BIAS 0xc308c308   // -136: a code of 8 is a weight of 0

// What decoding needs: where a lane's own of each entry of the table is, or 0x000f000f. That one is to be in a register,
// as an instruction takes one constant only, so it comes from a vote, which the assembler cannot foresee.
__device__ inline u32 decoding_key(int lane) {
    return SCALE_KIND == 2 ? __ballot_sync(0xffffffff, (lane & 12) == 0) : lane * 4;
}

// A's registers of one step from the codes of 8 weights.
struct Levels {
    u32 a[4];
#if SCALE_KIND == 2
    // Integers, 136 too large. Even columns come together, and odd ones, and so must those of B.
    __device__ inline Levels(const char*, u32 codes, u32 nibbles) {
        a[0] = (codes >> 4 & nibbles) | BIASED_ZERO;
        a[1] = (codes >> 12 & nibbles) | BIASED_ZERO;
        a[2] = (codes & nibbles) | BIASED_ZERO;
        a[3] = (codes >> 8 & nibbles) | BIASED_ZERO;
    }
#else
    // By the table: a byte's two levels are one look-up.
    __device__ inline Levels(const char* lut, u32 codes, u32 lane4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = *(const u32*)(lut + entry_of(codes, i, lane4));
    }
#endif
};
