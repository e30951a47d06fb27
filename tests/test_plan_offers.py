"""What does not fit is refused, and what is offered fits; for any number of GPUs."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.config import contradictions
from rlkd.core.errors import ConfigError
from rlkd.plan import offers
from rlkd.plan.devices import changed, devices, splits
from rlkd.plan.hardware import GIB, GPUS, Hardware, cpu, of
from rlkd.plan.plan import Plan, planned
from rlkd.plan.work import Lengths, assumed
from tests.plan_help import MACHINE, plan, recipe, shape

LENGTHS = Lengths(200.0, 1000.0, 1024, 4096, "a test")
SIZES = {"sampler__max_tokens": 4096, "data__max_prompt_tokens": 1024, "learner__max_tokens": 16384,
         "model__context": 8192}  # fmt: skip


def wide(model: str = "Qwen2.5-7B", hardware: Hardware = GPUS["H100"], **changes: Any) -> Plan:
    return plan(recipe(**{**SIZES, **changes}), model, hardware, LENGTHS)


@pytest.mark.parametrize(
    ("model", "name", "ranks", "shared"),
    [
        ("Qwen2.5-1.5B", "RTX4090", 1, False),
        ("Qwen2.5-7B", "L40S", 4, False),
        ("Qwen2.5-7B", "A100-80", 8, True),
        ("Llama-3.1-70B", "H200", 2, False),
    ],
)
def test_what_is_offered_fits(model: str, name: str, ranks: int, shared: bool) -> None:
    found = wide(model, GPUS[name], learner__ranks=ranks, ray__share_gpus=shared)
    assert not found.fits
    ways = offers.offers(found, LENGTHS)
    assert ways
    for offer in ways:
        config = changed(found.config, offer.changes)
        again = planned(config, found.models, found.hardware, LENGTHS)
        assert again.fits
        assert again.step == offer.plan.step
        assert contradictions.findings(config) == []
        for memory in again.memory.values():
            assert memory.total <= found.hardware.memory


def test_a_7b_on_one_h100_does_not_fit_and_something_else_does() -> None:
    """performance.md §2.4: 122 GB of states."""
    found = wide()
    assert not found.fits
    assert "learner needs" in found.shortages[0].what
    assert "79.6 GiB" in found.shortages[0].what
    ways = offers.offers(found, LENGTHS)
    assert ways
    assert any("learner.offload" in w.changes or "learner.ranks" in w.changes for w in ways)
    assert "learner." in str(ways[0])


def test_a_32b_needs_many_gpus() -> None:
    found = wide("Qwen2.5-32B")
    ways = offers.offers(found, LENGTHS)
    assert ways
    assert min(w.plan.devices.total for w in ways) > 2


def test_nothing_is_offered_where_nothing_fits() -> None:
    tiny = Hardware("toy", "gpu", 1e12, 1e12, 1.0 * GIB, 8, 1e9, 1e9)
    assert offers.offers(wide("Llama-3.1-70B", tiny), LENGTHS) == []


def test_on_a_cpu_all_processes_share_one_machine() -> None:
    config = recipe("grpo-smollm2")
    lengths = assumed(config, shape("SmolLM2-135M"))
    assert plan(config, "SmolLM2-135M", MACHINE, lengths).fits
    small = plan(config, "SmolLM2-135M", cpu(9.0 * GIB, 2), lengths)
    assert not small.fits
    assert "all processes need" in small.shortages[0].what
    ways = offers.offers(small, lengths)
    assert ways
    assert all(w.plan.fits for w in ways)


def test_the_sampler_needs_room_for_one_context() -> None:
    found = wide(hardware=GPUS["L40S"], model="Qwen2.5-7B", model__context=131072, sampler__gpu_memory_utilization=0.4)
    assert any("one context has 131,072" in s.what for s in found.shortages)
    odd = wide("Qwen2.5-0.5B", sampler__tensor_parallel=4)
    assert any("does not divide the model's 14 heads" in s.what for s in odd.shortages)


def test_a_rollout_worker_shares_one_gpu_or_none() -> None:
    found = wide("Qwen2.5-1.5B", ray__share_gpus=True, sampler__tensor_parallel=2, sampler__gpu_memory_utilization=0.3)
    assert any("needs GPUs of its own" in s.what for s in found.shortages)
    assert not any(c.get("ray.share_gpus") for c in splits(found.config, 8, 2))


@settings(max_examples=4, deadline=None)
@given(gpus=st.integers(2, 64))
def test_splits_use_exactly_so_many(gpus: int) -> None:
    config = recipe(**SIZES)
    found = [devices(changed(config, c), GPUS["H100"]) for c in splits(config, gpus, 1)]
    assert found
    assert {d.total for d in found} == {gpus}
    assert found[-1].shared


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_best_way_fits_and_uses_them_all(gpus: int) -> None:
    found = wide("Qwen2.5-1.5B", schedule__groups_per_step=64)
    offer = offers.best(found, gpus, LENGTHS)
    assert offer is not None
    assert offer.plan.fits
    assert offer.plan.devices.total == gpus


def test_more_gpus_of_one_node_are_never_slower() -> None:
    """Beyond one node weights and gradients pass a network, and a step may take longer."""
    found = wide("Qwen2.5-1.5B", schedule__groups_per_step=64, schedule__staleness=1)
    rows = offers.table(found, (1, 2, 4, 8), LENGTHS)
    took = [o.plan.step.step for _, o in rows if o is not None]
    assert len(took) == 4
    assert took == sorted(took, reverse=True)


@pytest.mark.parametrize(
    ("name", "expected"), [("h100", "H100"), ("A100_80", "A100-80"), ("rtx 4090", "RTX4090"), ("CPU", "cpu")]
)
def test_hardware_by_name(name: str, expected: str) -> None:
    assert of(name, MACHINE).name == expected


def test_unknown_hardware_and_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean H200"):
        of("H20O", MACHINE)
    for gpus in (0, 1025):
        with pytest.raises(ConfigError, match=f"--gpus {gpus}"):
            offers.wanted(gpus, GPUS["H100"])
    with pytest.raises(ConfigError, match="--gpus 4 with --hardware cpu"):
        offers.wanted(4, MACHINE)
