"""Quantizes a checkpoint by what its matrices receive: the calibrated ways of `minibble quantize`, and the choice.

What is finished survives a kill, because a layer's shards hold nothing else; a resumed job runs the text through the
finished layers again, which costs a forward pass and no disk.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibble.calibrate.matrices import Settled
from minibble.calibrate.plan import free_budget, plan_calibration
from minibble.calibrate.setup import Setup
from minibble.calibrate.solver import SolverSettings
from minibble.calibrate.stores import make_stores
from minibble.calibrate.stream import LayerReport, LayerStream, finished_reader
from minibble.calibrate.text import DEFAULT_SEQ_LEN, read_calibration
from minibble.quantize.errors import ConfigError
from minibble.quantize.inventory import TensorSpec
from minibble.quantize.job import Job, NearestJob, OnProgress, QuantizeResult, Records
from minibble.quantize.settings import DEFAULT_SHARD_SIZE, Settings, make_settings
from minibble.quantize.tensors import QuantizedTensor
from minibble.quantize.writer import CheckpointWriter, Produced

GROUP_SIZES = (32, 64, 128)  # of int4: what divides the columns that are solved at once


@dataclass(frozen=True)
class Options:
    """What calibration adds to the settings of a quantization.

    `text` as in `read_calibration`; `gpu_memory` in bytes bounds what the job takes on the GPU; `strict` makes a
    fallback to nearest rounding an error; `router_weights` as in Setup.
    """

    text: str | Path | None = None
    samples: int | None = None
    seq_len: int = DEFAULT_SEQ_LEN
    seed: int = 0
    damp: float = SolverSettings.damp
    act_order: bool = SolverSettings.act_order
    sweeps: int = SolverSettings.sweeps
    router_weights: bool = False
    strict: bool = False
    gpu_memory: int | None = None

    @property
    def solver(self) -> SolverSettings:
        """The solver's part; ConfigError for what cannot be."""
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"damp {self.damp:g} is not between 0 and 1")
        if not 0 <= self.sweeps <= 100:
            raise ConfigError(f"{self.sweeps} sweeps: take 0 to 100")
        return SolverSettings(self.damp, self.act_order, self.sweeps)


