"""Others' kernels for the same products, from the same codes. M tokens, N rows, K columns."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode
from minibble.quantize.tensors import Levels, QuantizedTensor

Product = Callable[[Tensor], Tensor]

_INNER_K_TILES = 8  # of torch's int4 kernel; the widest it knows


def bitsandbytes_product(q: QuantizedTensor) -> Product:
    """bitsandbytes' product with an NF4 matrix, whichever of its kernels it takes for x [M, K]."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    stored = NF4(double_quant=q.nested_absmax is not None).pack("w", q)
    parts = {name.removeprefix("w."): tensor for name, tensor in stored.items() if name != "w"}
    state = QuantState.from_dict(parts, device=q.device)
    codes = stored["w"]
    return lambda x: bitsandbytes.matmul_4bit(x, codes.t(), state)


def torch_int4_product(q: QuantizedTensor) -> Product:
    """torch's own int4 kernel, whose scales are bfloat16."""
    N, K = q.shape
    scales = q.absmax.view(N, -1).bfloat16()
    scales = torch.stack((scales, torch.zeros_like(scales)), dim=-1).transpose(0, 1).contiguous()
    codes = torch.ops.aten._convert_weight_to_int4pack(q.codes.view(N, K // 2), _INNER_K_TILES)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, codes, q.block_size, scales)


def cublas_product(q: QuantizedTensor) -> Product:
    """The decoded matrix in bfloat16."""
    weight = decode(q, torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


BITSANDBYTES, TORCH_INT4, CUBLAS = "bitsandbytes NF4-DQ", "torch int4 g128", "cuBLAS bf16"
# By the codes that a peer multiplies with: its name and how its products are made.
PEERS: dict[Levels, dict[str, Callable[[QuantizedTensor], Product]]] = {
    "nf4": {BITSANDBYTES: bitsandbytes_product, CUBLAS: cublas_product},
    "int4": {TORCH_INT4: torch_int4_product},
}


def prepared(prepare: Callable[[QuantizedTensor], Product], matrices: Sequence[QuantizedTensor]) -> list[Product] | str:
    """A peer's products with all `matrices`, or in a line why it cannot be measured here."""
    try:
        products = [prepare(q) for q in matrices]
        products[0](torch.ones(1, matrices[0].shape[1], dtype=torch.bfloat16, device=matrices[0].device))
    except Exception as error:  # whatever others' code raises: it is recorded and shown instead of a time
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return products


def expert_product(gate: Product, up: Product, down: Product) -> Product:
    """down(silu(gate x) * up x)."""
    return lambda x: down(torch.nn.functional.silu(gate(x)) * up(x))


def routed(experts: Sequence[Product], x_MD: Tensor, ids_MA: Tensor, weights_MA: Tensor) -> Callable[[], Tensor]:
    """The weighted sum of each token's experts, expert by expert, where each one's tokens are known beforehand."""
    chosen = []
    for expert in ids_MA.unique().tolist():
        token, place = (ids_MA == expert).nonzero(as_tuple=True)
        chosen.append((experts[expert], token, weights_MA[token, place, None].to(x_MD.dtype)))
    if len(x_MD) == 1:
        return lambda: torch.stack([expert(x_MD) * weight for expert, _, weight in chosen]).sum(0)

    def call() -> Tensor:
        out = torch.zeros_like(x_MD)
        for expert, token, weight in chosen:
            out.index_add_(0, token, expert(x_MD[token]) * weight)
        return out

    return call
