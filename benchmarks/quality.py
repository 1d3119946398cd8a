"""Quality of our rounding against bitsandbytes' own: `python benchmarks/quality.py SOURCE --text FILE`.

SOURCE is quantized twice: by `minibble quantize`, and matrix by matrix by bitsandbytes, whose decoded matrices are
stored in float32. Both are scored against SOURCE on the same windows. Gate: bitsandbytes decodes our codes to our bits.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor

from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.inventory import quantized_roles
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.nf4 import NF4
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.evaluate import evaluate

RESULT = Path(__file__).parent / "results" / "quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs = write_theirs(options.source, Path(folder) / "bitsandbytes")
        ours = quantize_checkpoint(options.source, Path(folder) / "minibble", device="cpu").out
        matrices = gate(ours)
        scores = {
            name: asdict(evaluate(path, options.text, options.source, device="cpu", max_windows=options.windows))
            for name, path in (("minibble", ours), ("bitsandbytes", theirs))
        }
    result = {
        "source": options.source.name,
        "matrices": matrices,
        "kl_ratio": scores["minibble"]["kl"] / scores["bitsandbytes"]["kl"],
        **scores,
        "versions": {name: version(name) for name in ("minibble", "torch", "bitsandbytes")},
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_theirs(source: Path, out: Path) -> Path:
    """A float32 checkpoint whose matrices went through bitsandbytes' quantize and dequantize."""
    checkpoint = Checkpoint.open(source)
    tensors = {}
    for spec in checkpoint.inventory:
        tensor = checkpoint.read(spec)
        assert isinstance(tensor, Tensor), "the source is already quantized"
        if spec.role in quantized_roles():
            codes, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
            state.dtype = torch.float32
            tensor = bnb.dequantize_4bit(codes, state)
        tensors[spec.name] = tensor.float().contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out)
    return out


def gate(path: Path) -> int:
    """Check that bitsandbytes decodes every 4-bit matrix of `path` to our bits; returns how many there are."""
    checkpoint = Checkpoint.open(path)
    format = checkpoint.format
    assert isinstance(format, NF4)
    for name in sorted(checkpoint.quantized):
        q = checkpoint.read(checkpoint.specs[name])
        assert isinstance(q, QuantizedTensor)
        stored = {key.removeprefix(f"{name}."): value for key, value in format.pack(name, q).items() if key != name}
        state = bnb.QuantState.from_dict(stored, device=torch.device("cpu"))
        state.dtype = torch.float32
        decoded = bnb.dequantize_4bit(q.codes.view(-1, 1), state)
        assert torch.equal(decoded, format.decode(q)), f"{name}: bitsandbytes decodes other bits"
    return len(checkpoint.quantized)


if __name__ == "__main__":
    main()
