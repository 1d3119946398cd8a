"""y = W x for single tokens on CPUs that have no better: a compiled loop that decodes as it multiplies.

Four rows share the activations in registers; a byte of codes is one look-up in each of two tables of 256 levels, which
stay in the L1 cache. Float32 throughout, rounding in another order than a product with the decoded matrix.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minibble.quantize.nf4_math import codebook
from minibble.runtime.kernels.compiled import compiled

ROWS = 4  # rows at a time
BLOCK = 64
SPLIT = 1 << 22  # weights from which the rows are worth sharing among threads


def suits(N: int, K: int, block_size: int) -> bool:
    """True for shapes the loop can do."""
    return N % ROWS == 0 and K % BLOCK == 0 and block_size == BLOCK


def gemv(codes: Any, absmax: Any, x_K: Tensor, N: int) -> Tensor:
    """W x, float32 [N]: `codes` uint8 [N*K/2] and `absmax` float32 [N*K/64] are numpy arrays, `x_K` float32 [K]."""
    x, out = x_K.numpy(), torch.empty(N)
    high, low = levels()
    threads = torch.get_num_threads() if N * len(x) >= SPLIT else 1
    share = -(-N // (ROWS * threads)) * ROWS
    spans = [(start, min(start + share, N)) for start in range(0, N, share)]
    run, y = compiled(rows), out.numpy()
    if len(spans) == 1:
        run(codes, absmax, high, low, x, y, 0, N)
    else:
        list(_pool(threads).map(lambda span: run(codes, absmax, high, low, x, y, *span), spans))
    return out


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gemv")


@cache
def levels() -> tuple[Any, Any]:
    """The levels of a byte's high and of its low nibble, float32 [256] each."""
    byte = torch.arange(256)
    return codebook()[byte >> 4].numpy(), codebook()[byte & 0xF].numpy()


def rows(codes, absmax, high, low, x, y, start, stop):  # type: ignore[no-untyped-def]
    """Rows `start` to `stop` of the product, in the part of Python that numba compiles."""
    nbytes, blocks = x.size // 2, x.size // 64
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
            m = n * blocks + b
            y0 += s0 * absmax[m]
            y1 += s1 * absmax[m + blocks]
            y2 += s2 * absmax[m + 2 * blocks]
            y3 += s3 * absmax[m + 3 * blocks]
        y[n], y[n + 1], y[n + 2], y[n + 3] = y0, y1, y2, y3
