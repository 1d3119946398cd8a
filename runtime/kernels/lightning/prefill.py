"""Many tokens of every sequence, from the projections to the gated output, in two launches or three.

A program runs along the tokens of a head in blocks, its state in registers in float32 (Lightning Attention-2, Qin et
al., 2024, section 3). Where heads and sequences are fewer than the GPU's processors, the tokens are cut into segments
that run at once: a launch before adds up what the segments' pieces give to the state. A last launch norms and gates
each token, over all heads; for by_hand.py's kernels it finds the norm's factors only.

The matrix units multiply float16, whose 11 bits lose eight times less than bfloat16's 8; its range is the price. So q
and k are divided by the block's largest magnitude, the state by its own, v by a constant, and o, on its way to the
last launch, by that of its row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minibble.runtime.kernels.device import shared_limit
from minibble.runtime.kernels.lightning import by_hand
from minibble.runtime.kernels.lightning.activations import scaled_silu, sigmoid
from minibble.runtime.kernels.lightning.cuts import BLOCK, cut

STAGES = 2  # blocks of tokens in flight, where shared memory has room for them
STAGES_NBYTES = 160 << 10
NORM_WARPS = 8

V_UNIT = tl.constexpr(16.0)  # v is finite up to 16 x 65504
LEAST_UNIT = tl.constexpr(1e-12)  # what a block of zeros is divided by
LEAST = tl.constexpr(1e-30)  # the same of states and outputs, which nothing is divided by later


@triton.jit
def _tokens(p, m_t, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of q, k or v before silu, float32 [BLOCK_T, BLOCK_K]; zero at padding. p: pointers to its rows."""
    o_k = tl.arange(0, BLOCK_K)
    m = m_t[:, None]
    if K != BLOCK_K:
        m = m & (o_k < K)[None, :]
    return tl.load(p[:, None] + o_k[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _ages(p_valid, row, o_t, tokens, PADDED: tl.constexpr, BLOCK_T: tl.constexpr):
    """Which of the block's tokens are real, the number of real ones up to and with each, and of all, float32."""
    m_t = o_t < tokens
    if PADDED:
        m_t = m_t & (tl.load(p_valid + row, mask=m_t, other=0) != 0)
        age = tl.cumsum(m_t.to(tl.int32), axis=0)
        last = tl.max(age, axis=0).to(tl.float32)
        age = age.to(tl.float32)
    else:
        last = tl.minimum(tokens, BLOCK_T).to(tl.float32)
        age = tl.minimum((o_t + 1).to(tl.float32), last)
    return m_t, age, last


@triton.jit
def _largest(x, least):
    return tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), least)


