"""The plan of an output checkpoint: which tensors go into which shard, to the byte, before any is written."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch

from minibble.quantize.errors import ConfigError
from minibble.quantize.safetensors_file import encode_header

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# Upper bounds of what the JSON header spends on a file and on a tensor, beyond the tensor's name and shape.
_HEADER_NBYTES = 64
_ENTRY_NBYTES = 96


@dataclass(frozen=True)
class ShardPlan:
    """One file: the specs it carries, in the order in which they are produced, and each tensor's dtype and shape."""

    filename: str
    names: tuple[str, ...]
    tensors: Layout = field(repr=False)

    @cached_property
    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and each tensor's offset in it."""
        return encode_header(self.tensors)

    @property
    def tensor_nbytes(self) -> int:
        return sum(_nbytes(dtype, shape) for dtype, shape in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Exact length of the file."""
        return len(self.header[0]) + self.tensor_nbytes


def plan_shards(
    items: Iterable[tuple[str, Layout]], shard_size: int, starts: Set[str] = frozenset()
) -> tuple[ShardPlan, ...]:
    """Fill shards with `items`, in their order, none larger than `shard_size` bytes.

    An item is a spec's name and the tensors stored for it, which stay together; an item larger than `shard_size`
    gets a shard of its own. Items named in `starts` begin a new shard.
    """
    if shard_size < 1:
        raise ConfigError(f"shard size {shard_size} must be at least 1 byte")
    groups: list[list[tuple[str, Layout]]] = []
    filled = 0
    for name, layout in items:
        cost = sum(_nbytes(dtype, shape) + _entry_bound(key, shape) for key, (dtype, shape) in layout.items())
        if not groups or filled + cost > shard_size or name in starts:
            groups.append([])
            filled = _HEADER_NBYTES
        groups[-1].append((name, layout))
        filled += cost
    return tuple(_shard(number, len(groups), group) for number, group in enumerate(groups, start=1))


def _shard(number: int, count: int, group: list[tuple[str, Layout]]) -> ShardPlan:
    filename = f"model-{number:05d}-of-{count:05d}.safetensors"
    tensors = {key: value for _, layout in group for key, value in layout.items()}
    return ShardPlan(filename, tuple(name for name, _ in group), tensors)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * prod(shape)


def _entry_bound(name: str, shape: tuple[int, ...]) -> int:
    return _ENTRY_NBYTES + len(name.encode()) + len(str(shape))
