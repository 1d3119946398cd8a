// Of skinny.cu: sizes, arguments, and copies to shared memory by Hopper's copy engine or, before it, by lanes.

typedef unsigned int u32;
typedef unsigned long long u64;

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
#define EVICT_FIRST 0x12F0000000000000ull  // the policy createpolicy.fractional.L2::evict_first makes: read once

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

__device__ inline u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ inline void barrier_init(u64* bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

__device__ inline void barrier_wait(u64* bar, u32 parity) {
    u32 done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                     : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
    } while (!done);
}

#if __CUDA_ARCH__ >= 900
__device__ inline void copy_bulk(char* to, const char* from, int nbytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(nbytes), "r"(shared_address(bar)), "l"(EVICT_FIRST) : "memory");
}
#else
__device__ inline void copy_16(char* to, const char* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
#endif

// Half a chunk, its scales with the first: 128 columns, so that little of a ring stands empty while it is worked on.
template <int HALF>
__device__ inline void copy_half(char* stage, const char* from, u64* bars, int lane) {
    const int FROM = HALF * HALF_NBYTES, SCALES = HALF ? 0 : CHUNK_NBYTES - CODES_NBYTES;
    u64* bar = bars + HALF;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                     ::"r"(shared_address(bar)), "r"(HALF_NBYTES + SCALES) : "memory");
        copy_bulk(stage + FROM, from + FROM, HALF_NBYTES, bar);
        if (SCALES) copy_bulk(stage + CODES_NBYTES, from + CODES_NBYTES, SCALES, bar);
    }
#else
    for (int i = FROM + lane * 16; i < FROM + HALF_NBYTES; i += 512) copy_16(stage + i, from + i);
    for (int i = CODES_NBYTES + lane * 16; i < CODES_NBYTES + SCALES; i += 512) copy_16(stage + i, from + i);
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
#endif
}

// 4 bytes, without waiting for them; zeros if not `there`.
__device__ inline void copy_word(char* to, const char* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 4 : 0)
                 : "memory");
}

__device__ inline void wait_for_words() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

