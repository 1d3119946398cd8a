// y = x W^T for many tokens, from the 4-bit layout of tiles.py, on Hopper.
//
// A block makes tiles of 256 rows of W by TOKENS tokens. One warp copies: 64 columns of x (the copy engine, swizzled) and
// of codes make a stage. Three warps decode scales, a chunk of 256 columns each in turn. Two warpgroups multiply: a warp
// owns 32 rows of W, decodes their codes into registers in the order of wgmma's A operand, and multiplies them with the
// tokens in shared memory, decoding the next 16 columns while the tensor cores work on the last.
//
// Work that does not make whole waves of tiles is cut by columns into equal ranges, one for each block (stream-K: Osama
// et al., 2023); the block with a tile's last columns adds the sums of the others, in fixed order. It waits only for
// blocks before it, which do that part first, so nothing depends on all blocks running at once.
//
// Macros: NF4 (else int4), NESTED (double quantization), SCALE_COLUMNS (columns that share a scale), TOKENS, GROUPED
// (experts; rows of x sorted by expert), SILU (rows of W alternate by 16 between gate and up; the output is silu(gate) *
// up), SCATTERED (row i of x makes row pairs[i] of the output, times weights[pairs[i]]), OUT_FLOAT (float32 output, else
// bfloat16).

#ifndef ORDERED
#define ORDERED (TOKENS >= 128)
#endif
#ifndef EXACT
#define EXACT 1
#endif
constexpr int ROWS = 256;
constexpr int CONSUMERS = 8;  // warps, 32 rows of W each
constexpr int THREADS = 384;
constexpr int SCALE_WARPS = 3;
constexpr int CODES_NBYTES = 4096;  // of a chunk of 32 rows x 256 columns
constexpr int SCALE_BLOCKS = 256 / SCALE_COLUMNS;  // in a row of a chunk
constexpr int SCALES = SCALE_COLUMNS < 64 ? 2 : 1;  // in 64 columns of a row
constexpr int SCALE_SLOTS = SCALE_BLOCKS == 8 ? 3 : 4;
constexpr int SCALE_SLOT_NBYTES = ROWS * SCALE_BLOCKS * 4;
constexpr int MAX_EXPERTS = 512;

// Shared memory. The table of levels lies at a multiple of its size, so that a byte's entry is found by OR.
constexpr int SHARED_START = 1024;  // what the system keeps on sm_90
constexpr int SHARED_NBYTES = 232448;
constexpr int TABLE_NBYTES = NF4 ? 32768 : 0;
constexpr int STARTS_AT = 512;
constexpr int MAP_AT = STARTS_AT + (GROUPED ? 4 * MAX_EXPERTS + 512 : 0);
constexpr int SCALES_AT = MAP_AT + (NESTED ? 1024 : 0);
constexpr int STAGING_PITCH = 80;  // bytes of a token: 64 and a step that spreads tokens over all banks
constexpr int STAGING_NBYTES = 16 * STAGING_PITCH;  // of a warp: 16 tokens of 32 rows
constexpr int STAGING_AT = SCALES_AT + SCALE_SLOTS * SCALE_SLOT_NBYTES;
constexpr int STAGING_END = STAGING_AT + (OUT_FLOAT ? 0 : CONSUMERS * STAGING_NBYTES);
constexpr int TABLE_AT = TABLE_NBYTES - SHARED_START;
constexpr int STAGES_AT = NF4 ? TABLE_AT + TABLE_NBYTES : (STAGING_END + 1023) / 1024 * 1024;
constexpr int X_NBYTES = TOKENS * 128;
constexpr int STAGE_CODES_NBYTES = ROWS * 32;
constexpr int STAGE_NBYTES = X_NBYTES + STAGE_CODES_NBYTES;
constexpr int STAGES_THAT_FIT = (SHARED_NBYTES - STAGES_AT) / STAGE_NBYTES;
constexpr int STAGES = STAGES_THAT_FIT < 24 ? STAGES_THAT_FIT : 24;
static_assert(!NF4 || STAGING_END <= TABLE_AT);
static_assert(8 * (2 * STAGES + 2 * SCALE_SLOTS) <= STARTS_AT);

