"""The memory plan of a calibration: never over a budget, sums that add up, and an error that says what is missing."""

import re
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minibble.calibrate import plan as planning
from minibble.calibrate.plan import (
    CHUNK_TOKENS,
    EXPERTS_AT_ONCE,
    STORES,
    WAYS,
    Budget,
    CalibrationPlan,
    free_budget,
    plan_calibration,
)
from minibble.quantize.builtin import builtin_config
from minibble.quantize.config import ModelConfig
from minibble.quantize.errors import BudgetError
from minibble.quantize.sizes import parse_size

RELEASED = builtin_config("minimax-text-01")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLENTY = Budget(1 << 50, 1 << 50, 1 << 50)

powers = st.integers(4, 14).map(lambda exponent: 2**exponent)
configs = st.builds(
    lambda hidden, expert, heads, head_dim, experts: replace(
        RELEASED, hidden_size=hidden, intermediate_size=expert, num_attention_heads=heads, head_dim=head_dim,
        num_experts=experts,
    ),
    powers, powers, st.integers(1, 64), st.sampled_from([16, 64, 128]), st.integers(2, 64),
)  # fmt: skip
sizes = st.tuples(st.integers(1, 1024), st.integers(2, 8192))
shares = st.one_of(st.floats(0, 1.3), st.sampled_from([0.0, 1e-3, 100.0]))
devices = st.sampled_from([CPU, CUDA])


def stores(config: ModelConfig, tokens: int, device: torch.device) -> dict[str, int]:
    """Bytes of each store, from what CalibrationPlan says they are."""
    itemsize = 4 if device == CPU else 2
    HK = config.num_attention_heads * config.head_dim
    return {
        "hidden": tokens * config.hidden_size * itemsize,
        "mixed": tokens * HK * itemsize,
        "sums": tokens * config.hidden_size * 4,
    }


def check_sums(plan: CalibrationPlan, config: ModelConfig, samples: int, seq_len: int, device: torch.device) -> None:
    held = {"gpu": 0, "host": 0, "disk": 0}
    for name, nbytes in stores(config, samples * seq_len, device).items():
        held[getattr(plan, name)] += nbytes
    assert plan.tokens == samples * seq_len
    assert plan.disk_bytes == held["disk"]
    group = 2 * max(
        plan.experts_at_once * 3 * config.hidden_size * config.intermediate_size,
        5 * config.num_attention_heads * config.head_dim * config.hidden_size,
    )
    work = plan.host_bytes - held["host"] - 2 * group
    assert work == 0 if device == CUDA else work > 0
    assert plan.gpu_bytes > held["gpu"] if device == CUDA else plan.gpu_bytes == held["gpu"] == 0
    assert 1 <= plan.chunk_sequences <= samples and plan.chunk_sequences * seq_len <= max(CHUNK_TOKENS, seq_len)
    assert 1 <= plan.experts_at_once <= min(EXPERTS_AT_ONCE, config.num_experts)


@settings(max_examples=200, deadline=None)
@given(configs, sizes, devices, shares, shares, shares)
def test_no_tier_is_ever_overfilled(
    config: ModelConfig, size: tuple[int, int], device: torch.device, gpu: float, host: float, disk: float
) -> None:
    """A plan fits all three budgets, and its parts add up; where there is none, the shortfall named is one.

    Budgets are shares of what everything takes in one place.
    """
    roomy, total = plan_calibration(config, *size, device, PLENTY), sum(stores(config, prod(size), device).values())
    everything = (roomy.gpu_bytes, roomy.host_bytes + (total if device == CUDA else 0), total)
    budget = Budget(*(int(share * nbytes) for share, nbytes in zip((gpu, host, disk), everything, strict=True)))
    try:
        plan = plan_calibration(config, *size, device, budget)
    except BudgetError as error:
        check_shortfall(str(error), config, size, device, budget)
        return
    assert plan.gpu_bytes <= budget.gpu_bytes or device == CPU
    assert plan.host_bytes <= budget.host_bytes and plan.disk_bytes <= budget.disk_bytes
    check_sums(plan, config, *size, device)
    exact = Budget(plan.gpu_bytes, plan.host_bytes, plan.disk_bytes)
    check_sums(plan_calibration(config, *size, device, exact), config, *size, device)


def check_shortfall(
    message: str, config: ModelConfig, size: tuple[int, int], device: torch.device, budget: Budget
) -> None:
    """The tier named has less than is needed, by what is said; with more of each tier named in turn there is a plan."""
    tiers = {str(device): "gpu_bytes", "host memory": "host_bytes", "the disk": "disk_bytes"}
    for _ in tiers:
        match = re.fullmatch(r".* needs (.+?) of (.+?), (.+?) more than there is: \w.*", message)
        assert match, message
        tier = tiers[match[2]]
        needed, missing, free = parse_size(match[1]), parse_size(match[3]), getattr(budget, tier)
        rounding = sum(parse_size(f"0.06 {text.split()[1]}") for text in (match[1], match[3]))
        assert missing > 0 and abs(needed - missing - free) <= rounding, (message, free)
        budget = replace(budget, **{tier: 1 << 60})
        try:
            plan_calibration(config, *size, device, budget)
            return
        except BudgetError as error:
            message = str(error)
    pytest.fail(f"no plan with all the room there is: {message}")


