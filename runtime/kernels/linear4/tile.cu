// y = x W^T for many tokens, from the 4-bit layout of tiles.py, on Hopper.
//
// A block makes tiles of some rows of W by TOKENS tokens. One warp copies: 64 columns of x (the copy engine, swizzled) and
// of codes make a stage. Three warps decode scales, a chunk of 256 columns each in turn. Two to four warpgroups multiply:
// a warp decodes the codes of its 16 rows of W into registers, in the order of wgmma's A operand, for the tensor cores to
// multiply with the tokens in shared memory, while those before them are multiplied. Decoding competes with the tensor
// cores for registers' ports, so the more tokens share it the better. With 256 of them two blocks make a cluster, 128 rows
// each, and each copies half of the tokens to both.
//
// Work that does not make whole waves of tiles is cut by columns into equal ranges, one for each block (stream-K: Osama
// et al., 2023); the block with a tile's last columns adds the sums of the others, in fixed order. It waits only for
// blocks before it, which do that part first, so nothing depends on all blocks running at once.
//
// Blocks may start while the kernel ahead still runs. Before it has ended they read weights only, or, if GROUPED, nothing;
// all else follows from copies that wait for it.
//
// Macros: NF4 (else int4), NESTED (double quantization), SCALE_COLUMNS (columns that share a scale), TOKENS, GROUPED
// (experts; rows of x sorted by expert; x is float16, and weights are multiplied as such; else all is bfloat16), SILU
// (rows of W alternate by 16 between gate and up; the output is silu(gate) * up), SCATTERED (row i of x makes row
// rows[i] of the output), SCALED (what row i of x makes is multiplied by factors[i], before SILU), OUT_FLOAT (float32
// output, else bfloat16).

// What one warp copies of a part of a tile.
struct Copies {
    const TensorMap* x_map;
    u32 base, nbytes;
    int lane, rank, boxes, chunk_nbytes;
    Place place;
    const u8* codes;  // of the lane's 32 rows

    __device__ Copies(const Problem& p, const TensorMap* x_map, u32 base)
        : x_map(x_map), base(base), lane(threadIdx.x & 31), rank(blockIdx.x % CLUSTER), chunk_nbytes(p.chunk_nbytes) {}

    __device__ __forceinline__ void begin(const Problem& p, const int* starts, int tile) {
        place = place_of(p, starts, tile);
        codes = place.matrix + (place.first_tile + (lane & 7)) * ((u64)p.chunks * chunk_nbytes);
        boxes = place.narrow() ? 1 : TOKENS / BOX_TOKENS / CLUSTER;  // that this block copies
        nbytes = boxes * CLUSTER * BOX_TOKENS * 128 + place.tiles * 1024;
    }

    // Of the columns 64 * kb, to a stage that is free.
    __device__ __forceinline__ void weights(u32 index, int kb) const {
        u32 to = base + STAGES_AT + index * STAGE_NBYTES + X_NBYTES, full = full_at(base, index);
        if (lane == 0) barrier_expect(full, nbytes);
        __syncwarp();
        const u8* from = codes + (u64)(kb >> 2) * chunk_nbytes + (kb & 3) * 1024;
        if (lane < place.tiles) copy_bytes(to + lane * 1024, from, 1024, full);
    }

    __device__ __forceinline__ void tokens(u32 index, int kb) const {
        if (lane < 8 || lane >= 8 + boxes) return;
        int box = rank * boxes + lane - 8, token = place.token + box * BOX_TOKENS;
        u32 to = base + STAGES_AT + index * STAGE_NBYTES + box * BOX_TOKENS * 128, full = full_at(base, index);
        if (WIDE) copy_box_to(to, x_map, kb * 64, token, full, 3);
        else copy_box(to, x_map, kb * 64, token, full);
    }

