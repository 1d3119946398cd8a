// Of slices.cu: sizes, arguments, and which tiles a block has.

#define FRAGMENTS (TOKENS / 8)         // of B, 8 tokens each
#define GROUPS (4 / STEPS_PER_SCALE)   // of 64 columns, that have a scale each
#define ROWS16 (2 / FRAGMENTS)         // rows that a warp multiplies at once, in 16: four chains of products side by side
#define SLOT_STRIDE (SLOT_NBYTES + 16) // with the slot's barrier
#define SUM_NBYTES 144                 // from token to token of 32 sums, so that lanes meet in no bank
#define SUMS_NBYTES (TOKENS * SUM_NBYTES)  // of a warp
#define BUFFERS 2                      // tiles whose sums can wait
#define TEAM (2 * FRAGMENTS)           // warps that add a tile's sums, four rows of a token each thread
#define TEAMS (WARPS / TEAM)
#define MAX_SPLITS 4                   // of K
#define NO_SUM 0xffffffffu   // what stands where a part has not come yet: a NaN, but not the one that sums become
#define NAN_BITS 0x7fffffffu

struct Args {
    const char* matrix;
    const char* x;    // bfloat16 [M, K]
    char* out;        // bfloat16 [M, N]; float32 [splits, M, N] if there are no `parts`
    int* parts;       // float32 [splits - 1, tiles, M or up to 3 more, 32]; NO_SUM before and after
    int M, N, K, tiles, chunks, splits;
    int blocks;       // of each split but the last, which has the others
    int block_tiles;  // most tiles of a block
    int first_slots;  // of all rings of a block, asked for before x is
    Codes codes;
};

struct Shared : Tables {
    char *ring, *sums;
    u64* bars;  // of each buffer: that it is full, that it is empty
};

// Of a tile, four rows of a token each. Warps have whole ones, with tokens that there are not: where lanes part, the ones
// that add go their way alone for long.
__device__ inline int items(const Args& a) { return (a.M + 3) / 4 * 32; }

// Where a warp's sums of the i-th tile lie.
__device__ inline char* buffer_of(const Shared& sh, int i, int warp) {
    return sh.sums + (i % BUFFERS * WARPS + warp) * SUMS_NBYTES;
}

// Of tiles among blocks; the first ones have those that are left over.
struct Division {
    int each, more;
    __device__ inline Division(int tiles, int blocks) : each(tiles / blocks), more(tiles - each * blocks) {}
    __device__ inline int first(int block) const { return block * each + min(block, more); }
    __device__ inline int block_of(int tile) const {
        int longer = more * (each + 1);
        return tile < longer ? tile / (each + 1) : more + (tile - longer) / each;
    }
};

// A block's tiles, in a circle: those of the last split begin with the one that other splits' blocks begin with, so that
// their parts come in the order in which they are added.
struct Share {
    int split, tile, count, begin;

    __device__ inline Share(const Args& a, int block) {
        Division others(a.tiles, a.blocks);
        split = min(block / a.blocks, a.splits - 1);
        block -= split * a.blocks;
        bool last = split == a.splits - 1;
        Division own = last ? Division(a.tiles, gridDim.x - split * a.blocks) : others;
        tile = own.first(block);
        count = own.first(block + 1) - tile;
        begin = 0;
        if (last && count > 0) {
            int next = others.first(others.block_of(tile + count - 1)) - tile;
            begin = max(next, 0);
        }
    }

    // Of the i-th that is taken.
    __device__ inline int local(int i) const {
        i += begin;
        return i < count ? i : i - count;
    }
};
