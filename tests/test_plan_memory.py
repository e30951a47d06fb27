"""Memory by part: never negative, a sum of its parts, less with more ranks; and ZeRO's own numbers."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.plan import memory
from rlkd.plan.hardware import GIB, GPUS
from rlkd.plan.known import KNOWN
from rlkd.plan.work import assumed, work_of
from tests.plan_help import MACHINE, plan, recipe, shape

H100 = GPUS["H100"]
STAGES = st.sampled_from([0, 1, 2, 3])


def learner(model: str = "Qwen2.5-7B", hardware: Any = H100, **changes: Any) -> memory.Memory:
    config, of = recipe(**changes), shape(model)
    return memory.learner(config, of, work_of(config, assumed(config, of)), hardware)


def states(m: memory.Memory) -> float:
    return sum(m.parts.get(name, 0.0) for name in ("weights", "gradients", "float32 copy", "moments"))


@settings(max_examples=10, deadline=None)
@given(
    model=st.sampled_from(sorted(KNOWN)), stage=STAGES, ranks=st.integers(1, 1024), offload=st.booleans(),
    checkpointing=st.booleans(), tokens=st.integers(64, 65536), gpu=st.booleans(),
)  # fmt: skip
def test_no_part_is_negative_and_the_total_is_their_sum(
    model: str, stage: int, ranks: int, offload: bool, checkpointing: bool, tokens: int, gpu: bool
) -> None:
    found = learner(
        model, H100 if gpu else MACHINE, learner__zero_stage=stage, learner__ranks=ranks, learner__offload=offload,
        learner__gradient_checkpointing=checkpointing, learner__max_tokens=tokens,
    )  # fmt: skip
    for parts, total in ((found.parts, found.total), (found.host, found.host_total)):
        assert all(size >= 0 for size in parts.values())
        assert total == sum(parts.values())
    assert found.total > 0


@settings(max_examples=10, deadline=None)
@given(model=st.sampled_from(sorted(KNOWN)), stage=STAGES, ranks=st.integers(1, 512), gpu=st.booleans())
def test_memory_falls_with_more_ranks(model: str, stage: int, ranks: int, gpu: bool) -> None:
    """Of ZeRO 1 to 3 the states; under 0 they stay. Everything else never grows."""
    machine = H100 if gpu else MACHINE
    few = learner(model, machine, learner__zero_stage=stage, learner__ranks=ranks)
    many = learner(model, machine, learner__zero_stage=stage, learner__ranks=2 * ranks)
    if stage or gpu:  # bfloat16 has no ZeRO-0
        assert states(many) < states(few)
    else:
        assert states(many) == states(few)
    assert many.total <= few.total


@settings(max_examples=10, deadline=None)
@given(ranks=st.integers(2, 512), model=st.sampled_from(sorted(KNOWN)))
def test_a_higher_stage_needs_less(ranks: int, model: str) -> None:
    """Where the bucket of stages 2 and 3, of 50 M elements, is small beside the gradients it saves."""
    one, two, three = (states(learner(model, learner__zero_stage=s, learner__ranks=ranks)) for s in (1, 2, 3))
    assert two < one
    if shape(model).parameters > 2e9:
        assert three < two


def test_zero_paper_figure_1() -> None:
    """Ψ = 7.5 B, N_d = 64, K = 12: 120, 31.4, 16.6 and 1.9 GB. DeepSpeed sums gradients in float32, where the paper has
    2 bytes: that much more is expected, and the layer that stage 3 gathers."""
    n, ranks, gb = shape().parameters, 64, 1e9
    moments = learner(learner__zero_stage=2, learner__ranks=ranks).parts["moments"]
    assert moments == pytest.approx(8 * n / ranks)
    assert states(learner(learner__ranks=1, learner__zero_stage=1)) == pytest.approx((2 + 2 + 4 + 12) * n)
    assert states(learner(learner__zero_stage=1, learner__ranks=ranks)) == pytest.approx((2 + 6 + 12 / ranks) * n)
    two = states(learner(learner__zero_stage=2, learner__ranks=ranks))
    assert two == pytest.approx((2 + (4 + 12) / ranks) * n + memory.BUCKET * 2)
    three = states(learner(learner__zero_stage=3, learner__ranks=ranks))
    assert three / gb == pytest.approx((2 + 4 + 12) * n / ranks / gb, abs=2.5)


def test_float32_under_zero_0_keeps_no_copy() -> None:
    found = learner(hardware=MACHINE)
    n = shape().parameters
    assert found.parts["float32 copy"] == 0
    assert states(found) == 16 * n


def test_offloading_moves_states_to_the_host() -> None:
    on = learner(learner__zero_stage=2, learner__ranks=4)
    off = learner(learner__zero_stage=2, learner__ranks=4, learner__offload=True)
    n = shape().parameters
    assert "moments" not in off.parts
    assert off.host["moments"] == 8 * n / 4
    assert off.total < on.total - 12 * n / 4


def test_checkpointing_keeps_a_stream_a_layer() -> None:
    of = shape()
    whole, few = (memory.activations(of, 2, c, True) for c in (False, True))
    assert few < whole / 10
    assert few > of.layers * of.hidden * 2


def test_activations_follow_the_micro_batch_and_never_exceed_the_step() -> None:
    small = learner(learner__max_tokens=1024).parts["activations"]
    large = learner(learner__max_tokens=2048).parts["activations"]
    assert large == pytest.approx(2 * small)
    config = recipe(learner__max_tokens=10**6)
    work = work_of(config, assumed(config, shape()))
    assert memory.micro_batch(config, work) == work.most_computed


def test_a_chunk_of_logits_is_the_rows_asked_for() -> None:
    of = shape()  # 152,064 token ids
    more = memory.head(of, 4096.0, 1024, 2) - memory.head(of, 4096.0, 128, 2)
    assert more == 3 * (1024 - 128) * of.vocabulary * 4


def test_a_rollout_worker_takes_its_share_of_the_gpu() -> None:
    found = plan(recipe(sampler__gpu_memory_utilization=0.5)).memory["rollout"]
    assert found.total == pytest.approx(0.5 * H100.memory)
    assert found.parts["weights"] == 2 * shape().parameters
    halves = plan(recipe(sampler__tensor_parallel=2)).memory["rollout"]
    assert halves.parts["weights"] == shape().parameters


def test_on_a_cpu_a_rollout_worker_has_the_cache_it_was_given() -> None:
    found = plan(recipe(sampler__kv_cache_gib=3.0), "Qwen2.5-0.5B", MACHINE).memory["rollout"]
    assert found.parts["keys and values"] == 3 * GIB
    assert found.parts["weights"] == 4 * shape("Qwen2.5-0.5B").parameters


def test_room_for_keys_and_values() -> None:
    """performance.md §2.4: a 7B on an H200 has 57 KB a token."""
    config = recipe(sampler__gpu_memory_utilization=0.9)
    work = work_of(config, assumed(config, shape()))
    room = memory.kv_room(config, shape(), work, GPUS["H200"])
    parts = memory.sampler(config, shape(), work, GPUS["H200"]).parts
    assert room == pytest.approx(parts["keys and values"] / (57_344 * work.lengths.longest))
