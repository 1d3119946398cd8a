// What few_ptx.cuh is on the GPU, on top of cuda.h; SCALE_KIND and the rest are macros as for the kernel.

#include <memory>

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define EVICT_NORMAL 0
#define ARRIVALS (__CUDA_ARCH__ >= 900 ? 1 : 32)
struct float2 { float x, y; };
struct uint2 { u32 x, y; };
static int __float_as_int(float f) { return (int)__float_as_uint(f); }
static float2 make_float2(float x, float y) { return {x, y}; }

static void barrier_init(u64* bar, int count) { barrier_init(shared_address(bar), (u32)count); }
static void barrier_wait(u64* bar, u32 parity) { barrier_wait(shared_address(bar), parity); }
static void barrier_expect(u64* bar, int nbytes) { barrier_expect(shared_address(bar), (u32)nbytes); }
static void barrier_arrive(u64* bar) { barrier_arrive(shared_address(bar)); }
static bool elected() { return lane() == 0; }
static void copy_bulk(char* to, const char* from, int nbytes, u64* bar, u64 = 0) {
    copy_bytes(shared_address(to), from, nbytes, shared_address(bar));
}

// A thread's own copies: they are there when it waits for all, or when its arrival at a barrier after them takes effect.
typedef std::shared_ptr<std::function<void()>> OwnCopy;
static std::map<Fiber*, std::vector<OwnCopy>> own_copies;
static void own(std::function<void()> copy) {
    own_copies[current].push_back(std::make_shared<std::function<void()>>(copy));
}
static void make_all(const std::vector<OwnCopy>& some) {
    for (const OwnCopy& copy : some)
        if (*copy) (*copy)(), *copy = nullptr;
}
static void copy_16(char* to, const char* from, bool there) {
    if ((u64)to % 16 || (u64)from % 16) fail("a copy that is not aligned");
    own([=] { there ? (void)memcpy(to, from, 16) : (void)memset(to, 0, 16); });
}
static void copy_4(char* to, const char* from) {
    if ((u64)to % 4 || (u64)from % 4) fail("a copy that is not aligned");
    own([=] { memcpy(to, from, 4); });
}
static void wait_for_copies() {
    make_all(own_copies[current]);
    own_copies[current].clear();
}
static void barrier_arrive_after_copies(u64* bar) {
    std::vector<OwnCopy> before = own_copies[current];
    Block* block = current->block;
    u32 address = shared_address(bar);
    copies.push_back([=] {
        make_all(before);
        arrive(block, address);
    });
}

static uint4 load_part(const uint4* from) {
    static int in_vain;
    yield();
    uint4 v = *from;
    bool has_come = v.x != ~0u && v.y != ~0u && v.z != ~0u && v.w != ~0u;
    in_vain = has_come ? 0 : in_vain + 1;
    moved |= in_vain < 100000;
    return v;
}
static void store_part(uint4* to, uint4 v) { *to = v; }
static u32 nothing_of(u32, int) { return 0; }
static float __fdividef(float a, float b) { return a / b; }
static int __popc(u32 v) { return __builtin_popcount(v); }
static int __ffs(u32 v) { return __builtin_ffs(v); }

static u32 __ballot_sync(u32, bool vote) {
    warp().values[lane()][0] = vote;
    __syncwarp();
    u32 all = 0;
    for (int l = 0; l < 32; l++) all |= warp().values[l][0] << l;
    __syncwarp();
    return all;
}
static u32 __match_any_sync(u32, int value) {
    warp().values[lane()][0] = value;
    __syncwarp();
    u32 same = 0;
    for (int l = 0; l < 32; l++) same |= (u32)(warp().values[l][0] == (u32)value) << l;
    __syncwarp();
    return same;
}
static u32 __shfl_sync(u32, u32 value, int from) { return exchange((int)value, from); }
static float __shfl_sync(u32, float value, int from) {
    return __uint_as_float((u32)exchange((int)__float_as_uint(value), from));
}
static u64 __shfl_sync(u32, u64 value, int from) {
    u64 high = (u32)exchange((int)(value >> 32), from);
    return high << 32 | (u32)exchange((int)value, from);
}

static void load_matrices(u32 (&b)[4], const char* row) {
    if ((u64)row % 16) fail("a row that is not aligned");
    memcpy(warp().values[lane()], &row, sizeof(row));
    __syncwarp();
    for (int i = 0; i < 4; i++) {
        const char* from;
        memcpy(&from, warp().values[8 * i + lane() / 4], sizeof(from));
        memcpy(&b[i], from + lane() % 4 * 4, 4);
    }
    __syncwarp();
}
static void mma(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    memcpy(warp().values[lane()], mine, sizeof(mine));
    __syncwarp();
    int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; i++) {
        int lower = i / 2, column = 2 * t + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; k++) {
            u32 left = warp().values[4 * g + k % 8 / 2][lower + k / 8 * 2];
            u32 right = warp().values[4 * column + k % 8 / 2][4 + k / 8];
            sum += (k % 2 ? high_of(left) : low_of(left)) * (k % 2 ? high_of(right) : low_of(right));
        }
        d[i] += sum;
    }
    __syncwarp();
}
static unsigned short to_bfloat16(float f) { return bfloat16_of(f); }
