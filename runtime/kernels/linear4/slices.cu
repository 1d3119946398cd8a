// y = W x^T for few tokens and one matrix, W in 4 bits in the layout of tiles.py: activations stand, weights pass.
//
// K is cut into splits, a split into slices of 128 columns, one for each warp of a block. A warp keeps its slice of x in
// registers, as tensor cores take it, and goes down the block's tiles of 32 rows with a ring of half chunks in flight. The
// sums that the warps have of a tile meet in one of a few buffers, where some warps in turn add them while all go on; so
// of all that has to be added at the end there is but one tile. What the last split's blocks add from other blocks comes
// likewise tile by tile.
//
// Macros: WARPS; TOKENS, 8 or 16; those of few_codes.cuh.

#define FRAGMENTS (TOKENS / 8)  // of B, 8 tokens each
#define THREADS (WARPS * 32)
#define GROUPS (4 / STEPS_PER_SCALE)  // of 64 columns, that have a scale each
#define SUM_NBYTES 144       // from token to token of 32 sums, so that lanes meet in no bank
#define SUMS_NBYTES (TOKENS * SUM_NBYTES)  // of a warp
#define BUFFERS 2            // tiles whose sums can wait
#define SLOT_STRIDE (SLOT_NBYTES + 16)     // with the slot's barrier
#define ROWS16 (2 / FRAGMENTS)        // rows that a warp multiplies at once, in 16: four chains of products side by side
#define TEAM (2 * FRAGMENTS)          // warps that add a tile's sums, four rows of a token each thread
#define TEAMS (WARPS / TEAM)
#define NO_SUM 0xffffffffu   // what stands where a part has not come yet: a NaN, but not the one that sums become
#define NAN_BITS 0x7fffffffu
#define MAX_SPLITS 8

struct Args {
    const char* matrix;
    const char* x;    // bfloat16 [M, K]
    char* out;        // bfloat16 [M, N]; float32 [splits, M, N] if there are no `parts`
    int* parts;       // float32 [splits - 1, tiles, M, 32]; NO_SUM before and after
    int M, N, K, tiles, chunks, splits;
    int blocks;       // of each split but the last, which has the others
    int first_slots;  // of all rings, asked for before x is
    int block_tiles;  // most tiles of a block
    int meta_start, nested_start, nested_count, nested_span;
    int parts_count, interleaved;
    int part_start[4], part_nested[4];  // in 16 rows, in second-level scales
    unsigned short levels[16];  // bfloat16, of each code
    float map[256];          // double quantization's first-level table, times `unscale`
    float unscale;           // what scales are multiplied with, as kernel levels are larger than stored ones
};

struct Shared {
    char *lut, *ring, *sums;
    u64* bars;  // of each buffer: that it is full, that it is empty
    float *map, *nested;
    float2* meta;  // for every 16 rows: first block within its second-level block (as an integer), and offset
};

// The tiles of a split from its block `number` on.
__device__ inline int first_tile(const Args& a, int blocks, int number) {
    int each = a.tiles / blocks;
    return number * each + min(number, a.tiles - each * blocks);
}

// A block's tiles, in a circle: those of the last split begin with the one that other splits' blocks begin with, so that
// their parts come in the order in which they are added.
struct Share {
    int split, tile, count, begin;

    __device__ inline Share(const Args& a, int block) {
        split = min(block / a.blocks, a.splits - 1);
        int number = block - split * a.blocks, blocks = split < a.splits - 1 ? a.blocks : gridDim.x - block + number;
        tile = first_tile(a, blocks, number);
        count = first_tile(a, blocks, number + 1) - tile;
        begin = 0;
        if (split == a.splits - 1) {
            int each = a.tiles / a.blocks, other = tile / max(each, 1);
            while (first_tile(a, a.blocks, other) > tile) --other;
            int next = first_tile(a, a.blocks, other + 1) - tile;
            if (next < count && first_tile(a, a.blocks, other) < tile) begin = next;
        }
    }

    // Of the i-th that is taken.
    __device__ inline int local(int i) const {
        i += begin;
        return i < count ? i : i - count;
    }
};

__device__ inline u64* barrier_of(char* slot) { return (u64*)(slot + SLOT_NBYTES); }

// A slice of a tile: one half of a chunk and the scales of both, which follow the second one.
__device__ inline void copy_slice(char* slot, const char* from, bool second, int lane) {
#if __CUDA_ARCH__ >= 900
    if (elected()) {
        barrier_expect(barrier_of(slot), SLOT_NBYTES);
        copy_bulk(slot, from, second ? SLOT_NBYTES : HALF_NBYTES, barrier_of(slot));
        if (!second) copy_bulk(slot + HALF_NBYTES, from + CODES_NBYTES, SCALES_NBYTES, barrier_of(slot));
    }
#else
    for (int i = lane * 16; i < SLOT_NBYTES; i += 512)
        copy_16(slot + i, from + i + (second || i < HALF_NBYTES ? 0 : HALF_NBYTES), true);
    barrier_arrive_after_copies(barrier_of(slot));
#endif
}

