// Of skinny.cu: what a block does, in what order, and what it needs for it.

// Half a chunk, its scales with the first: 128 columns, so that little of a ring stands empty while it is worked on.
template <int HALF>
__device__ inline void copy_half(char* stage, const char* from, u64* bars, int lane) {
    const int FROM = HALF * HALF_NBYTES, SCALES = HALF ? 0 : CHUNK_NBYTES - CODES_NBYTES;
    u64* bar = bars + HALF;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        barrier_expect(bar, HALF_NBYTES + SCALES);
        copy_bulk(stage + FROM, from + FROM, HALF_NBYTES, bar);
        if (SCALES) copy_bulk(stage + CODES_NBYTES, from + CODES_NBYTES, SCALES, bar);
    }
#else
    for (int i = FROM + lane * 16; i < FROM + HALF_NBYTES; i += 512) copy_16(stage + i, from + i);
    for (int i = CODES_NBYTES + lane * 16; i < CODES_NBYTES + SCALES; i += 512) copy_16(stage + i, from + i);
    barrier_arrive_after_copies(bar);
#endif
}

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
