"""Launches of attention.cu, for heads of 128 on Hopper; see prefill.py, whose Triton kernels it stands in for.

Attention gates its results itself. The norm is over all heads, so its weight is multiplied in and its factor, one of
each token, is left to the product that follows: a launch of its own for norm and gate moved 403 MB, 136 us of 482 for
8192 tokens and 64 heads on an H100. A profile of attention shows issue slots a third busy, for the steps between
barriers are short and registers leave room for eight warps on an SM. Pieces are the price of segments; two such
sequences need fewer of them, four none.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibble.runtime.kernels import nvrtc
from minibble.runtime.kernels.lightning.cuts import cut

HEAD_DIM = 128
SUMS = 4  # a head: one for each warp's features
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
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, norm_HK: Tensor, valid_BT: Tensor | None,
    out_BTN: Tensor, processors: int,
) -> Tensor:  # fmt: skip
    """Fills `out_BTN` with o * norm * sigmoid(gate) and returns sums of squares of o, float32 [B, T, 4 H]."""
    B, T, _ = projected_BTP.shape
    H, K = state_BHKK.shape[1:3]
    device = projected_BTP.device
    cuts = cut(T, B * H, PROGRAMS * processors)
    squares_BTS = torch.empty(B, T, SUMS * H, device=device)
    valid = ctypes.c_longlong(0) if valid_BT is None else valid_BT
    start, count = state_BHKK, squares_BTS
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
        (projected_BTP, slope_H, state_BHKK, valid, start, count, norm_HK, out_BTN, squares_BTS, T,
         cuts.piece * cuts.each, cuts.pieces, cuts.each),
        ATTENTION_NBYTES,
    )  # fmt: skip
    return squares_BTS
