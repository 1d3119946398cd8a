// y = W x^T for few tokens, W in 4 bits in the layout of tiles.py: a stream of weights past tensor cores.
//
// A block takes a range of 32-row tiles, its warps equal shares of their chunks, one after the other. Each warp keeps
// a ring of chunks in flight by itself, so that nothing but the reduction at the end of a range waits for another
// warp. A byte of NF4's codes becomes two bfloat16 levels by one look-up in a table that stands in shared memory once
// for each lane, int4's by arithmetic; the levels are the A operand of mma.m16n8k16, up to 8 tokens are B, and scales
// are applied in float32 to the sums over their columns. Jobs are (expert, up to 8 of its tokens); a plain product is
// the job of one expert.
//
// One function serves all uses in a layer, whose code so stays in the processors' caches.
//
// Macros: WARPS; SCALE_KIND 0 double quantization, 1 float32, 2 float16; SCALE_COLUMNS of one scale.

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

extern __shared__ __align__(1024) char shared[];

__device__ inline Shared carve(const Args& a) {
    Shared sh;
    char* at = shared;
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
    if (lane < 2 * a.stages) barrier_init(bars + lane, ARRIVALS);
    barriers_ready();
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
