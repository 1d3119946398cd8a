"""Write a checkpoint of any config with random weights: `python tools/make_dummy.py CONFIG OUT`.

CONFIG is a `config.json` or a built-in name (minimax-text-01); `--layers 2` keeps only the first layers but one of
each kind, so that the real sizes can be measured without the real number of layers.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from minibble.quantize.builtin import BUILTIN
from minibble.quantize.config import ModelConfig
from minibble.quantize.dummy import write_dummy
from minibble.quantize.formats import FORMATS, format_named
from minibble.quantize.sizes import decimal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="nf4-dq")
    parser.add_argument("--layers", type=int, help="number of layers: all lightning but the last, softmax")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="5GB")
    options = parser.parse_args()
    config = ModelConfig.from_dict(_raw(options.config, options.layers), where=options.config)
    started = time.monotonic()
    nbytes = write_dummy(
        config, options.out, format=format_named(options.format), seed=options.seed, shard_size=options.shard_size
    )
    elapsed = time.monotonic() - started
    print(f"{options.out}: {decimal(nbytes)} in {elapsed:.1f} s, {decimal(nbytes / elapsed)}/s")


def _raw(name: str, layers: int | None) -> dict[str, Any]:
    raw = dict(BUILTIN[name] if name in BUILTIN else ModelConfig.from_file(name).raw)
    if layers is not None:
        raw["num_hidden_layers"] = layers
        if "attn_type_list" in raw:
            raw["attn_type_list"] = [0] * (layers - 1) + [1]
        else:
            raw["layer_types"] = ["linear_attention"] * (layers - 1) + ["full_attention"]
    raw.pop("quantization_config", None)
    return raw


if __name__ == "__main__":
    main()
