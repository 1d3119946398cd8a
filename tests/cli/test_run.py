"""`minibble run`: prompts, standard input, conversations, budgets."""

import json

import pytest

CONTRACT = {
    "text", "prompt_tokens", "new_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_path",
    "peak_gpu_bytes", "plan"
}  # fmt: skip
SHORT = ("--max-new-tokens", 6, "--device", "cpu")


def test_json(cli_json, quantized) -> None:
    result = cli_json("run", quantized, "--prompt", "def f", *SHORT)
    assert set(result) == CONTRACT
    assert (result["prompt_tokens"], result["new_tokens"]) == (5, 6)
    assert result["prefill_tokens_per_s"] > 0
    assert result["decode_tokens_per_s"] > 0
    assert result["peak_gpu_bytes"] == []
    assert result["plan"]["context"] == 5 + 6
    assert result["plan"]["total_bytes"] > result["plan"]["weights_bytes"] > 0


def test_text_is_the_same_however_it_is_asked_for(cli, cli_json, quantized) -> None:
    text = cli_json("run", quantized, "--prompt", "def f", *SHORT)["text"]
    plain = cli("run", quantized, "--prompt", "def f", *SHORT)
    assert (plain.exit_code, plain.stdout) == (0, text + "\n")
    assert cli("run", quantized, *SHORT, input="def f").stdout == text + "\n"
    assert cli("run", quantized, "--prompt", "-", *SHORT, input="def f").stdout == text + "\n"
    assert cli("run", quantized, "--prompt", "def f", "--echo", *SHORT).stdout == "def f" + text + "\n"


def test_16_bit_source_runs_too(cli_json, source, quantized) -> None:
    plans = [cli_json("run", folder, "--prompt", "x", *SHORT)["plan"] for folder in (source, quantized)]
    assert plans[0]["weights_bytes"] > plans[1]["weights_bytes"]


def test_stats_go_to_stderr(cli, quantized) -> None:
    result = cli("run", quantized, "--prompt", "def f", "--stats", *SHORT)
    assert "prompt 5 tokens" in result.stderr
    assert "new    6 tokens" in result.stderr
    assert "steps  5 without CUDA graphs (no GPU: the model is on cpu)" in result.stderr
    assert "tokens/s" not in result.stdout


def test_steps_in_words() -> None:
    from minibble.cli.run_stats import steps

    assert steps({}) == []
    taken = {"eager": 1, "graph": 254, "padding among the new tokens": 2}
    assert steps(taken) == [
        "steps  254 replayed from CUDA graphs, 1 launched one by one",
        "steps  2 without CUDA graphs (padding among the new tokens)",
    ]


def test_sampling_with_a_seed_repeats(cli_json, quantized) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 3, "--seed", seed, "--max-new-tokens", 12, "--device", "cpu")
        return cli_json("run", quantized, "--prompt", "x", *options)["text"]

    assert sample(1) == sample(1) != sample(2)


def test_chat_takes_a_line_a_turn(cli, quantized) -> None:
    result = cli("run", quantized, "--chat", *SHORT, "--json", input="hello\n\nand then?\n/exit\nnever\n")
    assert result.exit_code == 0
    outcome = json.loads(result.stdout)
    assert [turn["user"] for turn in outcome["turns"]] == ["hello", "and then?"]
    first, second = outcome["turns"]
    # Only what is new is fed: the end of the first reply and the second turn, not the conversation again.
    assert second["prompt_tokens"] <= 1 + len("<|im_end|>") + first["prompt_tokens"] + 4
    assert second["prompt_tokens"] < first["prompt_tokens"] + first["new_tokens"] + 10
    plain = cli("run", quantized, "--chat", *SHORT, input="hello\nand then?\n")
    assert plain.stdout == first["text"] + "\n" + second["text"] + "\n"


def test_budget_is_checked_before_anything_is_loaded(cli, quantized, monkeypatch) -> None:
    result = cli("run", quantized, "--prompt", "x", "--gpu-memory", "10kB", *SHORT)
    assert result.exit_code == 1
    assert "more than the 10.0 kB allowed" in result.stderr
    assert result.stdout == ""


def test_budget_counts_the_prompt(cli, cli_json, quantized) -> None:
    fits = cli_json("run", quantized, "--prompt", "x", *SHORT)["plan"]["total_bytes"]
    options = ("--gpu-memory", f"{fits}B", *SHORT)
    assert cli("run", quantized, "--prompt", "x", *options).exit_code == 0
    result = cli("run", quantized, "--prompt", "x" * 400, *options)
    assert result.exit_code == 1
    assert "a context of 406 tokens" in result.stderr


def test_chat_stays_within_its_budget(cli, cli_json, quantized) -> None:
    """The first turn fits, the second would not: it ends before anything is generated for it."""
    first = cli_json("run", quantized, "--chat", *SHORT, input="hello\n")
    options = ("--gpu-memory", f"{first['plan']['total_bytes']}B", *SHORT)
    result = cli("run", quantized, "--chat", *options, input="hello\nand then?\n")
    assert result.exit_code == 1
    assert result.stdout == first["turns"][0]["text"] + "\n"
    assert "more than the" in result.stderr


@pytest.mark.parametrize(("device", "message"), [("cuda:99", "is not there"), ("quantum", "is unknown")])
def test_wrong_device(cli, quantized, device: str, message: str) -> None:
    result = cli("run", quantized, "--prompt", "x", "--device", device)
    assert result.exit_code == 1
    assert message in result.stderr