struct Problem {
    void* out;                 // [rows of x, N]
    const u64* matrices;       // [E] addresses of records if GROUPED, else the matrix itself
    u64 matrix_start;          // of the matrix in its record
    u64 meta_start;            // of first blocks and offsets, in the matrix
    u64 nested_start;          // of second-level scales
    const int* offsets;        // [E + 1] first token of each expert, if GROUPED
    const long long* pairs;    // [rows of x], if SCATTERED
    const float* weights;      // [rows of the output], if SCATTERED
    const u32* table;          // [256] byte -> two levels
    const float* dynamic_map;  // [256]
    float* partials;           // [blocks, 256 * TOKENS]
    int* flags;                // [blocks, 2], all 0 between launches
    float inverse;             // scales are multiplied by it
    int experts, tokens, N, K;  // N: width of the output
    int tiles;                 // of 32 rows of W
    int chunks, chunk_nbytes;
    int band;                  // tiles of tokens that share a pass over W
};

// Which part of which tile a block makes, one after the other. A unit is 64 columns of a tile.
struct Walk {
    int blocks, total;     // units of a tile; tiles
    int shared, sharers;   // tiles cut among blocks, and how many blocks; none of these is without work
    int low, high, tile;   // still to do: units of shared tiles, then whole tiles
    int begin, end, now;   // the current part: its units, its tile

    __device__ Walk(int tiles, int blocks_per_tile) : blocks(blocks_per_tile), total(tiles) {
        int grid = gridDim.x;
        shared = tiles % grid == 0 ? 0 : tiles < 2 * grid ? tiles : tiles % grid + grid;
        sharers = min(grid, (shared * blocks + 3) / 4);
        low = first_unit(min((int)blockIdx.x, sharers));
        high = first_unit(min((int)blockIdx.x + 1, sharers));
        tile = shared + blockIdx.x;
    }

    __device__ int first_unit(int block) const { return sharers ? (int)((long long)shared * blocks * block / sharers) : 0; }

    __device__ bool next() {
        if (high > low) {  // the last part first: a tile's first columns are somebody else's to finish
            now = (high - 1) / blocks;
            begin = max(low - now * blocks, 0);
            end = high - now * blocks;
            high = now * blocks + begin;
            return true;
        }
        if (tile >= total) return false;
        now = tile, begin = 0, end = blocks;
        tile += gridDim.x;
        return true;
    }
};

// Where a tile lies.
struct Place {
    int first_tile;      // of 32 rows
    int token, tokens;   // its first token, the end of its expert's tokens
    const u8* matrix;
};

__device__ __forceinline__ int row_tiles(const Problem& p) { return (p.tiles + CONSUMERS - 1) / CONSUMERS; }

__device__ __forceinline__ Place place_of(const Problem& p, const int* starts, int tile) {
    int expert = 0, first = 0, end = p.tokens;
    if (GROUPED) {
        int high = p.experts;
        while (high - expert > 1) {
            int middle = (expert + high) / 2;
            if (starts[middle] <= tile) expert = middle; else high = middle;
        }
        tile -= starts[expert];
        first = p.offsets[expert], end = p.offsets[expert + 1];
    }
    int token_tiles = (end - first + TOKENS - 1) / TOKENS, rows = row_tiles(p);
    int band = tile / (p.band * rows);
    int width = min(p.band, token_tiles - band * p.band), in_band = tile - band * p.band * rows;
    Place place;
    place.first_tile = in_band / width * CONSUMERS;
    place.token = first + (band * p.band + in_band % width) * TOKENS;
    place.tokens = end;
    place.matrix = (GROUPED ? (const u8*)p.matrices[expert] : (const u8*)p.matrices) + p.matrix_start;
    return place;
}

