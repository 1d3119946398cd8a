"""Which experts of a GPU's layers lie where: plain data, checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minibble.quantize.errors import ConfigError

Key = tuple[int, int]  # layer, expert


@dataclass(frozen=True)
class Tiering:
    """Expert ids by layer, each expert of a layer in exactly one tier, and the slots that the others share.

    `resident` experts have a slot on the device for good. `pinned` ones wait in host memory, `disk` ones in a file;
    where host memory falls short the last of a layer's `pinned` go first, so name the most wanted ones first.
    """

    resident: Mapping[int, Sequence[int]]
    pinned: Mapping[int, Sequence[int]]
    disk: Mapping[int, Sequence[int]]
    spare: int

    @property
    def layers(self) -> list[int]:
        return sorted({*self.resident, *self.pinned, *self.disk})

    @property
    def experts(self) -> int:
        """Experts of each layer."""
        first = self.layers[0]
        return sum(len(tier.get(first, ())) for tier in (self.resident, self.pinned, self.disk))

    def check(self) -> None:
        """ConfigError unless every layer has experts 0 to E-1 once each, and a slot to come to if they must come."""
        if not self.layers:
            raise ConfigError("a tiering of no layer: name at least one")
        expected = list(range(self.experts))
        for layer in self.layers:
            found = sorted(id for tier in (self.resident, self.pinned, self.disk) for id in tier.get(layer, ()))
            if found != expected:
                raise ConfigError(
                    f"tiering of layer {layer}: found experts {found}, expected each of 0 to {len(expected) - 1} once"
                )
        if self.spare < 0 or (self.spare == 0 and self.offloaded):
            raise ConfigError(
                f"{self.offloaded} experts wait off the device and {self.spare} slots are spare: give one"
            )

    @property
    def records(self) -> int:
        """Records on the device: residents, spare slots, and the poison that stands for all that are not there."""
        return sum(map(len, self.resident.values())) + self.spare + bool(self.offloaded)

    @property
    def offloaded(self) -> int:
        """Experts that are not resident."""
        return sum(len(ids) for tier in (self.pinned, self.disk) for ids in tier.values())


def keys(tier: Mapping[int, Sequence[int]]) -> Iterator[Key]:
    """(layer, expert) of a tier: the first of every layer, then the second of every layer, and so on."""
    for place in range(max((len(ids) for ids in tier.values()), default=0)):
        yield from ((layer, tier[layer][place]) for layer in sorted(tier) if place < len(tier[layer]))
