// wgmma m64nNk16: A from registers, B [N tokens][64 k] in shared memory, swizzled by 128 bytes, float32 sums. Macros: see
// tile.cu.

#if GROUPED
#define NUMBERS "f16"
#else
#define NUMBERS "bf16"
#endif

// Operands are numbered: first the N / 2 sums, then the registers of A, B's descriptor, and whether to add to the sums.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define SUMS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
                  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)

template <int N>
struct Wgmma;

#define WGMMA(N, NAMES, A0, A1, A2, A3, B, KEEP, ...)                                                                \
    template <>                                                                                                     \
    struct Wgmma<N> {                                                                                               \
        template <int R>                                                                                            \
        static __device__ __forceinline__ void multiply(float (&d)[R], const u32 (&a)[4], u64 b, int keep) {        \
            asm volatile("{.reg .pred p; setp.ne.b32 p, %" #KEEP ", 0;"                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NUMBERS "." NUMBERS " {" NAMES "}, "     \
                         "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;}"                          \
                         : __VA_ARGS__                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                          \
        }                                                                                                           \
    };

WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", 8, 9, 10, 11, 12, 13, SUMS_8(0))
WGMMA(32, TEN() "%10, %11, %12, %13, %14, %15", 16, 17, 18, 19, 20, 21, SUMS_8(0), SUMS_8(8))
WGMMA(64, TEN() TEN(1) TEN(2) "%30, %31", 32, 33, 34, 35, 36, 37, SUMS_32(0))
WGMMA(128, TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63", 64, 65, 66, 67, 68, 69, SUMS_32(0),
      SUMS_32(32))
WGMMA(256,
      TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
      "%120, %121, %122, %123, %124, %125, %126, %127",
      128, 129, 130, 131, 132, 133, SUMS_32(0), SUMS_32(32), SUMS_32(64), SUMS_32(96))
