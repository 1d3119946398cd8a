"""Memory of a GPU for less than all experts of a tiny model."""

from pathlib import Path

import minibble

CHUNK = 4096  # tokens at a time: memory for smaller pieces would hold all of these small experts


def short_of(folder: Path, share: float) -> int:
    """GPU memory for all but that share of the experts."""
    placed = minibble.load(folder, device="cuda:0", prefill_chunk=CHUNK).placement
    assert placed is not None
    return placed.total_bytes - int(share * sum(map(len, placed.resident))) * placed.record_bytes
