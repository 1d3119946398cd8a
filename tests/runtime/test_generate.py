"""`generate()`: every way of choosing tokens, against plain loops over the model's logits."""

from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from golden import tiny
from golden.tiny_models import make
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, TextIteratorStreamer

from minibble.runtime.model import MiniMaxForCausalLM
from minibble.runtime.state import HybridState

PROMPTS = tiny.prompts((9, 14, 5), seed=21)
NEW = 12


@cache
def plain_model() -> MiniMaxForCausalLM:
    """No token ends a text, so that lengths are fixed; a test that wants an end names one."""
    return make(eos_token_id=None)


@pytest.fixture
def model() -> MiniMaxForCausalLM:
    return plain_model()


def words(tokens: list[str], split: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is `tokens[i]`."""
    from tokenizers import Tokenizer, decoders, models

    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    made.pre_tokenizer = split
    if len(tokens[0]) == 1:
        made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=tokens[0], pad_token=tokens[0])


@cache
def by_word() -> PreTrainedTokenizerFast:
    """One word a token: `w7` is token 7."""
    from tokenizers import pre_tokenizers

    return words([f"w{i}" for i in range(tiny.VOCAB)], pre_tokenizers.WhitespaceSplit())


@cache
def by_letter() -> PreTrainedTokenizerFast:
    """One letter a token."""
    from tokenizers import Regex, pre_tokenizers

    return words([chr(33 + i) for i in range(tiny.VOCAB)], pre_tokenizers.Split(Regex("."), "isolated"))


def batch(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


@torch.no_grad()
def argmax_loop(model: MiniMaxForCausalLM, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy decoding without a cache."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def greedy(model: MiniMaxForCausalLM, prompts: list[list[int]], new: int = NEW, **settings: Any) -> list[list[int]]:
    inputs = batch(prompts)
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False, **settings)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_an_argmax_loop(model: MiniMaxForCausalLM, use_cache: bool) -> None:
    for prompt in PROMPTS:
        assert greedy(model, [prompt], use_cache=use_cache) == [argmax_loop(model, prompt)]


def test_left_padded_batch_equals_single_runs(model: MiniMaxForCausalLM) -> None:
    prompts = [*PROMPTS, PROMPTS[0][:1]]
    assert greedy(model, prompts) == [argmax_loop(model, prompt) for prompt in prompts]


def test_inputs_without_a_mask(model: MiniMaxForCausalLM) -> None:
    out = model.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=NEW, do_sample=False)
    assert out[0, len(PROMPTS[1]) :].tolist() == argmax_loop(model, PROMPTS[1])


def test_sampling_is_reproducible(model: MiniMaxForCausalLM) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(
            **batch(PROMPTS), max_new_tokens=NEW, do_sample=True, temperature=1.5, top_p=0.95, top_k=50
        ).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_sampling_follows_the_distribution(model: MiniMaxForCausalLM) -> None:
    """One token sampled many times: as often as its probability says."""
    torch.manual_seed(0)
    n = 3000
    out = model.generate(
        input_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=n
    )
    with torch.no_grad():
        p = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    seen = torch.bincount(out[:, -1], minlength=tiny.VOCAB) / n
    assert out.shape[0] == n
    assert (seen - p).abs().max() < 5 * float((p * (1 - p) / n).sqrt().max())


def beam_loop(model: MiniMaxForCausalLM, prompt: list[int], beams: int, new: int) -> list[int]:
    """Beam search without a cache and without any end of text: the likeliest of `beams` kept sequences."""
    kept: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(new):
        grown = []
        for score, tokens in kept:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
            best = logits.log_softmax(-1).topk(2 * beams)
            grown += [(score + float(p), [*tokens, int(i)]) for p, i in zip(best.values, best.indices, strict=True)]
        kept = sorted(grown, reverse=True)[:beams]
    return kept[0][1]


def test_beams(model: MiniMaxForCausalLM) -> None:
    found = greedy(model, PROMPTS, num_beams=3)
    assert found == greedy(model, PROMPTS, num_beams=3, use_cache=False)
    assert found == [beam_loop(model, prompt, 3, NEW) for prompt in PROMPTS]
    assert found != greedy(model, PROMPTS), "these prompts do not tell beams from greedy decoding"


def test_beams_return_several(model: MiniMaxForCausalLM) -> None:
    found = greedy(model, PROMPTS, num_beams=4, num_return_sequences=3)
    assert len(found) == 9
    assert found == greedy(model, PROMPTS, num_beams=4, num_return_sequences=3, use_cache=False)
    assert [found[0], found[3], found[6]] == greedy(model, PROMPTS, num_beams=4)


def test_several_samples_of_each_prompt(model: MiniMaxForCausalLM) -> None:
    torch.manual_seed(3)
    out = model.generate(**batch(PROMPTS), max_new_tokens=NEW, do_sample=True, num_return_sequences=4)
    assert out.shape[0] == 12
    width = max(map(len, PROMPTS))
    assert torch.equal(out[:, :width], batch(PROMPTS)["input_ids"].repeat_interleave(4, dim=0))


def test_end_of_text_stops(model: MiniMaxForCausalLM) -> None:
    text = argmax_loop(model, PROMPTS[0])
    end = next(token for i, token in enumerate(text) if i >= 3 and token not in text[:i])
    stop = text.index(end)
    assert greedy(model, [PROMPTS[0]], eos_token_id=end, pad_token_id=0) == [text[: stop + 1]]
    other = argmax_loop(model, PROMPTS[1])
    both = greedy(model, PROMPTS[:2], eos_token_id=[end, 96], pad_token_id=0)
    width = len(both[0])
    assert both[0] == (text[: stop + 1] + [0] * width)[:width]
    cut = next((i + 1 for i, token in enumerate(other) if token in (end, 96)), NEW)
    assert both[1][: min(cut, width)] == other[: min(cut, width)]


def test_end_of_text_of_the_config_stops() -> None:
    text = argmax_loop(plain_model(), PROMPTS[0])
    end = next(token for i, token in enumerate(text) if i >= 3 and token not in text[:i])
    assert greedy(make(eos_token_id=end), [PROMPTS[0]]) == [text[: text.index(end) + 1]]
    assert greedy(make(eos_token_id=[95, end]), [PROMPTS[0]]) == [text[: text.index(end) + 1]]


def test_stop_strings(model: MiniMaxForCausalLM) -> None:
    text = argmax_loop(model, PROMPTS[0])
    stop = chr(33 + text[4]) + chr(33 + text[5])
    found = greedy(model, [PROMPTS[0]], stop_strings=[stop], tokenizer=by_letter())
    assert found == [text[:6]]


def test_own_stopping_criteria(model: MiniMaxForCausalLM) -> None:
    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= len(PROMPTS[0]) + 4)

    assert len(greedy(model, [PROMPTS[0]], stopping_criteria=[After()])[0]) == 4


def test_streaming(model: MiniMaxForCausalLM) -> None:
    streamer = TextIteratorStreamer(by_word(), skip_prompt=True, timeout=60)
    settings = {"max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={"input_ids": torch.tensor([PROMPTS[0]])} | settings)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).split() == [f"w{i}" for i in argmax_loop(model, PROMPTS[0])]
    assert len([piece for piece in pieces if piece]) > 3


@pytest.mark.parametrize("extra", [1, 4, 9])
def test_continuing_with_several_new_tokens(model: MiniMaxForCausalLM, extra: int) -> None:
    """A second turn over the first one's state, as a chat would."""
    first = model.generate(
        input_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    state = first.past_key_values
    assert isinstance(state, HybridState)
    assert state.get_seq_length() == first.sequences.shape[1] - 1
    whole = first.sequences[0].tolist() + PROMPTS[1][:extra]
    out = model.generate(input_ids=torch.tensor([whole]), past_key_values=state, max_new_tokens=NEW, do_sample=False)
    assert out[0, len(whole) :].tolist() == argmax_loop(model, whole)


def test_continuing_a_padded_batch(model: MiniMaxForCausalLM) -> None:
    inputs = batch(PROMPTS)
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    turn = torch.tensor([p[:3] for p in PROMPTS])
    ids = torch.cat((first.sequences, turn), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)), dim=1)
    out = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False
    )
    for row, prompt in enumerate(PROMPTS):
        whole = prompt + argmax_loop(model, prompt, 4) + prompt[:3]
        assert out[row, ids.shape[1] :].tolist() == argmax_loop(model, whole, 6)


