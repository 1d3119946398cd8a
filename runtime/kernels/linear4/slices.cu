// y = W x^T for few tokens and one matrix, W in 4 bits in the layout of tiles.py: activations stand, weights pass.
//
// K is cut into splits, a split into slices of 128 columns, one for each warp of a block. A warp keeps its slice of x in
// registers, as tensor cores take it, and goes down the block's tiles of 32 rows with a ring of half chunks in flight. The
// sums that the warps have of a tile meet in one of two buffers, where some warps in turn add them while all go on; so of
// all that has to be added there is but one tile at the end. What the last split's blocks add from other blocks comes
// likewise tile by tile.
//
// Macros: WARPS; TOKENS, 8 or 16; SLOTS of a warp's ring; those of few_codes.cuh.

extern __shared__ __align__(1024) char shared[];

__device__ inline Shared carve(const Args& a) {
    Shared sh;
    char* at = shared;
    sh.lut = at, at += LUT_NBYTES;
    sh.sums = at, at += BUFFERS * WARPS * SUMS_NBYTES;
    sh.ring = at, at += WARPS * SLOTS * SLOT_STRIDE;
    sh.bars = (u64*)at, at += 2 * BUFFERS * 8;
    sh.map = (float*)at, at += SCALE_KIND == 0 ? 1024 : 0;
    sh.meta = (float2*)at, at += SCALE_KIND == 0 ? a.block_tiles * 16 : 0;
    sh.nested = (float*)at;
    return sh;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) slices(const Args a) {
    Shared sh = carve(a);
    // All lanes take the first one's, so that the compiler sees numbers of the warp and keeps them once.
    int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffff, (int)(threadIdx.x / 32), 0);
    char *ring = sh.ring + warp * SLOTS * SLOT_STRIDE, *ring_end = ring + SLOTS * SLOT_STRIDE, *next = ring;
    if (lane < SLOTS) barrier_init(barrier_of(ring + lane * SLOT_STRIDE), ARRIVALS);
    if (threadIdx.x < 2 * BUFFERS) barrier_init(sh.bars + threadIdx.x, threadIdx.x & 1 ? TEAM : WARPS);
    barriers_ready();
    __syncwarp();
    Share share(a, blockIdx.x);
    int slice = share.split * WARPS + warp, left = share.count, wrap = share.begin;
    bool second = slice & 1;
    const char* from = a.matrix + second * HALF_NBYTES +
                       ((long long)(share.tile + share.begin) * a.chunks + (slice >> 1)) * CHUNK_NBYTES;
    auto ask = [&](char* slot) {
        copy_slice(slot, from, second, lane);
        from += a.chunks * CHUNK_NBYTES;
        if (--left == wrap) from -= share.count * (a.chunks * CHUNK_NBYTES);
    };
    auto ask_ahead = [&](int slots) {
#pragma unroll 1
        for (char* end = ring + slots * SLOT_STRIDE; next < end && left; next += SLOT_STRIDE) ask(next);
    };
    // The little that is needed first goes ahead of the stream, in which it would wait for its turn.
    load_nested(a.codes, sh, a.matrix, a.K, share.tile, share.count);
    // Weights never change, so the stream begins before the kernel ahead of this one has ended.
    ask_ahead(min(SLOTS, (a.first_slots + WARPS - 1 - warp) / WARPS));
    fill_tables(a.codes, sh, lane, warp);
    wait_for_previous_kernel();
    Slice x;
    x.ask(a, sh, slice, warp, lane);
    ask_ahead(SLOTS);
    wait_for_copies();
    __syncthreads();
    x.take(sh, warp, lane);
    Bias bias(x);

    int team = warp / TEAM, item = (warp - team * TEAM) * 32 + lane, turn = 0;
    bool adds = item < items(a);
    Open open = {-1};
    char* to = buffer_of(sh, 0, warp) + (lane & 3) * 2 * SUM_NBYTES + (lane >> 2) * 4;
    const char* added_from = buffer_of(sh, 0, 0) + (item >> 3) * SUM_NBYTES + (item & 7) * 16;
    auto add = [&](int i) {
        int b = i % BUFFERS;
        barrier_wait(sh.bars + 2 * b, i / BUFFERS & 1);
        float4 y = {};
        if (adds) y = added(added_from + b * (WARPS * SUMS_NBYTES));
        __syncwarp();
        if (lane == 0) barrier_arrive(sh.bars + 2 * b + 1);
        if (adds) put(a, share.split, share.tile + share.local(i), item, y, open);
    };
    char* slot = ring;
    u32 parity = 0, key = decoding_key(lane);
#pragma unroll 1
    for (int i = 0; i < share.count; ++i) {
        barrier_wait(barrier_of(slot), parity);
        Scales scales(a, sh, slot + HALF_NBYTES, share.local(i), slice, lane);
        uint4 words[2][2];
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int rt = 0; rt < 2; ++rt) words[kb][rt] = *(const uint4*)(slot + kb * 1024 + rt * 512 + lane * 16);
        u32 read = scales.read ^ words[0][0].x ^ words[0][1].x ^ words[1][0].x ^ words[1][1].x;
        __syncwarp();
        if (left) ask(slot + nothing_of(read, a.M));
        slot += SLOT_STRIDE;
        if (slot == ring_end) slot = ring, parity ^= 1;
        int b = i % BUFFERS;
#pragma unroll
        for (int rt = 0; rt < 2; rt += ROWS16) {
            float sums[ROWS16][4 * FRAGMENTS];
            multiply(sh, words, rt, x, bias, scales, sums, key);
            if (rt == 0 && i >= BUFFERS) barrier_wait(sh.bars + 2 * b + 1, (i / BUFFERS - 1) & 1);
            store_sums(to + b * (WARPS * SUMS_NBYTES), rt, sums);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(sh.bars + 2 * b);
        if (i > 0) {
            if (turn == team) add(i - 1);
            if (++turn == TEAMS) turn = 0;
        }
    }
    if (share.count > 0 && turn == team) add(share.count - 1);
    finish(a, open, item);
}
