"""Launches of attention.cu, for heads of 128 on Hopper; see prefill.py, whose Triton kernels it stands in for.

One sequence of 8192 tokens and 64 heads takes an H100 104 us for the pieces, 243 for attention (Triton: 115 and 548)
and 136 for the norm, which moves 403 MB and can be no quicker. Attention could move its bytes in 174: a profile shows
issue slots a third busy, for the steps between barriers are short and registers leave room for eight warps on an SM.
Pieces are the price of segments; two such sequences need fewer of them, four none.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.lightning.cuts import cut

HEAD_DIM = 128
UNITS = 4  # a head: one for each warp's features
THREADS = 128
_TILE_NBYTES = 64 * HEAD_DIM * 2
_ALIGNED_NBYTES = 1024  # tiles begin at multiples
PIECE_NBYTES = 4 * _TILE_NBYTES + _ALIGNED_NBYTES  # of shared memory: k and v of two blocks
ATTENTION_NBYTES = 6 * _TILE_NBYTES + 64 * 64 * 2 + _ALIGNED_NBYTES  # q, k and v of two, and scores
PROGRAMS = 2  # on an SM at once

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("attention_ptx.cuh", "attention_block.cuh", "attention.cu")
)


@cache
def _kernels(heads: int) -> tuple[nvrtc.Kernel, nvrtc.Kernel]:
    """Of the pieces and of attention. The number of heads is a constant in them, so that strides are."""
    macros: dict[str, int | str] = {"HEADS": heads}
    return nvrtc.Kernel("lightning_pieces", _SOURCES, macros), nvrtc.Kernel("lightning_attention", _SOURCES, macros)


@cache
def suits(device: torch.device, head_dim: int) -> bool:
    """True where these kernels run: on Hopper, with NVRTC."""
    if device.type != "cuda" or head_dim != HEAD_DIM or not nvrtc.available():
        return False
    return nvrtc.is_hopper(device)


def attention(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None, half_BTN: Tensor,
    processors: int,
) -> Tensor:  # fmt: skip
    """Fills `half_BTN` and returns units, float32 [B, T, 4 H]: 32 features are to be multiplied by each."""
    B, T, _ = projected_BTP.shape
    H, K = state_BHKK.shape[1:3]
    device = projected_BTP.device
    cuts = cut(T, B * H, PROGRAMS * processors)
    unit_BTU = torch.empty(B, T, UNITS * H, device=device)
    valid = ctypes.c_longlong(0) if valid_BT is None else valid_BT
    start, count = state_BHKK, unit_BTU
    pieces, attention = _kernels(H)
    if cuts.pieces:
        start = torch.empty(B, H, 1 + cuts.pieces, K, K, device=device)
        count = torch.empty(B, H, 1 + cuts.pieces, device=device)
        pieces.launch(
            (H * cuts.pieces, B, 1), THREADS,
            (projected_BTP, slope_H, state_BHKK, valid, start, count, T, cuts.piece, cuts.pieces),
            PIECE_NBYTES,
        )  # fmt: skip
    attention.launch(
        (H * cuts.segments, B, 1), THREADS,
        (projected_BTP, slope_H, state_BHKK, valid, start, count, half_BTN, unit_BTU, T, cuts.piece * cuts.each,
         cuts.pieces, cuts.each),
        ATTENTION_NBYTES,
    )  # fmt: skip
    return unit_BTU