def test_an_empty_state_may_be_given(model: MiniMaxForCausalLM) -> None:
    state = HybridState(model.minibble)
    assert greedy(model, [PROMPTS[1]], past_key_values=state) == [argmax_loop(model, PROMPTS[1])]
    assert state.get_seq_length() == len(PROMPTS[1]) + NEW - 1


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_prefill_chunk_size_of_transformers(model: MiniMaxForCausalLM, size: int) -> None:
    assert greedy(model, PROMPTS, prefill_chunk_size=size) == [argmax_loop(model, p) for p in PROMPTS]


def test_own_prefill_chunk() -> None:
    model = make(eos_token_id=None)
    model.prefill_chunk = 4
    assert greedy(model, PROMPTS) == [argmax_loop(plain_model(), prompt) for prompt in PROMPTS]


def test_scores_and_logits_are_given(model: MiniMaxForCausalLM) -> None:
    out = model.generate(
        input_ids=torch.tensor([PROMPTS[0]]),
        generation_config=GenerationConfig(
            max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0
        ),
    )
    assert [logits.shape for logits in out.logits] == [(1, tiny.VOCAB)] * 3
    assert all(logits.dtype == torch.float32 for logits in out.logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "itself"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_cannot_work_says_so(model: MiniMaxForCausalLM, settings: dict[str, Any]) -> None:
    """Decoding that must take tokens back ends in an error that names the matter, not in wrong text."""
    if "assistant_model" in settings:
        settings = {"assistant_model": make(eos_token_id=None, seed=4)}
    repeating = [PROMPTS[0] * 4]
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)assist|lookup|cache|stateful|crop|forget"):
        greedy(model, repeating, **settings)