__device__ inline void fill_tables(const Args& a, const Shared& sh, int lane, int warp) {
#if SCALE_KIND != 2
    for (int first = warp * 32; first < 256; first += THREADS) {
        int byte = first + lane;
        u32 mine = a.levels[byte >> 4] | a.levels[byte & 15] << 16;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            *(u32*)(sh.lut + (first + i) * TABLE_STRIDE + lane * 4) = __shfl_sync(0xffffffff, mine, i);
    }
#endif
#if SCALE_KIND == 0
    for (int i = threadIdx.x; i < 256; i += THREADS) sh.map[i] = a.map[i];
#endif
}

// Second-level scales of the block's rows, for every 16 of them those that their blocks may need.
__device__ inline void load_nested(const Args& a, const Shared& sh, const Share& share) {
#if SCALE_KIND == 0
    const char* meta = a.matrix + a.meta_start + 16 * share.tile;
    int rows16 = 16 * (a.K / 64);
    for (int i = threadIdx.x; i < 2 * share.count * a.nested_span; i += THREADS) {
        int m = i / a.nested_span, j = i - m * a.nested_span;
        // The record holds the first block too, but to wait for it before asking for the scales costs a microsecond.
        int m16 = 2 * share.tile + m, part = 0;
        while (part + 1 < a.parts_count && m16 >= a.part_start[part + 1]) ++part;
        int block = a.interleaved ? (m16 & 1) * a.part_nested[1] * 256 + (m16 >> 1) * rows16
                                  : a.part_nested[part] * 256 + (m16 - a.part_start[part]) * rows16;
        int at = min((block >> 8) + j, a.nested_count - 1);
        copy_4((char*)(sh.nested + i), a.matrix + a.nested_start + 4 * at);
        if (j == 0) {
            *(int*)(sh.meta + m) = block & 255;
            copy_4((char*)(sh.meta + m) + 4, meta + m * 8 + 4);
        }
    }
#endif
}

// Where the warp's sums of a tile lie.
__device__ inline char* buffer_of(const Shared& sh, int tile, int warp) {
    return sh.sums + (tile % BUFFERS * WARPS + warp) * SUMS_NBYTES;
}

// A warp's 128 columns of x, as B's registers: [64 columns][8 tokens][32 columns].
struct Slice {
    u32 b[2][FRAGMENTS][2][4];

    // Rows of 256 bytes pass through the warp's part of two buffers, pieces of 16 bytes exchanged so that lanes meet in no bank.
    __device__ inline char* place(const Shared& sh, int warp, int row, int piece) {
        return buffer_of(sh, row / (TOKENS / 2), warp) + row % (TOKENS / 2) * 256 + (piece ^ (row & 7)) * 16;
    }

    __device__ inline void ask(const Args& a, const Shared& sh, int slice, int warp, int lane) {
        int piece = lane & 15;
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) {
            int row = 2 * i + (lane >> 4);
            copy_16(place(sh, warp, row, piece), a.x + ((long long)min(row, a.M - 1) * a.K + slice * 128 + piece * 8) * 2, true);
        }
    }

    __device__ inline void take(const Shared& sh, int warp, int lane) {
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    load_matrices(b[kb][f][i], place(sh, warp, 8 * f + (lane & 7), 8 * kb + 4 * i + (lane >> 3)));
#if SCALE_KIND == 2
#pragma unroll
                    for (int s = 0; s < 4; s += 2) {  // columns in the order of Levels
                        u32 low = b[kb][f][i][s], high = b[kb][f][i][s + 1];
                        b[kb][f][i][s] = __byte_perm(low, high, 0x5410);
                        b[kb][f][i][s + 1] = __byte_perm(low, high, 0x7632);
                    }
#endif
                }
    }
};

// What the sums over the columns of a scale begin with: for integers, which are 136 too large, -136 times those of x.
struct Bias {
    float of[2][GROUPS][4 * FRAGMENTS];

    __device__ inline Bias(const Slice& x) {
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                for (int f = 0; f < FRAGMENTS; ++f) {
                    float* sums = of[kb][group] + 4 * f;
                    sums[0] = sums[1] = sums[2] = sums[3] = 0;
#if SCALE_KIND == 2
                    const u32 minus_bias[4] = {MINUS_BIAS, MINUS_BIAS, MINUS_BIAS, MINUS_BIAS};
#pragma unroll
                    for (int s = group * STEPS_PER_SCALE; s < (group + 1) * STEPS_PER_SCALE; ++s)
                        mma(sums, minus_bias, x.b[kb][f][s / 2][s % 2 * 2], x.b[kb][f][s / 2][s % 2 * 2 + 1]);
#endif
                }
    }
};

