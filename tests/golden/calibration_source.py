"""A tiny 16-bit model whose routing is known in advance, and the text for it.

Of the 64 features of the residual, 0 is the same for all tokens, 1 tells the byte A from others, 2 the byte B: nothing
writes to them, and the router rows of the first three experts read only them. So, whatever the rounding, expert NEVER
gets no token, ONCE those that are A, SOME those that are B; what is left goes to the other experts. Feature DEAD is
kept from every matrix by norms of weight 0.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from golden.byte_tokenizer import VOCAB_SIZE, byte_tokenizer, save_byte_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

NEVER, ONCE, SOME = 0, 1, 2
DEAD = 5
EXPERTS, LAYERS = 6, 2
SAMPLES, SEQ_LEN = 4, 32
TOKENS = SAMPLES * SEQ_LEN
COUNTS = {NEVER: 0, ONCE: 1, SOME: 5}


def text(seed: int = 0) -> str:
    """TOKENS bytes, each a token: five of them B, one A."""
    rng = random.Random(seed)
    letters = [rng.choice("etaoinshrdlu  \n.") for _ in range(TOKENS)]
    for place, letter in zip(rng.sample(range(TOKENS), 6), "ABBBBB", strict=True):
        letters[place] = letter
    return "".join(letters)


def config(make: Callable[..., dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """config.json of the model, given the factory of tiny configs."""
    small = {
        "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS, "intermediate_size": 64, "vocab_size": VOCAB_SIZE,
        "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 1,
    }  # fmt: skip
    return make(**(small | changes))


def write(
    folder: Path, make_source: Callable[..., Path], tiny_config: Callable[..., dict[str, Any]], **changes: Any
) -> Path:
    """The checkpoint and `text.txt` in `folder`; returns the checkpoint's own."""
    source = make_source(folder / "source", config(tiny_config, **changes))
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / file).unlink()
    save_byte_tokenizer(source)
    edit(source, _known_routing)
    (folder / "text.txt").write_text(text())
    return source


def edit(source: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply `change` to all tensors of a checkpoint, which stay in their files."""
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: tensor for file in set(weight_map.values()) for name, tensor in load_file(source / file).items()}
    change(tensors)
    for file in set(weight_map.values()):
        part = {name: tensors[name].contiguous() for name, place in weight_map.items() if place == file}
        save_file(part, source / file, metadata={"format": "pt"})


def _known_routing(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = {letter: byte_tokenizer()(letter)["input_ids"][0] for letter in "AB"}
    table = tensors["model.embed_tokens.weight"]
    table.copy_(torch.randint(0, 2, table.shape, generator=generator) * 2 - 1)  # every token has the same norm
    table[:, :3] = torch.tensor([1, -1, -1])
    table[ids["A"], 1] = table[ids["B"], 2] = 1
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[:3] = 1
            tensor[DEAD] = 0
        elif name.endswith(("out_proj.weight", "o_proj.weight", "w2.weight")):
            tensor[:3] = 0
        elif name.endswith("block_sparse_moe.gate.weight"):
            tensor[:3] = 0
            tensor[:, :3] = 0
            tensor[NEVER, 0], tensor[ONCE, 0], tensor[SOME, 0] = -50, -50, -50
            tensor[ONCE, 1] = tensor[SOME, 2] = 100
