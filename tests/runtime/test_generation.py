"""Streaming, timing, continuing over a state, and conversations, on a random model that speaks bytes."""

import pytest
from golden.byte_tokenizer import TURN_END, VOCAB_SIZE, byte_tokenizer

from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.runtime.chat import Conversation
from minibble.runtime.generation import Sampling, encode, generate_text
from minibble.runtime.model import MiniMaxForCausalLM

PARTS_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'][0]['text'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}{% if loop.last or loop.length < 3 %}<|im_start|>{{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tiny_config) -> MiniMaxForCausalLM:
    model = MiniMaxForCausalLM.random(ModelConfig.from_dict(tiny_config(vocab_size=VOCAB_SIZE, eos_token_id=0)))
    model.tokenizer = byte_tokenizer()
    return model.eval()


@pytest.fixture
def restore_tokenizer(model):
    yield
    model.tokenizer = byte_tokenizer()


def test_greedy_text_streams_and_is_timed(model) -> None:
    pieces: list[str] = []
    result = generate_text(model, encode(model, "def f("), max_new_tokens=9, on_text=pieces.append)
    assert "".join(pieces) == result.text == model.tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert (result.prompt_tokens, result.new_tokens) == (6, 9)
    assert result.prefill_s > 0
    assert result.decode_s > 0
    assert result.decode_tokens_per_s == 8 / result.decode_s
    assert result.state.get_seq_length() == 6 + 9 - 1


def test_one_token_has_no_decode_speed(model) -> None:
    result = generate_text(model, encode(model, "x"), max_new_tokens=1)
    assert result.decode_tokens_per_s is None
    assert result.prefill_tokens_per_s is not None


def test_seed_repeats_sampled_text(model) -> None:
    ids = encode(model, "import ")
    texts = [
        generate_text(model, ids, max_new_tokens=16, sampling=Sampling(1.5, 0.95, 100, seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_of_one_is_greedy(model) -> None:
    ids = encode(model, "import ")
    sampled = generate_text(model, ids, max_new_tokens=8, sampling=Sampling(2.0, top_k=1))
    assert sampled.token_ids == generate_text(model, ids, max_new_tokens=8).token_ids


def test_state_continues_with_the_new_tokens_alone(model) -> None:
    first = generate_text(model, encode(model, "one two"), max_new_tokens=4)
    ids = [*encode(model, "one two"), *first.token_ids, *encode(model, " and three")]
    afresh = generate_text(model, ids, max_new_tokens=8)
    over = generate_text(model, ids, max_new_tokens=8, state=first.state)
    assert over.token_ids == afresh.token_ids
    assert (over.prompt_tokens, afresh.prompt_tokens) == (11, 21)


def test_stop_id_ends_the_text(model) -> None:
    ids = encode(model, "abc")
    free = generate_text(model, ids, max_new_tokens=6)
    stopped = generate_text(model, ids, max_new_tokens=6, stop_ids=[free.token_ids[2]])
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]
    assert stopped.ended
    assert not free.ended


def test_conversation_feeds_only_what_is_new(model) -> None:
    talk = Conversation(model, max_new_tokens=5)
    first = talk.reply("hello")
    most = talk.tokens_with("go on")
    second = talk.reply("go on")
    assert second.state.get_seq_length() < most <= second.state.get_seq_length() + 1 + 5
    start = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    middle = "<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    assert first.prompt_tokens == len(encode(model, start))
    # The first reply's last token had not been fed yet.
    assert second.prompt_tokens == len(encode(model, middle)) + (0 if first.ended else 1)
    said = first.token_ids[:-1] if first.ended else first.token_ids
    whole = [*encode(model, start), *said, *encode(model, middle)]
    stops = {"stop_ids": [TURN_END]}
    assert second.token_ids == generate_text(model, whole, max_new_tokens=5, **stops).token_ids


def test_conversation_in_a_template_of_content_parts(model, restore_tokenizer) -> None:
    plain = Conversation(model, max_new_tokens=4).reply("hello")
    model.tokenizer = byte_tokenizer(PARTS_TEMPLATE)
    assert Conversation(model, max_new_tokens=4).reply("hello").token_ids == plain.token_ids


def test_template_that_rewrites_the_past_starts_again(model, restore_tokenizer) -> None:
    model.tokenizer = byte_tokenizer(FORGETFUL_TEMPLATE)
    talk = Conversation(model, max_new_tokens=4)
    talk.reply("a long first turn")
    second = talk.reply("b")
    assert second.prompt_tokens == len(encode(model, "<|im_start|>b<|im_end|>"))
    assert second.state.get_seq_length() == second.prompt_tokens + second.new_tokens - 1


@pytest.mark.parametrize("template", [None, "nothing", "{{ messages[5].content }}"])
def test_useless_template_is_refused(model, restore_tokenizer, template) -> None:
    model.tokenizer = byte_tokenizer(template)
    with pytest.raises(CheckpointError, match="chat template"):
        Conversation(model)


def test_missing_tokenizer_is_refused(model, restore_tokenizer) -> None:
    model.tokenizer = None
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        encode(model, "x")


def test_empty_prompt_is_refused(model) -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        encode(model, "")


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_sampling_is_refused(settings) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(**settings)
