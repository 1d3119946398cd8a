// Of skinny.cu: sizes and arguments.

#define TOKENS 8            // of a job
#define SUM_STRIDE 36        // floats from token to token of 32 sums, so that lanes meet in no bank
#define X_PADDING 16         // bytes after a row of x, for the same reason
// What sums become: bfloat16 [M, N], if K is not split; float32 [splits, M, N]; silu(gate) * up as bfloat16 [pairs, F]; float32
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
    int matrix_start;        // within a record
    Codes codes;
    const int* units;        // if DIVIDED: of each pair's hidden units the first that count, whole chunks of down
};
