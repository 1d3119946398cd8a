// Of skinny.cu: what a block does, in what order, and what it needs for it.

// Half a chunk, 128 columns, so that little of a ring stands empty while it is worked on. The second half comes first,
// as the scales of both follow it.
__device__ inline void copy_half(char* slot, const char* chunk, bool second, u64* bar, int lane) {
    const char* from = second ? chunk + HALF_NBYTES : chunk;
    int nbytes = second ? SLOT_NBYTES : HALF_NBYTES;
#if __CUDA_ARCH__ >= 900
    if (elected()) {
        barrier_expect(bar, nbytes);
        copy_bulk(slot, from, nbytes, bar);
    }
#else
    for (int i = lane * 16; i < nbytes; i += 512) copy_16(slot + i, from + i, true);
    barrier_arrive_after_copies(bar);
#endif
}

struct Shared : Tables {
    char *ring, *x;
    float* sums;
    u64* bars;
    const char** job_matrix;  // where the matrix of job j's expert begins
    int *pairs, *job_count, *scratch;  // the pairs of job j begin at pairs[TOKENS * j]
};

// If DIVIDED a job's hidden units stand beside its count. One of several pairs has all of them.
#define COUNT_BITS 8

// A segment: consecutive tiles of one job and one split of K, which the warps share.
struct Segment {
    int job, split, tile, count;
    int tokens;  // of the job: the rows of x and of sums in shared memory
#if DIVIDED
    int units;  // of hidden ones
    // Tiles that are read at all: gate and up of 16 units each.
    __device__ inline int used(const Args& a) const {
        return a.epilogue == GATE_UP ? max(0, min(count, units / 16 - tile)) : count;
    }
    __device__ inline int chunks(const Args& a) const { return a.epilogue == DOWN ? units / 256 : a.chunks; }
#else
    __device__ inline int used(const Args& a) const { return count; }
    __device__ inline int chunks(const Args& a) const { return a.chunks; }
#endif
};

// The job list stands in shared memory; unit u is tile u % tiles of the job-and-split u / tiles.
__device__ inline Segment segment_at(const Args& a, const Shared& sh, int unit, int stop) {
    Segment s;
    int group = quotient(unit, a.tiles);
    s.job = quotient(group, a.splits);
    s.split = group - s.job * a.splits;
    s.tile = unit - group * a.tiles;
    s.tokens = sh.job_count[s.job];
#if DIVIDED
    s.units = s.tokens >> COUNT_BITS;
    s.tokens &= (1 << COUNT_BITS) - 1;
#endif
    s.count = min(min(stop - unit, a.tiles - s.tile), min(a.segment_tiles, quotient(a.sum_rows, s.tokens) - WARPS));
    return s;
}

// The chunk of the segment's tiles with which a split begins.
__device__ inline int split_start(const Args& a, const Segment& seg, int split) {
    return quotient(split * seg.chunks(a), a.splits);
}

// Bytes from row to row of x in shared memory.
__device__ inline int x_stride(const Args& a) { return quotient(a.chunks + a.splits - 1, a.splits) * 512 + X_PADDING; }

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
        int first = split_start(a, seg, seg.split);
        s.width = split_start(a, seg, seg.split + 1) - first;
        int total = seg.used(a) * s.width;
        s.q = warp * total / WARPS;
        s.q_end = (warp + 1) * total / WARPS;
        s.tile = quotient(s.q, s.width);
        s.c = s.q - s.tile * s.width;
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

// How many tokens a job has, and what of their expert's hidden units counts.
__device__ inline int job_entry(const Args& a, int pair, int tokens) {
    return DIVIDED ? tokens | a.units[pair] << COUNT_BITS : tokens;
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
        if (rank % TOKENS == 0) sh.job_count[job] = job_entry(a, lane, min(TOKENS, __popc(same) - rank));
    }
    return __popc(leaders);
}

// Any number of pairs: a thread for each expert, up to one an expert.
__device__ int jobs_of_many(const Args& a, Shared& sh, int pairs) {
    int *ids = sh.scratch, *counts = sh.scratch + pairs, e = threadIdx.x;
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
            sh.job_count[job] = job_entry(a, sh.pairs[job * TOKENS], min(TOKENS, rank - done));
        }
    }
    return jobs;
}

// Groups the pairs by expert and cuts each expert's into jobs of at most TOKENS; returns the number of jobs.
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

// Calls `f` with each row of x in shared memory and each 16 columns of it that are this thread's.
template <typename F>
__device__ inline void for_own_columns(const Args& a, const Segment& seg, F f) {
    int of_row = (split_start(a, seg, seg.split + 1) - split_start(a, seg, seg.split)) * 16;
    if (DIVIDED && !of_row) return;
    for (int i = threadIdx.x, r = 0;; i += THREADS) {
        while (i >= of_row) i -= of_row, ++r;
        if (r >= seg.tokens) break;
        f(r, i * 16);
    }
}

// The rows of x that a job reads, zeros where the last chunk is wider than the matrix.
__device__ void load_x(const Args& a, const Shared& sh, const Segment& seg) {
    int first = split_start(a, seg, seg.split) * 256;
    const int* pairs = sh.pairs + seg.job * TOKENS;
    for_own_columns(a, seg, [&](int r, int column) {
        int row = a.epilogue == GATE_UP ? token_of(a, pairs[r]) : pairs[r], k = first + column;
        const char* from = a.x + ((long long)row * a.K + min(k, a.K - 16)) * 2;
        char* to = sh.x + r * x_stride(a) + column * 2;
        copy_16(to, from, k < a.K);
        copy_16(to + 16, from + 16, k < a.K);
    });
}

// Int4's levels come as pairs of even columns and of odd ones, 8 columns apart, and so must x. A thread needs only what
// it has copied itself.
__device__ void order_x(const Args& a, const Shared& sh, const Segment& seg) {
#if SCALE_KIND == 2
    for_own_columns(a, seg, [&](int r, int column) {
        uint4* at = (uint4*)(sh.x + r * x_stride(a) + column * 2);
        uint4 low = at[0], high = at[1];
        at[0] = {__byte_perm(low.x, high.x, 0x5410), __byte_perm(low.y, high.y, 0x5410),
                 __byte_perm(low.z, high.z, 0x5410), __byte_perm(low.w, high.w, 0x5410)};
        at[1] = {__byte_perm(low.x, high.x, 0x7632), __byte_perm(low.y, high.y, 0x7632),
                 __byte_perm(low.z, high.z, 0x7632), __byte_perm(low.w, high.w, 0x7632)};
    });
#endif
}

// Second-level scales of the segment's rows.
__device__ inline void load_nested(const Args& a, const Shared& sh, const Segment& seg) {
    load_nested(a.codes, sh, sh.job_matrix[seg.job], a.K, seg.tile, seg.used(a));
}
