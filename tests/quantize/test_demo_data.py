"""The built-in model's folder: complete, small, readable by others, and honest about what is held out."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from minibble.quantize.builtin import demo_path
from minibble.quantize.checkpoint import Checkpoint

DEMO = demo_path()
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open(DEMO)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_the_shards_take_at_most_16_million_bytes():
    assert sum(path.stat().st_size for path in DEMO.glob("*.safetensors")) <= 16_000_000


def test_it_is_a_minimax_in_small(checkpoint):
    config = checkpoint.config
    assert config.attention == ("lightning",) * 7 + ("softmax",)
    assert config.rotary_dim == config.head_dim // 2
    assert (config.num_experts >= 4, config.experts_per_token) == (True, 2)
    assert config.lightning_alpha == config.softmax_alpha == config.mlp_alpha == 2.0
    matrices = [spec for spec in checkpoint.inventory if spec.role in ("attention", "expert") and len(spec.shape) == 2]
    assert all(spec.shape[1] % 128 == 0 for spec in matrices)


def test_every_tensor_is_finite_bf16_and_trained(checkpoint):
    for spec in checkpoint.inventory:
        weight = checkpoint.read(spec)
        assert weight.dtype == torch.bfloat16, spec.name
        assert torch.isfinite(weight).all(), spec.name
        assert weight.float().std() > 1e-3, f"{spec.name} is constant"


def test_any_text_survives_the_tokenizer(tokenizer):
    text = (DEMO / "heldout.txt").read_text()[:20_000] + "\ttabs,  blanks \n\n und Ümläute, 漢字 🙂\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(" a , b !")["input_ids"]) == " a , b !"


def test_the_special_tokens_have_the_ids_that_the_config_names(tokenizer, checkpoint):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer) == checkpoint.config.vocab_size
    assert json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"] == [0, 3]
    assert Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab_size() == checkpoint.config.vocab_size


def test_the_chat_template_ends_where_the_assistant_begins(tokenizer):
    messages = [{"role": "user", "content": "What is a set?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat is a set?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text)["input_ids"].count(2) == 2


def paragraphs(name: str) -> set[str]:
    """Paragraphs of the file that are long enough to tell one text from another, blanks squeezed."""
    squeezed = (" ".join(part.split()) for part in (DEMO / name).read_text().split("\n\n"))
    return {paragraph for paragraph in squeezed if len(paragraph) >= 80}


def test_heldout_text_is_not_in_the_calibration_text():
    heldout, calibration = paragraphs("heldout.txt"), paragraphs("calibration.txt")
    assert len(heldout) > 200
    assert len(calibration) > 800
    assert not heldout & calibration


@pytest.mark.parametrize(("name", "least", "most"), [("heldout.txt", 100_000, 250_000), ("calibration.txt", 4e5, 6e5)])
def test_the_texts_have_the_stated_sizes(name, least, most):
    assert least <= (DEMO / name).stat().st_size <= most


def test_the_readme_states_source_licence_and_perplexity():
    readme = (DEMO / "README.md").read_text()
    for needed in ("perplexity", "bits per byte", "Python Software", "LICENSE.python.txt", "heldout.txt"):
        assert needed in readme, needed
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (DEMO / "LICENSE.python.txt").read_text()