// First tile of every expert, and the number of tiles, into starts[0 .. experts]; by one warp.
__device__ __forceinline__ void count_tiles(const Problem& p, int* starts) {
    int lane = threadIdx.x & 31, total = 0;
    for (int base = 0; base < p.experts; base += 32) {
        int e = base + lane, tiles = 0;
        if (e < p.experts) tiles = (p.offsets[e + 1] - p.offsets[e] + TOKENS - 1) / TOKENS * row_tiles(p);
        int sum = tiles;
        for (int step = 1; step < 32; step *= 2) {
            int before = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += before;
        }
        if (e < p.experts) starts[e] = total + sum - tiles;
        total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) starts[p.experts] = total;
}

struct Ring {
    u32 index = 0, phase = 0;
    template <int N>
    __device__ __forceinline__ void step() {
        if (++index == N) index = 0, phase ^= 1;
    }
};

__device__ __forceinline__ u32 full_at(u32 base, u32 stage) { return base + 8 * stage; }
__device__ __forceinline__ u32 empty_at(u32 base, u32 stage) { return base + 8 * (STAGES + stage); }
__device__ __forceinline__ u32 scales_full_at(u32 base, u32 slot) { return base + 8 * (2 * STAGES + slot); }
__device__ __forceinline__ u32 scales_empty_at(u32 base, u32 slot) { return base + 8 * (2 * STAGES + SCALE_SLOTS + slot); }

__device__ __forceinline__ void copy_stages(const Problem& p, const TensorMap* x_map, u32 base, const int* starts,
                                            int tiles) {
    int lane = threadIdx.x & 31;
    Ring ring;
    for (Walk walk(tiles, 4 * p.chunks); walk.next();) {
        Place place = place_of(p, starts, walk.now);
        int here = min(CONSUMERS, p.tiles - place.first_tile);
        u64 tile_nbytes = (u64)p.chunks * p.chunk_nbytes;
        const u8* codes = place.matrix + (place.first_tile + (lane & 7)) * tile_nbytes;
        for (int kb = walk.begin; kb < walk.end; kb++) {
            u32 stage = base + STAGES_AT + ring.index * STAGE_NBYTES, full = full_at(base, ring.index);
            barrier_wait(empty_at(base, ring.index), ring.phase ^ 1);
            if (lane == 0) barrier_expect(full, X_NBYTES + here * 1024);
            __syncwarp();
            if (lane < here) {
                const u8* from = codes + (u64)(kb >> 2) * p.chunk_nbytes + (kb & 3) * 1024;
                copy_bytes(stage + X_NBYTES + lane * 1024, from, 1024, full);
            }
            if (lane == 8) copy_box(stage, x_map, kb * 64, place.token, full);
            ring.step<STAGES>();
        }
    }
}

// A scale as its bfloat16 (low half) and what that lacks (high half).
__device__ __forceinline__ u32 split(float scale) {
    u32 first = pair_of(scale, 0.0f);
    return pair_of(low_of(first), scale - low_of(first));
}

// The scales of one row of a chunk, as they are stored.
struct RowScales {
    u32 raw[NF4 && !NESTED ? 4 : NESTED ? 1 : SCALE_BLOCKS / 2];
    float nested, offset;

    __device__ __forceinline__ void load(const Problem& p, const u8* matrix, int tile, int row, int chunk) {
        constexpr int WORDS = sizeof(raw) / 4;
        const u8* at = matrix + ((u64)tile * p.chunks + chunk) * p.chunk_nbytes + CODES_NBYTES;
        for (int i = 0; i < WORDS; i++) raw[i] = ((const u32*)at)[row * WORDS + i];
        if (NESTED) {
            int2 meta = ((const int2*)(matrix + p.meta_start))[2 * tile + row / 16];
            int block = meta.x + (row & 15) * (p.K / 64) + chunk * 4;
            nested = ((const float*)(matrix + p.nested_start))[block / 256];
            offset = __int_as_float(meta.y);
        }
    }

