"""Fixtures that many tests share: tiny configs, tiny 16-bit checkpoints, a GPU if there is one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.config import ModelConfig
from minibble.quantize.int4 import Int4
from minibble.quantize.inventory import inventory, quantized_roles

_HF_MATRIX = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """Factory `tiny_config(spelling="original"|"hf", **overrides)`: raw `config.json` of a tiny model."""
    return _tiny_config


@pytest.fixture(scope="session")
def make_source() -> Callable[..., Path]:
    """Factory `make_source(path, config=None, shards=2, dtype=bfloat16, seed=0, names="original")`.

    Writes a random 16-bit checkpoint with index, tokenizer files and licence into the folder `path` and
    returns it. `names` is "original", "hf" (`mlp.experts.E.gate_proj`) or "fused" (3-D experts).
    """
    return _write_source


@pytest.fixture(scope="session")
def make_int4() -> Callable[..., Path]:
    """Factory `make_int4(source, out, group=32, everything=False)`: the 16-bit checkpoint `source` in int4.

    Every matrix is rounded to nearest and packed as GPTQ's files hold it, in one shard; embedding and head too if
    `everything`.
    """
    return _write_int4


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on several threads mostly wait for each other, above all beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _cpu_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests without the `gpu` marker run on the CPU on every machine."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cuda_device() -> torch.device:
    """The first CUDA device; the test is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


def _tiny_config(spelling: str = "original", **overrides: Any) -> dict[str, Any]:
    layers = overrides.get("num_hidden_layers", 3)
    softmax = [layer == layers - 1 for layer in range(layers)]
    common: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rotary_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": False,
        "hidden_act": "silu", "sliding_window": None, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    alpha = (2 * layers) ** 0.25
    if spelling == "original":
        common |= {
            "model_type": "minimax_text_01", "architectures": ["MiniMaxText01ForCausalLM"], "postnorm": True,
            "attn_type_list": [int(kind) for kind in softmax], "rope_theta": 10_000_000,
            "shared_intermediate_size": 0,
            "layernorm_full_attention_alpha": alpha, "layernorm_full_attention_beta": 1.0,
            "layernorm_linear_attention_alpha": alpha, "layernorm_linear_attention_beta": 1.0,
            "layernorm_mlp_alpha": alpha, "layernorm_mlp_beta": 1.0,
        }  # fmt: skip
    else:
        common |= {
            "model_type": "minimax", "architectures": ["MiniMaxForCausalLM"],
            "layer_types": ["full_attention" if kind else "linear_attention" for kind in softmax],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0},
            "full_attn_alpha_factor": alpha, "full_attn_beta_factor": 1.0, "linear_attn_alpha_factor": alpha,
            "linear_attn_beta_factor": 1.0, "mlp_alpha_factor": alpha, "mlp_beta_factor": 1.0,
        }  # fmt: skip
    return common | overrides


def _write_source(
    path: Path,
    config: dict[str, Any] | None = None,
    shards: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    names: str = "original",
) -> Path:
    raw = _tiny_config() if config is None else config
    tensors = _random_tensors(ModelConfig.from_dict(raw), dtype, seed)
    if names != "original":
        tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}
    if names == "fused":
        tensors = _fused(tensors)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw, indent=1))
    weight_map = {}
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        part = {
            name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i * shards // len(tensors) == number
        }
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / file).write_text("{}\n")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (path / "LICENSE").write_text("free to use\n")
    (path / "README.md").write_text("not to be copied\n")
    return path


def _write_int4(source: Path, out: Path, group: int = 32, everything: bool = False) -> Path:
    checkpoint, format = Checkpoint.open(source), Int4(group)
    tensors = {}
    for spec in checkpoint.inventory:
        weight = checkpoint.read(spec)
        assert isinstance(weight, torch.Tensor)
        if spec.role in quantized_roles(everything, everything):
            tensors |= format.pack(spec.name, format.encode(weight))
        else:
            tensors[spec.name] = weight
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    skipped = [] if everything else ["lm_head"]
    config = checkpoint.config.raw | {"quantization_config": format.quantization_config(skipped)}
    (out / "config.json").write_text(json.dumps(config))
    for name, content in format.extra_json(skipped).items():
        (out / name).write_text(json.dumps(content))
    for path in checkpoint.extra_files():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def _random_tensors(config: ModelConfig, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in inventory(config):
        tensor = torch.randn(spec.shape, generator=generator)
        tensor = 1 + 0.1 * tensor if spec.role == "norm" else tensor * spec.shape[-1] ** -0.5
        tensors[spec.name] = tensor.to(dtype)
    return tensors


def _hf_name(name: str) -> str:
    name = name.replace("block_sparse_moe.", "mlp.")
    parts = name.split(".")
    if "experts" in parts:
        parts[-2] = _HF_MATRIX[parts[-2]]
    return ".".join(parts)


def _fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-expert `mlp.experts.E.*_proj` matrices stacked as transformers holds them in memory."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    layers = {name.split(".experts.")[0] for name in tensors if ".experts." in name}
    for prefix in sorted(layers):
        count = len({name.split(".")[5] for name in tensors if name.startswith(prefix + ".experts.")})
        one = [
            {kind: tensors[f"{prefix}.experts.{e}.{kind}.weight"] for kind in _HF_MATRIX.values()} for e in range(count)
        ]
        fused[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat([x["gate_proj"], x["up_proj"]]) for x in one])
        fused[f"{prefix}.experts.down_proj"] = torch.stack([x["down_proj"] for x in one])
    return fused
