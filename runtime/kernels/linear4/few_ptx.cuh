// Of the kernels for few tokens: the PTX they are made of. Before Hopper lanes copy for themselves, and barriers count
// lanes.

// Policies as createpolicy.fractional.L2 makes them: of what is read once, and of what is not.
#define EVICT_FIRST 0x12F0000000000000ull
#define EVICT_NORMAL 0x1000000000000000ull
#define ARRIVALS (__CUDA_ARCH__ >= 900 ? 1 : 32)  // that a barrier waits for: the copy engine's, or each lane's

__device__ inline void barrier_init(u64* bar, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

__device__ inline void barrier_wait(u64* bar, u32 parity) {
    u32 done;
    do {
#if __CUDA_ARCH__ >= 900
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#else
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
#endif
                     : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
    } while (!done);
}

__device__ inline void barrier_arrive(u64* bar) {
    u64 state;
    asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(bar)) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ inline void barrier_expect(u64* bar, int nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 ::"r"(shared_address(bar)), "r"(nbytes) : "memory");
}

// True in one lane of a warp that is all there: the compiler then knows that it is one.
__device__ inline bool elected() {
    u32 chosen;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
    return chosen;
}

// Makes barriers known to the copy engine.
__device__ inline void barriers_ready() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void copy_bulk(char* to, const char* from, int nbytes, u64* bar, u64 policy = EVICT_FIRST) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(nbytes), "r"(shared_address(bar)), "l"(policy) : "memory");
}
#else
// Arrive when this thread's copies so far are there.
__device__ inline void barrier_arrive_after_copies(u64* bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ inline void barriers_ready() {}
#endif

// 4 or 16 bytes, without waiting for them; zeros instead of those that are not `there`.
__device__ inline void copy_4(char* to, const char* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ inline void copy_16(char* to, const char* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Zero, but the assembler cannot know: what depends on it comes after `read` has been read. Shared memory answers late
// where many warps ask, and a copy to the same place may be quicker: with weights in the L2 cache some were.
// `positive` is any number that is.
__device__ inline u32 nothing_of(u32 read, int positive) { return read & (u32)(positive >> 31); }

// Four matrices of 8 rows of 16 bytes, lane 8 i + r giving the place of row r of matrix i: B's registers of 32 columns.
__device__ inline void load_matrices(u32 (&b)[4], const char* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(shared_address(row)));
}

// d += a b, bfloat16 operands in the registers of a warp, sums in float32.
__device__ inline void mma(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline unsigned short to_bfloat16(float f) {
    unsigned short h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// What another block may write at any time. Each word is whole, no more is promised.
__device__ inline uint4 load_part(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ inline void store_part(uint4* to, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};"
                 ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
