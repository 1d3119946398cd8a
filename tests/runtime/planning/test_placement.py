"""Placements of the released model: arithmetic, so neither weights nor GPUs are needed."""

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minibble.quantize.builtin import builtin_config
from minibble.quantize.errors import BudgetError, ConfigError
from minibble.runtime import plan
from minibble.runtime.footprint import footprint, kv_cache_bytes, state_bytes
from minibble.runtime.plan import CUBLAS_NBYTES, workspace_nbytes
from minibble.runtime.planning.device_bytes import CONTEXT_NBYTES, ConfigSource, fused_workspace_nbytes, model_bytes
from minibble.runtime.planning.machine import Division, Gpu, Machine
from minibble.runtime.planning.placement import Placement
from minibble.runtime.planning.planner import plan_placement
from minibble.runtime.planning.rates import DECODED_BYTES_PER_S, gpu_seconds
from minibble.runtime.planning.shortage import exactly

GB = 10**9
CONFIG = builtin_config("minimax-text-01")
SOURCES = {name: ConfigSource.of(CONFIG, name) for name in ("nf4-dq", "int4-g128")}
NF4 = SOURCES["nf4-dq"]
LAYERS, EXPERTS, EMBEDDING = 80, 32, 200064 * 6144 * 2
TWO = Machine.of_sizes((141 * GB, 141 * GB))
H100 = Gpu("cuda:0", 80 * GB, 3.12e12)


def zipf(seed: int, exponent: float) -> list[list[int]]:
    """Counts [layers][experts] that fall with the rank, the ranks turned differently in each layer."""
    row = [int(10_000 / (rank + 1) ** exponent) for rank in range(EXPERTS)]
    return [[row[(expert * 5 + layer * seed) % EXPERTS] for expert in range(EXPERTS)] for layer in range(LAYERS)]


counts = st.none() | st.builds(zipf, st.integers(0, 31), st.sampled_from([0.0, 0.3, 1.0, 3.0]))
sizes = st.lists(st.integers(12, 180).map(lambda size: size * GB), min_size=1, max_size=4)
run = st.fixed_dictionaries({"context": st.integers(0, 1_000_000), "batch": st.sampled_from([1, 2, 5, 16, 64])})
tiers = st.tuples(st.none() | st.integers(0, 300 * GB), st.none() | st.integers(0, 300 * GB))


def check(placement: Placement, machine: Machine, format: str, total: int | None) -> None:
    """What must hold for every placement of the released model."""
    source, config, devices = SOURCES[format], CONFIG, placement.devices
    assert [device.device for device in devices] == [gpu.device for gpu in machine.gpus[: len(devices)]]
    for device, gpu in zip(devices, machine.gpus, strict=False):
        assert device.total_bytes <= device.budget_bytes <= gpu.memory_bytes
        assert device.total_bytes == sum(device.to_json()["parts"].values())
        assert device.overhead_bytes >= CONTEXT_NBYTES and device.workspace_bytes >= 2 * CUBLAS_NBYTES
        everything = len(device.layers) * EXPERTS
        assert device.slots >= 2 * config.experts_per_token or (device.slots == 0 and device.experts == everything)
    assert total is None or placement.total_bytes <= sum(device.budget_bytes for device in devices) <= total
    assert [layer for device in devices for layer in device.layers] == list(range(LAYERS))
    for tiers in zip(placement.resident, placement.pinned, placement.disk, strict=True):
        assert sorted(sum(tiers, ())) == list(range(EXPERTS))
    _check_sums(placement, source)
    limits = (machine.host_bytes, machine.disk_bytes if machine.disk_bytes is not None else 0)
    assert limits[0] is None or placement.host_bytes <= limits[0]
    assert placement.disk_bytes <= limits[1]
    assert placement.host_bytes >= sum(map(len, placement.pinned)) * placement.record_bytes + placement.embedding_bytes
    assert placement.embedding_bytes in (0, EMBEDDING)
    assert placement.disk_bytes == sum(map(len, placement.disk)) * placement.record_bytes
    assert 0 <= placement.expected_hit_rate <= 1
    assert (placement.expected_hit_rate == 1) >= (placement.host_bytes + placement.disk_bytes == 0)


