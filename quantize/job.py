"""Quantizes a 16-bit checkpoint: one tensor at a time from source shard to output shard."""

import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minibble
from minibble.quantize import sizes
from minibble.quantize.builtin import resolve_source
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.folder import MANIFEST
from minibble.quantize.inventory import TensorSpec, quantized_roles
from minibble.quantize.manifest import build_manifest, read_manifest
from minibble.quantize.measure import all_finite, finite_scales, relative_error
from minibble.quantize.nf4 import NF4
from minibble.quantize.prefetch import ahead
from minibble.quantize.shards import ShardPlan, plan_shards
from minibble.quantize.tensors import QuantizedTensor
from minibble.quantize.writer import CheckpointWriter, Produced, file_sha256

DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Settings:
    """What shapes the output; sizes in bytes."""

    method: str
    block_size: int
    double_quant: bool
    quantize_head: bool
    quantize_embedding: bool
    shard_size: int


@dataclass(frozen=True)
class Progress:
    """How far a job is, in bytes of the source; `current` names the tensor just done."""

    done_bytes: int
    total_bytes: int
    done_tensors: int
    total_tensors: int
    current: str


@dataclass(frozen=True)
class QuantizePlan:
    """What a job will write. Bytes are those of tensors; the files' own, headers included, are in `shards`."""

    source: Path
    source_bytes: int
    output_bytes: int
    parameters: int
    quantized_tensors: int
    kept_tensors: int
    settings: Settings
    layout: tuple[ShardPlan, ...] = field(repr=False)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.output_bytes / self.parameters

    @property
    def shards(self) -> list[tuple[str, int]]:
        """File name and exact length of each shard."""
        return [(shard.filename, shard.nbytes) for shard in self.layout]


@dataclass(frozen=True)
class QuantizeResult:
    """What a job has written; `relative_error` is the mean of the 4-bit matrices' ||W - Q||^2 / ||W||^2."""

    out: Path
    plan: QuantizePlan
    elapsed_s: float
    relative_error: float
    manifest: Path


