"""The manifest `minibble.json`: what a checkpoint was made from, how, and what became of each tensor."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minibble.quantize.errors import CheckpointError
from minibble.quantize.folder import MANIFEST
from minibble.quantize.journal import SealedShard

VERSION = 1


def build_manifest(
    identity: dict[str, Any],
    totals: dict[str, Any],
    sealed: Mapping[str, SealedShard],
    kept: dict[str, str],
    copied: dict[str, str],
    notes: list[str],
    conclude: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda records: {},
) -> dict[str, Any]:
    """The manifest's content, free of times and host names: the same input gives the same bytes.

    `kept` gives the dtype of each tensor that is not 4-bit, `copied` the SHA-256 of each file taken along, `conclude`
    what else to tell given the records of all 4-bit matrices; its `totals` are added to those given.
    """
    quantized = {name: record for shard in sealed.values() for name, record in shard.tensors.items()}
    errors = [record["relative_error"] for _, record in sorted(quantized.items())]
    if errors:
        mean = float(f"{sum(errors) / len(errors):.6g}")
        totals = totals | {"mean_relative_error": mean, "max_relative_error": max(errors)}
    more = dict(conclude(quantized))
    totals = totals | more.pop("totals", {})
    return {
        "manifest_version": VERSION,
        **identity,
        "totals": totals,
        "shards": {name: {"nbytes": shard.nbytes, "sha256": shard.sha256} for name, shard in sealed.items()},
        "quantized": quantized,
        "kept": kept,
        "files": copied,
        "notes": notes,
        **more,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`; None where there is none, CheckpointError where it cannot be understood."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["manifest_version"] != VERSION:
            raise ValueError(f"version {manifest['manifest_version']}, expected {VERSION}")
        for shard in manifest["shards"].values():
            if not isinstance(shard["nbytes"], int) or not isinstance(shard["sha256"], str):
                raise ValueError("malformed shards")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no manifest of this program ({error!r})") from error
    return manifest
