"""silu and sigmoid inside the Triton kernels of this package, float32.

EXACT takes Triton's own functions, as its interpreter must. The others are a few units in the last place off and
written out because the special function unit, which does exponentials and reciprocals, bounds the prefill kernel.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        return 1.0 / (1.0 + tl.exp(-x))
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 t;
        mul.f32 t, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 t, t;
        add.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
        }""",  # 0fBFB8AA3B is -log2(e), 0f3F800000 is 1
        "=f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def silu(x, EXACT: tl.constexpr):
    return x * sigmoid(x, EXACT)


@triton.jit
def scaled_silu(x, factor, EXACT: tl.constexpr):
    """silu(x) * factor, a scalar. Two elements share a reciprocal: 1/a = b/(ab), where exponents end at 2^60."""
    if EXACT:
        return silu(x, True) * factor
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, r;
        mul.f32 a, $2, 0fBFB8AA3B;
        mul.f32 b, $3, 0fBFB8AA3B;
        min.f32 a, a, 0f42700000;
        min.f32 b, b, 0f42700000;
        ex2.approx.ftz.f32 a, a;
        ex2.approx.ftz.f32 b, b;
        add.f32 a, a, 0f3F800000;
        add.f32 b, b, 0f3F800000;
        mul.f32 r, a, b;
        rcp.approx.ftz.f32 r, r;
        mul.f32 r, r, $4;
        mul.f32 b, b, r;
        mul.f32 a, a, r;
        mul.f32 $0, $2, b;
        mul.f32 $1, $3, a;
        }""",  # 0f42700000 is 60
        "=&f,=&f,f,f,f,f",
        [x, factor],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )
