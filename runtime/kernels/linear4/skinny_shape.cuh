// Of skinny.cu: sizes and arguments.

#define TOKENS 8             // columns of B
#define CODES_NBYTES 4096    // of a chunk: 32 rows of 256 columns
#define HALF_NBYTES 2048
#define LUT_STRIDE 256       // bytes from entry to entry, so that a byte of codes is the second byte of its address
#define LUT_NBYTES (256 * LUT_STRIDE)
#define SCALES_PER_ROW (256 / SCALE_COLUMNS)
#if SCALE_KIND == 0
#define SCALE_NBYTES 1
#elif SCALE_KIND == 1
#define SCALE_NBYTES 4
#else
#define SCALE_NBYTES 2
#endif
#define CHUNK_NBYTES (CODES_NBYTES + 32 * SCALES_PER_ROW * SCALE_NBYTES)
#define THREADS (WARPS * 32)

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
    int token_rows;          // tokens of a job that shared memory has room for: min(8, M)
    int stages, segment_tiles;
    int first_stages;        // of a ring, filled before x is asked for
    int matrix_start, meta_start, nested_start, nested_count, nested_span;  // within a record
    float* parts;            // room for float32 [splits, M, N] where bfloat16 results have splits
    int* arrived;            // for each job and tile, how many of its splits are done; zeros before and after
    int parts_count, interleaved;
    int part_start[4], part_nested[4];  // in 16 rows, in second-level scales
    unsigned short levels[16];  // bfloat16, of each code
    float map[256];          // double quantization's first-level table, times `unscale`
    float unscale;           // what scales are multiplied with, as kernel levels are larger than stored ones
};
