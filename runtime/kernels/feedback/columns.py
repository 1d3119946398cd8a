"""The kernels of this package in Triton: a program takes some rows through all columns of a block.

Steps already taken stay in registers, [C, rows]; what a column sees of them is one product with a row of M. Loads and
stores run along the rows, which lie together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # per program, which is one warp: no barrier between columns
LEVELS = tl.constexpr(16)


@triton.jit
def _nearest(x, p_levels):
    """Index of the level nearest to each x; ties go to the lower one."""
    code = tl.zeros(x.shape, dtype=tl.int32)
    for i in tl.static_range(LEVELS - 1):
        code += (x > (tl.load(p_levels + i) + tl.load(p_levels + i + 1)) / 2).to(tl.int32)
    return code


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0, 0.0, 1.0 / tl.where(scale == 0, 1.0, scale))


@triton.jit
def _step_kernel(
    p_x, p_m, p_scale, p_group, p_levels, p_codes, p_e, p_step, C, N,
    sx, ss, sg, sc, se, DESCEND: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """s*: distance between matrices, in elements. Within a matrix columns lie N apart."""
    b = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    o_col = tl.arange(0, COLUMNS)
    p_x += b * sx + o_row
    p_m += b * C * C
    p_scale += b * ss + o_row
    p_codes += b * sc + o_row
    p_step += b * C * N + o_row
    steps = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for j in range(C):
        m = tl.load(p_m + j * C + o_col, mask=o_col < j, other=0.0)
        x = tl.load(p_x + j * N, mask=m_row, other=0.0) - tl.sum(steps * m[:, None], axis=0)
        pivot = tl.load(p_m + j * C + j)
        group = tl.load(p_group + b * sg + j)
        scale = tl.load(p_scale + group * N, mask=m_row, other=0.0)
        o_code = j * N
        if DESCEND:
            old = tl.load(p_levels + tl.load(p_codes + o_code, mask=m_row, other=0).to(tl.int32)) * scale
            target = old + x / pivot
        else:
            target = x
        code = _nearest(target * _inverse(scale), p_levels)
        new = tl.load(p_levels + code) * scale
        if DESCEND:
            step = new - old
            p = p_e + b * se + o_code + o_row
            tl.store(p, tl.load(p, mask=m_row, other=0.0) - step, mask=m_row)
        else:
            step = (x - new) / pivot
            tl.store(p_step + o_code, step, mask=m_row)
        tl.store(p_codes + o_code, code.to(tl.uint8), mask=m_row)
        steps = tl.where((o_col == j)[:, None], step[None, :], steps)


def step_block(
    X_BCN: Tensor, M_BCC: Tensor, scale_BGN: Tensor, group_BC: Tensor, levels: Tensor, codes_BCN: Tensor,
    E_BCN: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `stepwise.step_block`; the steps are only returned where there is no E."""
    B, C, N = X_BCN.shape
    for tensor in (X_BCN, codes_BCN, scale_BGN, *(() if E_BCN is None else (E_BCN,))):
        assert tensor.stride()[1:] == (N, 1), "columns must lie N apart"
    assert M_BCC.is_contiguous() and group_BC.stride(1) == 1
    step_BCN = torch.empty((B, C, N) if E_BCN is None else (1,), device=X_BCN.device)
    with torch.cuda.device_of(X_BCN):  # Triton launches on the current device
        _step_kernel[(triton.cdiv(N, ROWS), B)](
            X_BCN, M_BCC, scale_BGN, group_BC, levels, codes_BCN, X_BCN if E_BCN is None else E_BCN, step_BCN, C, N,
            X_BCN.stride(0), scale_BGN.stride(0), group_BC.stride(0), codes_BCN.stride(0),
            0 if E_BCN is None else E_BCN.stride(0),
            DESCEND=E_BCN is not None, COLUMNS=triton.next_power_of_2(C), ROWS=ROWS, num_warps=1,
        )  # fmt: skip
    return step_BCN


@triton.jit
def _search_kernel(
    p_w, p_shares, p_levels, p_scale, N, K, count,
    GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    o_col = group * GROUP + tl.arange(0, GROUP)
    w = tl.load(p_w + (b * K + o_col)[:, None] * N + o_row[None, :], mask=m_row[None, :], other=0.0)
    outermost = tl.maximum(tl.abs(tl.load(p_levels)), tl.abs(tl.load(p_levels + LEVELS - 1)))
    whole = tl.max(tl.abs(w), axis=0) / outermost
    best = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    scale = whole
    for i in range(count):
        tried = whole * tl.load(p_shares + i)
        unit = w * _inverse(tried)[None, :]
        value = tl.zeros_like(w) + tl.load(p_levels)
        for level in tl.static_range(LEVELS - 1):
            upper = tl.load(p_levels + level + 1)
            value = tl.where(unit > (tl.load(p_levels + level) + upper) / 2, upper, value)
        off = w - value * tried[None, :]
        error = tl.sum(off * off, axis=0)
        scale = tl.where(error < best, tried, scale)
        best = tl.minimum(best, error)
    tl.store(p_scale + (b * tl.num_programs(1) + group) * N + o_row, scale, mask=m_row)


def search_scales(W_BKN: Tensor, levels: Tensor, group_size: int, shares: tuple[float, ...]) -> Tensor:
    """See `feedback.search_scales`; group sizes are powers of two."""
    B, K, N = W_BKN.shape
    assert W_BKN.is_contiguous()
    scale_BGN = torch.empty(B, K // group_size, N, device=W_BKN.device)
    tried = torch.tensor(shares, dtype=torch.float32, device=W_BKN.device)
    with torch.cuda.device_of(W_BKN):
        _search_kernel[(triton.cdiv(N, ROWS), K // group_size, B)](
            W_BKN, tried, levels, scale_BGN, N, K, len(shares),
            GROUP=group_size, ROWS=ROWS, num_warps=group_size // 32,
        )  # fmt: skip
    return scale_BGN
