"""Int4 in AutoGPTQ's files: packing against another reader, rounding against exhaustive search, bytes, refusals."""

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minibble.quantize.errors import CheckpointError, ConfigError
from minibble.quantize.formats import FORMATS, format_named, format_of
from minibble.quantize.int4 import Int4
from minibble.quantize.int4_math import search_scales
from minibble.quantize.measure import finite_scales, relative_error
from minibble.quantize.nf4_math import decode_absmax, decode_rows, zero_byte
from minibble.quantize.tensors import QuantizedTensor

NAME = "model.layers.0.self_attn.q_proj.weight"
MODULE = NAME.removesuffix(".weight")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random_matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(shape[0], 1, generator=generator) + 0.1
    return (torch.randn(shape, generator=generator) * scales).to(dtype)


def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """Eight values for each int32 along `axis`, the lowest bits first."""
    parts = [(words.astype(np.int64) >> (4 * i)) & 15 for i in range(8)]
    stacked = np.stack(parts, axis=axis + 1)
    return stacked.reshape([n * 8 if i == axis else n for i, n in enumerate(words.shape)])


def read_like_gptq(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The matrix [N, K], float32, that version 1 of AutoGPTQ's layout stands for, whatever its zeros and groups."""
    keys = ("qweight", "qzeros", "scales", "g_idx")
    qweight, qzeros, scales, g_idx = (tensors[f"{MODULE}.{key}"].numpy() for key in keys)
    codes, zeros = nibbles(qweight, 0), nibbles(qzeros, 1) + 1
    return (scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx]).astype(np.float32)).T


def codes_of(q: QuantizedTensor) -> torch.Tensor:
    return torch.stack((q.codes >> 4, q.codes & 0xF), dim=1).reshape(q.shape)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Awkward matrices: groups of zeros, one large weight among small ones, weights near float16's ends."""
    group = draw(st.sampled_from([8, 16, 24, 32, 128]))
    shape = (8 * draw(st.integers(1, 4)), group * draw(st.integers(1, 4)))
    weight = random_matrix(shape, seed=draw(st.integers(0, 2**31 - 1))) * 10.0 ** draw(st.sampled_from([-7, -2, 0, 3]))
    if draw(st.booleans()):
        weight[0, :group] = 0
    if draw(st.booleans()):
        weight[-1, -1] = -30 * weight.abs().max()
    return weight.to(draw(st.sampled_from(FLOATS[:2]))), group


@settings(max_examples=60, deadline=None)
@given(drawn=matrices())
@example(drawn=(torch.zeros(8, 8), 8))
def test_round_trip(drawn: tuple[torch.Tensor, int]) -> None:
    weight, group = drawn
    shape = (weight.shape[0], weight.shape[1])
    format = Int4(group)
    q = format.encode(weight)
    tensors = format.pack(NAME, q)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == format.stored(NAME, shape)
    assert format.nbytes(shape) == sum(tensor.nbytes for tensor in tensors.values())
    assert format.held_nbytes(shape) == q.nbytes
    again = format.unpack(NAME, shape, tensors.__getitem__)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.absmax, q.absmax)
    assert (again.shape, again.levels, again.block_size) == (shape, "int4", group)
    decoded = format.decode(again)
    assert np.array_equal(decoded.numpy(), read_like_gptq(tensors))
    assert (decoded[weight == 0] == 0).all()


def test_reads_codes_that_it_would_not_have_chosen() -> None:
    """Any words at all, as another tool may write them."""
    generator = torch.Generator().manual_seed(3)
    tensors = Int4(16).pack(NAME, Int4(16).encode(torch.zeros(16, 48)))
    words = torch.randint(-(2**31), 2**31 - 1, (6, 16), generator=generator).int()
    tensors |= {f"{MODULE}.qweight": words, f"{MODULE}.scales": torch.randn(3, 16, generator=generator).half()}
    q = Int4(16).unpack(NAME, (16, 48), tensors.__getitem__)
    assert np.array_equal(Int4(16).decode(q).numpy(), read_like_gptq(tensors))
    assert torch.equal(Int4(16).pack(NAME, q)[f"{MODULE}.qweight"], words)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decode_rounds_once(dtype: torch.dtype) -> None:
    q = Int4(32).encode(random_matrix((24, 96)))
    exact = (codes_of(q).double() - 8) * q.absmax.double().view(24, 3).repeat_interleave(32, 1)
    assert torch.equal(Int4(32).decode(q, dtype), exact.to(dtype))
    rows = torch.tensor([[3, 0], [23, 3]])
    assert torch.equal(decode_rows(q, rows), exact.float()[rows])


