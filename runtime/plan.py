"""What running a model takes on its device, decided before anything is allocated: pure arithmetic.

The workspace counts the largest things alive at once on the paths of `runtime/kernels/`: a decoded matrix with its
products, or the float32 work of lightning attention, whichever is more; where fused kernels run, the projections of
attention or what the routed experts receive and give.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import BudgetError
from minibble.quantize.formats import Format
from minibble.quantize.inventory import TensorSpec
from minibble.quantize.sizes import binary, decimal
from minibble.runtime.footprint import kv_cache_bytes, state_bytes
from minibble.runtime.kernels.linear4.slices import MAX_PARTIAL_SUMS
from minibble.runtime.kernels.tiles import TileLayout, usable
from minibble.runtime.layout import by_module

# Tokens that go through the layers at a time. On an H100 8,192 tokens took 202 ms through eight layers of the real size
# in pieces of 1,024, 152 in one; 4,096 give an expert 256 tokens, a full tile of the kernel for many, for 0.6 GB.
PREFILL_CHUNK = 1024
PREFILL_CHUNK_CUDA = 4096
# Sums that blocks hand to each other: of the kernel for many tokens, on 132 processors, and of the one for few.
HANDED_OVER_NBYTES = (18 << 20) + 4 * MAX_PARTIAL_SUMS
CUBLAS_NBYTES = 32 << 20  # what cuBLAS takes for itself on Hopper through torch's allocator


class Source(Protocol):
    """What planning and loading read of a checkpoint: its inventory, and which tensors are 4-bit in which format."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def inventory(self) -> tuple[TensorSpec, ...]: ...

    @property
    def quantized(self) -> frozenset[str]: ...

    @property
    def format(self) -> Format | None: ...


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on `device` for `batch` sequences of `context` tokens."""

    device: str
    dtype: str
    context: int
    batch: int
    weights_bytes: int
    kv_cache_bytes: int
    state_bytes: int
    workspace_bytes: int
    budget_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_cache_bytes + self.state_bytes + self.workspace_bytes

    def to_json(self) -> dict[str, Any]:
        """Every field and the total."""
        return asdict(self) | {"total_bytes": self.total_bytes}

    def check(self) -> None:
        """Raise BudgetError if the total is over the budget."""
        if self.budget_bytes is not None and self.total_bytes > self.budget_bytes:
            short = self.total_bytes - self.budget_bytes
            raise BudgetError(
                f"{self.device} needs {decimal(self.total_bytes)} ({binary(self.total_bytes)}) for a context of "
                f"{self.context} tokens: {decimal(short)} more than the {decimal(self.budget_bytes)} allowed; allow "
                "more, or take a smaller context"
            )


def plan_memory(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    *,
    context: int,
    batch: int = 1,
    prefill_chunk: int | None = None,
    budget_bytes: int | None = None,
) -> MemoryPlan:
    """The plan for running `source` on one `device` with activations of `dtype`; pieces of a prompt have
    `prefill_chunk` tokens, by default what suits the device."""
    prefill_chunk = prefill_chunk or default_prefill_chunk(device)
    running = workspace_nbytes(source, device, dtype, batch * min(context, prefill_chunk))
    return MemoryPlan(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        context=context,
        batch=batch,
        weights_bytes=weights_nbytes(source, device, dtype),
        kv_cache_bytes=kv_cache_bytes(source.config, context, batch, dtype.itemsize),
        state_bytes=state_bytes(source.config, batch),
        workspace_bytes=max(running, loading_nbytes(source, device, dtype)),
        budget_bytes=budget_bytes,
    )


def default_prefill_chunk(device: torch.device) -> int:
    """How many tokens of a prompt go through the layers at a time."""
    return PREFILL_CHUNK_CUDA if device.type == "cuda" else PREFILL_CHUNK


def weights_nbytes(source: Source, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that all weights take once loaded."""
    specs = {spec.name: spec for spec in source.inventory}
    modules = ([specs[name] for name in names] for _, names in by_module(source.config))
    return sum(module_nbytes(module, source, device, dtype) for module in modules)


def module_nbytes(
    specs: list[TensorSpec], source: Source, device: torch.device, dtype: torch.dtype, fused: bool | None = None
) -> int:
    """Bytes that the matrix takes whose rows are those of `specs`, one under the other.

    `fused` says whether the kernels for 4-bit matrices run there, by default as this machine has it.
    """
    packed = specs[0].role != "embedding" and all(spec.name in source.quantized for spec in specs)
    if fused is None:
        fused = device.type == "cuda" and usable(dtype)
    if packed and fused and source.format is not None:
        tiles = _kernel_layout(specs, source.format)
        if tiles is not None:
            return tiles.nbytes
    rows = sum(spec.shape[0] for spec in specs)
    return sum(resident_nbytes(spec, source, device, dtype, rows) for spec in specs)


