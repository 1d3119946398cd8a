// Enough of CUDA for tile.cu on a CPU, one fiber a thread: numbers.cuh, ptx.cuh, wgmma.cuh and the language's own functions.
//
// Fibers run until they wait. What the hardware does later is done as late as can be: products only when they are
// waited for, copies at random times. A barrier that is overrun, and blocks that all wait, end the program.

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads, blocks)
using std::max;
using std::min;

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct Index { int x; };

// A matrix of 16-bit numbers as the copy engine sees it; the rest of the hardware's 128 bytes is unused.
struct alignas(64) TensorMap {
    const uint16_t* data;
    u64 rows, columns, box_rows;
    u64 unused[12];
};

static void fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    abort();
}

struct Phases {  // an mbarrier
    int count = 0, pending = 0, phase = 0;
    long nbytes = 0;
    void check() {
        if (pending < 0) fail("a barrier got more arrivals than it expects");
        if (pending == 0 && nbytes == 0) phase ^= 1, pending = count;
    }
};

struct Meeting { int arrived = 0, round = 0; };

struct Warp {
    Meeting meeting;
    u32 values[32][8];
};

struct Block {
    Index index;
    u8* memory;
    std::map<u32, Phases> barriers;
    Meeting named[16], all;
    std::vector<Warp> warps;
};

struct Product { std::function<void()> make; };

struct Fiber {
    ucontext_t context;
    Index thread;
    Block* block;
    bool done = false;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
};

static constexpr int MEMORY = 1 << 18;
static Index gridDim;
static std::vector<Block*> running;  // the cluster
static std::vector<Fiber*> fibers;
static std::vector<std::function<void()>> copies;
static Fiber* current;
static ucontext_t scheduler;
static std::mt19937 chance;
static Meeting cluster_meeting;
static bool moved;  // something happened since all fibers last had their turn

#define threadIdx (current->thread)
#define blockIdx (current->block->index)

static void yield() { swapcontext(&current->context, &scheduler); }

static void meet(Meeting& meeting, int threads) {
    int round = meeting.round;
    if (++meeting.arrived == threads) meeting.arrived = 0, meeting.round++, moved = true;
    while (meeting.round == round) yield();
    moved = true;
}

static Warp& warp() { return current->block->warps[threadIdx.x / 32]; }
static int lane() { return threadIdx.x & 31; }
static void __syncwarp() { meet(warp().meeting, 32); }
static void __syncthreads() { meet(current->block->all, 32 * current->block->warps.size()); }
static void named_barrier(int id, int threads) { meet(current->block->named[id], threads); }
static void cluster_barrier() { meet(cluster_meeting, 32 * current->block->warps.size() * running.size()); }
static void __trap() { fail("trap"); }

static int exchange(int value, int from) {
    warp().values[lane()][0] = value;
    __syncwarp();
    int got = warp().values[from][0];
    __syncwarp();
    return got;
}
static int __shfl_sync(u32, int value, int from) { return exchange(value, from); }
static int __shfl_up_sync(u32, int value, int step) { return exchange(value, max(lane() - step, 0)); }

// Shared memory: addresses as in the hardware, the rank in the cluster above 24 bits of offset.
static int rank_of(const Block* block) { return block->index.x % (int)running.size(); }
static u8* shared_memory() { return current->block->memory + 1024; }
static u32 shared_address(const void* p) { return (u32)((const u8*)p - current->block->memory) | rank_of(current->block) << 24; }
static u8* at(u32 address) {
    if ((address & 0xffffff) >= MEMORY || address >> 24 != (u32)rank_of(current->block)) fail("a wrong shared address");
    return current->block->memory + (address & 0xffffff);
}
static Phases& barrier_at(Block* block, u32 address) { return block->barriers[address & 0xffffff]; }

static void barriers_ready() {}
static void barrier_init(u32 barrier, u32 arrivals) {
    Phases& p = barrier_at(current->block, barrier);
    p.count = p.pending = arrivals;
}
static void arrive(Block* block, u32 barrier) {
    Phases& p = barrier_at(block, barrier);
    p.pending--, p.check(), moved = true;
}
static void barrier_arrive(u32 barrier) { arrive(current->block, barrier); }
static void barrier_arrive_at(u32 barrier, u32 rank) { arrive(running[rank], barrier); }
static void barrier_expect(u32 barrier, u32 nbytes) {
    barrier_at(current->block, barrier).nbytes += nbytes;
    barrier_arrive(barrier);
}
static void barrier_wait(u32 barrier, u32 parity) {
    while (barrier_at(current->block, barrier).phase == (int)parity) yield();
    moved = true;
}

