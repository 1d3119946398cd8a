"""Quantizes a 16-bit checkpoint: from source shards to output shards, tensor by tensor.

`Job` does what every way of choosing codes needs: plan, journal, config, manifest. Rounding to nearest is done here,
one tensor in memory at a time; `minibble.calibrate.job` is the way that looks at activations.
"""

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import minibble
from minibble.quantize.builtin import resolve_source
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.folder import MANIFEST
from minibble.quantize.inventory import TensorSpec, quantized_roles
from minibble.quantize.manifest import build_manifest, read_manifest
from minibble.quantize.measure import all_finite, finite_scales, relative_error
from minibble.quantize.prefetch import ahead
from minibble.quantize.settings import Settings, make_settings
from minibble.quantize.shards import ShardPlan, plan_shards
from minibble.quantize.tensors import QuantizedTensor
from minibble.quantize.writer import CheckpointWriter, Produced, file_sha256

Records = Mapping[str, Any]  # what the manifest tells of each 4-bit matrix
OnProgress = Callable[["Progress"], None]


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
    """What a job has written; `totals` are those of the manifest."""

    out: Path
    plan: QuantizePlan
    elapsed_s: float
    totals: Mapping[str, Any]
    manifest: Path

    @property
    def relative_error(self) -> float:
        """Mean of the 4-bit matrices' ||W - Q||^2 / ||W||^2."""
        return self.totals.get("mean_relative_error", 0.0)


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    resume: bool = False,
    progress: OnProgress | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Write `source` (a folder, or "demo") to the folder `out` in 4 bits, every weight rounded to nearest.

    4-bit are all expert and attention matrices; router, norms, embedding and head keep their dtype unless asked
    otherwise. `settings` are those of `make_settings`. `device` is where weights are encoded (None: the GPU if there
    is one). `resume` continues an output that was interrupted: the files end byte-identical to an uninterrupted run.
    Raises CheckpointError for a source that is not complete, 16-bit and finite, and for an output that cannot be
    written.
    """
    return NearestJob(source, out, make_settings(**settings), device).execute(resume, progress)


class Job:
    """One quantization: the source, what will be written, and the device that works.

    `by_layer` puts a layer's tensors into shards of their own, so that whole layers are finished one by one.
    """

    def __init__(
        self,
        source: str | Path,
        out: str | Path,
        settings: Settings,
        device: str | torch.device | None,
        by_layer: bool = False,
    ):
        self.out = Path(out)
        self.source = _open_source(source, self.out)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.format = settings.format
        self.roles = quantized_roles(settings.quantize_head, settings.quantize_embedding)
        self.plan = self._plan(settings, by_layer)

    def write(
        self,
        resume: bool,
        produce: Callable[[CheckpointWriter], Generator[Produced, None, None]],
        identity: Mapping[str, Any] = MappingProxyType({}),
        settings: Mapping[str, Any] = MappingProxyType({}),
        conclude: Callable[[Records], Mapping[str, Any]] = lambda records: {},
    ) -> QuantizeResult:
        """Write what `produce` yields for the pending shards, in their order, and then all else.

        `identity` and `settings` say what more the output depends on, `conclude` what more the manifest shall hold.
        """
        started = time.monotonic()
        whole = {
            "version": minibble.__version__,
            "source": {
                "fingerprint": self.source.fingerprint(),
                "model_type": self.source.config.model_type,
                "nbytes": self.plan.source_bytes,
            },
            "settings": asdict(self.plan.settings) | dict(settings),
            **identity,
        }
        out = self.out
        with CheckpointWriter(out, self.plan.layout, whole, resume) as writer:
            if not writer.complete:
                self._fill(writer, produce(writer), conclude)
        manifest = read_manifest(out)
        assert manifest is not None
        return QuantizeResult(out, self.plan, time.monotonic() - started, manifest["totals"], out / MANIFEST)

    def read(self, spec: TensorSpec) -> Tensor | QuantizedTensor:
        """From disk; what goes to a GPU is read into pinned memory."""
        return self.source.read(spec, pin_memory=self.device.type == "cuda" and spec.role in self.roles)

    def rounded(self, spec: TensorSpec, tensor: Tensor) -> Produced:
        """A tensor to store: 4-bit, each weight rounded to nearest, or as it is, whichever its role asks for."""
        quantized = spec.role in self.roles
        weight = tensor.to(self.device, non_blocking=True) if quantized else tensor
        q = self.format.encode(weight) if quantized else None
        if not (all_finite(weight) if q is None else finite_scales(q)):
            raise CheckpointError(
                f"{self.source.path}: {self.source.where(spec)} has NaN or infinite values; download the source again"
            )
        if q is None:
            return Produced(spec.name, {spec.name: tensor})
        return self.packed(spec.name, q, {"relative_error": relative_error(self.format, weight, q)})

    def packed(self, name: str, q: QuantizedTensor, record: dict[str, Any]) -> Produced:
        """A 4-bit matrix to store, wherever it is now."""
        return Produced(name, to_host(self.format.pack(name, q)), record)

    def reporter(self, specs: list[TensorSpec], progress: OnProgress | None) -> Callable[[TensorSpec], None]:
        """A function to call after each of `specs`, all that is still to be done."""
        total, count = self.plan.source_bytes, len(self.source.inventory)
        done = total - sum(self.source.stored_nbytes(spec) for spec in specs)
        number = count - len(specs)

        def report(spec: TensorSpec) -> None:
            nonlocal done, number
            done, number = done + self.source.stored_nbytes(spec), number + 1
            if progress is not None:
                progress(Progress(done, total, number, count, spec.name))

        return report

    def _fill(
        self,
        writer: CheckpointWriter,
        produced: Generator[Produced, None, None],
        conclude: Callable[[Records], Mapping[str, Any]],
    ) -> None:
        try:
            for shard in writer.pending:
                writer.write_shard(shard, islice(produced, len(shard.names)))
        finally:
            produced.close()
        writer.wait()
        config, skipped, notes = self._config()
        extra = self.source.extra_files()
        copied = {path.name: file_sha256(path) for path in extra}
        manifest = build_manifest(writer.identity, self._totals(), writer.sealed, self._kept(), copied, notes, conclude)
        writer.finish(config, manifest, extra, self.format.extra_json(skipped))

    def _config(self) -> tuple[dict[str, Any], list[str], list[str]]:
        """The output's config.json, the modules that stay in 16 bit, and what the manifest says about it."""
        config = dict(self.source.config.raw)
        notes = []
        if config.pop("auto_map", None) is not None:
            notes.append("config.json: auto_map dropped, code files are never copied")
        skipped = ["block_sparse_moe.gate", "mlp.gate"]
        skipped += [] if "head" in self.roles else ["lm_head"]
        config["quantization_config"] = self.format.quantization_config(skipped)
        return config, skipped, notes

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

    def _plan(self, settings: Settings, by_layer: bool) -> QuantizePlan:
        source = self.source
        layout = plan_shards(
            [(spec.name, self._stored(spec)) for spec in source.inventory],
            settings.shard_size,
            _layer_starts(source.inventory) if by_layer else frozenset(),
        )
        quantized = sum(spec.role in self.roles for spec in source.inventory)
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

    def _stored(self, spec: TensorSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if spec.role not in self.roles:
            return {spec.name: (self.source.dtype(spec), spec.shape)}
        if spec.shape[-1] % self.format.block_size:
            raise ConfigError(
                f"{self.source.where(spec)}: rows of {spec.shape[-1]} weights are not whole blocks of "
                f"{self.format.block_size}, so this model cannot be stored as {self.format.name}"
            )
        return self.format.stored(spec.name, spec.shape)


class NearestJob(Job):
    """A quantization that rounds every weight to the nearest level, one tensor in memory at a time."""

    def execute(self, resume: bool = False, progress: OnProgress | None = None) -> QuantizeResult:
        """Do it."""

        def produce(writer: CheckpointWriter) -> Generator[Produced, None, None]:
            specs = [self.source.specs[name] for shard in writer.pending for name in shard.names]
            report = self.reporter(specs, progress)
            for spec, tensor in ahead(self.read, specs):
                assert isinstance(tensor, Tensor)
                produced = self.rounded(spec, tensor)
                report(spec)
                yield produced

        return self.write(resume, produce)


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` on the CPU; from a GPU through pinned memory, several times faster than pageable."""

    def pinned(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    host = {name: pinned(tensor) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return host


def _layer_starts(inventory: tuple[TensorSpec, ...]) -> frozenset[str]:
    """The first tensor of each layer, and the first after them."""
    return frozenset(spec.name for before, spec in pairwise(inventory) if spec.layer != before.layer)


def _open_source(source: str | Path, out: Path) -> Checkpoint:
    path = resolve_source(source)
    if out.resolve().is_relative_to(path.resolve()):
        raise CheckpointError(f"{out}: the output lies inside the source {path}; choose another folder")
    checkpoint = Checkpoint.open(path)
    if checkpoint.format is not None:
        raise CheckpointError(f"{path}: is already 4-bit ({checkpoint.format.name}); give the 16-bit source instead")
    return checkpoint