@pytest.mark.parametrize("group", [8, 32, 128])
def test_codes_are_the_nearest_levels(group: int) -> None:
    """Against an exhaustive search in float64."""
    weight = random_matrix((9, 256))
    q = Int4(group).encode(weight)
    scale = q.absmax.double().view(9, -1).repeat_interleave(group, 1)
    values = torch.arange(-8, 8).double() * scale[..., None]
    distance = (weight.double()[..., None] - values).abs()
    chosen = distance.gather(-1, codes_of(q).long()[..., None]).squeeze(-1)
    assert (chosen <= distance.amin(-1) + 1e-7 * scale).all()


def test_first_weight_is_in_the_high_nibble_and_in_the_lowest_bits_of_the_file() -> None:
    weight = torch.zeros(8, 16)
    weight[0, 0], weight[0, 1] = -1.0, 0.5
    q = Int4(16).encode(weight)
    assert q.codes[0] >> 4 < 8 < q.codes[0] & 0xF
    word = int(Int4(16).pack(NAME, q)[f"{MODULE}.qweight"][0, 0])
    assert (word & 0xF, (word >> 4) & 0xF, (word >> 8) & 0xF) == (q.codes[0] >> 4, q.codes[0] & 0xF, 8)
    assert q.codes[-1] == zero_byte("int4") == 0x88