def _check_sums(placement: Placement, source: ConfigSource) -> None:
    """The parts of all GPUs are those of the whole model: nothing is lost between layers or counted twice."""
    config, context, batch = source.config, placement.context, placement.batch
    total = {name: sum(device.parts[name] for device in placement.devices) for name in placement.devices[0].parts}
    weights = plan.weights_nbytes(source, torch.device("cuda", 0), torch.bfloat16)
    assert total["weights_bytes"] == weights - LAYERS * EXPERTS * placement.record_bytes - placement.embedding_bytes
    assert total["kv_cache_bytes"] == kv_cache_bytes(config, context, batch)
    assert total["state_bytes"] == state_bytes(config, batch)
    held = sum(map(len, placement.resident)) + sum(device.slots + bool(device.slots) for device in placement.devices)
    assert total["experts_bytes"] == held * placement.record_bytes


@pytest.fixture(autouse=True, scope="module")
def fused() -> Any:
    """`plan` counts the kernels' layout, as on a machine that can compile them, and the model's bytes only once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "usable", lambda dtype: dtype == torch.bfloat16)
        weights = {id(source): plan.weights_nbytes(source, torch.device("cuda"), torch.bfloat16)
                   for source in SOURCES.values()}  # fmt: skip
        patch.setattr(plan, "weights_nbytes", lambda source, device, dtype: weights[id(source)])
        yield


@settings(max_examples=150, deadline=None)
@given(sizes, st.none() | st.integers(12 * GB, 400 * GB), run, tiers, counts, st.sampled_from(sorted(SOURCES)))
def test_no_budget_is_exceeded_and_every_expert_has_its_place(sizes, total, run, tiers, counts, format) -> None:
    machine = Machine.of_sizes(sizes, *tiers)
    try:
        placement = plan_placement(SOURCES[format], machine, gpu_memory=total, counts=counts, **run)
    except BudgetError:
        assume(False)
        return
    check(placement, machine, format, total)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(15 * GB, 300 * GB), st.integers(1, 40 * GB), run, counts, st.sampled_from(["all", "sizes"]))
def test_more_budget_never_lowers_the_hit_rate(sizes, total, more, run, counts, which) -> None:
    gpus = tuple(Gpu(f"cuda:{index}", size, 3e12) for index, size in enumerate(sizes))
    larger = tuple(replace(gpu, memory_bytes=gpu.memory_bytes + more) for gpu in gpus)
    try:
        before = plan_placement(
            NF4, Machine(gpus), gpu_memory=total if which == "all" else None, counts=counts, prefill_chunk=4096, **run
        )
    except BudgetError:
        assume(False)
        return
    if which == "all":
        after = plan_placement(NF4, Machine(gpus), gpu_memory=total + more, counts=counts, prefill_chunk=4096, **run)
    else:
        after = plan_placement(NF4, Machine(larger), counts=counts, prefill_chunk=4096, **run)
    assert after.expected_hit_rate >= before.expected_hit_rate


@settings(max_examples=25, deadline=None)
@given(st.integers(12 * GB, 60 * GB), st.integers(1, 2), st.integers(4096, 1_000_000), st.sampled_from([1, 8]))
def test_what_a_budget_error_names_is_enough(total, number, context, batch) -> None:
    """With so much more in all, or with the context that it names, there is a plan; a bit less is refused again."""
    machine = Machine.of_sizes((141 * GB,) * number)
    try:
        plan_placement(NF4, machine, context=context, batch=batch, gpu_memory=total)
        assume(False)
        return
    except BudgetError as error:
        text = str(error)
    assert "without any resident expert" in text
    assume(" more on " not in text)  # a GPU that is too small itself: no budget for all together helps
    amount, unit = text.split("; ")[1].split()[:2]
    digit = {"GB": GB, "MB": GB // 1000, "kB": 1000}[unit] // 10  # the last one, rounded up
    more = round(float(amount) * 10) * digit
    placement = plan_placement(NF4, machine, context=context, batch=batch, gpu_memory=total + more)
    check(placement, machine, "nf4-dq", total + more)
    with pytest.raises(BudgetError):
        plan_placement(NF4, machine, context=context, batch=batch, gpu_memory=total + more - digit - 1)
    if "; or a context of" in text:
        fitting = int(text.rsplit("context of ", 1)[1].split()[0])
        plan_placement(NF4, machine, context=fitting, batch=batch, gpu_memory=total)
        with pytest.raises(BudgetError):
            plan_placement(NF4, machine, context=fitting + 1, batch=batch, gpu_memory=total)


def test_the_two_readings_of_228() -> None:
    """228 GiB hold everything; 228 GB leave some 7 % of the experts to host memory."""
    whole = plan_placement(NF4, TWO, context=4096, gpu_memory=228 * 2**30)
    assert whole.expected_hit_rate == 1 and whole.host_bytes == 0
    assert [device.slots for device in whole.devices] == [0, 0]
    less = plan_placement(NF4, TWO, context=4096, gpu_memory=228 * GB)
    assert 0.92 < less.expected_hit_rate < 0.95
    assert less.expected_hit_rate == pytest.approx(sum(map(len, less.resident)) / (LAYERS * EXPERTS))
    assert less.total_bytes > 228 * GB - 4 * less.record_bytes
    assert less.expected_decode_tokens_per_s < whole.expected_decode_tokens_per_s / 2


@pytest.mark.parametrize(("format", "megabytes"), [("nf4-dq", 87.6), ("int4-g128", 87.6)])
def test_record_of_an_expert(format: str, megabytes: float) -> None:
    """As the kernels hold it, without NVRTC too; all of them weigh what the files do but for padding."""
    found = model_bytes(SOURCES[format], torch.bfloat16)
    assert found.record_bytes / 1e6 == pytest.approx(megabytes, abs=0.05)
    stored = footprint(CONFIG, format).parts["experts"] / (LAYERS * EXPERTS)
    assert 0 <= found.record_bytes - stored < 0.002 * stored or format == "int4-g128"
    assert found.record_bytes % 256 == 0


@pytest.mark.parametrize("tokens", [0, 1, 63, 4096])
def test_workspace_is_that_of_the_plan_for_one_gpu(tokens: int) -> None:
    expected = workspace_nbytes(NF4, torch.device("cuda", 0), torch.bfloat16, tokens)
    assert fused_workspace_nbytes(CONFIG, torch.bfloat16, tokens) == expected


def test_hottest_experts_stay() -> None:
    """No expert on disk is used more than one in host memory, none there more than a resident one of its GPU."""
    uses = zipf(3, 1.0)
    machine = Machine.of_sizes((48 * GB, 48 * GB), host_bytes=60 * GB, disk_bytes=200 * GB)
    placement = plan_placement(NF4, machine, context=4096, counts=uses)

    def used(ids: tuple[tuple[int, ...], ...], layers: range) -> list[int]:
        return [uses[layer][expert] for layer in layers for expert in ids[layer]]

    for device in placement.devices:
        coldest = min(used(placement.resident, device.layers))
        assert coldest >= max(used(placement.pinned, device.layers))
    everywhere = range(LAYERS)
    assert min(used(placement.pinned, everywhere)) >= max(used(placement.disk, everywhere)) > 0
    mass = sum(sum(used(placement.resident, range(l, l + 1))) / sum(uses[l]) for l in everywhere) / LAYERS
    assert placement.expected_hit_rate == pytest.approx(mass, rel=1e-9)
    even = plan_placement(NF4, machine, context=4096)
    assert placement.expected_hit_rate > even.expected_hit_rate + 0.1


def test_what_is_left_out_is_spread_evenly() -> None:
    placement = plan_placement(NF4, Machine.of_sizes((48 * GB,)), context=4096)
    numbers = {len(ids) for ids in placement.resident}
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("counts", [None, zipf(3, 1.0)], ids=["even", "zipf"])
@pytest.mark.parametrize("host_gb", [106, 120, 300])
def test_the_cpu_helps_as_far_as_host_memory_goes(host_gb: int, counts: list[list[int]] | None) -> None:
    division = Division(4352, 9216, 256, 41_000_000)
    alone = Machine.of_sizes((141 * GB,), host_bytes=host_gb * GB)
    plain, helped = (
        plan_placement(NF4, machine, context=4096, counts=counts)
        for machine in (alone, replace(alone, division=division))
    )
    assert (helped.resident, helped.pinned, helped.host_bytes) == (plain.resident, plain.pinned, plain.host_bytes)
    assert plain.computed == () and plain.division is None
    waiting = {(layer, expert) for layer, ids in enumerate(helped.pinned) for expert in ids}
    assert waiting >= set(helped.computed) and len(set(helped.computed)) == len(helped.computed)
    part = helped.division
    assert part is not None and part.whole == 9216 and 0 < part.units <= 4352 and part.units % 256 == 0
    room = (host_gb * GB - helped.host_bytes) // part.nbytes
    assert len(helped.computed) == min(room, len(waiting)) > 0
    if host_gb == 300:  # room for all: nearly as much of each as the CPU can take
        assert part.units >= 0.9 * 4352
    assert plain.expected_decode_tokens_per_s < helped.expected_decode_tokens_per_s
    assert helped.expected_decode_tokens_per_s < 1.7 * plain.expected_decode_tokens_per_s


def test_balanced_by_time_where_everything_fits() -> None:
    """Alike GPUs take as many layers; where a GPU is small, the other takes them over."""
    placement = plan_placement(NF4, TWO, context=4096)
    first, last = (len(device.layers) for device in placement.devices)
    assert first == last
    uneven = plan_placement(NF4, Machine.of_sizes((40 * GB, 141 * GB)), context=4096)
    assert len(uneven.devices[0].layers) < 30
    assert all(device.budget_bytes - device.total_bytes < 4 * device.record_bytes for device in uneven.devices)


def test_gpus_that_would_not_help_are_left_out() -> None:
    """A second GPU shares a budget of 40 GB with another CUDA context: fewer experts and a hop."""
    alone = plan_placement(NF4, Machine.of_sizes((80 * GB,)), context=4096, gpu_memory=40 * GB)
    both = plan_placement(NF4, Machine.of_sizes((80 * GB, 80 * GB)), context=4096, gpu_memory=40 * GB)
    assert len(both.devices) == 1 and both.resident == alone.resident


def test_budgets_for_each_gpu() -> None:
    placement = plan_placement(NF4, TWO, context=4096, gpu_memory=(100 * GB, 90 * GB))
    assert [device.budget_bytes for device in placement.devices] == [100 * GB, 90 * GB]
    with pytest.raises(ConfigError, match="1 budgets for 2 GPUs"):
        plan_placement(NF4, TWO, context=4096, gpu_memory=(100 * GB,))


def test_a_layer_takes_the_time_that_was_measured() -> None:
    """133 us on an H100 at 3.12 TB/s: mean of seven lightning layers and one softmax layer after 4,096 tokens."""
    found = model_bytes(NF4, torch.bfloat16)
    state = 2 * state_bytes(CONFIG) / 80
    nbytes = sum(found.layers) / 80 + 2 * found.record_bytes + state + kv_cache_bytes(CONFIG, 4096) / 80
    assert nbytes / H100.read_bytes_per_s == pytest.approx(98.2e-6, rel=0.01)
    assert gpu_seconds(nbytes, 1, H100) == pytest.approx(133.3e-6, rel=0.02)
    assert gpu_seconds(nbytes, 1, Gpu.of_size(0, 141 * GB)) == pytest.approx(108.2e-6, rel=0.02)


def test_decode_rate() -> None:
    """Written out: bytes of a step on both GPUs, a hop, and missed experts over the rates of copy engine and disk."""
    machine = replace(TWO, host_bytes=100 * GB, disk_bytes=100 * GB)
    for budget, batch in ((228 * 2**30, 1), (100 * GB, 1), (100 * GB, 8)):
        placement = plan_placement(NF4, machine, context=4096, batch=batch, gpu_memory=budget)
        record, share = placement.record_bytes, 1 - (1 - 2 / 32) ** batch
        weights = sum(device.weights_bytes for device in placement.devices) + placement.embedding_bytes - EMBEDDING
        nbytes = (
            weights + 80 * 32 * share * record + kv_cache_bytes(CONFIG, 4096, batch) + 2 * state_bytes(CONFIG, batch)
        )
        seconds = nbytes / DECODED_BYTES_PER_S + 80 * 15e-6 + 45e-6 * (len(placement.devices) - 1) + 0.6e-3
        seconds += share * record * (sum(map(len, placement.pinned)) / 55e9 + sum(map(len, placement.disk)) / 1.7e9)
        seconds += share * sum(map(len, (*placement.pinned, *placement.disk))) * 60e-6
        seconds += sum(len(device.layers) for device in placement.devices if device.slots) * 35e-6
        assert placement.expected_decode_tokens_per_s == pytest.approx(batch / seconds, rel=1e-6)


def test_host_memory_that_is_too_small() -> None:
    machine = Machine.of_sizes((24 * GB,), host_bytes=100 * GB)
    with pytest.raises(BudgetError, match=r"fit on no GPU.*100\.0 GB; (.*) GB more host memory") as error:
        plan_placement(NF4, machine, context=4096)
    more = round(float(str(error.value).split("; ")[1].split()[0]) * 1e9)
    assert plan_placement(NF4, replace(machine, host_bytes=100 * GB + more), context=4096).host_bytes <= 100 * GB + more
    with pytest.raises(BudgetError):
        plan_placement(NF4, replace(machine, host_bytes=100 * GB + more - 2 * GB), context=4096)
    placement = plan_placement(NF4, replace(machine, disk_bytes=130 * GB), context=4096)
    assert placement.host_bytes <= 100 * GB and placement.disk_bytes > 100 * GB
    with pytest.raises(BudgetError, match=r"the disk 1\.0 GB"):
        plan_placement(NF4, replace(machine, disk_bytes=GB), context=4096)


def test_the_disk_that_an_error_asks_for_is_enough() -> None:
    machine = replace(Machine.of_sizes((24 * GB, 24 * GB), host_bytes=GB // 10), disk_bytes=GB)
    with pytest.raises(BudgetError) as error:
        plan_placement(NF4, machine, context=4096)
    disk, host = re.search(r"or ([\d.]+) GB on disk with ([\d.]+) MB of host", str(error.value)).groups()
    enough = replace(machine, host_bytes=round(float(host) * 1e6), disk_bytes=round(float(disk) * 1e9))
    placement = plan_placement(NF4, enough, context=4096)
    assert len(placement.devices) == 2 and placement.host_bytes <= enough.host_bytes
    with pytest.raises(BudgetError):
        plan_placement(NF4, replace(enough, host_bytes=enough.host_bytes - placement.record_bytes), context=4096)


def test_planning_is_quick() -> None:
    """A plan on the released model with counts and shifted layers; the first one has counted the model's bytes."""
    machine, uses, taken = Machine.of_sizes((24 * GB, 80 * GB, 48 * GB, 48 * GB)), zipf(7, 1.0), []
    for context in (4096, 5000, 6000, 7000):
        started = time.perf_counter()
        plan_placement(NF4, machine, context=context, counts=uses)
        taken.append(time.perf_counter() - started)
    assert min(taken) < 1


