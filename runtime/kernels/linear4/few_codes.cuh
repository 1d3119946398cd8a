// Of the kernels for few tokens: chunks of codes in shared memory, tables, and what tensor cores take of them.
//
// Macros: WARPS; TABLE_STRIDE, 128 or 256; SCALE_KIND 0 double quantization, 1 float32, 2 float16; SCALE_COLUMNS of one
// scale.

#define THREADS (WARPS * 32)
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

// What a kernel is told of a matrix's codes and scales.
struct Codes {
    unsigned short levels[16];  // bfloat16, of each code
    float map[256];             // double quantization's first-level table, times `unscale`
    float unscale;              // what scales are multiplied with, as kernel levels are larger than stored ones
    int meta_start, nested_start, nested_count, nested_span;  // within a record
    int parts_count, interleaved;
    int part_start[4], part_nested[4];  // in 16 rows, in second-level scales
};

// In shared memory. Of double quantization, for every 16 rows: first block within its second-level block (as an integer)
// and offset, and second-level scales.
struct Tables {
    char* lut;
    float *map, *nested;
    float2* meta;
};

__device__ inline void fill_tables(const Codes& codes, const Tables& tables, int lane, int warp) {
#if SCALE_KIND != 2
    for (int first = warp * 32; first < 256; first += THREADS) {
        int byte = first + lane;
        u32 mine = codes.levels[byte >> 4] | codes.levels[byte & 15] << 16;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            *(u32*)(tables.lut + (first + i) * TABLE_STRIDE + lane * 4) = __shfl_sync(0xffffffff, mine, i);
    }
#endif
#if SCALE_KIND == 0
    for (int i = threadIdx.x; i < 256; i += THREADS) tables.map[i] = codes.map[i];
#endif
}

// n / d of numbers below a million, in a fraction of the time and of the code that integers take.
__device__ inline int quotient(int n, int d) { return (int)__fdividef((float)n + 0.5f, (float)d); }

// Asks for the second-level scales of some tiles' rows, for every 16 of them those that their blocks may need.
__device__ inline void load_nested(const Codes& codes, const Tables& tables, const char* record, int K, int tile,
                                   int count) {
#if SCALE_KIND == 0
    const char* meta = record + codes.meta_start + 16 * tile;
    int rows16 = 16 * (K / 64);
    for (int i = threadIdx.x; i < 2 * count * codes.nested_span; i += THREADS) {
        int m = quotient(i, codes.nested_span), j = i - m * codes.nested_span;
        // The record holds the first block too, but to wait for it before asking for the scales costs a microsecond.
        int m16 = 2 * tile + m, part = 0;
        while (part + 1 < codes.parts_count && m16 >= codes.part_start[part + 1]) ++part;
        int block = codes.interleaved ? (m16 & 1) * codes.part_nested[1] * 256 + (m16 >> 1) * rows16
                                      : codes.part_nested[part] * 256 + (m16 - codes.part_start[part]) * rows16;
        int at = min((block >> 8) + j, codes.nested_count - 1);
        copy_4((char*)(tables.nested + i), record + codes.nested_start + 4 * at);
        if (j == 0) {
            *(int*)(tables.meta + m) = block & 255;
            copy_4((char*)(tables.meta + m) + 4, meta + m * 8 + 4);
        }
    }
#endif
}

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