def _kernel_layout(specs: list[TensorSpec], format: Format) -> TileLayout | None:
    rows, interleaved = tuple(spec.shape[0] for spec in specs), specs[0].expert is not None and len(specs) > 1
    return TileLayout.of_format(rows, specs[0].shape[1], format, interleaved)


def resident_nbytes(spec: TensorSpec, source: Source, device: torch.device, dtype: torch.dtype, rows: int) -> int:
    """Bytes that `spec` takes once loaded, as a part of a matrix of `rows`."""
    if spec.name in source.quantized and source.format is not None:
        if device.type == "cuda" or spec.role == "embedding":
            return source.format.held_nbytes(spec.shape)
        blocks = -(-spec.numel // source.format.block_size)
        return -(-spec.numel // 2) + blocks * _cpu_scale_nbytes(source.format, rows, spec.shape[1], dtype)
    return spec.numel * held_dtype(spec, device, dtype).itemsize


def _cpu_scale_nbytes(stored: Format, N: int, K: int, dtype: torch.dtype) -> int:
    """Bytes of a block's scale in a matrix [N, K] on CPUs: float32, int4's bfloat16 with its zero, or, for the kernel
    that multiplies from NF4 codes, bfloat16."""
    from minibble.runtime.kernels.linear4 import cpu

    return 2 if stored.levels == "nf4" and cpu.fuses(N, K, dtype) else 4


def held_dtype(spec: TensorSpec, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """dtype in which an unquantized tensor is held: that of the activations, but float32 for routers and norms,
    and for the head on CPUs, which have no product of 16-bit matrices with unrounded sums."""
    if spec.role in ("norm", "router") or (spec.role == "head" and device.type == "cpu"):
        return torch.float32
    return dtype


def workspace_nbytes(source: Source, device: torch.device, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of temporary tensors while `tokens` go through a layer at once."""
    config = source.config
    HK, D = config.num_attention_heads * config.head_dim, config.hidden_size
    projected = tokens * 4 * HK * dtype.itemsize
    hidden = 3 * tokens * D * dtype.itemsize
    lightning = projected + tokens * HK * 4 * (6 + 3 + 2)  # float32: qkv twice, blocks' copies, outputs
    if device.type == "cuda" and usable(dtype) and source.quantized:
        return fused_workspace_nbytes(config, dtype, tokens)
    products = projected + max((rows * columns * dtype.itemsize for rows, columns in _products(source)), default=0)
    fixed = CUBLAS_NBYTES if device.type == "cuda" else 0
    return fixed + hidden + max(lightning, products)


def fused_workspace_nbytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """`workspace_nbytes` of a 4-bit model on a GPU whose fused kernels can be compiled."""
    HK, D = config.num_attention_heads * config.head_dim, config.hidden_size
    projected, hidden = tokens * 4 * HK * dtype.itemsize, 3 * tokens * D * dtype.itemsize
    routed = tokens * config.experts_per_token * (2 * D + config.intermediate_size) * dtype.itemsize
    work = hidden + max(projected + 2 * tokens * HK * dtype.itemsize, routed)
    # Decode steps have a stream, and so these, of their own, and graphs a place for the sums.
    return 2 * CUBLAS_NBYTES + 3 * HANDED_OVER_NBYTES + work


def loading_nbytes(source: Source, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of temporary tensors while the largest matrix is laid out for the kernels: as stored, and put together."""
    if device.type != "cuda" or not usable(dtype):
        return 0
    specs = {spec.name: spec for spec in source.inventory}
    modules = ([specs[name] for name in names] for _, names in by_module(source.config))
    return 2 * max((stored_nbytes(module, source) for module in modules), default=0)


def stored_nbytes(specs: list[TensorSpec], source: Source) -> int:
    """Bytes of the 4-bit matrices among `specs` as they are stored."""
    format = source.format
    return 0 if format is None else sum(format.held_nbytes(s.shape) for s in specs if s.name in source.quantized)


def _products(source: Source) -> Iterable[tuple[int, int]]:
    """Shapes of the 4-bit matrices that are decoded whole."""
    config = source.config
    HK, D, F = config.num_attention_heads * config.head_dim, config.hidden_size, config.intermediate_size
    if source.quantized:
        yield from ((4 * HK, D), (D, HK), (2 * F, D), (D, F))
    if any(spec.role == "head" and spec.name in source.quantized for spec in source.inventory):
        yield (config.vocab_size, D)
