"""moe4 on a layer's experts of the released size, beside its peers. M tokens, D hidden, F expert hidden, E experts,
A active."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minibble.quantize.errors import ConfigError
from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import decode
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.bench import gpu, peers
from minibble.runtime.bench.check import BOUND, PEER_BOUND, WrongResult, checked
from minibble.runtime.bench.linear import Tell, figures
from minibble.runtime.bench.weights import generator_on, random_matrix, random_tensor

TOKENS = (1, 2, 4, 8, 16, 32, 64)
QUICK_TOKENS = (1, 16)
_ROUTINGS = 8  # that calls with several tokens take in turn

Expert = tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor]  # gate, up, down
Routing = tuple[Tensor, Tensor]  # ids, int32 [M, A], and weights, float32 [M, A]
Calls = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Sizes:
    """Of a layer's experts."""

    D: int = 6144
    F: int = 9216
    E: int = 32
    A: int = 2


def measure(
    formats: dict[str, Format],
    tokens: Sequence[int],
    device: torch.device,
    read_GB_per_s: float,
    tell: Tell,
    sizes: Sizes = Sizes(),
) -> dict[str, Any]:
    """Times of every kernel at every M, a call and an expert whose weights it reads; `missing` as in linear.py."""
    generator = generator_on(device, 1)
    xs = {M: random_tensor((M, sizes.D), 1.0, device, generator) for M in tokens}
    routings = {M: make_routings(M, sizes, generator) for M in tokens}
    touched = {M: sum(len(ids.unique()) for ids, _ in routings[M]) / len(routings[M]) for M in tokens}
    rows: list[dict[str, Any]] = [{"M": M, "touched": round(touched[M], 2), "kernels": {}} for M in tokens]
    result: dict[str, Any] = {"sizes": asdict(sizes), "expert_nbytes": {}, "rows": rows, "missing": {}}
    for name, format in formats.items():
        experts = [_expert(sizes, format, device, generator) for _ in range(sizes.E)]
        table, nbytes = expert_table(experts, sizes, format), sum(q.nbytes for q in experts[0])
        expected = _expected(experts, xs, {M: routings[M][0] for M in tokens})
        for kernel, calls, bound in _kernels(name, table, experts, xs, routings, result["missing"]):
            result["expert_nbytes"][kernel] = nbytes
            for M, row in zip(tokens, rows, strict=True):
                tell(f"moe4 {kernel}, M = {M}")
                try:
                    error = checked(f"moe4 {kernel}", partial(_summed, calls[M][0]), expected[M], bound)
                except WrongResult as wrong:
                    if kernel == name:
                        raise
                    result["missing"][kernel] = str(wrong)
                    break
                us = gpu.graph_us(calls[M])
                found = figures(us, round(touched[M] * nbytes), read_GB_per_s)
                row["kernels"][kernel] = found | {"us_per_expert": round(us / touched[M], 2), "error": error}
    return result


def make_routings(M: int, sizes: Sizes, generator: torch.Generator) -> list[Routing]:
    """Random choices of A different experts for M tokens; those of one token use every expert once before any twice."""
    device, count = generator.device, sizes.E // sizes.A if M == 1 else _ROUTINGS
    if M == 1:
        ids = torch.randperm(sizes.E, generator=generator, device=device)[: count * sizes.A].view(count, 1, sizes.A)
    else:
        ids = torch.rand(count, M, sizes.E, generator=generator, device=device).topk(sizes.A).indices
    logits = torch.randn(count, M, sizes.A, generator=generator, device=device)
    return list(zip(ids.int(), logits.softmax(-1), strict=True))


def _expert(sizes: Sizes, format: Format, device: torch.device, generator: torch.Generator) -> Expert:
    wide, tall = (sizes.F, sizes.D), (sizes.D, sizes.F)
    gate, up, down = (random_matrix(shape, format, device, generator) for shape in (wide, wide, tall))
    return gate, up, down


def _expected(
    experts: Sequence[Expert], xs: Mapping[int, Tensor], routings: Mapping[int, Routing]
) -> dict[int, Tensor]:
    """The weighted sum of the experts' outputs for each M, float64 [M, D]; every expert is decoded once."""
    x = torch.cat([x.double() for x in xs.values()])
    ids, weights = (torch.cat([routing[i] for routing in routings.values()]) for i in (0, 1))
    y = torch.zeros_like(x)
    for index, expert in enumerate(experts):
        share = torch.where(ids == index, weights.double(), 0).sum(1)
        chosen = share.nonzero().flatten()
        gate, up, down = (decode(q).double() for q in expert)
        hidden = F.silu(x[chosen] @ gate.t()) * (x[chosen] @ up.t())
        y.index_add_(0, chosen, (hidden @ down.t()) * share[chosen, None])
    return dict(zip(xs, y.split([len(x) for x in xs.values()]), strict=True))


def _summed(call: Callable[[], Tensor]) -> Tensor:
    """The sum over A that our kernel leaves to the next one, [M, D]."""
    y = call()
    return y.sum(0) if y.ndim == 3 else y


def _kernels(
    name: str,
    table: Any,
    experts: Sequence[Expert],
    xs: Mapping[int, Tensor],
    routings: Mapping[int, list[Routing]],
    missing: dict[str, str],
) -> Iterator[tuple[str, dict[int, Calls], float]]:
    """Ours, called `name`, and its peers that are there: name, calls for each M, bound on the error.

    Theirs go expert by expert and are told which tokens each expert has: without that they would wait for the host.
    """

    def ours(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return table.decode(x, ids, weights)

    yield name, {M: [partial(ours, x, *routing) for routing in routings[M]] for M, x in xs.items()}, BOUND
    for peer, make in peers.PEERS[experts[0][0].levels].items():
        if peer == peers.CUBLAS:
            continue  # 11 GB of weights, for a time that linear4's table tells already
        products = [peers.prepared(make, expert) for expert in experts]
        wrong = next((found for found in products if isinstance(found, str)), None)
        if wrong is not None:
            missing[peer] = wrong
            continue
        whole = [peers.expert_product(*found) for found in products if not isinstance(found, str)]
        yield peer, {M: [peers.routed(whole, x, *r) for r in routings[M]] for M, x in xs.items()}, PEER_BOUND


def expert_table(experts: Sequence[Expert], sizes: Sizes, format: Format) -> Any:
    """The experts as the model holds them on a GPU."""
    from minibble.runtime.kernels.moe4.table import ExpertTable

    device = experts[0][0].device
    table = ExpertTable.empty(sizes.E, sizes.D, sizes.F, format, torch.bfloat16, device)
    if table is None:
        raise ConfigError("the fused kernels cannot run here: `minibble doctor` says what is missing")
    for index, (gate, up, down) in enumerate(experts):
        table.put(index, "gate_up", [gate, up])
        table.put(index, "down", [down])
    return table