    __device__ __forceinline__ float scale(int i, const float* map) const {
        if (NESTED) return __fadd_rn(__fmul_rn(map[raw[0] >> 8 * i & 255], nested), offset);
        if (NF4) return __uint_as_float(raw[i]);
        return float_of_half(raw[i / 2] >> 16 * (i & 1) & 0xffff);
    }
};

__device__ __forceinline__ void store_scales(u32 address, const RowScales& row, const float* map, float inverse) {
    u32 words[SCALE_BLOCKS];
#pragma unroll
    for (int i = 0; i < SCALE_BLOCKS; i++) words[i] = split(row.scale(i, map) * inverse);
    if (SCALE_BLOCKS == 2) {
        store_shared2(address, words[0], words[1]);
    } else {
#pragma unroll
        for (int i = 0; i < SCALE_BLOCKS; i += 4)
            store_shared4(address + 4 * i, uint4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
}

__device__ __forceinline__ void decode_scales(const Problem& p, u32 base, const int* starts, float* map, int tiles,
                                              int worker) {
    int lane = threadIdx.x & 31, turn = 0;
    if (NESTED) {
        for (int i = threadIdx.x - 32; i < 256; i += 32 * SCALE_WARPS) map[i] = p.dynamic_map[i];
        named_barrier(6, 32 * SCALE_WARPS);
    }
    Ring ring;
    for (Walk walk(tiles, 4 * p.chunks); walk.next();) {
        Place place = place_of(p, starts, walk.now);
        int here = min(CONSUMERS, p.tiles - place.first_tile);
        for (int chunk = walk.begin >> 2; chunk <= (walk.end - 1) >> 2; chunk++) {
            if (turn == worker) {
                RowScales rows[CONSUMERS];
#pragma unroll
                for (int i = 0; i < CONSUMERS; i++)
                    if (i < here) rows[i].load(p, place.matrix, place.first_tile + i, lane, chunk);
                barrier_wait(scales_empty_at(base, ring.index), ring.phase ^ 1);
                u32 slot = base + SCALES_AT + ring.index * SCALE_SLOT_NBYTES + lane * SCALE_BLOCKS * 4;
#pragma unroll
                for (int i = 0; i < CONSUMERS; i++)
                    if (i < here) store_scales(slot + i * 32 * SCALE_BLOCKS * 4, rows[i], map, p.inverse);
                barrier_arrive(scales_full_at(base, ring.index));
            }
            turn = turn == SCALE_WARPS - 1 ? 0 : turn + 1;
            ring.step<SCALE_SLOTS>();
        }
    }
}

// Both halves of a split scale, each for a pair of weights.
struct Scale {
    u32 main, rest;
    __device__ __forceinline__ void set(u32 both) {
        main = __byte_perm(both, both, 0x1010);
        rest = __byte_perm(both, both, 0x3232);
    }
    // level * scale, rounded once: the rest's share is far below the last place.
    __device__ __forceinline__ u32 times(u32 levels) const {
        return EXACT ? fma_pairs(levels, main, multiply_pairs(levels, rest)) : multiply_pairs(levels, main);
    }
};

// The four A registers of a lane from four bytes of codes; `table` is the lane's column of the table.
__device__ __forceinline__ void decode(u32 (&a)[4], u32 word, u32 table, const Scale& upper, const Scale& lower) {
    u32 levels[4];
#if NF4
    levels[0] = load_table((word << 7 & 0x7f80) | table);
    levels[1] = load_table((word >> 1 & 0x7f80) | table);
    levels[2] = load_table((word >> 9 & 0x7f80) | table);
    levels[3] = load_table((word >> 17 & 0x7f80) | table);
#else
    u32 high = word >> 4;  // 128 + code is a bfloat16 with the code in its last bits
    levels[0] = add_pairs(__byte_perm(high, word, 0x4400) & 0x000f000f | 0x43004300, 0xc308c308);
    levels[1] = add_pairs(__byte_perm(high, word, 0x5511) & 0x000f000f | 0x43004300, 0xc308c308);
    levels[2] = add_pairs(__byte_perm(high, word, 0x6622) & 0x000f000f | 0x43004300, 0xc308c308);
    levels[3] = add_pairs(__byte_perm(high, word, 0x7733) & 0x000f000f | 0x43004300, 0xc308c308);
#endif
    a[0] = upper.times(levels[0]);
    a[1] = lower.times(levels[1]);
    a[2] = upper.times(levels[2]);
    a[3] = lower.times(levels[3]);
}

// Rows of tokens from address >> 4, 8 rows of 128 bytes 1024 bytes apart, swizzled by 128 bytes.
__device__ __forceinline__ u64 token_descriptor(u32 address) {
    return (u64)(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

struct Sums {
    float first[TOKENS / 2], second[TOKENS / 2];  // of rows 0..15 and 16..31 of the warp's tile

    __device__ __forceinline__ void fence() {
#pragma unroll
        for (int i = 0; i < TOKENS / 2; i++) keep(first[i]), keep(second[i]);
    }
};

// Sums of another block's part of the tile, as float4 [TOKENS / 4][256 threads].
__device__ __forceinline__ float4* partial_of(const Problem& p, int block, int thread) {
    return (float4*)(p.partials + (u64)block * ROWS * TOKENS) + thread;
}

__device__ __forceinline__ void hand_over(const Problem& p, Sums& sums, int thread) {
    float4* to = partial_of(p, blockIdx.x, thread);
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        __stcg(to + 256 * i, make_float4(sums.first[4 * i], sums.first[4 * i + 1], sums.first[4 * i + 2], sums.first[4 * i + 3]));
        __stcg(to + 256 * (TOKENS / 8 + i),
               make_float4(sums.second[4 * i], sums.second[4 * i + 1], sums.second[4 * i + 2], sums.second[4 * i + 3]));
    }
    __threadfence();
    named_barrier(1 + thread / 128, 128);
    if (thread % 128 == 0) publish(p.flags + 2 * blockIdx.x + thread / 128);
}

// Add the sums of the blocks that made the tile's first columns, the last of them first.
__device__ __forceinline__ void take_over(const Problem& p, Sums& sums, int thread, const Walk& walk) {
    for (int block = blockIdx.x - 1;; block--) {
        if (thread % 128 == 0) await(p.flags + 2 * block + thread / 128);
        named_barrier(1 + thread / 128, 128);
        const float4* from = partial_of(p, block, thread);
#pragma unroll
        for (int i = 0; i < TOKENS / 8; i++) {
            float4 a = __ldcg(from + 256 * i), b = __ldcg(from + 256 * (TOKENS / 8 + i));
            sums.first[4 * i] += a.x, sums.first[4 * i + 1] += a.y, sums.first[4 * i + 2] += a.z, sums.first[4 * i + 3] += a.w;
            sums.second[4 * i] += b.x, sums.second[4 * i + 1] += b.y;
            sums.second[4 * i + 2] += b.z, sums.second[4 * i + 3] += b.w;
        }
        if (walk.first_unit(block) <= walk.now * walk.blocks) return;
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ __forceinline__ u64 output_row(const Problem& p, int token) { return SCATTERED ? p.pairs[token] : token; }

// Eight neighbouring outputs of a token.
__device__ __forceinline__ void store_eight(const Problem& p, uint4 v, int token, int n) {
    unsigned short* to = (unsigned short*)p.out + output_row(p, token) * p.N + n;
    if (n + 8 <= p.N && p.N % 8 == 0) {
        *(uint4*)to = v;
        return;
    }
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (n + i < p.N) to[i] = (unsigned short)(words[i / 2] >> 16 * (i & 1));
}

__device__ __forceinline__ void apply_weights(const Problem& p, Sums& sums, const Place& place) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        int token = place.token + 8 * i + 2 * t;
        float even = token < place.tokens ? p.weights[p.pairs[token]] : 0.0f;
        float odd = token + 1 < place.tokens ? p.weights[p.pairs[token + 1]] : 0.0f;
        sums.first[4 * i] *= even, sums.first[4 * i + 2] *= even, sums.second[4 * i] *= even, sums.second[4 * i + 2] *= even;
        sums.first[4 * i + 1] *= odd, sums.first[4 * i + 3] *= odd;
        sums.second[4 * i + 1] *= odd, sums.second[4 * i + 3] *= odd;
    }
}

__device__ __forceinline__ void store_float(const Problem& p, const Sums& sums, const Place& place, int row) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        int token = place.token + 8 * (i / 4) + 2 * t + (i & 1), n = row + g + 8 * (i >> 1 & 1);
        if (token >= place.tokens) continue;
        float* to = (float*)p.out + output_row(p, token) * p.N + n;
        if (n < p.N) to[0] = sums.first[i];
        if (n + 16 < p.N) to[16] = sums.second[i];
    }
}

// Sixteen tokens at a time through the warp's own shared memory, where they are turned to rows of y.
__device__ __forceinline__ void store_pairs(const Problem& p, const Sums& sums, const Place& place, int tile, u32 staging) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < TOKENS / 16; i++) {
        const float* a = sums.first + 8 * i;
        const float* b = sums.second + 8 * i;
        __syncwarp();
#if SILU
        u32 made[4];
#pragma unroll
        for (int j = 0; j < 4; j++) made[j] = pair_of(silu(a[2 * j]) * b[2 * j], silu(a[2 * j + 1]) * b[2 * j + 1]);
        store_matrices_transposed(staging + (8 * (lane >> 4) + (lane & 7)) * STAGING_PITCH + 16 * (lane >> 3 & 1), made[0],
                                  made[1], made[2], made[3]);
        __syncwarp();
        int token = lane / 2, n = 8 * (lane & 1);
        if (place.token + 16 * i + token < place.tokens)
            store_eight(p, load_shared4(staging + token * STAGING_PITCH + 2 * n), place.token + 16 * i + token, 16 * tile + n);
#else
#pragma unroll
        for (int j = 0; j < 2; j++)
            store_matrices_transposed(staging + (8 * j + (lane & 7)) * STAGING_PITCH + 16 * (lane >> 3),
                                      pair_of(a[4 * j], a[4 * j + 1]), pair_of(a[4 * j + 2], a[4 * j + 3]),
                                      pair_of(b[4 * j], b[4 * j + 1]), pair_of(b[4 * j + 2], b[4 * j + 3]));
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int token = 8 * j + lane / 4, n = 8 * (lane & 3);
            if (place.token + 16 * i + token < place.tokens)
                store_eight(p, load_shared4(staging + token * STAGING_PITCH + 2 * n), place.token + 16 * i + token,
                            32 * tile + n);
        }
