// Of slices.cu: from the sums of warps to outputs.

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

// Item i of a tile belongs to token i / 8.
__device__ inline uint4* part_of(const Args& a, int split, int tile, int item) {
    return (uint4*)a.parts + (split * a.tiles + tile) * items(a) + item;
}

// Four rows of a tile whose other parts are to be added, if there is a tile.
struct Open {
    int tile;
    float4 sum;
};

// Adds them, of all splits in their order, and leaves their places empty. They come from blocks before this one, so it
// waits for nothing that waits for it.
__device__ inline void finish(const Args& a, const Open& open, int item) {
    if (open.tile < 0) return;
    uint4 part[MAX_SPLITS - 1];
    bool all;
    do {
        all = true;
#pragma unroll
        for (int s = 0; s < MAX_SPLITS - 1; ++s)
            if (s < a.splits - 1) part[s] = load_part(part_of(a, s, open.tile, item));
#pragma unroll
        for (int s = 0; s < MAX_SPLITS - 1; ++s)
            if (s < a.splits - 1) all &= has_come(part[s]);
    } while (!all);
    float4 y = {};
#pragma unroll
    for (int s = 0; s < MAX_SPLITS - 1; ++s)
        if (s < a.splits - 1) {
            store_part(part_of(a, s, open.tile, item), {NO_SUM, NO_SUM, NO_SUM, NO_SUM});
            y.x += __uint_as_float(part[s].x), y.y += __uint_as_float(part[s].y);
            y.z += __uint_as_float(part[s].z), y.w += __uint_as_float(part[s].w);
        }
    y.x += open.sum.x, y.y += open.sum.y, y.z += open.sum.z, y.w += open.sum.w;
    int token = item >> 3, n = open.tile * 32 + (item & 7) * 4;
    if (token >= a.M || n >= a.N) return;
    store_bfloat16((unsigned short*)a.out + (long long)token * a.N + n, y, a.N - n, a.N % 4 == 0);
}

// What becomes of the sums of four rows of a tile. Those of the last split stay until the thread has the next ones, as by
// then the other parts are there.
__device__ inline void put(const Args& a, int split, int tile, int item, float4 y, Open& open) {
    if (a.parts == nullptr) {
        int token = item >> 3, n = tile * 32 + (item & 7) * 4;
        float* to = (float*)a.out + ((long long)split * a.M + token) * a.N + n;
        if (token < a.M && n < a.N) store_floats(to, y, a.N - n, a.N % 4 == 0);
    } else if (split < a.splits - 1) {
        store_part(part_of(a, split, tile, item), {bits_of(y.x), bits_of(y.y), bits_of(y.z), bits_of(y.w)});
    } else {
        finish(a, open, item);
        open = {tile, y};
    }
}
