"""y = W x for single tokens on CPUs that have no better: a compiled loop that decodes as it multiplies.

Four rows share the activations in registers; a byte of codes is one look-up in each of two tables of 256 levels, which
stay in the L1 cache. Float32 throughout, rounding in another order than a product with the decoded matrix. Scales may
cover one block of 64 weights or several.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minibble.quantize.nf4_math import level_table
from minibble.quantize.tensors import Levels
from minibble.runtime.kernels.compiled import compiled

ROWS = 4  # rows at a time
BLOCK = 64
TOKENS = 2  # from three tokens on, decoding once for all is quicker
SPLIT = 1 << 22  # weights from which the rows are worth sharing among threads


class Arrays(NamedTuple):
    """A matrix [N, K] for the loop: codes uint8 [N*K/2], scales float32 [N*K/block], levels of both nibbles."""

    codes: Any
    scales: Any
    high: Any
    low: Any


def suits(N: int, K: int, block_size: int) -> bool:
    """True for shapes the loop can do."""
    return N % ROWS == 0 and K % block_size == 0 and block_size % BLOCK == 0


def arrays(codes: Tensor, scales: Tensor, levels: Levels) -> Arrays:
    """The tensors as the loop takes them; memory is shared."""
    return Arrays(codes.numpy(), scales.numpy(), *_byte_levels(levels))


def linear(x: Tensor, weight: Arrays, N: int) -> Tensor:
    """x [..., K] of any float dtype, token by token: float32 [..., N]."""
    rows = x.float().reshape(-1, x.shape[-1])
    if len(rows) == 1:
        return gemv(weight, rows[0], N).view(*x.shape[:-1], N)
    return torch.stack([gemv(weight, row, N) for row in rows]).view(*x.shape[:-1], N)


def gemv(weight: Arrays, x_K: Tensor, N: int) -> Tensor:
    """W x, float32 [N], of `x_K`, float32 [K]."""
    x, out = x_K.numpy(), torch.empty(N)
    threads = torch.get_num_threads() if N * len(x) >= SPLIT else 1
    share = -(-N // (ROWS * threads)) * ROWS
    spans = [(start, min(start + share, N)) for start in range(0, N, share)]
    run, y = compiled(rows), out.numpy()
    if len(spans) == 1:
        run(*weight, x, y, 0, N)
    else:
        list(_pool(threads).map(lambda span: run(*weight, x, y, *span), spans))
    return out


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gemv")


@cache
def _byte_levels(levels: Levels) -> tuple[Any, Any]:
    """The levels of a byte's high and of its low nibble, float32 [256] each."""
    byte, table = torch.arange(256), level_table(levels)
    return table[byte >> 4].numpy(), table[byte & 0xF].numpy()


def rows(codes, scales, high, low, x, y, start, stop):  # type: ignore[no-untyped-def]
    """Rows `start` to `stop` of the product, in the part of Python that numba compiles."""
    nbytes, blocks = x.size // 2, x.size // 64
    groups = scales.size // y.size
    wide = blocks // groups
    for n in range(start, stop, 4):
        y0 = y1 = y2 = y3 = np.float32(0)
        for b in range(blocks):
            s0 = s1 = s2 = s3 = np.float32(0)
            at = n * nbytes + b * 32
            for j in range(32):
                even, odd = x[b * 64 + 2 * j], x[b * 64 + 2 * j + 1]
                c0, c1 = codes[at + j], codes[at + nbytes + j]
                c2, c3 = codes[at + 2 * nbytes + j], codes[at + 3 * nbytes + j]
                s0 += high[c0] * even + low[c0] * odd
                s1 += high[c1] * even + low[c1] * odd
                s2 += high[c2] * even + low[c2] * odd
                s3 += high[c3] * even + low[c3] * odd
            m = n * groups + b // wide
            y0 += s0 * scales[m]
            y1 += s1 * scales[m + groups]
            y2 += s2 * scales[m + 2 * groups]
            y3 += s3 * scales[m + 3 * groups]
        y[n], y[n + 1], y[n + 2], y[n + 3] = y0, y1, y2, y3