def way(plan: CalibrationPlan) -> tuple[int, int]:
    """Experts at once, and how many stores have left the GPU; those that leave later are still there."""
    there = [getattr(plan, name) == "gpu" for name in STORES]
    assert there == sorted(there)
    return plan.experts_at_once, there.count(False)


@settings(max_examples=100, deadline=None)
@given(configs, sizes, st.floats(3, 13))
def test_a_smaller_gpu_takes_a_later_way(config: ModelConfig, size: tuple[int, int], exponent: float) -> None:
    """With room elsewhere, the plan is the first of WAYS that a GPU has room for."""
    ways = [(min(experts, config.num_experts), moved) for experts, moved in WAYS]
    assert ways.index(way(plan_calibration(config, *size, CUDA, PLENTY))) == 0
    before = 0
    for share in (1.0, 0.5, 0.25, 0.1):
        try:
            plan = plan_calibration(config, *size, CUDA, replace(PLENTY, gpu_bytes=int(share * 10**exponent)))
        except BudgetError:
            before = len(ways)
            continue
        assert before <= ways.index(way(plan))
        before = ways.index(way(plan))


@settings(max_examples=50, deadline=None)
@given(configs, sizes)
def test_on_a_cpu_stores_are_in_host_memory_if_they_fit(config: ModelConfig, size: tuple[int, int]) -> None:
    roomy = plan_calibration(config, *size, CPU, PLENTY)
    assert roomy.experts_at_once == min(EXPERTS_AT_ONCE, config.num_experts) and roomy.disk_bytes == 0
    assert {roomy.hidden, roomy.mixed, roomy.sums} == {"host"}
    tight = plan_calibration(config, *size, CPU, replace(PLENTY, host_bytes=roomy.host_bytes - 1))
    assert "disk" in (tight.hidden, tight.mixed, tight.sums) and tight.experts_at_once == roomy.experts_at_once


def test_the_real_model() -> None:
    """262,144 tokens: everything on a GPU of 80 GB; 24 GB are enough too; small ones need host memory, or a disk."""
    samples, seq_len = 128, 2048
    large = plan_calibration(RELEASED, samples, seq_len, CUDA, Budget(78 * 2**30, 10**11, 0))
    assert {large.hidden, large.mixed, large.sums} == {"gpu"} and large.experts_at_once == EXPERTS_AT_ONCE
    assert plan_calibration(RELEASED, samples, seq_len, CUDA, Budget(24 * 10**9, 10**11, 0)).host_bytes < 3 * 10**10
    small = plan_calibration(RELEASED, samples, seq_len, CUDA, Budget(10**10, 10**11, 0))
    disk = plan_calibration(RELEASED, samples, seq_len, CUDA, Budget(10**10, small.host_bytes - 10**9, 10**11))
    assert "host" in (small.hidden, small.mixed, small.sums) and "disk" in (disk.hidden, disk.mixed, disk.sums)
    with pytest.raises(BudgetError, match=r"needs .* GB of cuda, .* more than there is: allow more"):
        plan_calibration(RELEASED, samples, seq_len, CUDA, Budget(10**9, 10**11, 0))
    assert " on disk" in disk.describe() and f"{small.experts_at_once} experts" in small.describe()
    assert "of GPU memory" in small.describe() and "of disk" not in small.describe()
    assert small.to_json() == asdict(small)


def test_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of it, on the disk that the folder will be on; a GPU's share may be bounded."""
    disk = SimpleNamespace(total=10**12, used=0, free=10**11)
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return disk

    monkeypatch.setattr(planning.shutil, "disk_usage", disk_usage)
    found = free_budget(CPU, tmp_path / "a" / "b", 10**10, None)
    assert asked == [tmp_path] and found.gpu_bytes == 0 and found.disk_bytes == 8 * 10**10
    with open("/proc/meminfo", encoding="ascii") as file:
        total = 1024 * int(file.readline().split()[1])
    assert 0 < found.host_bytes < total
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**10, 4 * 10**10))
    assert free_budget(CUDA, tmp_path, 0, None).gpu_bytes == 9 * 10**9
    assert free_budget(CUDA, tmp_path, 0, 5 * 10**9).gpu_bytes == 5 * 10**9
    with pytest.raises(BudgetError, match=r"10\.0 GB free"):
        free_budget(CUDA, tmp_path, 0, 5 * 10**10)