def test_a_foreign_cache_is_refused(model: MiniMaxForCausalLM) -> None:
    from transformers import DynamicCache

    with pytest.raises((TypeError, ValueError), match=r"HybridState|DynamicCache"):
        model(input_ids=torch.tensor([PROMPTS[0]]), past_key_values=DynamicCache())


UNUSED = (3, 11, 60, 61, 62, 96)


@pytest.fixture(scope="module")
def with_unused_rows(tmp_path_factory: pytest.TempPathFactory, make_source: Any) -> Path:
    """A checkpoint whose head has all-zero rows, as the released one has, and no likely token otherwise."""
    from safetensors.torch import load_file, save_file

    folder = make_source(tmp_path_factory.mktemp("unused") / "m", config=tiny.original_json(eos_token_id=None))
    for extra in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / extra).unlink(missing_ok=True)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] *= 0.05
            tensors["lm_head.weight"][list(UNUSED)] = 0
            save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def test_unused_rows_are_never_chosen(with_unused_rows: Path) -> None:
    from minibble.runtime.loading import load

    model = load(with_unused_rows, dtype=torch.float32)
    ids = torch.tensor([PROMPTS[0]])
    hot: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "top_k": 0, "num_return_sequences": 4}
    hot["max_new_tokens"] = 200

    def chosen(**settings: Any) -> set[int]:
        torch.manual_seed(0)
        return set(model.generate(input_ids=ids, **settings)[:, ids.shape[1] :].flatten().tolist())

    seen = chosen(**hot)
    assert len(seen) > 80 and not seen & set(UNUSED)
    hot["max_new_tokens"] = 30
    assert not chosen(max_new_tokens=8, num_beams=4, do_sample=False) & set(UNUSED)
    assert not chosen(generation_config=GenerationConfig(**hot)) & set(UNUSED)
    assert not chosen(**hot, renormalize_logits=True, top_p=0.9) & set(UNUSED)


def test_without_the_mask_they_would_be_chosen(with_unused_rows: Path) -> None:
    """Their logit is 0, that of an average token: plain sampling takes them."""
    from minibble.runtime.loading import load

    model = load(with_unused_rows, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    torch.manual_seed(0)
    drawn = set(torch.multinomial((logits / 5).softmax(-1), 800, replacement=True).tolist())
    assert drawn & set(UNUSED)


def test_greedy_passes_over_unused_rows(with_unused_rows: Path, tmp_path: Path) -> None:
    """Where every other logit is negative, 0 is the largest: greedy decoding must not take it."""
    from minibble.runtime.loading import load

    model = load(with_unused_rows, dtype=torch.float32)
    with torch.no_grad():
        hidden: list[torch.Tensor] = []
        hook = model.norm.register_forward_hook(lambda *args: hidden.append(args[2]))
        model(input_ids=torch.tensor([PROMPTS[0]]))
        hook.remove()
        head = next(view for name, view in model.named_weights() if name == "lm_head.weight")
        used = torch.ones(len(head), dtype=torch.bool)
        used[list(UNUSED)] = False
        head[used] -= 10 * hidden[0][0, -1] / hidden[0][0, -1].norm()
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert int(logits.argmax()) in UNUSED
    out = model.generate(input_ids=torch.tensor([PROMPTS[0]]), max_new_tokens=1, do_sample=False)
    assert int(out[0, -1]) == int(logits.masked_fill(~used, -torch.inf).argmax())
