// Of skinny.cu: sizes and arguments.

#define FRAGMENTS (TOKENS / 8)  // of B, 8 tokens each
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
#define CHUNK_NBYTES (CODES_NBYTES + 32 * SCALES_PER_ROW * SCALE_NBYTES)
#define SLOT_NBYTES (CHUNK_NBYTES - HALF_NBYTES)  // half a chunk, and room for the scales of the whole
#define SUM_STRIDE 36        // floats from token to token of 32 sums, so that lanes meet in no bank
#define X_PADDING 16         // bytes after a row of x, for the same reason
#define THREADS (WARPS * 32)
#define MAX_SPLITS 4         // of K
#define NO_SUM 0xffffffffu   // what stands where a part has not come yet: a NaN, but not the one that sums become
#define NAN_BITS 0x7fffffffu

// What sums become: bfloat16 [M, N]; float32 [splits, M, N]; silu(gate) * up as bfloat16 [pairs, F]; float32
// [active * splits, M, N] times the router's weight.
enum Epilogue { TO_BFLOAT16, TO_PARTS, GATE_UP, DOWN };

struct Args {
    int epilogue;
    const long long* table;  // address of each expert's record
    const char* matrix;      // the only matrix, where there are no experts
    const int* ids;          // expert of each pair of token and choice, or null for one expert
    const float* weights;    // the router's, of each pair
    const char* x;           // bfloat16 [rows, K]
    char* out;
    int M, active, experts;
    int N, K, tiles, chunks, splits;
    int token_rows;          // pairs of a job that shared memory has room for; a token may choose an expert twice
    int slots, first_slots;  // of a warp's ring; those of them asked for before x is
    int segment_tiles, sum_rows;  // what shared memory has room for: tiles of a segment, and 32 sums of a token
    int matrix_start, meta_start, nested_start, nested_count, nested_span;  // within a record
    int* parts;              // if bfloat16 results have splits, float32 [splits, M, 32 tiles]; NO_SUM before and after
    int parts_count, interleaved;
    int part_start[4], part_nested[4];  // in 16 rows, in second-level scales
    unsigned short levels[16];  // bfloat16, of each code
    float map[256];          // double quantization's first-level table, times `unscale`
    float unscale;           // what scales are multiplied with, as kernel levels are larger than stored ones
    const int* units;        // if DIVIDED: of each pair's hidden units the first that count, whole chunks of down
};
