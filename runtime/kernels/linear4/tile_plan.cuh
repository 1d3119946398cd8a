// What the blocks of tile.cu work on, and in which order. Macros: see there.

struct Problem {
    void* out;                 // [rows of x, N]
    const u64* matrices;       // [E] addresses of records if GROUPED, else the matrix itself
    u64 matrix_start;          // of the matrix in its record
    u64 meta_start;            // of first blocks and offsets, in the matrix
    u64 nested_start;          // of second-level scales
    const int* offsets;        // [E + 1] first token of each expert, if GROUPED
    const long long* rows;     // [rows of x], if SCATTERED
    const float* factors;      // [rows of x], if SCALED
    const u32* table;          // [256] byte -> two levels
    const float* dynamic_map;  // [256]
    float* partials;           // [blocks, 256 * 128]
    int* flags;                // [blocks, 4], all 0 between launches
    float inverse;             // scales are multiplied by it
    int experts, tokens, N, K;  // N: width of the output
    int tiles;                 // of 32 rows of W
    int chunks, chunk_nbytes;
    int band;                  // tiles of tokens that share a pass over W
};

// Which part of which tile a block (or cluster) makes, one after the other. A unit is 64 columns of a tile.
struct Walk {
    int blocks, total;     // units of a tile; tiles
    int shared, sharers;   // tiles cut among blocks, and how many blocks; none of these is without work
    int low, high, tile;   // still to do: units of shared tiles, then whole tiles
    int top;               // where the units of shared tiles end
    int begin, end, now;   // the current part: its units, its tile

    __device__ Walk(int tiles, int blocks_per_tile) : blocks(blocks_per_tile), total(tiles) {
        int grid = gridDim.x / CLUSTER, member = blockIdx.x / CLUSTER;
        shared = tiles % grid == 0 ? 0 : tiles < 2 * grid ? tiles : tiles % grid + grid;
        sharers = min(grid, (shared * blocks + 3) / 4);
        low = first_unit(min(member, sharers));
        high = top = first_unit(min(member + 1, sharers));
        tile = shared + member;
    }

    // To add others' sums and to store takes a tile's last block as long as some units, which count as such.
    __device__ int first_unit(int block) const {
        int length = blocks + FINISH_UNITS;
        int at = sharers ? (int)((long long)shared * length * block / sharers) : 0, tile = at / length;
        return tile * blocks + min(at - tile * length, blocks);
    }

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
        tile += gridDim.x / CLUSTER;
        return true;
    }
};

// Whose sums over the first columns of a tile the block that has its last ones adds.
struct Others {
    int early = -1;            // whose come before it begins: they are what it begins with
    int first = 0, last = -1;  // the others; added at the end, the last one's first

    __device__ explicit Others(const Walk& walk) {
        if (walk.begin == 0 || walk.end < walk.blocks) return;
        int start = walk.now * walk.blocks;
        first = last = (int)blockIdx.x / CLUSTER - 1;
        while (walk.first_unit(first) > start) first--;
        // The first one has done this part before all else, if it has one of the tile before as well.
        int theirs = walk.first_unit(first + 1) - start, before = walk.top - start - walk.blocks;
        if (STAGED_SUMS && walk.first_unit(first) < start && theirs + HAND_OVER_UNITS <= before) early = first++;
    }
};

// Where a block's share of a tile lies.
struct Place {
    int first_tile, tiles;  // of 32 rows; there may be none
    int token, tokens;      // its first token, the end of its expert's tokens
    const u8* matrix;

    __device__ __forceinline__ bool narrow() const { return WIDE && tokens - token <= 128; }
};

__device__ __forceinline__ int row_tiles(const Problem& p) { return (p.tiles + CLUSTER_TILES - 1) / CLUSTER_TILES; }

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
    place.first_tile = in_band / width * CLUSTER_TILES + blockIdx.x % CLUSTER * TILES;
    place.tiles = max(min(TILES, p.tiles - place.first_tile), 0);
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

