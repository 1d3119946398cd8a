"""linear4 on one matrix of the released model, 6144 to 9216, beside its peers. M tokens, N rows, K columns."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch

from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import decode
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.bench import gpu, peers
from minibble.runtime.bench.check import BOUND, PEER_BOUND, WrongResult, checked
from minibble.runtime.bench.weights import generator_on, random_matrix, random_tensor
from minibble.runtime.kernels.linear4 import prepare

SHAPE = (9216, 6144)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_TOKENS = (1, 16, 256, 1024)

Tell = Callable[[str], None]


def measure(
    formats: dict[str, Format],
    tokens: Sequence[int],
    device: torch.device,
    read_GB_per_s: float,
    tell: Tell,
    shape: tuple[int, int] = SHAPE,
) -> dict[str, Any]:
    """Times of every kernel at every M; `missing` says of each peer that is not there why."""
    rows: list[dict[str, Any]] = [{"M": M, "kernels": {}} for M in tokens]
    result: dict[str, Any] = {"shape": list(shape), "nbytes": {}, "rows": rows, "missing": {}}
    generator = generator_on(device, 0)
    xs = {M: random_tensor((M, shape[1]), 1.0, device, generator) for M in tokens}
    for name, format in formats.items():
        q = random_matrix(shape, format, device, generator)
        held = [q, *(random_matrix(shape, format, device, generator) for _ in range(gpu.copies(q.nbytes) - 1))]
        dense = decode(q).double()
        expected = {M: x.double() @ dense.t() for M, x in xs.items()}
        del dense
        for kernel, products, nbytes, bound in _kernels(name, held, result["missing"]):
            result["nbytes"][kernel] = nbytes
            for M, row in zip(tokens, rows, strict=True):
                tell(f"linear4 {kernel}, M = {M}")
                try:
                    error = checked(f"linear4 {kernel}", partial(products[0], xs[M]), expected[M], bound)
                except WrongResult as wrong:
                    if kernel == name:
                        raise
                    result["missing"][kernel] = str(wrong)
                    break
                us = gpu.graph_us([partial(product, xs[M]) for product in products])
                row["kernels"][kernel] = figures(us, nbytes, read_GB_per_s) | {"error": error}
    return result


def _kernels(
    name: str, held: Sequence[QuantizedTensor], missing: dict[str, str]
) -> Iterator[tuple[str, list[peers.Product], int, float]]:
    """Ours, called `name`, and its peers that are there: products in turn, bytes of a matrix, bound of the error."""
    packed = [prepare([q], q.device, torch.bfloat16) for q in held]
    yield name, [partial(p, out_dtype=torch.bfloat16) for p in packed], held[0].nbytes, BOUND
    del packed
    for peer, make in peers.PEERS[held[0].levels].items():
        nbytes = 2 * prod(held[0].shape) if peer == peers.CUBLAS else held[0].nbytes
        found = peers.prepared(make, held[: gpu.copies(nbytes)])
        if isinstance(found, str):
            missing[peer] = found
        else:
            yield peer, found, nbytes, PEER_BOUND


def figures(us: float, nbytes: int, read_GB_per_s: float) -> dict[str, float]:
    """A time, and the rate of weights read in it (codes and scales) in GB/s and as a share of the reading bandwidth."""
    rate = nbytes / us / 1e3
    return {"us": round(us, 2), "GB_per_s": round(rate, 1), "share": round(rate / read_GB_per_s, 4)}