    // The sums that blocks have handed over, the last one's first, to the next stages. They end at about the same time,
    // so all are waited for at once.
    __device__ __forceinline__ void sums(const Problem& p, int first, int last, Ring& ring) const {
        constexpr int GROUPS = CONSUMERS / 4;
        if (lane < 32 / GROUPS * GROUPS)
            for (int member = last - lane / GROUPS; member >= first; member -= 32 / GROUPS)
                await(p.flags + 4 * (member * CLUSTER + rank) + lane % GROUPS);
        __syncwarp();
        if (lane == 0) copies_see_stores();
        for (int member = last; member >= first; member--) {
            const u8* from = (const u8*)partial_of(p, member * CLUSTER + rank, 0);
            for (int i = 0; i < TOKENS / 8 / SUM_ROWS; i++) {
                u32 full = full_at(base, ring.index), to = base + STAGES_AT + ring.index * STAGE_NBYTES;
                barrier_wait(empty_at(base, ring.index), ring.phase ^ 1);
                if (lane == 0) {
                    barrier_expect(full, SUM_STAGE_NBYTES);
                    copy_bytes(to, from + i * SUM_STAGE_NBYTES, SUM_STAGE_NBYTES, full);
                }
                __syncwarp();
                ring.step<STAGES>();
            }
        }
    }
};

__device__ __forceinline__ void copy_stages(const Problem& p, const TensorMap* x_map, u32 base, const int* starts,
                                            int tiles) {
    Copies copies(p, x_map, base);
    if (copies.lane == 0) expect_boxes(x_map);
    int early = 0;
    if (!GROUPED) {  // weights never change: the first ones come before the kernel ahead has ended, which may make x
        for (Walk walk(tiles, 4 * p.chunks); early < STAGES && walk.next();) {
            Others others(walk);
            if (others.early >= 0) break;
            copies.begin(p, starts, walk.now);
            for (int kb = walk.begin; kb < walk.end && early < STAGES; kb++) copies.weights(early++, kb);
            if (STAGED_SUMS && others.last >= others.first) break;
        }
        wait_for_previous_kernel();
    }
    Ring ring;
    for (Walk walk(tiles, 4 * p.chunks); walk.next();) {
        copies.begin(p, starts, walk.now);
        Others others(walk);
        if (others.early >= 0) copies.sums(p, others.early, others.early, ring);
        for (int kb = walk.begin; kb < walk.end; kb++) {
            if (--early < 0) {
                barrier_wait(empty_at(base, ring.index), ring.phase ^ 1);
                copies.weights(ring.index, kb);
            }
            copies.tokens(ring.index, kb);
            ring.step<STAGES>();
        }
        if (STAGED_SUMS && others.last >= others.first) copies.sums(p, others.first, others.last, ring);
    }
}

#if GROUPED
// A scale, for a pair of weights.
struct Scale {
    u32 twice;
    __device__ __forceinline__ void set(u32 word) { twice = word; }
    __device__ __forceinline__ u32 times(u32 levels) const { return multiply_halves(levels, twice); }
};
#else
// Both parts of a scale, each for a pair of weights.
struct Scale {
    u32 main, rest;
    __device__ __forceinline__ void set(u32 both) {
        main = __byte_perm(both, both, 0x1010);
        rest = __byte_perm(both, both, 0x3232);
    }
    // level * scale, rounded once: the rest's share is far below the last place.
    __device__ __forceinline__ u32 times(u32 levels) const {
        return fma_pairs(levels, main, multiply_pairs(levels, rest));
    }
};
#endif

// The four A registers of a lane from four bytes of codes; `table` is the lane's place in every entry of the table.
__device__ __forceinline__ void decode(u32 (&a)[4], u32 word, u32 table, const Scale& upper, const Scale& lower) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 levels = load_table(entry_of(word, i, table) + SHARED_START + TABLE_AT);
        a[i] = (i % 2 ? lower : upper).times(levels);
    }
}

// Rows of tokens from address >> 4, 8 rows of 128 bytes 1024 bytes apart, swizzled by 128 bytes.
__device__ __forceinline__ u64 token_descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}


// Codes and scales of a lane for 64 columns of its rows g and g + 8.
struct Operands {
    u32 words[4], scales[SCALES][2];

    __device__ __forceinline__ void load(u32 codes_at, u32 scales_at) {
        uint4 v = load_shared4(codes_at);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
#pragma unroll
        for (int i = 0; i < SCALES; i++)
            for (int r = 0; r < 2; r++) scales[i][r] = load_shared(scales_at + (8 * r * SCALE_BLOCKS + i) * 4);
    }
};

