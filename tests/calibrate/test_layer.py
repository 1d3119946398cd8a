"""One layer after the other on the calibration text: what each matrix is solved for, and what becomes of the text.

The runtime's own model of the finished checkpoint is the judge: every matrix must have been solved for just what it
receives there.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from golden import calibration_source as known
from golden.calibration_source import COUNTS, DEAD, EXPERTS, LAYERS, SAMPLES, SEQ_LEN, TOKENS
from torch import Tensor

import minibble
from minibble.calibrate import job
from minibble.calibrate.layer import MIN_TOKENS, PRIOR
from minibble.calibrate.solver import SolverSettings
from minibble.calibrate.stores import Stores
from minibble.calibrate.text import read_calibration
from minibble.quantize.checkpoint import Checkpoint
from minibble.quantize.job import quantize_checkpoint
from minibble.quantize.nf4 import NF4
from minibble.quantize.nf4_math import decode_absmax, level_table
from minibble.quantize.tensors import QuantizedTensor
from minibble.runtime.layers import Linear
from minibble.runtime.layout import by_module
from minibble.runtime.moe import MoE

Config = Callable[..., dict[str, Any]]


class Run(NamedTuple):
    """A calibrated checkpoint, its manifest, the stores as the job left them, and what every matrix receives."""

    source: Checkpoint
    out: Checkpoint
    manifest: dict[str, Any]
    stores: Stores
    outputs: list[Tensor]
    received: dict[str, Tensor]
    weighted: bool


@pytest.fixture(scope="module", params=[False, True], ids=["tokens", "weighted"])
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_source: Callable[..., Path],
    tiny_config: Config,
) -> Run:  # fmt: skip
    """With tokens that all count the same, and with tokens that count by their router weight."""
    folder = tmp_path_factory.mktemp("layer")
    source = known.write(folder, make_source, tiny_config)
    made: list[Stores] = []
    with pytest.MonkeyPatch.context() as patch:
        make_stores = job.make_stores

        def kept(*args: Any) -> Stores:
            made.append(make_stores(*args))
            return made[-1]

        patch.setattr(job, "make_stores", kept)
        result = job.quantize(
            source, folder / "out", calibration=folder / "text.txt", samples=SAMPLES, seq_len=SEQ_LEN, sweeps=2,
            device="cpu", router_weights=request.param,
        )  # fmt: skip
    outputs, received = watch(result.out, read_calibration(folder / "text.txt", source, seq_len=SEQ_LEN).ids)
    manifest = json.loads(result.manifest.read_text())
    checkpoints = Checkpoint.open(source), Checkpoint.open(result.out)
    return Run(*checkpoints, manifest, made[0], outputs, received, request.param)


def watch(path: Path, ids: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of each layer [tokens, D] of the runtime's model in float32, and the inputs of each module."""
    model = minibble.load(path, device="cpu", dtype=torch.float32)
    outputs: list[Tensor] = []
    received: dict[str, Tensor] = {}

    def hear(name: str) -> Callable[..., None]:
        return lambda module, args: received.update({name: args[0].flatten(0, -2).clone()})

    for name, module in model.named_modules():
        if isinstance(module, Linear | MoE):
            module.register_forward_pre_hook(hear(name))
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output.flatten(0, 1).clone()))
    with torch.no_grad():
        model(ids)
    return outputs, received


def matrices(run: Run, module: str) -> Iterator[tuple[str, Tensor, QuantizedTensor]]:
    """Name, 16-bit weight and 4-bit matrix of each part of a module."""
    for name in dict(by_module(run.source.config))[module]:
        weight, q = run.source.read(run.source.specs[name]), run.out.read(run.out.specs[name])
        assert isinstance(weight, Tensor) and isinstance(q, QuantizedTensor)
        yield name, weight, q


def output_error(weight: Tensor, q: QuantizedTensor, H: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T) in float64."""
    W, E = weight.double(), weight.double() - NF4().decode(q).double()
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def test_the_text_ends_where_the_model_takes_it(run: Run) -> None:
    """After the last layer the activations are those of the finished checkpoint in the runtime."""
    ours, theirs = run.stores.hidden, run.outputs[-1]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("module", ["attention.in_proj", "attention.out_proj"])
def test_attention_is_solved_for_what_it_receives(run: Run, layer: int, module: str) -> None:
    """From the matrices before it as the file holds them, those of its own layer too."""
    name = f"layers.{layer}.{module}"
    H = gram(run.received[name])
    for tensor, weight, q in matrices(run, name):
        record = run.manifest["quantized"][tensor]
        assert record["output_error"] == pytest.approx(output_error(weight, q, H), rel=1e-4), tensor
        assert record["tokens"] == TOKENS and record["damp"] == SolverSettings.damp and "shrinkage" not in record


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("kind", ["gate_up", "down"])
def test_experts_are_solved_for_their_tokens_and_a_prior(run: Run, layer: int, kind: str) -> None:
    """The tokens routed to an expert, and all the layer's tokens, which together count as PRIOR for each input."""
    everything = run.received[f"layers.{layer}.moe"]
    for expert in range(EXPERTS):
        name = f"layers.{layer}.moe.experts.{expert}.{kind}"
        for tensor, weight, q in matrices(run, name):
            record = run.manifest["quantized"][tensor]
            count = record["tokens"]
            if count < MIN_TOKENS:
                assert torch.equal(q.codes, NF4().encode(weight).codes) and "output_error" not in record
                continue
            own = router_weights(run, layer, expert)
            assert len(run.received[name]) == len(own) == count
            all_inputs = everything if kind == "gate_up" else hidden_of(run, layer, expert, everything)
            prior = PRIOR * weight.shape[1]
            H = gram(run.received[name] * own[:, None]) + gram(all_inputs) * float(own.square().mean()) * prior / TOKENS
            assert record["output_error"] == pytest.approx(output_error(weight, q, H), rel=1e-4), tensor
            assert record["shrinkage"] == pytest.approx(prior / (prior + count), rel=1e-3)


