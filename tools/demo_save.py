"""Writes the built-in model's checkpoint folder: shards, config, tokenizer files, generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from demo_net import DemoNet
from safetensors.torch import save_file
from torch import Tensor

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "model_max_length": 8192,
    "pad_token": "<|pad|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": [0, 3],
    "pad_token_id": 1,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 40,
}
SHARDS = 2


def save_checkpoint(net: DemoNet, tokenizer: Path, out: Path) -> None:
    """The checkpoint in bf16 and the released names, in two shards of about equal bytes with an index."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in net.named_weights()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, tensor in tensors.items():
        shards[min(done * SHARDS // total, SHARDS - 1)][name] = tensor
        done += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        filename = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, out / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, filename)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(out / "model.safetensors.index.json", index)
    write_json(out / "config.json", net.c.to_json())
    write_json(out / "generation_config.json", GENERATION)
    write_json(out / "tokenizer_config.json", TOKENIZER)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copyfile(tokenizer, out / "tokenizer.json")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_weights(net: DemoNet, folder: Path) -> None:
    """Reads a folder that `save_checkpoint` wrote back into a model."""
    from safetensors.torch import load_file

    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    with torch.no_grad():
        for name, weight in net.named_weights():
            weight.copy_(stored.pop(name))
    if stored:
        raise ValueError(f"{folder}: tensors that the model lacks: {sorted(stored)[:3]}")
