// y = W x^T for few tokens, W in 4 bits in the layout of tiles.py: a stream of weights past tensor cores.
//
// A block takes a range of 32-row tiles, its warps equal shares of their chunks, one after the other. Each warp keeps
// a ring of half chunks in flight by itself, so that nothing but the reduction at the end of a range waits for another
// warp. A byte of NF4's codes becomes two bfloat16 levels by one look-up in a table that stands in shared memory once
// for each lane, int4's by arithmetic; the levels are the A operand of mma.m16n8k16, tokens are B, 8 at a time, and
// scales are applied in float32 to the sums over their columns. Jobs are (expert, up to 8 of its tokens); a plain product
// is the job of one expert.
//
// One function serves all uses in a layer, whose code so stays in the processors' caches.
//
// Macros: those of few_codes.cuh; DIVIDED, whether of some experts only the first hidden units are computed.

// Where a block's share of the units begins. Blocks start in order, each when a processor is done with the kernel before:
// the last ones are behind already, so what remains of the division goes to the first.
__device__ inline int share(int block, int units) {
    int each = quotient(units, gridDim.x);
    return block * each + min(block, units - each * (int)gridDim.x);
}

extern __shared__ __align__(1024) char shared[];

__device__ inline Shared carve(const Args& a) {
    Shared sh;
    char* at = shared;
    sh.lut = at, at += LUT_NBYTES;
    sh.ring = at, at += WARPS * a.slots * SLOT_NBYTES;
    sh.x = at, at += a.token_rows * x_stride(a);
    sh.sums = (float*)at, at += a.sum_rows * SUM_STRIDE * 4;
    sh.bars = (u64*)at, at += WARPS * a.slots * 8;
    int jobs = a.ids == nullptr ? (a.M + TOKENS - 1) / TOKENS : a.M * a.active;
    sh.job_matrix = (const char**)at, at += 8 * jobs;
    sh.map = (float*)at, at += SCALE_KIND == 0 ? 1024 : 0;
    sh.meta = (float2*)at, at += SCALE_KIND == 0 ? a.segment_tiles * 16 : 0;
    sh.nested = (float*)at, at += SCALE_KIND == 0 ? a.segment_tiles * 2 * a.codes.nested_span * 4 : 0;
    sh.pairs = (int*)at, at += 4 * TOKENS * jobs;
    sh.job_count = (int*)at, at += 4 * jobs;
    sh.scratch = (int*)at;
    return sh;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) skinny(const Args a) {
    Shared sh = carve(a);
    // All lanes take the first one's, so that the compiler sees numbers of the warp and keeps them once.
    int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffff, (int)(threadIdx.x / 32), 0);
    char* ring = sh.ring + warp * a.slots * SLOT_NBYTES;
    u64* bars = sh.bars + warp * a.slots;
    if (lane < a.slots) barrier_init(bars + lane, ARRIVALS);
    barriers_ready();
    const char* matrix = matrix_of_lane(a, lane);
    // The router's choice is what the kernel before has just made, or one of the kernels before that.
    bool chosen = a.epilogue != GATE_UP;
    if (!chosen) {
        fill_tables(a.codes, sh, lane, warp);
        wait_for_previous_kernel();
    }
    int units = make_jobs(a, sh, matrix, expert_of_lane(a, lane)) * a.splits * a.tiles;
    int start = share(blockIdx.x, units), stop = share(blockIdx.x + 1, units);
    if (start == stop) return;
    // The little that is needed first goes ahead of the stream, in which it would wait for its turn.
    Segment seg = segment_at(a, sh, start, stop);
    load_nested(a, sh, seg);
    if (!chosen) load_x(a, sh, seg);
    Stream ahead = {start, stop};
    bool more = stream_segment(a, sh, ahead, warp);
    Stream now = ahead;
    bool second = true;
    int filled = 0;
    auto refill = [&](int slot, u32 nothing) {
        copy_half(ring + slot * SLOT_NBYTES + nothing, ahead.from, second, bars + slot, lane);
        second = !second;
        if (!second) return;
        stream_step(ahead);
        if (ahead.q == ahead.q_end) more = stream_segment(a, sh, ahead, warp);
    };
    // Weights never change, so the stream begins before the kernel ahead of this one has ended.
    for (; filled < a.first_slots && more; ++filled) refill(filled, 0);
    if (chosen) {
        fill_tables(a.codes, sh, lane, warp);
        wait_for_previous_kernel();
        load_x(a, sh, seg);
    }

    int slot = 0;
    u32 parity = 0, key = decoding_key(lane);
    float sums[2][4] = {};
    for (int unit = start; unit < stop;) {
        bool other_x = unit == start;
        if (unit > start) {
            int job = seg.job, split = seg.split;
            seg = segment_at(a, sh, unit, stop);
            other_x = seg.job != job || seg.split != split;
            if (other_x) load_x(a, sh, seg);
            load_nested(a, sh, seg);
        }
        const char* row = sh.x + min(lane & 7, seg.tokens - 1) * x_stride(a) + (lane >> 3) * 16;
        wait_for_copies();
        if (other_x) order_x(a, sh, seg);
        __syncthreads();
        if (unit == start)
            for (; filled < a.slots && more; ++filled) refill(filled, 0);
        int first = split_start(a, seg, seg.split);
        if (unit > start) now.unit = unit, now.stop = unit + seg.count, stream_segment(a, sh, now, warp);
        if (now.unit == unit + seg.count)  // else the warp has no part of this segment
            while (now.q < now.q_end) {
                const char* x = row + now.c * 512;
                RowScales scales[2][2];
                Operands operands;
                char* at = ring + slot * SLOT_NBYTES;
                barrier_wait(bars + slot, parity);
                u32 read = load_scales(a, sh, at + HALF_NBYTES, now.tile, first + now.c, scales, lane) ^
                           load_operands(operands, at, x + 256, lane);
                __syncwarp();
                if (more) refill(slot, nothing_of(read, a.M));
                multiply_half<1>(sh, operands, scales, sums, key);
                if (++slot == a.slots) slot = 0, parity ^= 1;
                at = ring + slot * SLOT_NBYTES;
                barrier_wait(bars + slot, parity);
                read = load_operands(operands, at, x, lane);
                __syncwarp();
                if (more) refill(slot, nothing_of(read, a.M));
                multiply_half<0>(sh, operands, scales, sums, key);
                if (++slot == a.slots) slot = 0, parity ^= 1;
                int tile = now.tile;
                stream_step(now);
                if (now.tile != tile || now.q == now.q_end) store_partial(sh, tile + warp, seg.tokens, sums, lane);
            }
        __syncthreads();
        write_outputs(a, sh, seg);
        unit += seg.count;
    }
}
