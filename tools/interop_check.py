"""Decodes the 4-bit matrices of a checkpoint by another tool's own modules and compares them with minibble's.

    python -I interop_check.py TOOL CHECKPOINT REFERENCE

Runs in the environment of TOOL, one of READERS, where minibble is not; interop.py makes it. The folder REFERENCE has
the matrices [N, K] as minibble decodes them, in a safetensors file for each dtype. Prints one line of JSON:
`versions`, and `reads`, what was compared by which module and what differs; or `skipped`, if TOOL does not import.
"""

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SOURCE_DTYPE = torch.bfloat16  # of the built-in model's weights: what its NF4 files say, and decode to if not told
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SUFFIXES = (".weight.quant_state.bitsandbytes__nf4", ".qweight")  # of a tensor that every 4-bit matrix has

Tensors = dict[str, Tensor]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to decode: which module does it, in which dtype, and the matrix [N, K] of a name."""

    by: str
    dtype: torch.dtype
    decode: Callable[[str], Tensor]


@dataclass(frozen=True)
class Read:
    """What one way gave: how many matrices or settings were compared, and what differs, by name."""

    by: str
    what: str
    compared: int
    differ: dict[str, str] = field(default_factory=dict)


def bitsandbytes_ways(folder: Path, tensors: Tensors) -> list[Way]:
    """The function behind bitsandbytes' modules, and its linear module with a weight as transformers loads it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    def stats(name: str) -> Tensors:
        return {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

    def dequantized(name: str, dtype: torch.dtype) -> Tensor:
        state = QuantState.from_dict(stats(name), device=torch.device("cpu"))
        if dtype != SOURCE_DTYPE:
            state.dtype = dtype
        return dequantize_4bit(tensors[name], state)

    def multiplied(name: str, dtype: torch.dtype) -> Tensor:
        weight = Params4bit.from_prequantized(tensors[name], stats(name), device="cpu")
        N, K = weight.quant_state.shape
        # It stays in training mode: for inference, CPUs with AVX512-BF16 repack the codes for arithmetic of their own.
        linear = Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
        linear.weight = weight
        return _multiplied(linear, K, dtype)

    ways = (("dequantize_4bit", dequantized), ("Linear4bit", multiplied))
    return [Way(by, dtype, partial(decode, dtype=dtype)) for by, decode in ways for dtype in _BITS]


def auto_gptq_ways(folder: Path, tensors: Tensors) -> list[Way]:
    """Both linear modules of auto-gptq that work without a GPU."""
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.nn_modules.qlinear import qlinear_cuda, qlinear_cuda_old

    config = BaseQuantizeConfig.from_pretrained(str(folder))

    def way(module: Any, dtype: torch.dtype) -> Way:
        def decode(name: str) -> Tensor:
            parts, N, K = _gptq_parts(tensors, name)
            linear = module.QuantLinear(config.bits, config.group_size, K, N, bias=False, weight_dtype=dtype)
            linear.load_state_dict(parts)
            return _multiplied(linear, K, dtype)

        return Way(f"{module.__name__.split('.')[-1]}.QuantLinear", dtype, decode)

    # A level times a float16 scale is exact in float32, and is rounded once in float16: both are asked to the bit.
    return [
        way(module, dtype) for module in (qlinear_cuda, qlinear_cuda_old) for dtype in (torch.float16, torch.float32)
    ]


def auto_gptq_settings(folder: Path) -> Settings:
    """`quantize_config.json` as auto-gptq reads it."""
    from auto_gptq import BaseQuantizeConfig

    return BaseQuantizeConfig.from_pretrained(str(folder)).to_dict()


def gptqmodel_ways(folder: Path, tensors: Tensors) -> list[Way]:
    """gptqmodel's plain linear module, after its own conversion of the zero points of version 1."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format

    config = QuantizeConfig.from_pretrained(str(folder))
    names = ("bits", "group_size", "sym", "desc_act", "pack_dtype")
    settings = {name: getattr(config, name) for name in names}
    linears = {}
    for name in stored_matrices(tensors):
        parts, N, K = _gptq_parts(tensors, name)
        linears[name] = TorchLinear(in_features=K, out_features=N, **settings)
        linears[name].load_state_dict(parts)
    if config.format == FORMAT.GPTQ:  # the condition of its own loader
        convert_gptq_v1_to_v2_format(nn.ModuleList(linears.values()), config, TorchLinear)

    def decode(name: str) -> Tensor:
        linears[name].post_init()
        return _multiplied(linears[name].eval(), linears[name].in_features, torch.float16)

    return [Way("TorchLinear", torch.float16, decode)]


def gptqmodel_settings(folder: Path) -> Settings:
    """`quantize_config.json` as gptqmodel reads it."""
    from gptqmodel.quantization import QuantizeConfig

    config = QuantizeConfig.from_pretrained(str(folder))
    names = ("bits", "group_size", "sym", "desc_act", "lm_head")
    return {name: getattr(config, name) for name in names} | {"checkpoint_format": config.format.value}


# How a tool decodes, and how it reads quantize_config.json.
READERS: dict[str, tuple[Callable[[Path, Tensors], list[Way]], Callable[[Path], Settings] | None]] = {
    "bitsandbytes": (bitsandbytes_ways, None),
    "auto-gptq": (auto_gptq_ways, auto_gptq_settings),
    "gptqmodel": (gptqmodel_ways, gptqmodel_settings),
}


def stored_matrices(tensors: Tensors) -> list[str]:
    """The names of the 4-bit matrices among the tensors of a checkpoint."""
    return sorted(
        name.removesuffix(suffix) + ".weight" for suffix in _SUFFIXES for name in tensors if name.endswith(suffix)
    )


def differing(ours: Tensor, theirs: Tensor) -> int:
    """How many values differ in any bit; all of them if shape or dtype do.

    But for the sign of a zero, which a sum of products with zeros loses.
    """
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return max(ours.numel(), 1)
    as_bits = _BITS[ours.dtype]
    return int(((ours + 0.0).view(as_bits) != (theirs + 0.0).view(as_bits)).sum())


def read_matrices(way: Way, stored: list[str], reference: Tensors) -> Read:
    """Every matrix decoded by `way` against `reference`; `stored` are the names of those in the files."""
    differ = dict.fromkeys(sorted(set(stored) - set(reference)), "in the files only")
    differ |= dict.fromkeys(sorted(set(reference) - set(stored)), "not in the files")
    for name in sorted(set(stored) & set(reference)):
        count = differing(reference[name], way.decode(name))
        if count:
            differ[name] = f"{count} of {reference[name].numel()} weights"
    return Read(way.by, _called(way.dtype), len({*stored, *reference}), differ)


def read_settings(by: str, what: str, ours: Settings, theirs: Settings) -> Read:
    """The settings that both know."""
    known = [key for key in ours if key in theirs]
    differ = {key: f"{ours[key]!r} became {theirs[key]!r}" for key in known if ours[key] != theirs[key]}
    return Read(by, what, len(known), differ)


def reads_of(tool: str, folder: Path, references: Path) -> Iterator[Read]:
    """All comparisons for `tool`; ImportError if it does not work here."""
    ways_of, settings_of = READERS[tool]
    tensors = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    ways, stored = ways_of(folder, tensors), stored_matrices(tensors)
    yield transformers_settings(json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"])
    if settings_of is not None:
        ours = json.loads((folder / "quantize_config.json").read_text("utf-8"))
        yield read_settings(tool, "quantize_config.json", ours, settings_of(folder))
    for way in ways:
        yield read_matrices(way, stored, load_file(references / f"{_called(way.dtype)}.safetensors"))


def transformers_settings(config: Settings) -> Read:
    """The `quantization_config` of `config.json` as transformers reads it."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    theirs = AutoQuantizationConfig.from_dict(dict(config))
    return read_settings(f"transformers' {type(theirs).__name__}", "config.json", config, theirs.to_dict())


def main() -> None:
    tool, folder, references = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    with contextlib.redirect_stdout(sys.stderr):  # some tools greet
        try:
            reads = [asdict(read) for read in reads_of(tool, folder, references)]
            names = (tool, "torch", "transformers", "numpy")
            answer = {"versions": {name: importlib.metadata.version(name) for name in names}, "reads": reads}
        except ImportError as error:
            answer = {"skipped": f"does not import: {error}"}
    print(json.dumps(answer))


def _multiplied(linear: nn.Module, K: int, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that `linear` multiplies by: what it makes of the identity."""
    with torch.no_grad():
        return linear(torch.eye(K, dtype=dtype)).t()


def _gptq_parts(tensors: Tensors, name: str) -> tuple[Tensors, int, int]:
    """The tensors of the matrix `name` as the state of a module, and its N and K."""
    module = name.removesuffix(".weight")
    parts = {key: tensors[f"{module}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
    return parts, parts["scales"].shape[1], parts["g_idx"].numel()


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
