// Scales on their way from the layout to the multiplying warps: decoded, and made two numbers of 16 bits. Macros: see
// tile.cu.

// A scale twice if GROUPED, else as its bfloat16 (low half) and what that lacks (high half).
__device__ __forceinline__ u32 in_16_bits(float scale) {
    if (GROUPED) return two_halves(scale);
    u32 first = pair_of(scale, 0.0f);
    return pair_of(low_of(first), scale - low_of(first));
}

// The scales of one row of a chunk, as they are stored.
struct RowScales {
    u32 raw[NF4 && !NESTED ? 4 : NESTED ? 1 : SCALE_BLOCKS / 2];
    float nested, offset;

    // Without a branch, so that the loads of many rows are under way together.
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
    for (int i = 0; i < SCALE_BLOCKS; i++) words[i] = in_16_bits(row.scale(i, map) * inverse);
    if (SCALE_BLOCKS == 2) {
        store_shared2(address, words[0], words[1]);
    } else {
#pragma unroll
        for (int i = 0; i < SCALE_BLOCKS; i += 4)
            store_shared4(address + 4 * i, uint4{words[i], words[i + 1], words[i + 2], words[i + 3]});
    }
}

// The chunks whose scales a worker decodes: every SCALE_WARPS-th of the block.
struct Chunks {
    const Problem& p;
    const int* starts;
    Walk walk;
    Place place;
    int chunk = 0, left = 0, number = -1;

    __device__ Chunks(const Problem& p, const int* starts, int tiles) : p(p), starts(starts), walk(tiles, 4 * p.chunks) {}

    __device__ __forceinline__ bool advance(int steps) {
        number += steps;
        while (left < steps) {
            steps -= left;
            if (!walk.next()) return false;
            place = place_of(p, starts, walk.now);
            chunk = (walk.begin >> 2) - 1;
            left = ((walk.end - 1) >> 2) - chunk;
        }
        left -= steps, chunk += steps;
        return true;
    }

    __device__ __forceinline__ void load(RowScales (&rows)[TILES], int lane) const {
#pragma unroll
        for (int i = 0; i < TILES; i++)
            rows[i].load(p, place.matrix, min(place.first_tile + i, p.tiles - 1), lane, chunk);
    }
};

// Loads a chunk's scales while the one before is decoded.
__device__ __forceinline__ void decode_scales(const Problem& p, u32 base, const int* starts, float* map, int tiles,
                                              int worker) {
    int lane = threadIdx.x & 31;
    RowScales rows[TILES], next[TILES];
    Chunks chunks(p, starts, tiles);
    bool more = chunks.advance(worker + 1);
    if (more) chunks.load(rows, lane);
    if (NESTED) {
        for (int i = threadIdx.x - 32; i < 256; i += 32 * SCALE_WARPS) map[i] = p.dynamic_map[i];
        named_barrier(6, 32 * SCALE_WARPS);
    }
    while (more) {
        int slot = chunks.number % SCALE_SLOTS, round = chunks.number / SCALE_SLOTS;
        more = chunks.advance(SCALE_WARPS);
        if (more) chunks.load(next, lane);
        barrier_wait(scales_empty_at(base, slot), round & 1 ^ 1);
        u32 address = base + SCALES_AT + slot * SCALE_SLOT_NBYTES + lane * SCALE_BLOCKS * 4;
#pragma unroll
        for (int i = 0; i < TILES; i++)
            store_scales(address + i * 32 * SCALE_BLOCKS * 4, rows[i], map, p.inverse);
        barrier_arrive(scales_full_at(base, slot));
#pragma unroll
        for (int i = 0; i < TILES; i++) rows[i] = next[i];
    }
}