static void later(std::function<void()> copy, Block* block, u32 barrier, u32 nbytes) {
    copies.push_back([=] {
        copy();
        Phases& p = barrier_at(block, barrier);
        p.nbytes -= nbytes, p.check(), moved = true;
    });
}
static void copy_bytes(u32 to, const void* from, u32 nbytes, u32 barrier) {
    if (to % 16 || (u64)from % 16 || nbytes % 16) fail("a copy that is not aligned");
    u8* place = at(to);
    later([=] { memcpy(place, from, nbytes); }, current->block, barrier, nbytes);
}
static void copy_box_to(u32 to, const TensorMap* map, int column, int row, u32 barrier, int blocks) {
    if (to % 1024) fail("a box that is not aligned");
    TensorMap m = *map;
    for (int rank = 0; rank < (int)running.size(); rank++) {
        if (!(blocks >> rank & 1)) continue;
        u8* place = running[rank]->memory + (to & 0xffffff);
        auto copy = [=] {
            for (u64 r = 0; r < m.box_rows; r++)
                for (u64 c = 0; c < 64; c++) {
                    bool inside = row + r < m.rows && column + c < m.columns;
                    u64 byte = (r * 128 + c * 2) ^ (r % 8 * 16);
                    *(uint16_t*)(place + byte) = inside ? m.data[(row + r) * m.columns + column + c] : 0;
                }
        };
        later(copy, running[rank], barrier, m.box_rows * 128);
    }
}
static void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    copy_box_to(to, map, column, row, barrier, 1 << rank_of(current->block));
}

static u32 load_shared(u32 a) { return *(u32*)at(a); }
static u32 load_table(u32 a) { return *(u32*)at(a); }
static uint4 load_shared4(u32 a) { return *(uint4*)at(a); }
static void store_shared(u32 a, u32 v) { *(u32*)at(a) = v; }
static void store_shared2(u32 a, u32 x, u32 y) { store_shared(a, x), store_shared(a + 4, y); }
static void store_shared4(u32 a, uint4 v) { *(uint4*)at(a) = v; }
static void store_floats4(u32 a, float x, float y, float z, float w) { *(float4*)at(a) = {x, y, z, w}; }

static void store_matrices_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    u32 mine[5] = {a, b, c, d, address};
    memcpy(warp().values[lane()], mine, sizeof(mine));
    __syncwarp();
    for (int m = 0; m < 4; m++)
        for (int e = 0; e < 2; e++) {
            u32 row = warp().values[8 * m + 2 * (lane() % 4) + e][4];
            *(uint16_t*)at(row + lane() / 4 * 2) = mine[m] >> 16 * e;
        }
    __syncwarp();
}

static float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static float __int_as_float(int v) { return __uint_as_float(v); }
static u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
#define __expf(x) std::exp(x)
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static void __stcg(float4* p, float4 v) { *p = v; }
static float4 __ldcg(const float4* p) { return *p; }
static u32 __byte_perm(u32 a, u32 b, u32 selector) {
    u64 both = (u64)b << 32 | a;
    u32 made = 0;
    for (int i = 0; i < 4; i++) made |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return made;
}

static u32 bfloat16_of(float f) {
    u32 v = __float_as_uint(f);
    return f != f ? 0x7fff : (v + 0x7fff + (v >> 16 & 1)) >> 16;
}
static float low_of(u32 pair) { return __uint_as_float(pair << 16); }
static float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
static u32 pair_of(float low, float high) { return bfloat16_of(low) | bfloat16_of(high) << 16; }
static u32 multiply_pairs(u32 a, u32 b) { return pair_of(low_of(a) * low_of(b), high_of(a) * high_of(b)); }
static u32 fma_pairs(u32 a, u32 b, u32 c) {
    return pair_of(std::fma(low_of(a), low_of(b), low_of(c)), std::fma(high_of(a), high_of(b), high_of(c)));
}
static float float_of_half(u32 h) {
    h &= 0xffff;
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp((float)fraction, -24);
    return h >> 15 ? -size : size;
}

static u32 half_of(float f) {
    float size = std::fabs(f);
    u32 sign = f < 0 ? 0x8000 : 0;
    if (size != size) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent = size > 0 ? std::max(std::ilogb(size), -14) : -14;
    u32 steps = (u32)std::lrint(std::ldexp(size, 10 - exponent));  // to even; of subnormal numbers less than 1024
    return sign | (((u32)(exponent + 14) << 10) + steps);
}
static float first_half(u32 pair) { return float_of_half(pair); }
static float second_half(u32 pair) { return float_of_half(pair >> 16); }
static u32 halves(float low, float high) { return half_of(low) | half_of(high) << 16; }
static u32 multiply_halves(u32 a, u32 b) { return halves(first_half(a) * first_half(b), second_half(a) * second_half(b)); }
static u32 two_halves(float value) { return halves(value, value); }