// The scales of a lane's four rows: g, g + 8, g + 16, g + 24.
struct Scales {
    float of[2][GROUPS][4];  // [64 columns]

    __device__ inline Scales(const Args& a, const Shared& sh, const char* found, int tile, int slice, int lane) {
        int g = lane >> 2, half = slice & 1;
#if SCALE_KIND == 0
        // Each lane has one row's, and gets others' from their lanes.
        u32 codes = *(const unsigned short*)(found + lane * 4 + half * 2);
        int m16 = 2 * tile + (lane >> 4);
        float2 meta = sh.meta[m16];
        int block = __float_as_int(meta.x) + (lane & 15) * (a.K / 64) + 4 * (slice >> 1);
        float nested = sh.nested[m16 * a.nested_span + (block >> 8)], offset = meta.y * a.unscale;
#pragma unroll
        for (int kb = 0; kb < 2; ++kb) {
            float mine = sh.map[codes >> (8 * kb) & 255] * nested + offset;
#pragma unroll
            for (int i = 0; i < 4; ++i) of[kb][0][i] = __shfl_sync(0xffffffff, mine, g + 8 * i);
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const char* row = found + ((g + 8 * i) * SCALES_PER_ROW + half * (128 / SCALE_COLUMNS)) * SCALE_NBYTES;
#if SCALE_KIND == 1
            float2 v = *(const float2*)row;
            of[0][0][i] = v.x * a.unscale, of[1][0][i] = v.y * a.unscale;
#else
#pragma unroll
            for (int kb = 0; kb < 2; ++kb)
#pragma unroll
                for (int group = 0; group < GROUPS; ++group)
                    of[kb][group][i] =
                        float_of_half(((const unsigned short*)row)[(kb * 64 + group * 16 * STEPS_PER_SCALE) / SCALE_COLUMNS]);
#endif
        }
#endif
    }
};

// Rows of a tile from the `rt`-th 16 on times the slice; words are those of [64 columns][16 rows].
__device__ inline void multiply(const Shared& sh, const uint4 (&words)[2][2], int rt, const Slice& x, const Bias& bias,
                                const Scales& scales, float (&sums)[ROWS16][4 * FRAGMENTS], u32 key) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        float part[2][ROWS16][4 * FRAGMENTS];
#pragma unroll
        for (int kb = 0; kb < 2; ++kb)
#pragma unroll
            for (int r = 0; r < ROWS16; ++r)
#pragma unroll
                for (int i = 0; i < 4 * FRAGMENTS; ++i) part[kb][r][i] = bias.of[kb][group][i];
#pragma unroll
        for (int s = group * STEPS_PER_SCALE; s < (group + 1) * STEPS_PER_SCALE; ++s)
#pragma unroll
            for (int kb = 0; kb < 2; ++kb)
#pragma unroll
                for (int r = 0; r < ROWS16; ++r) {
                    const uint4& w = words[kb][rt + r];
                    Levels levels(sh.lut, s == 0 ? w.x : s == 1 ? w.y : s == 2 ? w.z : w.w, key);
#pragma unroll
                    for (int f = 0; f < FRAGMENTS; ++f)
                        mma(part[kb][r] + 4 * f, levels.a, x.b[kb][f][s / 2][s % 2 * 2], x.b[kb][f][s / 2][s % 2 * 2 + 1]);
                }
#pragma unroll
        for (int r = 0; r < ROWS16; ++r)
#pragma unroll
            for (int i = 0; i < 4 * FRAGMENTS; ++i) {
                int row = 2 * (rt + r) + (i >> 1 & 1);
                float both = part[0][r][i] * scales.of[0][group][row] + part[1][r][i] * scales.of[1][group][row];
                sums[r][i] = group ? sums[r][i] + both : both;
            }
    }
}

// A warp's sums of a tile, by token; `to` is the lane's place.
__device__ inline void store_sums(char* to, int rt, const float (&sums)[ROWS16][4 * FRAGMENTS]) {
#pragma unroll
    for (int r = 0; r < ROWS16; ++r)
#pragma unroll
        for (int i = 0; i < 4 * FRAGMENTS; ++i)
            *(float*)(to + (i / 4 * 8 + (i & 1)) * SUM_NBYTES + (16 * (rt + r) + 8 * (i >> 1 & 1)) * 4) = sums[r][i];
}

// Four rows of a token from all warps.
__device__ inline float4 added(const char* at) {
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        float4 v = *(const float4*)(at + w * SUMS_NBYTES);
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    return sum;
}

// A part says by itself that it has come, so nobody has to fence or to count.
__device__ inline u32 bits_of(float sum) {
    u32 bits = __float_as_uint(sum);
    return bits == NO_SUM ? NAN_BITS : bits;
}

