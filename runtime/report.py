"""Where every byte of a model goes: in a checkpoint on disk, or in each format before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibble.quantize.builtin import BUILTIN, DEMO, builtin_config, resolve_source
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import ConfigError
from minibble.quantize.folder import CONFIG, JOURNAL
from minibble.quantize.inventory import active_parameters
from minibble.runtime.footprint import (
    Footprint,
    footprint,
    footprints,
    kv_cache_bytes,
    parameters_by_part,
    state_bytes,
    sum_parts,
)
from minibble.runtime.quality import Quality, read_quality

if TYPE_CHECKING:
    from minibble.runtime.plan import Source
    from minibble.runtime.planning.machine import Machine
    from minibble.runtime.planning.placement import Placement

STORED = "stored"


@dataclass(frozen=True)
class MemoryReport:
    """What a model weighs. Sizes in bytes; `weights` is what the totals speak of, `formats` what else it could be.

    `weights` are the tensors on disk when the target is a checkpoint (`stored`), else those of the asked format.
    `quality` is what the manifest of such a checkpoint says, if it has one and is 4-bit; `placement` is the plan for
    the GPUs that were asked about.
    """

    target: str
    config: ModelConfig
    stored: bool
    weights: Footprint
    formats: Mapping[str, Footprint]
    context: int
    batch: int
    kv_cache_bytes: int
    state_bytes: int
    quality: Quality | None = None
    placement: "Placement | None" = None

    @property
    def parameters(self) -> int:
        return self.weights.parameters

    @property
    def running_bytes(self) -> int:
        """Weights, KV cache and state together; activations and workspace not counted."""
        return self.weights.total_bytes + self.kv_cache_bytes + self.state_bytes

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, with the keys that other programs may rely on."""
        return {
            "target": self.target,
            "model_type": self.config.model_type,
            "parameters": self.parameters,
            "active_parameters": active_parameters(self.config),
            "parameters_by_part": parameters_by_part(self.config),
            "attention": list(self.config.attention),
            "layers": {kind: self.config.attention.count(kind) for kind in ("lightning", "softmax")},
            "stored": self.stored,
            "format": self.weights.format,
            **_numbers(self.weights),
            "formats": {name: _numbers(weights) for name, weights in self.formats.items()},
            "context": self.context,
            "batch": self.batch,
            "kv_cache_bytes": self.kv_cache_bytes,
            "state_bytes": self.state_bytes,
            "running_bytes": self.running_bytes,
            **({} if self.quality is None else {"quality": self.quality.to_json()}),
            **({} if self.placement is None else self.placement.to_json()),
        }


def _numbers(weights: Footprint) -> dict[str, Any]:
    return {
        "total_bytes": weights.total_bytes,
        "bits_per_weight": weights.bits_per_weight,
        "parts": dict(weights.parts),
    }


@dataclass(frozen=True)
class _Target:
    """What there is to report on: `source` and `stored`, its bytes on disk, if there are weights, and their quality."""

    config: ModelConfig
    source: "Source | None" = None
    stored: Footprint | None = None
    quality: Quality | None = None


def memory_report(
    target: str | Path,
    *,
    context: int = 8192,
    batch: int = 1,
    format: str | None = None,
    gpu_memory: int | None = None,
    gpus: Sequence[int] | None = None,
    host_memory: int | None = None,
    disk: int | None = None,
) -> MemoryReport:
    """Report on a checkpoint folder, a `config.json` (or a folder with only that), or a built-in name.

    A checkpoint is reported as it lies on disk, to the byte, unless `format` asks what it would be in another.
    Without weights, `format` is `nf4-dq` by default; see `footprint.FORMAT_NAMES`. `context` is in tokens per
    sequence, `batch` in sequences. ConfigError or CheckpointError say what is wrong with the target.

    With `gpus`, bytes of each, or `gpu_memory`, the most bytes on all of them (alone: of one GPU), the report has a
    placement. It pins at most `host_memory` bytes of experts, by default what is needed, and leaves at most `disk`
    bytes of them on disk, by default none. BudgetError says what is missing.
    """
    if context < 0 or batch < 1:
        raise ConfigError(f"context {context} and batch {batch} must be at least 0 and 1")
    if gpu_memory is None and gpus is None and (host_memory is not None or disk is not None):
        raise ConfigError("host memory and disk are for experts that do not fit on GPUs: say which, or how much memory")
    examined = _examine(target)
    config, as_stored = examined.config, examined.stored is not None and format is None
    weights = examined.stored if as_stored else footprint(config, format or "nf4-dq")
    assert weights is not None
    placement = None
    if gpu_memory is not None or gpus is not None:
        from minibble.runtime.planning.machine import Machine

        machine = Machine.of_sizes(gpus or [gpu_memory or 0], host_memory, disk)
        total = gpu_memory if gpus else None
        placement = _placement(examined, None if as_stored else weights.format, machine, context, batch, total)
    return MemoryReport(
        target=str(target),
        config=config,
        stored=as_stored,
        weights=weights,
        formats=footprints(config),
        context=context,
        batch=batch,
        kv_cache_bytes=kv_cache_bytes(config, context, batch),
        state_bytes=state_bytes(config, batch),
        quality=examined.quality if as_stored else None,
        placement=placement,
    )


def _placement(
    target: _Target, format: str | None, machine: "Machine", context: int, batch: int, gpu_memory: int | None
) -> "Placement":
    """The plan for the target's weights as they are, or for its config in `format`."""
    from minibble.runtime.planning.device_bytes import ConfigSource
    from minibble.runtime.planning.planner import plan_placement

    source = target.source if format is None else ConfigSource.of(target.config, format)
    assert source is not None
    counts = None if target.quality is None else target.quality.expert_tokens
    return plan_placement(source, machine, context=context, batch=batch, gpu_memory=gpu_memory, counts=counts)


def _examine(target: str | Path) -> _Target:
    path = resolve_source(target)
    if path.is_dir():
        bare = not any(".safetensors" in entry.name or entry.name == JOURNAL for entry in path.iterdir())
        if bare and (path / CONFIG).is_file():
            return _Target(ModelConfig.from_file(path / CONFIG))
        return _stored(path)
    if path.is_file():
        return _Target(ModelConfig.from_file(path))
    if str(target) in BUILTIN:
        return _Target(builtin_config(str(target)))
    names = ", ".join((*BUILTIN, DEMO))
    raise ConfigError(f"'{target}' is no checkpoint folder, no config.json and no built-in model ({names})")


def _stored(path: Path) -> _Target:
    from minibble.quantize.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    specs = checkpoint.inventory
    weights = Footprint(
        format=checkpoint.format.name if checkpoint.format is not None else "16-bit",
        parameters=sum(spec.numel for spec in specs),
        parts=sum_parts(specs, checkpoint.stored_nbytes),
    )
    quality = None if checkpoint.format is None else read_quality(path, checkpoint.config)
    return _Target(checkpoint.config, checkpoint, weights, quality)
