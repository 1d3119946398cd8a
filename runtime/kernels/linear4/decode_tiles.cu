// Tiles of the layout of tiles.py to a bfloat16 matrix [N, K]: a level times its scale in float32, rounded once.
//
// A block of four warps decodes chunks of 32 rows x 256 columns of one tile; a warp its own 64 columns, 16 rows at a
// time, turned from the order of the tensor cores to rows in shared memory. Macros: NF4 (else int4), NESTED (double quantization),
// SCALE_COLUMNS (columns that share a scale).

constexpr int CODES_NBYTES = 4096;
constexpr int SCALE_BLOCKS = 256 / SCALE_COLUMNS;
constexpr int PITCH = 36;  // words of a row of 64: a step of 4 spreads rows over all banks

struct Source {
    const u8* matrix;
    u64 meta_start, nested_start;
    const float* levels;       // [16]
    const float* dynamic_map;  // [256]
    int chunks, chunk_nbytes, K;
};

// Where the scales of a row of a tile come from.
struct Row {
    int row, first;  // in the tile; its first block, if NESTED
    float offset;

    __device__ __forceinline__ Row(const Source& p, int tile, int row) : row(row) {
#if NESTED
        int2 meta = ((const int2*)(p.matrix + p.meta_start))[2 * tile + row / 16];
        first = meta.x + (row & 15) * (p.K / 64);
        offset = __int_as_float(meta.y);
#endif
    }

    __device__ __forceinline__ float scale(const Source& p, const u8* chunk, int number, int block) const {
        const u8* scales = chunk + CODES_NBYTES;
        int i = row * SCALE_BLOCKS + block;
#if NESTED
        float nested = ((const float*)(p.matrix + p.nested_start))[(first + number * 4) / 256];
        return __fadd_rn(__fmul_rn(p.dynamic_map[scales[i]], nested), offset);
#elif NF4
        return ((const float*)scales)[i];
#else
        return float_of_half(((const unsigned short*)scales)[i]);
#endif
    }
};

extern "C" __global__ void __launch_bounds__(128)
    decode_tiles(const Source p, unsigned short* out, int first_row, int end_row) {
    __shared__ float levels[16];
    __shared__ __align__(16) u32 turned[4][16 * PITCH];
    constexpr int SCALES = SCALE_COLUMNS < 64 ? 2 : 1;  // of a row in 64 columns
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int tile = first_row / 32 + blockIdx.y;
    if (threadIdx.x < 16) levels[threadIdx.x] = p.levels[threadIdx.x];
    __syncthreads();
    u32* mine = turned[warp];
    Row rows[4] = {Row(p, tile, g), Row(p, tile, g + 8), Row(p, tile, g + 16), Row(p, tile, g + 24)};
    for (int chunk = blockIdx.x; chunk < p.chunks; chunk += gridDim.x) {
        const u8* here = p.matrix + ((u64)tile * p.chunks + chunk) * p.chunk_nbytes;
        const uint4* codes = (const uint4*)here + 64 * warp + lane;
        uint4 loaded[2] = {codes[0], codes[32]};
        float scales[4][SCALES];
#pragma unroll
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < SCALES; i++)
                scales[r][i] = rows[r].scale(p, here, chunk, (64 * warp + 32 * i) / SCALE_COLUMNS);
#pragma unroll
        for (int rt = 0; rt < 2; rt++) {
            u32 words[4] = {loaded[rt].x, loaded[rt].y, loaded[rt].z, loaded[rt].w};
#pragma unroll
            for (int s = 0; s < 4; s++)
                for (int i = 0; i < 4; i++) {
                    u32 byte = words[s] >> 8 * i & 255;
                    float scale = scales[2 * rt + (i & 1)][s * SCALES / 4];
                    mine[(g + 8 * (i & 1)) * PITCH + 8 * s + 4 * (i >> 1) + t] =
                        pair_of(levels[byte >> 4] * scale, levels[byte & 15] * scale);
                }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int local = 4 * i + lane / 8, row = 32 * tile + 16 * rt + local;
                int column = 256 * chunk + 64 * warp + 8 * (lane % 8);
                uint4 values = *(const uint4*)(mine + local * PITCH + 4 * (lane % 8));
                if (row < end_row && column < p.K) *(uint4*)(out + (u64)(row - first_row) * p.K + column) = values;
            }
            __syncwarp();
        }
    }
}