__device__ inline bool has_come(uint4 v) { return v.x != NO_SUM && v.y != NO_SUM && v.z != NO_SUM && v.w != NO_SUM; }

__device__ inline uint4* part_of(const Args& a, int split, int tile, int item) {
    return (uint4*)a.parts + (split * a.tiles + tile) * (a.M * 8) + item;
}

__device__ inline void store_bfloat16(unsigned short* to, float4 y, int rows, bool aligned) {
    unsigned short h[4] = {to_bfloat16(y.x), to_bfloat16(y.y), to_bfloat16(y.z), to_bfloat16(y.w)};
    if (aligned) {
        *(uint2*)to = {h[0] | (u32)h[1] << 16, h[2] | (u32)h[3] << 16};
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (i < rows) to[i] = h[i];
}

__device__ inline void store_floats(float* to, float4 y, int rows, bool aligned) {
    if (aligned) {
        *(float4*)to = y;
        return;
    }
    if (rows > 0) to[0] = y.x;
    if (rows > 1) to[1] = y.y;
    if (rows > 2) to[2] = y.z;
    if (rows > 3) to[3] = y.w;
}

// A tile of the last split whose other parts are to be added.
struct Open {
    int tile;
    float4 sum;
};

__device__ inline void finish(const Args& a, const Open& open, int item) {
    float4 y = {};
    uint4 of[MAX_SPLITS - 1];
    if (a.splits > 1) {
        bool all;
        do {
            all = true;
#pragma unroll
            for (int s = 0; s < MAX_SPLITS - 1; ++s)
                if (s < a.splits - 1) of[s] = load_part(part_of(a, s, open.tile, item));
#pragma unroll
            for (int s = 0; s < MAX_SPLITS - 1; ++s)
                if (s < a.splits - 1) all &= has_come(of[s]);
        } while (!all);
#pragma unroll
        for (int s = 0; s < MAX_SPLITS - 1; ++s)
            if (s < a.splits - 1) {
                store_part(part_of(a, s, open.tile, item), {NO_SUM, NO_SUM, NO_SUM, NO_SUM});
                y.x += __uint_as_float(of[s].x), y.y += __uint_as_float(of[s].y);
                y.z += __uint_as_float(of[s].z), y.w += __uint_as_float(of[s].w);
            }
    }
    y.x += open.sum.x, y.y += open.sum.y, y.z += open.sum.z, y.w += open.sum.w;
    int n = open.tile * 32 + (item & 7) * 4;
    if (n < a.N) store_bfloat16((unsigned short*)a.out + (long long)(item >> 3) * a.N + n, y, a.N - n, a.N % 4 == 0);
}

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
    load_nested(a, sh, share);
    // Weights never change, so the stream begins before the kernel ahead of this one has ended.
    ask_ahead(min(SLOTS, (a.first_slots + WARPS - 1 - warp) / WARPS));
    fill_tables(a, sh, lane, warp);
    wait_for_previous_kernel();
    Slice x;
    x.ask(a, sh, slice, warp, lane);
    ask_ahead(SLOTS);
    wait_for_copies();
    __syncthreads();
    x.take(sh, warp, lane);
    Bias bias(x);

    bool last = a.parts != nullptr && share.split == a.splits - 1;
    int team = warp / TEAM, item = (warp - team * TEAM) * 32 + lane, turn = 0;
    bool own = item < a.M * 8;
    Open open = {-1};
    char* to = buffer_of(sh, 0, warp) + (lane & 3) * 2 * SUM_NBYTES + (lane >> 2) * 4;
    const char* added_from = buffer_of(sh, 0, 0) + (item >> 3) * SUM_NBYTES + (item & 7) * 16;
    auto add = [&](int i) {
        int b = i % BUFFERS;
        barrier_wait(sh.bars + 2 * b, i / BUFFERS & 1);
        float4 y = {};
        if (own) y = added(added_from + b * (WARPS * SUMS_NBYTES));
        __syncwarp();
        if (lane == 0) barrier_arrive(sh.bars + 2 * b + 1);
        if (!own) return;
        int tile = share.tile + share.local(i);
        if (last) {
            if (open.tile >= 0) finish(a, open, item);
            open = {tile, y};
        } else if (a.parts != nullptr) {
            store_part(part_of(a, share.split, tile, item), {bits_of(y.x), bits_of(y.y), bits_of(y.z), bits_of(y.w)});
        } else {
            int n = tile * 32 + (item & 7) * 4;
            float* to = (float*)a.out + ((long long)share.split * a.M + (item >> 3)) * a.N + n;
            if (n < a.N) store_floats(to, y, a.N - n, a.N % 4 == 0);
        }
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
        __syncwarp();
        if (left) ask(slot);
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
    if (open.tile >= 0) finish(a, open, item);
}