def router_weights(run: Run, layer: int, expert: int) -> Tensor:
    """What each token of an expert counts, in their order."""
    router = run.source.read(run.source.specs[f"model.layers.{layer}.block_sparse_moe.gate.weight"])
    assert isinstance(router, Tensor)
    logits, ids = (run.received[f"layers.{layer}.moe"].double() @ router.double().T).topk(2)
    weights = logits.softmax(dim=1)[ids == expert]
    return weights if run.weighted else torch.ones_like(weights)


def hidden_of(run: Run, layer: int, expert: int, x: Tensor) -> Tensor:
    """silu(W1 x) * W3 x with the 4-bit matrices of an expert."""
    parts = {name.split(".")[-2]: q for name, _, q in matrices(run, f"layers.{layer}.moe.experts.{expert}.gate_up")}
    w1, w3 = (NF4().decode(parts[key]) for key in ("w1", "w3"))
    return torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)


def test_every_expert_is_accounted_for(run: Run) -> None:
    """Experts with 0, 1 and 5 tokens: how many, and what was done about it, stand in the manifest."""
    assert MIN_TOKENS in (2, 3, 4, 5), "5 tokens must be enough and 1 too few for this test"
    for layer, counts in enumerate(run.manifest["expert_tokens"]):
        assert len(counts) == EXPERTS and sum(counts) == 2 * TOKENS
        for expert, count in COUNTS.items():
            assert counts[expert] == count
        for expert, count in enumerate(counts):
            for matrix in ("w1", "w2", "w3"):
                record = run.manifest["quantized"][
                    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                ]
                assert record["tokens"] == count and record["relative_error"] > 0
                if count < MIN_TOKENS:
                    assert record["fallback"] == f"{count} tokens, fewer than {MIN_TOKENS}: nearest rounding"
                    assert "shrinkage" not in record
                else:
                    assert record["output_error"] > 0 and 0 < record["shrinkage"] < 1 and "fallback" not in record
    totals, records = run.manifest["totals"], run.manifest["quantized"].values()
    errors = [record["output_error"] for record in records if "output_error" in record]
    assert totals["fallbacks"] == sum("fallback" in record for record in records) == 2 * 3 * LAYERS
    assert totals["mean_output_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert totals["max_output_error"] == max(errors)


def test_few_tokens_do_not_spoil_an_expert(run: Run) -> None:
    """Five tokens hold 5 of 64 directions; in the others the layer's tokens keep the errors in bounds."""
    for layer in range(LAYERS):
        everything = run.received[f"layers.{layer}.moe"]
        for tensor, weight, q in matrices(run, f"layers.{layer}.moe.experts.{known.SOME}.gate_up"):
            nearest = output_error(weight, NF4().encode(weight), gram(everything))
            assert output_error(weight, q, gram(everything)) < 0.5 * nearest, tensor


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_dead_input_is_rounded_to_nearest(run: Run, layer: int) -> None:
    """Under the scale that the file ends up with; nearest rounding of whole matrices knows only the one before."""
    solved = [expert for expert, count in enumerate(run.manifest["expert_tokens"][layer]) if count >= MIN_TOKENS]
    modules = ["attention.in_proj", *(f"moe.experts.{expert}.gate_up" for expert in solved)]
    for module in modules:
        assert run.received[f"layers.{layer}.{module}"][:, DEAD].abs().max() == 0
        for tensor, weight, q in matrices(run, f"layers.{layer}.{module}"):
            scale = decode_absmax(q)  # one block a row
            nearest = (level_table("nf4") * scale[:, None] - weight[:, DEAD, None].float()).abs().amin(dim=1)
            off = (NF4().decode(q)[:, DEAD] - weight[:, DEAD].float()).abs()
            assert torch.allclose(off, nearest, rtol=0, atol=1e-6), tensor


def test_a_constant_input_is_one_like_others(run: Run) -> None:
    """Feature 0 of the first layer has no variance at all; its matrices come out as well as the others."""
    x = run.received["layers.0.attention.in_proj"]
    assert float(x[:, 0].std()) < 1e-6 < float(x[:, 0].abs().min())
    for tensor, weight, q in matrices(run, "layers.0.attention.in_proj"):
        nearest = NF4().encode(weight)
        assert output_error(weight, q, gram(x)) < 0.5 * output_error(weight, nearest, gram(x)), tensor


def test_the_mean_error_of_the_outputs_falls(run: Run, tmp_path: Path) -> None:
    """Every layer's outputs are nearer to the source's than nearest rounding's are."""
    quantize_checkpoint(run.source.path, tmp_path / "nearest", device="cpu")
    text = run.source.path.parent / "text.txt"
    ids = read_calibration(text, run.source.path, seq_len=SEQ_LEN).ids
    exact, _ = watch(run.source.path, ids)
    nearest, _ = watch(tmp_path / "nearest", ids)
    for ours, theirs, true in zip(run.outputs, nearest, exact, strict=True):
        assert float((ours - true).square().mean()) < 0.3 * float((theirs - true).square().mean())