template <typename T>
static void keep(T&) {}
template <int N>
static void give_registers() {}
template <int N>
static void take_registers() {}

// These wait for the whole warp, as their .sync says.
static void wgmma_fence() { __syncwarp(); }
static void wgmma_commit() { current->groups.emplace_back(std::move(current->open)), current->open.clear(); }
template <int PENDING>
static void wgmma_wait() {
    __syncwarp();
    while (current->groups.size() > PENDING) {
        std::vector<Product> group = std::move(current->groups.front());
        current->groups.erase(current->groups.begin());
        for (Product& product : group) product.make();
    }
}

#if GROUPED
static float number_of(u32 bits) { return float_of_half(bits); }
#else
static float number_of(u32 bits) { return low_of(bits); }
#endif

template <int N>
struct Wgmma {
    template <int R>
    static void multiply(float (&d)[R], const u32 (&a)[4], u64 b, int keep) {
        u32 mine[4] = {a[0], a[1], a[2], a[3]}, start = (u32)(b & 0x3fff) << 4;
        if (b >> 62 != 1 || (b >> 32 & 0x3fff) != 64) fail("a descriptor of another layout");
        float* sums = d;
        current->open.push_back({[=] { make(sums, mine, start, keep); }});
    }
    static void make(float* d, const u32* mine, u32 start, int keep) {
        int g = lane() / 4, t = lane() % 4;
        memcpy(warp().values[lane()], mine, 16);
        __syncwarp();
        float rows[2][16];
        for (int k = 0; k < 16; k++)
            for (int r = 0; r < 2; r++) {
                u32 pair = warp().values[4 * g + k % 8 / 2][r + k / 8 * 2];
                rows[r][k] = number_of(k % 2 ? pair >> 16 : pair);
            }
        for (int i = 0; i < N / 2; i++) {
            int token = 8 * (i / 4) + 2 * t + i % 2;
            float sum = keep ? d[i] : 0.0f;
            for (int k = 0; k < 16; k++) {
                u32 byte = start + token * 128 + k * 2;
                byte ^= (byte >> 7 & 7) << 4;
                sum += rows[i >> 1 & 1][k] * number_of(*(uint16_t*)(current->block->memory + byte));
            }
            d[i] = sum;
        }
        __syncwarp();
    }
};

static void copies_see_stores() {}
static void expect_boxes(const TensorMap*) {}
static void publish(int* flag) { *flag = 1, moved = true; }
static void await(int* flag) {
    while (!*flag) yield();
    *flag = 0, moved = true;
}

// Nothing runs ahead of the kernel, but its own threads pass in any order.
static void wait_for_previous_kernel() { moved = true, yield(); }

static std::function<void()> kernel;
static void fiber_main() {
    kernel();
    current->done = true;
    moved = true;
    yield();
}

// Runs the clusters one after the other: a block waits for none but those before it.
static void run_grid(int grid, int cluster, int threads, u32 seed, std::function<void()> body) {
    constexpr size_t STACK = 1 << 17;
    chance.seed(seed), kernel = body, gridDim.x = grid;
    for (int first = 0; first < grid; first += cluster) {
        cluster_meeting = {};
        for (int i = 0; i < cluster; i++) {
            Block* block = new Block();
            block->index.x = first + i;
            block->memory = (u8*)aligned_alloc(1 << 18, MEMORY);
            memset(block->memory, 0xff, MEMORY);
            block->warps.resize(threads / 32);
            running.push_back(block);
        }
        std::vector<void*> stacks;
        for (Block* block : running)
            for (int t = 0; t < threads; t++) {
                Fiber* fiber = new Fiber();
                fiber->block = block, fiber->thread.x = t;
                void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                getcontext(&fiber->context);
                fiber->context.uc_stack = {stack, 0, STACK};
                makecontext(&fiber->context, fiber_main, 0);
                stacks.push_back(stack), fibers.push_back(fiber);
            }
        for (size_t left = fibers.size(); left;) {
            moved = false, left = 0;
            std::shuffle(fibers.begin(), fibers.end(), chance);
            for (Fiber* fiber : fibers) {
                if (fiber->done) continue;
                left++;
                swapcontext(&scheduler, &(current = fiber)->context);
            }
            std::shuffle(copies.begin(), copies.end(), chance);
            for (size_t n = copies.empty() ? 0 : 1 + chance() % copies.size(); n; n--) copies.back()(), copies.pop_back();
            if (left && !moved) fail("all threads wait");
        }
        if (!copies.empty()) fail("copies under way at the end");
        for (Fiber* fiber : fibers) delete fiber;
        for (void* stack : stacks) munmap(stack, STACK);
        for (Block* block : running) free(block->memory), delete block;
        fibers.clear(), running.clear();
    }
}