#endif
    }
}

// Wait for the tensor cores, which read `a` until then.
__device__ __forceinline__ void finish(u32 (&a)[4][2][4]) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) keep(a[i][0][j]), keep(a[i][1][j]);
}

__device__ __forceinline__ void multiply(const Problem& p, u32 base, const int* starts, int tiles) {
    int thread = threadIdx.x - 128, warp = thread / 32, lane = thread & 31;
    int blocks = 4 * p.chunks, group = thread / 128;
    if (NF4) {
        for (int i = thread; i < 2048; i += 256) {
            u32 levels = p.table[i / 8];
            store_shared4(base + TABLE_AT + 16 * i, uint4{levels, levels, levels, levels});
        }
        named_barrier(5, 256);
    }
    if (ORDERED && group == 1) named_arrive(3, 256);
    u32 table = SHARED_START + TABLE_AT + 4 * lane;
    u32 scales_at = base + SCALES_AT + (32 * warp + lane / 4) * SCALE_BLOCKS * 4;
    Ring ring, slots;
    Sums sums;
    for (Walk walk(tiles, blocks); walk.next();) {
        u32 before = 0;
        u32 a[4][2][4];
        for (int kb = walk.begin; kb < walk.end; kb++) {
            u32 stage = base + STAGES_AT + ring.index * STAGE_NBYTES;
            if (kb == walk.begin || kb % 4 == 0) barrier_wait(scales_full_at(base, slots.index), slots.phase);
            barrier_wait(full_at(base, ring.index), ring.phase);
            u32 codes_at = stage + X_NBYTES + warp * 1024 + lane * 16;
            uint4 upper = load_shared4(codes_at), lower = load_shared4(codes_at + 512);
            u32 words[2][4] = {{upper.x, upper.y, upper.z, upper.w}, {lower.x, lower.y, lower.z, lower.w}};
            u32 scale_at = scales_at + slots.index * SCALE_SLOT_NBYTES + kb % 4 * 64 / SCALE_COLUMNS * 4;
            u32 split_scales[SCALES][4];
#pragma unroll
            for (int i = 0; i < SCALES; i++)
                for (int r = 0; r < 4; r++) split_scales[i][r] = load_shared(scale_at + (8 * r * SCALE_BLOCKS + i) * 4);
            u64 tokens = token_descriptor(stage);
            if (kb != walk.begin) {
                finish(a);
                if (lane == 0) barrier_arrive(empty_at(base, before));
            }
            Scale scales[4];
#pragma unroll
            for (int s = 0; s < 4; s++) {
                if (s * SCALES % 4 == 0)
                    for (int r = 0; r < 4; r++) scales[r].set(split_scales[s * SCALES / 4][r]);
                decode(a[s][0], words[0][s], table, scales[0], scales[1]);
                decode(a[s][1], words[1][s], table, scales[2], scales[3]);
            }
            if (ORDERED) named_barrier(3 + group, 256);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 4; s++) {
                Wgmma<TOKENS>::multiply(sums.first, a[s][0], tokens + 2 * s, kb != walk.begin || s);
                Wgmma<TOKENS>::multiply(sums.second, a[s][1], tokens + 2 * s, kb != walk.begin || s);
            }
            wgmma_commit();
            if (ORDERED) named_arrive(4 - group, 256);
            if (kb % 4 == 3 || kb + 1 == walk.end) {
                if (lane == 0) barrier_arrive(scales_empty_at(base, slots.index));
                slots.step<SCALE_SLOTS>();
            }
            before = ring.index;
            ring.step<STAGES>();
        }
        finish(a);
        sums.fence();
        if (lane == 0) barrier_arrive(empty_at(base, before));
        if (walk.end < blocks) {
            hand_over(p, sums, thread);
            continue;
        }
        if (walk.begin > 0) take_over(p, sums, thread, walk);
        Place place = place_of(p, starts, walk.now);
        int tile = place.first_tile + warp;
        if (tile >= p.tiles) continue;
        if (SCATTERED) apply_weights(p, sums, place);
#if OUT_FLOAT
        store_float(p, sums, place, 32 * tile);
#else
        store_pairs(p, sums, place, tile, base + STAGING_AT + warp * STAGING_NBYTES);
#endif
    }
    if (ORDERED && group == 0) named_barrier(3, 256);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    tile4(const __grid_constant__ TensorMap x_map, const __grid_constant__ Problem p) {
    extern __shared__ __align__(1024) u8 shared[];
    u32 base = shared_address(shared);
    int thread = threadIdx.x;
    if (base != SHARED_START) __trap();
    int* starts = (int*)(shared + STARTS_AT);
    float* map = (float*)(shared + MAP_AT);
    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full_at(base, i), 1), barrier_init(empty_at(base, i), CONSUMERS);
        for (int i = 0; i < SCALE_SLOTS; i++)
            barrier_init(scales_full_at(base, i), 32), barrier_init(scales_empty_at(base, i), CONSUMERS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (GROUPED && thread < 32) count_tiles(p, starts);
    __syncthreads();
    int tiles = GROUPED ? starts[p.experts] : row_tiles(p) * ((p.tokens + TOKENS - 1) / TOKENS);
    if (thread < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        if (thread < 32) copy_stages(p, &x_map, base, starts, tiles);
        else decode_scales(p, base, starts, map, tiles, thread / 32 - 1);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        multiply(p, base, starts, tiles);
    }
}
