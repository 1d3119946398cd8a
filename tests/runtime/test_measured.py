"""What this machine offers: the rate of a disk."""

from pathlib import Path

import pytest

from minibble.quantize.errors import CheckpointError
from minibble.runtime import measured
from minibble.runtime.experts.disk import DiskRecords


def test_rate_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record once; nothing is left."""
    asked, plain = [], DiskRecords.read

    def read(self: DiskRecords, key, buffer, work) -> None:  # type: ignore[no-untyped-def]
        asked.append(key)
        plain(self, key, buffer, work)

    monkeypatch.setattr(DiskRecords, "read", read)
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(measured.time, "perf_counter", lambda: next(clock))
    assert measured.disk_rate(tmp_path, 5 << 20) == 8 * (5 << 20) / 2
    assert len(set(asked)) == len(asked) == 8 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="choose another folder"):
        measured.disk_rate(tmp_path / "gone", 1 << 20)