typedef u32 Registers[4][4];  // A operands of 64 columns

__device__ __forceinline__ void decode_all(Registers& a, const Operands& in, u32 table) {
    Scale upper, lower;
#pragma unroll
    for (int s = 0; s < 4; s++) {
        if (s * SCALES % 4 == 0) upper.set(in.scales[s * SCALES / 4][0]), lower.set(in.scales[s * SCALES / 4][1]);
        decode(a[s], in.words[s], table, upper, lower);
    }
}

// Start the products of 64 columns with the first N tokens; `add`: to the sums so far.
template <int N>
__device__ __forceinline__ void start(Sums& sums, const Registers& a, u64 tokens, bool add) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) Wgmma<N>::multiply(sums.of, a[s], tokens + 2 * s, add || s);
    wgmma_commit();
}

// Wait for all but the last PENDING of what was started; `a`, which is read until then, is free from here on.
template <int PENDING>
__device__ __forceinline__ void finish(Registers& a) {
    wgmma_wait<PENDING>();
#pragma unroll
    for (int i = 0; i < 16; i++) keep(a[i / 4][i % 4]);
}

// One warp's way through the stages of a part of a tile.
struct Multiplier {
    u32 base, table, scales_at, codes_at, sums_at;
    int lane;
    Ring ring, slots;
    u32 before;  // the stage whose products were started last
    Operands in;

    __device__ Multiplier(u32 base, int thread) : base(base), lane(thread & 31) {
        int warp = thread / 32;
        table = base - SHARED_START + 4 * lane;
        scales_at = base + SCALES_AT + (16 * warp + lane / 4) * SCALE_BLOCKS * 4;
        codes_at = base + STAGES_AT + X_NBYTES + warp * 512 + lane * 16;
        sums_at = base + STAGES_AT + thread * 16;
        keep(table), keep(scales_at), keep(codes_at);  // in registers, not computed anew
    }

    // Wait for the stage of columns 64 * kb, and take codes and scales.
    __device__ __forceinline__ void take(int kb, bool chunk_begins) {
        if (chunk_begins) barrier_wait(scales_full_at(base, slots.index), slots.phase);
        barrier_wait(full_at(base, ring.index), ring.phase);
        in.load(codes_at + ring.index * STAGE_NBYTES,
                scales_at + slots.index * SCALE_SLOT_NBYTES + kb % 4 * 64 / SCALE_COLUMNS * 4);
    }

    __device__ __forceinline__ void release(u32 stage) {
        if (CLUSTER > 1) {
            if (lane < CLUSTER) barrier_arrive_at(empty_at(base, stage), lane);
        } else if (lane == 0) {
            barrier_arrive(empty_at(base, stage));
        }
    }

    // Take another block's sums, or add them.
    template <bool ADD>
    __device__ __forceinline__ void take_sums(Sums& sums) {
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            if (i % SUM_ROWS == 0) barrier_wait(full_at(base, ring.index), ring.phase);
            uint4 v = load_shared4(sums_at + ring.index * STAGE_NBYTES + i % SUM_ROWS * SUM_ROW_NBYTES);
            u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                sums.of[4 * i + j] = ADD ? sums.of[4 * i + j] + __uint_as_float(words[j]) : __uint_as_float(words[j]);
            if (i % SUM_ROWS < SUM_ROWS - 1) continue;
            __syncwarp();
            release(ring.index);
            ring.step<STAGES>();
        }
        sums.fence();
    }

    // Start the products of a stage from `a`, while those from `other` may still be under way.
    template <int N>
    __device__ __forceinline__ void step(Sums& sums, Registers& a, Registers& other, int kb, const Walk& walk, bool begun) {
        decode_all(a, in, table);
        u32 now = ring.index;
        bool last = kb + 1 == walk.end, chunk_ends = kb % 4 == 3;
        if (chunk_ends || last) {
            __syncwarp();
            if (lane == 0) barrier_arrive(scales_empty_at(base, slots.index));
            slots.step<SCALE_SLOTS>();
        }
        ring.step<STAGES>();
        if (!last) take(kb + 1, chunk_ends);
        start<N>(sums, a, token_descriptor(base + STAGES_AT + now * STAGE_NBYTES), begun || kb != walk.begin);
        finish<1>(other);
        if (kb != walk.begin) release(before);
        before = now;
    }

    template <int N>
    __device__ __forceinline__ void run(Sums& sums, const Walk& walk, bool begun) {
        Registers a, b;
        take(walk.begin, true);
        for (int kb = walk.begin;;) {
            step<N>(sums, a, b, kb, walk, begun);
            if (++kb == walk.end) break;
            step<N>(sums, b, a, kb, walk, begun);
            if (++kb == walk.end) break;
        }
        finish<0>(a);
        finish<0>(b);
        sums.fence();
        release(before);
    }
};

