// Sizes of tile.cu, and what lies where in its shared memory. Macros: see there.

constexpr bool WIDE = TOKENS == 256;
constexpr int CLUSTER = WIDE ? 2 : 1;  // blocks that make a tile of 256 rows together
// A warp that multiplies has 16 rows: few tokens leave registers for four warpgroups, which hide each other's waits.
constexpr int CONSUMERS = TOKENS <= 32 ? 16 : TOKENS == 64 ? 12 : 8;  // such warps
constexpr int ROWS = 16 * CONSUMERS;                                  // of a block
constexpr int TILES = ROWS / 32;
constexpr int CLUSTER_TILES = TILES * CLUSTER;
constexpr int THREADS = 128 + 32 * CONSUMERS;
constexpr int REGISTERS = WIDE ? 224 : CONSUMERS == 16 ? 96 : CONSUMERS == 12 ? 144 : 208;  // of a thread that multiplies
constexpr int COPY_REGISTERS = CONSUMERS == 16 ? 480 - 4 * REGISTERS : 504 - CONSUMERS / 4 * REGISTERS;  // of the others
constexpr int SCALE_WARPS = 3;
constexpr int CODES_NBYTES = 4096;                  // of a chunk of 32 rows x 256 columns
constexpr int SCALE_BLOCKS = 256 / SCALE_COLUMNS;   // in a row of a chunk
constexpr int SCALES = SCALE_COLUMNS < 64 ? 2 : 1;  // in 64 columns of a row
constexpr int SCALE_SLOTS = 3;
constexpr int SCALE_SLOT_NBYTES = ROWS * SCALE_BLOCKS * 4;
constexpr int MAX_EXPERTS = 256;

constexpr int FINISH_UNITS = 3;     // of 64 columns, that a tile's last block takes longer than others
constexpr int HAND_OVER_UNITS = 4;  // until what a block hands over is there

constexpr int SHARED_START = 1024;  // what the system keeps on sm_90
constexpr int SHARED_NBYTES = 232448;
constexpr int STARTS_AT = 512;
constexpr int MAP_AT = STARTS_AT + (GROUPED ? 4 * MAX_EXPERTS + 512 : 0);
constexpr int SCALES_AT = MAP_AT + (NESTED ? 1024 : 0);
constexpr int STAGING_PITCH = SILU ? 48 : 144;  // bytes of a token, and a step that spreads tokens over all banks
constexpr int STAGING_NBYTES = SILU ? 1024 : 4 * STAGING_PITCH;  // of a warp: 16 tokens of four warps, or what its neighbour gets
constexpr int STAGING_AT = SCALES_AT + SCALE_SLOTS * SCALE_SLOT_NBYTES;
constexpr int SMALL_END = STAGING_AT + (OUT_FLOAT ? 0 : CONSUMERS * STAGING_NBYTES);
constexpr int TABLE_STRIDE = WIDE ? 128 : 256;  // 256 tokens leave no room for more
constexpr int TABLE_AT = (SMALL_END + 1023) / 1024 * 1024;
constexpr int STAGES_AT = TABLE_AT + 256 * TABLE_STRIDE;
constexpr int BOX_TOKENS = WIDE ? 64 : TOKENS;  // that one copy brings
constexpr int X_NBYTES = TOKENS * 128;
constexpr int STAGE_NBYTES = X_NBYTES + ROWS * 32;
constexpr int STAGES_THAT_FIT = (SHARED_NBYTES - STAGES_AT) / STAGE_NBYTES;
constexpr int STAGES = STAGES_THAT_FIT < 24 ? STAGES_THAT_FIT : 24;
// Sums that blocks hand over, float4 [TOKENS / 8][multiplying threads]: the many of 256 tokens come in stages as well, in
// which they are under way together; few are there sooner by loads.
constexpr bool STAGED_SUMS = WIDE;
constexpr int SUM_ROWS = 8;  // of a stage
constexpr int SUM_ROW_NBYTES = 512 * CONSUMERS;
constexpr int SUM_STAGE_NBYTES = SUM_ROWS * SUM_ROW_NBYTES;
static_assert(!STAGED_SUMS || (SUM_STAGE_NBYTES <= STAGE_NBYTES && TOKENS / 8 % SUM_ROWS == 0));
static_assert(8 * (2 * STAGES + 2 * SCALE_SLOTS) <= STARTS_AT);

__device__ __forceinline__ u32 full_at(u32 base, u32 stage) { return base + 8 * stage; }
__device__ __forceinline__ u32 empty_at(u32 base, u32 stage) { return base + 8 * (STAGES + stage); }
__device__ __forceinline__ u32 scales_full_at(u32 base, u32 slot) { return base + 8 * (2 * STAGES + slot); }
__device__ __forceinline__ u32 scales_empty_at(u32 base, u32 slot) { return base + 8 * (2 * STAGES + SCALE_SLOTS + slot); }

struct Ring {
    u32 index = 0, phase = 0;
    template <int N>
    __device__ __forceinline__ void step() {
        if (++index == N) index = 0, phase ^= 1;
    }
};
