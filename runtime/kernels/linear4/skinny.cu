// y = W x^T for few tokens, W in 4 bits in the layout of tiles.py: a stream of weights past tensor cores.
//
// A block takes a range of 32-row tiles, its warps equal shares of their chunks, one after the other. Each warp keeps
// a ring of chunks in flight by itself, so that nothing but the reduction at the end of a range waits for another
// warp. A byte of codes becomes two bfloat16 levels by one look-up in a table that stands in shared memory once for
// each lane; the levels are the A operand of mma.m16n8k16, up to 8 tokens are B, and scales are applied in float32 to
// the sums over their columns. Jobs are (expert, up to 8 of its tokens); a plain product is the job of one expert.
//
// One function serves all uses in a layer, whose code so stays in the processors' caches.
//
// Macros: WARPS; SCALE_KIND 0 double quantization, 1 float32, 2 float16; SCALE_COLUMNS of one scale.

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

// ---- Hopper's copy engine, or copies by lanes before it -------------------------------------------------------------

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

// ---- What a block does ----------------------------------------------------------------------------------------------

// The table of levels fills only half of every LUT_STRIDE bytes; the sums that warps leave lie in the other halves.
struct Shared {
    char *lut, *ring, *x;
    float *map, *nested;
    float2* meta;  // for every 16 rows: first block within its second-level block (as an integer), and offset
    u64* bars;
    const char** job_matrix;  // where the matrix of job j's expert begins
    int *pairs, *job_count, *last;  // the pairs of job j begin at pairs[TOKENS * j]
};

// A segment: consecutive tiles of one job and one split of K, which the warps share.
struct Segment {
    int job, split, tile, count;
    int tokens;  // of the job: the rows of x and of sums in shared memory
};

// The job list stands in shared memory; unit u is tile u % tiles of the job-and-split u / tiles.
__device__ inline Segment segment_at(const Args& a, const Shared& sh, int unit, int stop) {
    Segment s;
    int group = unit / a.tiles;
    s.job = group / a.splits;
    s.split = group % a.splits;
    s.tile = unit % a.tiles;
    s.count = min(min(stop - unit, a.tiles - s.tile), a.segment_tiles);
    s.tokens = sh.job_count[s.job];
    return s;
}

__device__ inline int split_start(const Args& a, int split) { return split * a.chunks / a.splits; }

// The chunks of one warp, in the order in which it takes them.
struct Stream {
    int unit, stop;   // where the next segment begins, where the block's range ends
    int q, q_end;     // chunk of the segment
    int c, width;     // chunk of the tile within the split, chunks of the split
    int tile;         // of the segment
    const char* from;
    int skip;         // bytes from the end of a split to its beginning in the next tile
};

__device__ inline bool stream_segment(const Args& a, const Shared& sh, Stream& s, int warp) {
    while (s.unit < s.stop) {
        Segment seg = segment_at(a, sh, s.unit, s.stop);
        s.unit += seg.count;
        int first = split_start(a, seg.split);
        s.width = split_start(a, seg.split + 1) - first;
        int total = seg.count * s.width;
        s.q = warp * total / WARPS;
        s.q_end = (warp + 1) * total / WARPS;
        s.tile = s.q / s.width;
        s.c = s.q % s.width;
        s.skip = (a.chunks - s.width) * CHUNK_NBYTES;
        s.from = sh.job_matrix[seg.job] + ((long long)(seg.tile + s.tile) * a.chunks + first + s.c) * CHUNK_NBYTES;
        if (s.q < s.q_end) return true;
    }
    return false;
}

__device__ inline void stream_step(Stream& s) {
    ++s.q;
    s.from += CHUNK_NBYTES;
    if (++s.c == s.width) {
        s.c = 0;
        ++s.tile;
        s.from += s.skip;
    }
}

// The matrix of the lane's expert, or of the only one: known long before the ids are.
__device__ inline const char* matrix_of_lane(const Args& a, int lane) {
    return a.ids == nullptr ? a.matrix : (const char*)a.table[min(lane, a.experts - 1)] + a.matrix_start;
}

// That of the pair with the lane's number, or one that no pair has.
__device__ inline int expert_of_lane(const Args& a, int lane) {
    return a.ids != nullptr && lane < a.M * a.active ? a.ids[lane] : -1 - lane;
}