@pytest.mark.parametrize("counts", [[[1] * 32] * 79, [[1] * 31] * 80, [[-1] * 32] * 80])
def test_counts_of_another_model(counts) -> None:
    with pytest.raises(ConfigError, match="80 layers × 32 experts"):
        plan_placement(NF4, TWO, context=1, counts=counts)


def test_tiny_model_and_json(tiny_config) -> None:
    """More GPUs than layers; a model whose experts are fewer than the slots."""
    from minibble.quantize.config import ModelConfig

    source = ConfigSource.of(ModelConfig.from_dict(tiny_config(), where="tiny"), "nf4")
    placement = plan_placement(source, Machine.of_sizes((2 * GB,) * 4), context=100)
    assert len(placement.devices) == 1 and placement.expected_hit_rate == 1
    data = placement.to_json()
    assert data.keys() >= {"devices", "host_bytes", "disk_bytes", "expected_hit_rate", "expected_decode_tokens_per_s"}
    assert data["devices"][0].keys() >= {"device", "budget_bytes", "total_bytes", "experts", "parts", "layers"}
    assert data["devices"][0]["experts"] == 12 and data["devices"][0]["layers"] == [0, 3]


def test_mixed_experts_are_refused() -> None:
    some = NF4.quantized - {"model.layers.3.block_sparse_moe.experts.1.w2.weight"}
    with pytest.raises(ConfigError, match="not all of one size"):
        plan_placement(replace(NF4, quantized=some), TWO, context=1)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("context", [100, 8192, 200_000])