def plan_quantize(
    source: str | Path,
    out: str | Path | None = None,
    *,
    method: str = "nf4",
    double_quant: bool = True,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
    shard_size: str | int = DEFAULT_SHARD_SIZE,
) -> QuantizePlan:
    """What `quantize_checkpoint` would write, from the source's headers alone; nothing is written."""
    settings = _settings(method, double_quant, quantize_head, quantize_embedding, shard_size)
    checkpoint = _open_source(source, out)
    return _plan(checkpoint, settings)


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "nf4",
    double_quant: bool = True,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
    shard_size: str | int = DEFAULT_SHARD_SIZE,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> QuantizeResult:
    """Write `source` (a folder, or "demo") to the folder `out` with every expert and attention matrix in 4 bit.

    Router, norms, embedding and head keep their dtype unless asked otherwise. `device` is where weights are
    encoded (None: the GPU if there is one). `resume` continues an output that was interrupted: the files end
    byte-identical to an uninterrupted run. Raises CheckpointError for a source that is not complete, 16-bit and
    finite, and for an output that cannot be written.
    """
    started = time.monotonic()
    settings = _settings(method, double_quant, quantize_head, quantize_embedding, shard_size)
    checkpoint = _open_source(source, out)
    plan = _plan(checkpoint, settings)
    job = _Job(checkpoint, plan, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    identity = {
        "version": minibble.__version__,
        "source": job.source_identity,
        "settings": asdict(settings),
    }
    with CheckpointWriter(Path(out), plan.layout, identity, resume) as writer:
        if not writer.complete:
            job.run(writer, progress)
    manifest = read_manifest(Path(out))
    assert manifest is not None
    error = manifest["totals"].get("mean_relative_error", 0.0)
    return QuantizeResult(Path(out), plan, time.monotonic() - started, error, Path(out) / MANIFEST)


class _Job:
    """One quantization: the source, its plan, and the device that encodes."""

    def __init__(self, source: Checkpoint, plan: QuantizePlan, device: torch.device):
        self.source, self.plan, self.device = source, plan, device
        self.format, self.roles = _format(plan.settings), _roles(plan.settings)
        self.source_identity = {
            "fingerprint": source.fingerprint(), "model_type": source.config.model_type, "nbytes": plan.source_bytes
        }  # fmt: skip

    def run(self, writer: CheckpointWriter, progress: Callable[[Progress], None] | None) -> None:
        pending = writer.pending
        specs = [self.source.specs[name] for shard in pending for name in shard.names]
        produced = self._produce(specs, progress)
        try:
            for shard in pending:
                writer.write_shard(shard, islice(produced, len(shard.names)))
        finally:
            produced.close()
        writer.wait()
        config, notes = self._config()
        extra = self.source.extra_files()
        copied = {path.name: file_sha256(path) for path in extra}
        manifest = build_manifest(writer.identity, self._totals(), writer.sealed, self._kept(), copied, notes)
        writer.finish(config, manifest, extra)

    def _produce(
        self, specs: list[TensorSpec], progress: Callable[[Progress], None] | None
    ) -> Generator[Produced, None, None]:
        """Read, encode and pack `specs` in order, reading one tensor ahead."""
        total = self.plan.source_bytes
        done = total - sum(self.source.stored_nbytes(spec) for spec in specs)
        count = len(self.source.inventory)
        for number, (spec, tensor) in enumerate(ahead(self._read, specs), start=count - len(specs) + 1):
            assert isinstance(tensor, Tensor)
            produced = self._one(spec, tensor)
            done += tensor.nbytes
            if progress is not None:
                progress(Progress(done, total, number, count, spec.name))
            yield produced

    def _read(self, spec: TensorSpec) -> Tensor | QuantizedTensor:
        """From disk; what goes to a GPU is read into pinned memory."""
        return self.source.read(spec, pin_memory=self.device.type == "cuda" and spec.role in self.roles)

    def _one(self, spec: TensorSpec, tensor: Tensor) -> Produced:
        quantized = spec.role in self.roles
        weight = tensor.to(self.device, non_blocking=True) if quantized else tensor
        q = self.format.encode(weight) if quantized else None
        if not (all_finite(weight) if q is None else finite_scales(q)):
            raise CheckpointError(
                f"{self.source.path}: {self.source.where(spec)} has NaN or infinite values; download the source again"
            )
        if q is None:
            return Produced(spec.name, {spec.name: tensor})
        record = {"relative_error": relative_error(self.format, weight, q)}
        return Produced(spec.name, self.format.pack(spec.name, to_host(q)), record)

    def _config(self) -> tuple[dict[str, Any], list[str]]:
        """The output's config.json, and what the manifest says about it."""
        config = dict(self.source.config.raw)
        notes = []
        if config.pop("auto_map", None) is not None:
            notes.append("config.json: auto_map dropped, code files are never copied")
        skipped = ["block_sparse_moe.gate", "mlp.gate"]
        skipped += [] if "head" in self.roles else ["lm_head"]
        config["quantization_config"] = self.format.quantization_config(skipped)
        return config, notes

    def _kept(self) -> dict[str, str]:
        kept = [spec for spec in self.source.inventory if spec.role not in self.roles]
        return {spec.name: str(self.source.dtype(spec)).removeprefix("torch.") for spec in kept}

    def _totals(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "parameters": plan.parameters,
            "nbytes": plan.output_bytes,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "quantized_tensors": plan.quantized_tensors,
            "kept_tensors": plan.kept_tensors,
        }


def to_host(q: QuantizedTensor) -> QuantizedTensor:
    """`q` on the CPU; from a GPU through pinned memory, several times faster than pageable."""
    if q.device.type != "cuda":
        return q.to("cpu")

    def pinned(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    nested = None if q.nested_absmax is None else pinned(q.nested_absmax)
    host = QuantizedTensor(
        q.shape, pinned(q.codes), pinned(q.absmax), nested, q.nested_offset, q.block_size, q.source_dtype
    )
    torch.cuda.synchronize(q.device)
    return host


def _settings(
    method: str, double_quant: bool, quantize_head: bool, quantize_embedding: bool, shard_size: str | int
) -> Settings:
    if method != "nf4":
        raise ConfigError(f"method {method!r} is unknown; expected 'nf4'")
    nbytes = sizes.parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    return Settings(method, NF4().block_size, double_quant, quantize_head, quantize_embedding, nbytes)


def _format(settings: Settings) -> NF4:
    return NF4(settings.block_size, settings.double_quant)


def _roles(settings: Settings) -> frozenset[str]:
    return quantized_roles(settings.quantize_head, settings.quantize_embedding)


def _open_source(source: str | Path, out: str | Path | None) -> Checkpoint:
    path = resolve_source(source)
    if out is not None and Path(out).resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{out}: the output lies inside the source {path}; choose another folder")
    checkpoint = Checkpoint.open(path)
    if checkpoint.format is not None:
        raise CheckpointError(f"{path}: is already 4-bit ({checkpoint.format.name}); give the 16-bit source instead")
    return checkpoint


def _plan(source: Checkpoint, settings: Settings) -> QuantizePlan:
    format, roles = _format(settings), _roles(settings)
    for spec in source.inventory:
        if spec.role in roles and spec.shape[-1] % format.block_size:
            raise ConfigError(
                f"{source.where(spec)}: rows of {spec.shape[-1]} weights are not whole blocks of {format.block_size}, "
                "so this model cannot be stored as NF4"
            )
    items = [
        (
            spec.name,
            format.stored(spec.name, spec.shape)
            if spec.role in roles
            else {spec.name: (source.dtype(spec), spec.shape)},
        )
        for spec in source.inventory
    ]
    layout = plan_shards(items, settings.shard_size)
    quantized = sum(spec.role in roles for spec in source.inventory)
    return QuantizePlan(
        source=source.path,
        source_bytes=source.total_nbytes,
        output_bytes=sum(shard.tensor_nbytes for shard in layout),
        parameters=sum(spec.numel for spec in source.inventory),
        quantized_tensors=quantized,
        kept_tensors=len(source.inventory) - quantized,
        settings=settings,
        layout=layout,
    )