// Up to 32 pairs: every warp does the same, one writes. Jobs come in the order of their first pairs.
__device__ int jobs_of_a_warp(const Args& a, Shared& sh, int pairs, const char* matrix, int expert) {
    int lane = threadIdx.x % 32;
    u32 below = (1u << lane) - 1;
    u32 same = __match_any_sync(0xffffffff, expert);
    int rank = __popc(same & below);
    u32 leaders = __ballot_sync(0xffffffff, lane < pairs && rank % TOKENS == 0);
    const char* own = (const char*)__shfl_sync(0xffffffff, (u64)matrix, expert & 31);
    if (a.experts > 32 && lane < pairs) own = (const char*)a.table[expert] + a.matrix_start;
    if (threadIdx.x < pairs) {
        u32 mine = leaders & same;
        for (int i = 0; i < rank / TOKENS; ++i) mine &= mine - 1;
        int job = __popc(leaders & ((1u << (__ffs(mine) - 1)) - 1));
        sh.pairs[job * TOKENS + rank % TOKENS] = lane;
        sh.job_matrix[job] = own;
        if (rank % TOKENS == 0) sh.job_count[job] = min(TOKENS, __popc(same) - rank);
    }
    return __popc(leaders);
}

// Any number of pairs: a thread for each expert, up to one an expert.
__device__ int jobs_of_many(const Args& a, Shared& sh, int pairs) {
    int *ids = sh.last, *counts = sh.last + pairs, e = threadIdx.x;
    for (int p = e; p < pairs; p += THREADS) ids[p] = a.ids[p];
    __syncthreads();
    if (e < a.experts) {
        int count = 0;
        for (int p = 0; p < pairs; ++p) count += ids[p] == e;
        counts[e] = count;
    }
    __syncthreads();
    int job = 0, jobs = 0;
    for (int i = 0; i < a.experts; ++i) {
        if (i == e) job = jobs;
        jobs += (counts[i] + TOKENS - 1) / TOKENS;
    }
    if (e < a.experts && counts[e]) {
        int rank = 0;
        for (int p = 0; p < pairs; ++p)
            if (ids[p] == e) sh.pairs[job * TOKENS + rank++] = p;
        for (int done = 0; done < rank; done += TOKENS, ++job) {
            sh.job_matrix[job] = (const char*)a.table[e] + a.matrix_start;
            sh.job_count[job] = min(TOKENS, rank - done);
        }
    }
    return jobs;
}

// Groups the pairs by expert and cuts each expert's into jobs of at most 8; returns the number of jobs.
__device__ int make_jobs(const Args& a, Shared& sh, const char* matrix, int expert) {
    int pairs = a.M * a.active, tid = threadIdx.x, jobs = 0;
    if (a.ids == nullptr) {
        jobs = (a.M + TOKENS - 1) / TOKENS;
        for (int p = tid; p < pairs; p += THREADS) {
            sh.pairs[p] = p;
            sh.job_matrix[p / TOKENS] = matrix;
            sh.job_count[p / TOKENS] = min(TOKENS, a.M - p / TOKENS * TOKENS);
        }
    } else if (pairs <= 32) {
        jobs = jobs_of_a_warp(a, sh, pairs, matrix, expert);
    } else {
        jobs = jobs_of_many(a, sh, pairs);
    }
    __syncthreads();
    return jobs;
}

// Of a pair of token and choice; without experts a pair is a token.
__device__ inline int token_of(const Args& a, int pair) {
    return a.active == 1 ? pair : a.active == 2 ? pair >> 1 : pair / a.active;
}

// The rows of x that a job reads, in the order of B's registers: [64 columns][half][row][4 threads][4 words].
__device__ void load_x(const Args& a, const Shared& sh, const Segment& seg) {
    int first = split_start(a, seg.split) * 256, columns = split_start(a, seg.split + 1) * 256 - first;
    const int* pairs = sh.pairs + seg.job * TOKENS;
    int t = threadIdx.x & 3, place = threadIdx.x >> 2, r = place % seg.tokens, k = first + place / seg.tokens * 32 + t * 2;
    int r_step = THREADS / 4 % seg.tokens, k_step = THREADS / 4 / seg.tokens * 32;
    for (char* to = sh.x + threadIdx.x * 16; k < first + columns; to += THREADS * 16) {
        int row = a.epilogue == GATE_UP ? token_of(a, pairs[r]) : pairs[r];
        const char* from = a.x + ((long long)row * a.K + k) * 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) copy_word(to + i * 4, from + i * 16, k < a.K);
        r += r_step, k += k_step;
        if (r >= seg.tokens) r -= seg.tokens, k += 32;
    }
}

