"""The activations of all calibration tokens: on the GPU, in host memory or in a file, as the plan says."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from minibble.calibrate.plan import Place
from minibble.calibrate.setup import Setup
from minibble.quantize.atomic import partial_path


@dataclass(frozen=True)
class Stores:
    """hidden [tokens, D], mixed [tokens, H*K], sums float32 [tokens, D]: see CalibrationPlan."""

    hidden: Tensor
    mixed: Tensor
    sums: Tensor


def make_stores(setup: Setup, folder: Path) -> Stores:
    """The stores of the plan; files among them lie in `folder`, nameless, so that nothing of them survives."""
    plan, config, device = setup.plan, setup.config, setup.device
    D, HK = config.hidden_size, config.num_attention_heads * config.head_dim

    def make(name: str, place: Place, features: int, dtype: torch.dtype) -> Tensor:
        shape = (plan.tokens, features)
        if place == "gpu":
            return torch.empty(shape, dtype=dtype, device=device)
        if place == "host":
            return torch.empty(shape, dtype=dtype)
        path = partial_path(folder / f"activations-{name}")
        try:
            with open(path, "wb") as file:  # room is taken now: a full disk would kill whoever writes to the mapping
                os.posix_fallocate(file.fileno(), 0, prod(shape) * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)
        finally:
            path.unlink(missing_ok=True)

    return Stores(
        make("hidden", plan.hidden, D, setup.dtype),
        make("mixed", plan.mixed, HK, setup.dtype),
        make("sums", plan.sums, D, torch.float32),
    )


def take(store: Tensor, rows: slice | Tensor, device: torch.device) -> Tensor:
    """Those rows of a store on `device`."""
    if isinstance(rows, Tensor):
        return store.index_select(0, rows.to(store.device)).to(device)
    return store[rows].to(device)


def spans(count: int, size: int) -> Iterator[slice]:
    """0 to `count`, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