OnLayer = Callable[[LayerReport], None]


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    progress: OnProgress | None = None,
    on_layer: OnLayer | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Write the 16-bit checkpoint `source` (a folder, or `demo`) to the folder `out` in 4 bits; see `open_job`.

    `resume` continues an interrupted output and ends with the same bytes on the same machine. Raises ConfigError,
    CalibrationError, CheckpointError and BudgetError.
    """
    job = open_job(source, out, **settings)
    if isinstance(job, CalibratedJob):
        return job.execute(resume, progress, on_layer)
    return job.execute(resume, progress)


def open_job(
    source: str | Path,
    out: str | Path,
    *,
    method: str = "nf4",
    calibration: str | Path | None = None,
    group_size: int | None = None,
    double_quant: bool = True,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
    shard_size: str | int = DEFAULT_SHARD_SIZE,
    device: str | torch.device | None = None,
    **options: Any,
) -> "NearestJob | CalibratedJob":
    """A job with its plan, from the source's headers and the calibration text; nothing is written yet.

    `method` is `nf4` or `gptq` (int4 in groups of `group_size`). `nf4` rounds to nearest unless a `calibration` text is
    given; `gptq` always calibrates, by default on the built-in text. `options` are those of `Options`: samples,
    seq_len, seed, damp, act_order, sweeps, router_weights, strict, gpu_memory.
    """
    settings = make_settings(
        method, group_size=group_size, double_quant=double_quant, quantize_head=quantize_head,
        quantize_embedding=quantize_embedding, shard_size=shard_size,
    )  # fmt: skip
    if method != "nf4" or calibration is not None:
        return CalibratedJob(source, out, settings, device, Options(text=calibration, **options))
    if options:
        raise ConfigError(f"{', '.join(options)}: of no use without calibration; give a calibration text")
    return NearestJob(source, out, settings, device)


class CalibratedJob(Job):
    """A quantization whose codes are chosen by what the matrices receive on `text`; `memory` says where it works."""

    def __init__(
        self,
        source: str | Path,
        out: str | Path,
        settings: Settings,
        device: str | torch.device | None,
        options: Options,
    ):
        if settings.method == "gptq" and settings.block_size not in GROUP_SIZES:
            raise ConfigError(f"group size {settings.block_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        solver = options.solver
        super().__init__(source, out, settings, device, by_layer=True)
        self.text = read_calibration(
            options.text, self.source.path, samples=options.samples, seq_len=options.seq_len, seed=options.seed
        )
        config, device = self.source.config, self.device
        budget = free_budget(device, self.out, self.plan.output_bytes, options.gpu_memory)
        self.memory = plan_calibration(config, self.text.samples, self.text.seq_len, device, budget)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.setup = Setup(
            config, self.format, solver, self.memory, self.text.seq_len, device, dtype, options.strict,
            options.router_weights,
            where=lambda name: f"{self.source.path}: {self.source.where(self.source.specs[name])}",
        )  # fmt: skip

    def execute(
        self, resume: bool = False, progress: OnProgress | None = None, on_layer: OnLayer | None = None
    ) -> QuantizeResult:
        """Do it. `on_layer` hears of each layer once it is solved."""

        def produce(writer: CheckpointWriter) -> Generator[Produced, None, None]:
            return self._produce(writer, progress, on_layer)

        return self.write(resume, produce, {"calibration": self.text.to_json()}, self._settings(), self._conclude)

    def _settings(self) -> dict[str, Any]:
        """What the output depends on beside the settings of every quantization."""
        return asdict(self.setup.solver) | {"router_weights": self.setup.router_weights}

    @torch.inference_mode()
    def _produce(
        self, writer: CheckpointWriter, progress: OnProgress | None, on_layer: OnLayer | None
    ) -> Generator[Produced, None, None]:
        pending = [self.source.specs[name] for shard in writer.pending for name in shard.names]
        wanted, report = set(pending), self.reporter(pending, progress)
        for spec, produced in self._stored_tensors(pending, writer, on_layer):
            if spec in wanted:
                report(spec)
                yield produced

    def _stored_tensors(
        self, pending: list[TensorSpec], writer: CheckpointWriter, on_layer: OnLayer | None
    ) -> Generator[tuple[TensorSpec, Produced], None, None]:
        """What precedes the layers, the layers that have pending tensors, and what follows, in the order of files."""
        to_solve = {spec.layer for spec in pending if spec.layer is not None}
        first = next((n for n, spec in enumerate(pending) if spec.layer is not None), len(pending))
        yield from self._rounded(pending[:first])
        if to_solve:
            sealed = [writer.out / name for name in writer.sealed]
            stream = LayerStream(
                self.setup, self.source, self.read, finished_reader(sealed, self.format), to_solve, on_layer
            )
            for spec, one in stream.run(self.text.ids, make_stores(self.setup, writer.out)):
                yield spec, self._produced(spec, one)
        yield from self._rounded(spec for spec in pending[first:] if spec.layer is None)

    def _produced(self, spec: TensorSpec, one: Tensor | QuantizedTensor | Settled) -> Produced:
        if isinstance(one, Settled):
            assert one.record is not None
            return self.packed(spec.name, one.q, one.record)
        assert isinstance(one, Tensor)
        return self.rounded(spec, one)

    def _rounded(self, specs: Iterable[TensorSpec]) -> Iterator[tuple[TensorSpec, Produced]]:
        """Tensors outside the layers: kept, or rounded to nearest."""
        return ((spec, self._produced(spec, self.source.read(spec))) for spec in specs)

    def _conclude(self, records: Records) -> Mapping[str, Any]:
        """Of the manifest: the tokens of each expert, and totals of the output error."""
        config = self.source.config
        tokens = [[0] * config.num_experts for _ in range(config.num_hidden_layers)]
        for spec in self.source.inventory:
            if spec.expert is not None and spec.layer is not None:
                tokens[spec.layer][spec.expert] = records[spec.name]["tokens"]
        errors = [record["output_error"] for record in records.values() if "output_error" in record]
        totals = {
            "mean_output_error": float(f"{sum(errors) / len(errors):.6g}"),
            "max_output_error": max(errors),
            "fallbacks": sum("fallback" in record for record in records.values()),
        }
        return {"expert_tokens": tokens, "totals": totals}