// Second-level scales of the segment's rows, for every 16 of them those that their blocks may need.
__device__ void load_nested(const Args& a, const Shared& sh, const Segment& seg) {
#if SCALE_KIND == 0
    const char* record = sh.job_matrix[seg.job];
    const char* meta = record + a.meta_start + 16 * seg.tile;
    int rows16 = 16 * (a.K / 64);
    for (int i = threadIdx.x; i < 2 * seg.count * a.nested_span; i += THREADS) {
        int m = i / a.nested_span, j = i % a.nested_span;
        // The record holds the first block too, but to wait for it before asking for the scales costs a microsecond.
        int m16 = 2 * seg.tile + m, part = 0;
        while (part + 1 < a.parts_count && m16 >= a.part_start[part + 1]) ++part;
        int block = a.interleaved ? (m16 & 1) * a.part_nested[1] * 256 + (m16 >> 1) * rows16
                                  : a.part_nested[part] * 256 + (m16 - a.part_start[part]) * rows16;
        int at = min((block >> 8) + j, a.nested_count - 1);
        copy_word((char*)(sh.nested + i), record + a.nested_start + 4 * at, true);
        if (j == 0) {
            *(int*)(sh.meta + m) = block & 255;
            copy_word((char*)(sh.meta + m) + 4, meta + m * 8 + 4, true);
        }
    }
#endif
}

// ---- A chunk --------------------------------------------------------------------------------------------------------

__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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
        u32 biased = (codes & 0x000f000f) | 0x43004300, y;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(biased), "r"(0x3f803f80), "r"(0xc308c308));  // - 136
        return y;
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

__device__ inline float half_to_float(u32 bits) {
    float f;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "r"(bits));
    return f;
}

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

// ---- From sums to outputs -------------------------------------------------------------------------------------------

__device__ inline float& left(const Shared& sh, int i) { return *(float*)(sh.lut + i / 32 * LUT_STRIDE + 128 + i % 32 * 4); }

// A warp's sums over its part of a tile, [32 rows][tokens]; the parts of a warp and a tile are unique by their sum.
__device__ inline void store_partial(const Shared& sh, int slot, int tokens, float (&sums)[2][4], int lane) {
    int to = slot * 32 * tokens;
    int g = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
    for (int rt = 0; rt < 2; ++rt)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int col = column + (i & 1);
            if (col < tokens) left(sh, to + (16 * rt + g + 8 * (i >> 1)) * tokens + col) = sums[rt][i];
            sums[rt][i] = 0;
        }
}

__device__ inline float reduced(const Shared& sh, int width, int total, int tokens, int tile, int row, int token) {
    float sum = 0;
    int begin = tile * width, end = begin + width;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        int from = max(w * total / WARPS, begin), to = min((w + 1) * total / WARPS, end);
        if (from < to) sum += left(sh, ((tile + w) * 32 + row) * tokens + token);
    }
    return sum;
}