def test_a_plan_fits_into_its_own_total(number: int, context: int) -> None:
    machine = Machine.of_sizes((300 * GB,) * number)
    free = plan_placement(NF4, machine, context=context)
    again = plan_placement(NF4, machine, context=context, gpu_memory=free.total_bytes)
    assert free.expected_hit_rate == again.expected_hit_rate == 1
    assert again.total_bytes <= free.total_bytes and again.host_bytes == 0


def test_every_gpu_has_buffers_for_the_disk() -> None:
    machine = Machine.of_sizes((48 * GB, 48 * GB), host_bytes=60 * GB, disk_bytes=200 * GB)
    placement = plan_placement(NF4, machine, context=4096)
    taken = sum(map(len, placement.pinned)) + 4 * len(placement.devices)
    assert len(placement.devices) == 2 and placement.host_bytes <= 60 * GB
    assert taken * placement.record_bytes + placement.embedding_bytes == placement.host_bytes


def test_the_embedding_makes_room_for_experts() -> None:
    """It goes to host memory where some experts would otherwise, if there is room for it."""
    whole = plan_placement(NF4, TWO, context=4096)
    assert whole.embedding_bytes == 0 and whole.to_json()["embedding"] == "gpu"
    for less in (EMBEDDING // 2, 2 * EMBEDDING):
        budget = whole.total_bytes - less
        placement = plan_placement(NF4, replace(TWO, host_bytes=10 * GB), context=4096, gpu_memory=budget)
        assert placement.embedding_bytes == EMBEDDING and placement.to_json()["embedding"] == "host"
        assert placement.devices[0].weights_bytes + EMBEDDING == pytest.approx(whole.devices[0].weights_bytes, rel=0.2)
    assert placement.expected_hit_rate < 1
    kept = plan_placement(NF4, replace(TWO, host_bytes=2 * GB, disk_bytes=10 * GB), context=4096, gpu_memory=budget)
    assert kept.embedding_bytes == 0 and kept.expected_hit_rate < placement.expected_hit_rate
    held = plan_placement(ConfigSource.of(CONFIG, "nf4-dq-all"), TWO, context=4096, gpu_memory=200 * GB)
    assert held.embedding_bytes == 0, "the CPU would have to decode it"


def test_little_host_memory_is_not_counted_as_much() -> None:
    """What cannot be pinned takes no page tables: 20.2 GB are enough."""
    machine = replace(Machine.of_sizes((141 * GB,), host_bytes=2 * GB), disk_bytes=400 * GB)
    placement = plan_placement(NF4, machine, context=4096, gpu_memory=20_200_000_000)
    assert placement.devices[0].overhead_bytes < 900_000_000


def test_larger_pieces_cost_little() -> None:
    """Pieces of a prompt grow only where decoding hardly loses by the memory for them."""
    for gb in (22, 23.7, 23.71, 24, 60, 140):
        placement = plan_placement(NF4, Machine.of_sizes((int(gb * GB),)), context=32768)
        small = plan_placement(NF4, Machine.of_sizes((int(gb * GB),)), context=32768, prefill_chunk=4096)
        assert placement.expected_decode_tokens_per_s > 0.98 * small.expected_decode_tokens_per_s


def test_the_hottest_of_a_layer_are_pinned_first() -> None:
    uses = zipf(3, 1.0)
    placement = plan_placement(NF4, Machine.of_sizes((48 * GB,)), context=4096, counts=uses)
    for row, ids in zip(uses, placement.pinned, strict=True):
        assert [row[e] for e in ids] == sorted((row[e] for e in ids), reverse=True)


@pytest.mark.parametrize("missing_bytes", [999_949_999, 1_234_500_000_001, 10**12 - 1])
def test_amounts_are_rounded_up(missing_bytes: int) -> None:
    from minibble.quantize.sizes import parse_size

    assert parse_size(exactly(missing_bytes).replace(" ", "")) >= missing_bytes


def test_a_gpu_that_is_too_small_comes_first() -> None:
    """It is not skipped, since the order is the user's; the error says what to do."""
    with pytest.raises(BudgetError, match=r"more on cuda:0 would do \(or leave out the GPUs that are too small\)"):
        plan_placement(NF4, Machine.of_sizes((5 * GB, 141 * GB)), context=4096)
    assert len(plan_placement(NF4, Machine.of_sizes((141 * GB, 6 * GB)), context=4096).devices) == 1