@triton.jit(do_not_specialize=["T", "piece"])
def _piece_kernel(
    p_x, p_slope, p_state, p_valid, p_start, p_count, T, piece,
    H: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What `piece` tokens add to the state and how many of them are real; the state before all of them is copied.

    p_start: float32 [B, H, 1 + PIECES, K, K], p_count: float32 [B, H, 1 + PIECES].
    """
    h, number = tl.program_id(0) % H, tl.program_id(0) // H
    b = tl.program_id(1).to(tl.int64)
    o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    o_state = o_k[:, None] * K + o_k[None, :]
    m_state = (o_k < K)[:, None] & (o_k < K)[None, :]
    slot = (b * H + h) * (1 + PIECES)
    slope = tl.load(p_slope + h) * 1.4426950408889634  # log2(e): exp2 is one instruction
    if number == 0:
        before = tl.load(p_state + (b * H + h) * K * K + o_state, mask=m_state)
        tl.store(p_start + slot * K * K + o_state, before, mask=m_state)
    unit = 1.0
    count = 0.0
    state = tl.zeros((BLOCK_K, BLOCK_K), dtype=tl.float32)
    for start in range(number * piece, (number + 1) * piece, BLOCK_T):
        row = b * T + start + o_t
        m_t, age, last = _ages(p_valid, row, o_t, T - start, PADDED, BLOCK_T)
        p_row = p_x + row * (4 * H * K) + h * 3 * K
        k, v = _tokens(p_row + K, m_t, K, BLOCK_K), _tokens(p_row + 2 * K, m_t, K, BLOCK_K)
        block_unit = _largest(k, LEAST_UNIT)
        k = scaled_silu(k, 1 / block_unit, EXACT).to(tl.float16)
        v = scaled_silu(v, 1 / V_UNIT, EXACT) * tl.exp2(slope * (age - last))[:, None]
        state = tl.dot(tl.trans(k), v.to(tl.float16), state * (tl.exp2(-slope * last) * (unit / block_unit)))
        unit = block_unit
        count += last
    slot += 1 + number
    tl.store(p_start + slot * K * K + o_state, state * (unit * V_UNIT), mask=m_state)
    tl.store(p_count + slot, count)


@triton.jit(do_not_specialize=["T", "segment"])
def _attention_kernel(
    p_x, p_slope, p_state, p_valid, p_start, p_count, p_o, p_unit, T, segment,
    H: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, PIECES_EACH: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """o as float16 [B, T, H, K] times units, float32 [B, T, H], and the state after all tokens.

    A segment is PIECES_EACH pieces, the last what is left. With one segment `p_start` may be `p_state`.
    """
    h, number = tl.program_id(0) % H, tl.program_id(0) // H
    b = tl.program_id(1).to(tl.int64)
    o_t, o_k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    o_state = o_k[:, None] * K + o_k[None, :]
    m_state = (o_k < K)[:, None] & (o_k < K)[None, :]
    slope = tl.load(p_slope + h) * 1.4426950408889634
    slot = (b * H + h) * (1 + PIECES)
    state = tl.load(p_start + slot * K * K + o_state, mask=m_state, other=0.0)
    for i in range(1, 1 + number * PIECES_EACH):
        added = tl.load(p_start + (slot + i) * K * K + o_state, mask=m_state, other=0.0)
        state = state * tl.exp2(-slope * tl.load(p_count + slot + i)) + added
    # From here on it is kept divided by V_UNIT and by the `unit` of the block before.
    unit = 1.0
    state *= 1 / V_UNIT
    earlier = o_t[:, None] >= o_t[None, :]
    stop = tl.minimum((number + 1) * segment, T)

    for start in range(number * segment, stop, BLOCK_T):
        row = b * T + start + o_t
        m_t, age, last = _ages(p_valid, row, o_t, T - start, PADDED, BLOCK_T)
        p_row = p_x + row * (4 * H * K) + h * 3 * K
        # One after the other, so that registers hold few of them in float32.
        # No silu is larger than what goes into it. Where that is a large negative number only range is lost.
        q = _tokens(p_row, m_t, K, BLOCK_K)
        q_unit = _largest(q, LEAST_UNIT)
        q = scaled_silu(q, 1 / q_unit, EXACT).to(tl.float16)
        state_unit = _largest(state, LEAST)
        o = tl.dot(q, (state * (1 / state_unit)).to(tl.float16))

        k = _tokens(p_row + K, m_t, K, BLOCK_K)
        k_unit = _largest(k, LEAST_UNIT)
        k = scaled_silu(k, 1 / k_unit, EXACT).to(tl.float16)
        weight = tl.where(earlier, tl.exp2(slope * (age[None, :] - age[:, None])), 0.0)
        score = (tl.dot(q, tl.trans(k)) * weight).to(tl.float16)

        v = scaled_silu(_tokens(p_row + 2 * K, m_t, K, BLOCK_K), 1 / V_UNIT, EXACT)
        o *= (tl.exp2(-slope * age) * (state_unit * unit / k_unit))[:, None]
        o = tl.dot(score, v.to(tl.float16), o)  # of q / q_unit, k / k_unit and v / V_UNIT
        v *= tl.exp2(slope * (age - last))[:, None]
        state = tl.dot(tl.trans(k), v.to(tl.float16), state * (tl.exp2(-slope * last) * (unit / k_unit)))
        unit = k_unit

        m_row = start + o_t < T
        row_unit = tl.maximum(tl.max(tl.abs(o), axis=1), LEAST)
        m_out = m_row[:, None]
        if K != BLOCK_K:
            m_out = m_out & (o_k < K)[None, :]
        p_out = p_o + row[:, None] * (H * K) + h * K + o_k[None, :]
        tl.store(p_out, (o * (1 / row_unit)[:, None]).to(tl.float16), mask=m_out)
        tl.store(p_unit + row * H + h, row_unit * (q_unit * k_unit * V_UNIT), mask=m_row)

    if stop == T:
        tl.store(p_state + (b * H + h) * K * K + o_state, state * (unit * V_UNIT), mask=m_state)


@triton.jit
def _norm_kernel(
    p_o, p_unit, p_x, p_norm, p_out, eps,
    H: tl.constexpr, K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A token: o / rms(o) * norm * sigmoid(gate). `p_out` may be `p_o`: all of a row is read before it is written."""
    N: tl.constexpr = H * K
    row = tl.program_id(0).to(tl.int64)
    o_h, o_k = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_K)
    feature = o_h[:, None] * K + o_k[None, :]
    m = (o_h < H)[:, None] & (o_k < K)[None, :]
    unit = tl.load(p_unit + row * H + o_h, mask=o_h < H, other=0.0)
    o = tl.load(p_o + row * N + feature, mask=m, other=0.0).to(tl.float32) * unit[:, None]
    gate = tl.load(p_x + row * (4 * N) + 3 * N + feature, mask=m, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(o * o, axis=1), axis=0) / N + eps)
    o = o * scale * tl.load(p_norm + feature, mask=m, other=0.0) * sigmoid(gate, EXACT)
    tl.store(p_out + row * N + feature, o.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _factor_kernel(p_sums, p_factor, N, eps, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """The norm's factor of a token from the S sums of squares of its N features."""
    row, o_s = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_S)
    sums = tl.load(p_sums + row * S + o_s, mask=o_s < S, other=0.0)
    tl.store(p_factor + row, tl.rsqrt(tl.sum(sums, axis=0) / N + eps))


def prefill(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, eps: float, valid_BT: Tensor | None,
    processors: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gated output [B, T, HK], bfloat16 as `projected_BTP`, and factors, float32 [B, T], if it lacks those of the norm.

    `state_BHKK`, float32, is updated in place.
    """
    B, T, _ = projected_BTP.shape
    H, K = state_BHKK.shape[1:3]
    device = projected_BTP.device
    assert projected_BTP.dtype == torch.bfloat16 and projected_BTP.shape[2] == 4 * H * K
    assert projected_BTP.is_contiguous() and state_BHKK.is_contiguous()
    valid = None if valid_BT is None else valid_BT.contiguous().view(torch.uint8)
    out_BTN = torch.empty(B, T, H * K, dtype=projected_BTP.dtype, device=device)
    with torch.cuda.device_of(projected_BTP):  # Triton launches on the current device
        if by_hand.suits(device, K):
            squares = by_hand.attention(projected_BTP, slope_H, state_BHKK, norm_HK, valid, out_BTN, processors)
            factor_BT, sums = torch.empty(B, T, device=device), squares.shape[2]
            block_s = triton.next_power_of_2(sums)
            _factor_kernel[(B * T,)](squares, factor_BT, H * K, eps, S=sums, BLOCK_S=block_s, num_warps=1)
            return out_BTN, factor_BT
        half_BTN = out_BTN.view(torch.float16)  # the last launch turns it into bfloat16 where it lies
        unit_BTH = attention(projected_BTP, slope_H, state_BHKK, valid, half_BTN, processors)
        _norm_kernel[(B * T,)](
            half_BTN, unit_BTH, projected_BTP, norm_HK, out_BTN, eps,
            H=H, K=K, BLOCK_H=triton.next_power_of_2(H), BLOCK_K=triton.next_power_of_2(K),
            EXACT=not projected_BTP.is_cuda, num_warps=NORM_WARPS,
        )  # fmt: skip
    return out_BTN, None


def attention(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None, half_BTN: Tensor,
    processors: int,
) -> Tensor:  # fmt: skip
    """Fills `half_BTN` and returns the units, float32 [B, T, H], that its heads are to be multiplied by."""
    B, T, _ = projected_BTP.shape
    H, K = state_BHKK.shape[1:3]
    device, on_gpu = projected_BTP.device, projected_BTP.is_cuda
    cuts, block_k = cut(T, B * H, processors), max(16, triton.next_power_of_2(K))
    unit_BTH = torch.empty(B, T, H, device=device)
    valid, start, count = projected_BTP if valid_BT is None else valid_BT, state_BHKK, unit_BTH
    options = {
        "H": H, "K": K, "PIECES": cuts.pieces, "BLOCK_T": BLOCK, "BLOCK_K": block_k, "PADDED": valid_BT is not None,
        "EXACT": not on_gpu, "num_warps": 8 if block_k > 64 else 4, "num_stages": _stages(device) if on_gpu else 1,
    }  # fmt: skip
    if cuts.pieces:
        start = torch.empty(B, H, 1 + cuts.pieces, K, K, device=device)
        count = torch.empty(B, H, 1 + cuts.pieces, device=device)
        _piece_kernel[(H * cuts.pieces, B)](
            projected_BTP, slope_H, state_BHKK, valid, start, count, T, cuts.piece, **options
        )
    _attention_kernel[(H * cuts.segments, B)](
        projected_BTP, slope_H, state_BHKK, valid, start, count, half_BTN, unit_BTH, T, cuts.piece * cuts.each,
        PIECES_EACH=cuts.each, **options,
    )  # fmt: skip
    return unit_BTH


def _stages(device: torch.device) -> int:
    return STAGES if shared_limit(device) >= STAGES_NBYTES else 1
