"""Launches of attention.cu, for heads of 128; see prefill.py, which it stands in for."""

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
PIECE_NBYTES = 4 * _TILE_NBYTES  # of shared memory: k and v of two blocks
ATTENTION_NBYTES = 6 * _TILE_NBYTES + 64 * 64 * 2  # q, k and v of two, and scores
PROGRAMS = 2  # on an SM at once

_SOURCES = (Path(__file__).parent / "attention.cu",)
_PIECES = nvrtc.Kernel("lightning_pieces", _SOURCES)
_ATTENTION = nvrtc.Kernel("lightning_attention", _SOURCES)


@cache
def suits(device: torch.device, head_dim: int) -> bool:
    """True where these kernels run: not on GPUs with little shared memory, nor without NVRTC."""
    if device.type != "cuda" or head_dim != HEAD_DIM or not nvrtc.available():
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 8 and properties.shared_memory_per_block_optin > ATTENTION_NBYTES + 1024  # type: ignore


def attention(
    projected_BTP: Tensor, slope_H: Tensor, state_BHKK: Tensor, valid_BT: Tensor | None, half_BTN: Tensor,
    processors: int,
) -> Tensor:  # fmt: skip
    """Fills `half_BTN` and returns the units, float32 [B, T, 4 H], that its features are to be multiplied by, 32 at a time."""
    B, T, _ = projected_BTP.shape
    H, K = state_BHKK.shape[1:3]
    device = projected_BTP.device
    cuts = cut(T, B * H, PROGRAMS * processors)
    unit_BTU = torch.empty(B, T, UNITS * H, device=device)
    valid = ctypes.c_longlong(0) if valid_BT is None else valid_BT
    start, count = state_BHKK, unit_BTU
    if cuts.pieces:
        start = torch.empty(B, H, 1 + cuts.pieces, K, K, device=device)
        count = torch.empty(B, H, 1 + cuts.pieces, device=device)
        _PIECES.launch(
            (H * cuts.pieces, B, 1), THREADS,
            (projected_BTP, slope_H, state_BHKK, valid, start, count, T, cuts.piece, H, cuts.pieces),
            PIECE_NBYTES,
        )  # fmt: skip
    _ATTENTION.launch(
        (H * cuts.segments, B, 1), THREADS,
        (projected_BTP, slope_H, state_BHKK, valid, start, count, half_BTN, unit_BTU, T, cuts.piece * cuts.each, H,
         cuts.pieces, cuts.each),
        ATTENTION_NBYTES,
    )  # fmt: skip
    return unit_BTU