@pytest.mark.parametrize(("group", "bound"), [(32, 0.00750), (64, 0.00905), (128, 0.01025)])
def test_error_of_normal_weights(group: int, bound: float) -> None:
    """Searched scales: at amax / 7.5 the errors are 0.0090, 0.0106 and 0.0123."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    q = Int4(group).encode(weight)
    error = relative_error(Int4(group), weight, q)
    exact = (weight.double() - Int4(group).decode(q).double()).square().sum() / weight.double().square().sum()
    assert error == pytest.approx(float(exact), rel=1e-5)
    assert 0.95 * bound < error < bound


def test_each_group_has_the_best_of_the_tried_scales() -> None:
    weight = random_matrix((16, 256), torch.bfloat16)
    scales = search_scales(weight, 64)
    assert scales.dtype == torch.float16 and scales.shape == (16, 4)
    assert torch.equal(scales.view(-1), Int4(64).encode(weight).absmax)
    groups = weight.double().view(16, 4, 64)

    def error(scale: torch.Tensor) -> torch.Tensor:
        step = scale.half().double()[..., None]
        return (groups - step * (groups / step).round().clamp(-8, 7)).square().sum(-1)

    amax = groups.abs().amax(-1)
    for share in np.linspace(0.70, 1.08, 20):
        assert (error(scales) <= error(amax * share / 7.5) * (1 + 1e-3)).all()
    assert (error(scales).sum() < 0.9 * error(amax / 7.5).sum()).all()


def test_work_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_matrix((24, 192))
    whole = Int4(64).encode(weight)
    monkeypatch.setattr("minibble.quantize.int4_math._CHUNK_CPU", 300)
    monkeypatch.setattr("minibble.quantize.nf4_math._CHUNK_CPU", 300)
    parts = Int4(64).encode(weight)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.absmax, parts.absmax)
    assert relative_error(Int4(64), weight, parts) == relative_error(Int4(64), weight, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e6])
def test_weights_that_cannot_be_held_stay_visible(bad: float) -> None:
    weight = random_matrix((8, 64))
    weight[2, 5] = bad
    q = Int4(32).encode(weight)
    assert not finite_scales(q)
    assert (~decode_absmax(q).isfinite()).nonzero().flatten().tolist() == [4]
    assert not Int4(32).decode(q)[2].isfinite().all()


@pytest.mark.parametrize("shape", [(9216, 6144), (6144, 9216), (24576, 6144), (1024, 6144)], ids=str)
def test_bytes_of_the_real_matrices(shape: tuple[int, int]) -> None:
    """4 bits a weight, a float16 and a 4-bit zero point a group, and a group index a column."""
    (N, K), groups = shape, prod(shape) // 128
    assert Int4().nbytes(shape) == N * K // 2 + 2 * groups + groups // 2 + 4 * K


@pytest.mark.parametrize("shape", [(12, 128), (8, 192), (8, 64)], ids=str)
def test_shapes_that_do_not_fit_are_refused_by_name(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"q_proj\.weight is {shape[0]} x {shape[1]}.*groups of 128"):
        Int4().stored(NAME, shape)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(8, 100)], ids=["vector", "rows"])
def test_encode_refuses_what_is_not_whole_groups(weight: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="whole groups of 128"):
        Int4().encode(weight)


def tampered(change: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = Int4(16).pack(NAME, Int4(16).encode(random_matrix((8, 64))))
    return tensors | {f"{MODULE}.{key}": value for key, value in change.items()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"qzeros": torch.full((4, 1), -0x77777778, dtype=torch.int32)}, "gptq_v2"),
        ({"qzeros": torch.full((4, 1), 0x77777776, dtype=torch.int32)}, "other zero points"),
        ({"g_idx": torch.arange(64).flip(0).int() // 16}, "not sequential"),
        ({"g_idx": torch.arange(64).int()}, "not sequential"),
        ({"g_idx": torch.arange(64) // 16}, "g_idx is torch.int64"),
        ({"qweight": torch.zeros(8, 9, dtype=torch.int32)}, r"qweight is torch.int32 \(8, 9\)"),
        ({"scales": torch.zeros(4, 8)}, "scales is torch.float32"),
    ],
    ids=str,
)
def test_unpack_refuses_what_it_would_misread(change: dict[str, Any], text: str) -> None:
    tensors = tampered(change)
    with pytest.raises(CheckpointError, match=rf"q_proj\.weight: .*{text}"):
        Int4(16).unpack(NAME, (8, 64), tensors.__getitem__)


def test_untampered_is_accepted() -> None:
    Int4(16).unpack(NAME, (8, 64), tampered({}).__getitem__)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantization_config_round_trip(group: int) -> None:
    config = Int4(group).quantization_config(["lm_head"])
    assert Int4.from_quantization_config(config, "config.json") == format_of(config, "config.json") == Int4(group)
    assert Int4(group).extra_json(["lm_head"]) == {"quantize_config.json": config}
    # What loaders of GPTQ files ask for.
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, group, True, False)
    assert (config["quant_method"], config["checkpoint_format"], config["lm_head"]) == ("gptq", "gptq", False)
    assert Int4(group).quantization_config([])["lm_head"]


@pytest.mark.parametrize("missing", ["sym", "desc_act", "checkpoint_format", "lm_head"])
def test_configs_of_older_tools_are_read(missing: str) -> None:
    config = Int4(64).quantization_config([])
    del config[missing]
    assert Int4.from_quantization_config(config | {"damp_percent": 0.01, "format": "gptq"}, "config.json") == Int4(64)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8}, {"bits": 3}, {"bits": None}, {"sym": False}, {"checkpoint_format": "gptq_v2"},
        {"checkpoint_format": "marlin"}, {"format": "gptq_v2"}, {"pack_dtype": "int64"}, {"group_size": -1},
        {"group_size": 100}, {"group_size": "128"}, {"group_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_other_kinds_of_gptq_are_refused(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(ConfigError, match=f"here: quantization_config has {key}"):
        format_of(Int4().quantization_config([]) | change, "here")


@pytest.mark.parametrize("config", [{"quant_method": "awq"}, {}, [], "gptq", None], ids=str)
def test_other_methods_are_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="expected bitsandbytes"):
        format_of(config, "config.json")


def test_names() -> None:
    assert [getattr(format_named(name), "name", "bf16") for name in FORMATS] == list(FORMATS)
    assert format_named("int4-g128") == Int4()
    with pytest.raises(ConfigError, match="unknown format 'int3'; there are bf16"):
        format_named("int3")


@pytest.mark.parametrize("group", [0, -128, 12])
def test_group_sizes_that_cannot_be_packed(group: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        Int4(group)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"levels": "fp4"}, "'fp4'"),
        ({"absmax": torch.zeros(4)}, r"absmax .* torch.float32 \(4,\)"),
        ({"nested_absmax": torch.zeros(1), "nested_offset": 0.0}, "no second-level scales"),
    ],
    ids=["levels", "absmax", "nested"],
)
def test_tensors_that_contradict_themselves(change: dict[str, Any], text: str) -> None:
    parts: dict[str, Any] = {"absmax": torch.zeros(4, dtype=torch.float16), "levels": "int4"} | change
    with pytest.raises(CheckpointError, match=text):
        QuantizedTensor((8, 64), torch.zeros(256, dtype=torch.uint8), block_size=128, **parts)


def test_assembled_scales_are_rounded_to_the_file() -> None:
    q = Int4(32).encode(random_matrix((8, 64)))
    again = Int4(32).assemble(q.shape, q.codes, q.absmax.float() * (1 + 1e-5), torch.float32)
    assert torch.equal(again.absmax, q.absmax) and torch.equal(again.codes, q.codes)


@pytest.mark.gpu
def test_gpu_encodes_packs_and_decodes_alike(cuda_device: torch.device) -> None:
    weight = random_matrix((136, 256), torch.bfloat16)
    there, here = Int4().encode(weight.to(cuda_device)), Int4().encode(weight)
    assert (there.codes.cpu() != here.codes).float().mean() < 1e-3
    q = here.to(cuda_device)
    for dtype in FLOATS:
        assert torch.equal(Int4().decode(q, dtype).cpu(), Int4().decode(here, dtype))
    packed = Int4().pack(NAME, q)
    assert all(torch.equal(packed[name].cpu(), tensor) for name, tensor in Int4().pack(NAME, here).items())