__device__ inline unsigned short to_bfloat16(float f) {
    unsigned short h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ void write_outputs(const Args& a, const Shared& sh, const Segment& seg) {
    int width = split_start(a, seg.split + 1) - split_start(a, seg.split), total = seg.count * width;
    int rows = a.epilogue == GATE_UP ? 16 : 32, shift = a.epilogue == GATE_UP ? 4 : 5;
    for (int token = 0; token < seg.tokens; ++token) {
        int pair = sh.pairs[seg.job * TOKENS + token];
        for (int i = threadIdx.x; i < seg.count << shift; i += THREADS) {
            int row = i & (rows - 1), tile = i >> shift, n = (seg.tile + tile) * rows + row;
            if (n >= a.N) continue;
            float y = reduced(sh, width, total, seg.tokens, tile, row, token);
            if (a.epilogue == GATE_UP) {
                float up = reduced(sh, width, total, seg.tokens, tile, row + 16, token);
                y = __fdividef(y, 1.0f + __expf(-y)) * up;
            }
            if (a.epilogue == GATE_UP || (a.epilogue == TO_BFLOAT16 && a.splits == 1)) {
                ((unsigned short*)a.out)[(long long)pair * a.N + n] = to_bfloat16(y);
            } else if (a.epilogue == DOWN) {
                int choice = (pair - token_of(a, pair) * a.active) * a.splits + seg.split;
                ((float*)a.out)[((long long)choice * a.M + token_of(a, pair)) * a.N + n] = y * a.weights[pair];
            } else {
                float* to = a.epilogue == TO_PARTS ? (float*)a.out : a.parts;
                to[((long long)seg.split * a.M + pair) * a.N + n] = y;
            }
        }
    }
}

// Of a tile whose K is split among blocks, the block that ends last adds the parts, always in the same order.
__device__ void add_parts(const Args& a, const Shared& sh, const Segment& seg) {
    __threadfence();
    __syncthreads();
    for (int i = threadIdx.x; i < seg.count; i += THREADS) {
        int* arrived = a.arrived + seg.job * a.tiles + seg.tile + i;
        sh.last[i] = atomicAdd(arrived, 1) == a.splits - 1;
        if (sh.last[i]) *arrived = 0;
    }
    __syncthreads();
    __threadfence();
    int tokens = seg.tokens;
    for (int i = threadIdx.x; i < seg.count * 32 * tokens; i += THREADS) {
        int row = i % 32, tile = i / 32 % seg.count, token = i / (32 * seg.count);
        int pair = sh.pairs[seg.job * TOKENS + token], n = (seg.tile + tile) * 32 + row;
        if (n >= a.N || !sh.last[tile]) continue;
        float sum = 0;
        for (int s = 0; s < a.splits; ++s) sum += __ldcg(a.parts + ((long long)s * a.M + pair) * a.N + n);
        ((unsigned short*)a.out)[(long long)pair * a.N + n] = to_bfloat16(sum);
    }
}

// The tables come with the launch: nothing is read from memory before the ids are.
__device__ void fill_tables(const Args& a, const Shared& sh, int lane, int warp) {
#if SCALE_KIND != 2
    for (int first = warp * 32; first < 256; first += THREADS) {
        int byte = first + lane;
        u32 mine = a.levels[byte >> 4] | a.levels[byte & 15] << 16;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            *(u32*)(sh.lut + (first + i) * LUT_STRIDE + lane * 4) = __shfl_sync(0xffffffff, mine, i);
    }
#endif
#if SCALE_KIND == 0
    for (int i = threadIdx.x; i < 256; i += THREADS) sh.map[i] = a.map[i];
#endif
}

// Where a block's share of the units begins. Blocks start in order, each when a processor is done with the kernel before:
// the last ones are behind already, so what remains of the division goes to the first.
__device__ inline int share(int block, int units) {
    return block * (units / gridDim.x) + min(block, units % gridDim.x);
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) char shared_memory[];

__device__ inline Shared carve(const Args& a) {
    Shared sh;
    char* at = shared_memory;
    sh.lut = at, at += LUT_NBYTES;
    sh.ring = at, at += WARPS * a.stages * CHUNK_NBYTES;
    sh.x = at, at += ((a.chunks + a.splits - 1) / a.splits) * 512 * a.token_rows;
    sh.bars = (u64*)at, at += WARPS * a.stages * 16;
    int jobs = a.ids == nullptr ? (a.M + TOKENS - 1) / TOKENS : a.M * a.active;
    sh.job_matrix = (const char**)at, at += 8 * jobs;
    sh.map = (float*)at, at += SCALE_KIND == 0 ? 1024 : 0;
    sh.meta = (float2*)at, at += SCALE_KIND == 0 ? a.segment_tiles * 16 : 0;
    sh.nested = (float*)at, at += SCALE_KIND == 0 ? a.segment_tiles * 2 * a.nested_span * 4 : 0;
    sh.pairs = (int*)at, at += 4 * TOKENS * jobs;
    sh.job_count = (int*)at, at += 4 * jobs;
    sh.last = (int*)at;
    return sh;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) skinny(const Args a) {
    Shared sh = carve(a);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    char* ring = sh.ring + warp * a.stages * CHUNK_NBYTES;
    u64* bars = sh.bars + warp * 2 * a.stages;  // two halves of each stage
    if (lane < 2 * a.stages) barrier_init(bars + lane, __CUDA_ARCH__ >= 900 ? 1 : 32);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    const char* matrix = matrix_of_lane(a, lane);
    // The router's choice is what the kernel before has just made, or one of the kernels before that.
    bool chosen = a.epilogue != GATE_UP;
    int expert = chosen ? expert_of_lane(a, lane) : 0;
    fill_tables(a, sh, lane, warp);
    if (!chosen) {
        wait_for_previous_kernel();
        expert = expert_of_lane(a, lane);
    }
    int units = make_jobs(a, sh, matrix, expert) * a.splits * a.tiles;
    int start = share(blockIdx.x, units), stop = share(blockIdx.x + 1, units);
    if (start == stop) return;
    // The little that is needed first goes ahead of the stream, in which it would wait for its turn.
    Segment seg = segment_at(a, sh, start, stop);
    load_nested(a, sh, seg);
    if (!chosen) load_x(a, sh, seg);
    Stream ahead = {start, stop}, now = {start, stop};
    bool more = stream_segment(a, sh, ahead, warp);
    // Weights never change, so the stream begins before the kernel ahead of this one has ended; but only with what
    // memory delivers in the meantime: x would wait behind the rest.
    int filled = 0;
    auto fill = [&](int upto) {
        for (; filled < upto && more; ++filled) {
            copy_half<0>(ring + filled * CHUNK_NBYTES, ahead.from, bars + 2 * filled, lane);
            copy_half<1>(ring + filled * CHUNK_NBYTES, ahead.from, bars + 2 * filled, lane);
            stream_step(ahead);
            if (ahead.q == ahead.q_end) more = stream_segment(a, sh, ahead, warp);
        }
    };
    fill(a.first_stages);
    if (chosen) {
        wait_for_previous_kernel();
        load_x(a, sh, seg);
    }

    u32 lane4 = lane * 4;
    int stage = 0;
    u32 parity = 0;
    float sums[2][4] = {};
    for (int unit = start; unit < stop;) {
        if (unit > start) {
            seg = segment_at(a, sh, unit, stop);
            load_x(a, sh, seg);
            load_nested(a, sh, seg);
        }
        int x_lane = min(lane >> 2, seg.tokens - 1) * 64 + (lane & 3) * 16;
        wait_for_words();
        __syncthreads();
        if (unit == start) fill(a.stages);
        int first = split_start(a, seg.split);
        now.unit = unit;
        now.stop = unit + seg.count;
        if (stream_segment(a, sh, now, warp))
            while (now.q < now.q_end) {
                char* at = ring + stage * CHUNK_NBYTES;
                u64* full = bars + 2 * stage;
                RowScales scales[2][2];
                barrier_wait(full, parity);
                load_scales(a, sh, at, now.tile, first + now.c, scales, lane);
                multiply_half<0>(sh, at, now.c, scales, sums, lane, lane4, x_lane, seg.tokens);
                __syncwarp();
                if (more) copy_half<0>(at, ahead.from, full, lane);
                barrier_wait(full + 1, parity);
                multiply_half<1>(sh, at, now.c, scales, sums, lane, lane4, x_lane, seg.tokens);
                __syncwarp();
                if (more) {
                    copy_half<1>(at, ahead.from, full, lane);
                    stream_step(ahead);
                    if (ahead.q == ahead.q_end) more = stream_segment(a, sh, ahead, warp);
                }
                if (++stage == a.stages) stage = 0, parity ^= 1;
                int tile = now.tile;
                stream_step(now);
                if (now.tile != tile || now.q == now.q_end) store_partial(sh, tile + warp, seg.tokens, sums, lane);
            }
        __syncthreads();
        write_outputs(a, sh, seg);
        if (a.epilogue == TO_BFLOAT16 && a.splits > 1) add_parts(a, sh, seg);
        unit += seg.count;
    }
}
