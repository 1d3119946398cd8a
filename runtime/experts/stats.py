"""What a store of experts has done so far."""

from dataclasses import asdict, dataclass, fields, replace


@dataclass
class ExpertStats:
    """Counts since the store was made; a difference of two is one of these, too.

    An expert asked for is a hit if it was in a slot, or on its way to one, and else a miss; layers with all of their
    experts on the device ask for none while decoding. `predicted_right` are the hits that a prefetch brought, counted
    once each; `computed` the misses of which the CPU computed a part, `in_place` those that kernels read from host
    memory themselves. `stall_s` is time that the host waited, for the disk above all; `device_stall_s` time that the
    device's computing waited for a copy, as far as measured yet: reading in place is computing.
    """

    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    predicted_right: int = 0
    computed: int = 0
    in_place: int = 0
    evictions: int = 0
    bytes_from_host: int = 0
    bytes_from_disk: int = 0
    stall_s: float = 0.0
    device_stall_s: float = 0.0
    failed_reads: int = 0
    buffered_reads: int = 0  # reads and writes of pieces of records, where the disk refused direct ones

    @property
    def hit_rate(self) -> float:
        """The share of hits, 1.0 before anything was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def snapshot(self) -> "ExpertStats":
        return replace(self)

    def since(self, earlier: "ExpertStats") -> "ExpertStats":
        """What has been added since the snapshot `earlier`."""
        return ExpertStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def to_json(self) -> dict[str, int | float]:
        return asdict(self) | {"hit_rate": self.hit_rate}