__device__ __forceinline__ void fill_table(const Problem& p, u32 base, int thread) {
    for (int i = thread; i < 2048; i += 32 * CONSUMERS) {
        u32 levels = p.table[i / 8];
        store_shared4(base + TABLE_AT + i / 8 * TABLE_STRIDE + i % 8 * 16, uint4{levels, levels, levels, levels});
    }
    named_barrier(5, 32 * CONSUMERS);
}

__device__ __forceinline__ void multiply(const Problem& p, u32 base, const int* starts, int tiles) {
    int thread = threadIdx.x - 128, warp = thread / 32;
    fill_table(p, base, thread);
    Multiplier multiplier(base, thread);
    Sums sums;
    for (Walk walk(tiles, 4 * p.chunks); walk.next();) {
        Place place = place_of(p, starts, walk.now);
        Others others(walk);
        bool begun = others.early >= 0;
        if (begun) multiplier.take_sums<false>(sums);
        if (WIDE && place.narrow()) multiplier.run<128>(sums, walk, begun);
        else multiplier.run<TOKENS>(sums, walk, begun);
        if (walk.end < walk.blocks) {
            hand_over(p, sums, thread);
            continue;
        }
        if (STAGED_SUMS)
            for (int member = others.last; member >= others.first; member--) multiplier.take_sums<true>(sums);
        else if (walk.begin > 0)
            take_over(p, sums, thread, others);
        int tile = place.first_tile + warp / 2;
        if ((SILU || OUT_FLOAT) && tile >= p.tiles) continue;
        if (SCALED) apply_factors(p, sums, place);
        int row = SILU ? 16 * tile : 32 * tile + 16 * (warp & 1);  // of the output
#if OUT_FLOAT
        store_float(p, sums, place, row);
#else
        store_pairs(p, sums, place, row, base + STAGING_AT + warp * STAGING_NBYTES);
#endif
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    tile4(const __grid_constant__ TensorMap x_map, const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared);
    int thread = threadIdx.x;
    if ((base & 0xffffff) != SHARED_START) __trap();  // the upper bits are the rank in the cluster
    int* starts = (int*)(shared + STARTS_AT);
    if (thread == 0) {
        for (int i = 0; i < STAGES; i++)
            barrier_init(full_at(base, i), 1), barrier_init(empty_at(base, i), CONSUMERS * CLUSTER);
        for (int i = 0; i < SCALE_SLOTS; i++)
            barrier_init(scales_full_at(base, i), 32), barrier_init(scales_empty_at(base, i), CONSUMERS);
        barriers_ready();
    }
    if (GROUPED && thread < 32) {
        wait_for_previous_kernel();
        count_tiles(p, starts);
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_barrier();
    int tiles = GROUPED ? starts[p.experts] : row_tiles(p) * ((p.tokens + TOKENS - 1) / TOKENS);
    if (thread < 128) {
        give_registers<COPY_REGISTERS>();
        if (thread < 32) copy_stages(p, &x_map, base, starts, tiles);
        else decode_scales(p, base, starts, (float*)(shared + MAP_AT), tiles, thread / 32 - 1);
    } else {
        take_registers<REGISTERS>();
        multiply(p, base, starts, tiles);
    }
    if (CLUSTER > 1) cluster_barrier();  // the other block may still write here
}
