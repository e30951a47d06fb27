"""No learning signal: which groups nothing can be learned from, and what becomes of a run that has no others."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkd.algorithms.dr_grpo import DrGRPO
from rlkd.algorithms.grpo import GRPO
from rlkd.algorithms.kdrl import KDRL
from rlkd.algorithms.luffy import LUFFY
from rlkd.algorithms.reinforce_pp import ReinforcePP
from rlkd.algorithms.rloo import RLOO
from rlkd.algorithms.rsft import RSFT
from rlkd.core.errors import DataError
from rlkd.core.types import Group, Sample, Signal
from rlkd.rollout import Sampled
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.health import DEFAULTS, Alarms
from rlkd.train.loop import Loop, Schedule
from rlkd.train.no_signal import IN_A_ROW, SHARE, Barren, PassRates, learns_nothing
from tests import test_algorithms, test_algorithms_with_teachers
from tests.distill_help import credited, step
from tests.fakes import FakeLearner, FakePolicy, FakeVerify
from tests.test_algorithms_with_teachers import random_step, without_teacher
from tests.test_loop import loop_of
from tests.toys import group_of

SAMPLED = [*test_algorithms.ALGORITHMS, RSFT()]  # trained on what the policy wrote alone
GUIDED = [a for a in test_algorithms_with_teachers.ALGORITHMS if not isinstance(a, RSFT)]
CASES = [(a, test_algorithms.random_step) for a in SAMPLED] + [(a, random_step) for a in GUIDED]
PLAIN = [GRPO(), RLOO(), DrGRPO(norm_length=8), ReinforcePP(), ReinforcePP(baseline=False), LUFFY(norm_length=8)]


def scored(algorithm: Any, group: Group) -> Group:
    """The group with the signals that a run would have asked for, and no others."""
    fields = {Signal.TEACHER: "teacher_logp", Signal.TEACHER_TOPK: "teacher_topk"}
    unasked = {name: None for signal, name in fields.items() if signal not in algorithm.needs}
    asked = algorithm.wants(group, "big") if len(unasked) < 2 else [True] * len(group.samples)
    silent = group if all(asked) else without_teacher(group)
    rows = [known if a else s for known, s, a in zip(group.samples, silent.samples, asked, strict=True)]
    return replace(group, samples=tuple(replace(s, **unasked) for s in rows))


@pytest.mark.faults("F56")
@pytest.mark.parametrize(("algorithm", "made"), CASES, ids=[f"{a.name}-{i}" for i, (a, _) in enumerate(CASES)])
def test_nothing_can_be_learned_from_a_group_exactly_when_it_has_no_gradient(algorithm: Any, made: Any) -> None:
    """Without the KL to a reference and the entropy bonus, which are there whatever a group is like, and without bounds
    on ρ, which look at the policy."""
    if isinstance(algorithm, GRPO):
        free = {"clip_low": 0.999, "clip_high": 1e9, "dual_clip": None, "correction": "none"}
        algorithm = replace(algorithm, beta=0.0, entropy=0.0, **free)
    seen = set()
    for seed, reward in ((1, 0.0), (2, 1.0), (3, 1.0)):
        groups, logits = made(seed)
        same = tuple(replace(s, reward=reward) for s in groups[1].samples)
        groups = [scored(algorithm, replace(g, samples=same) if i == 1 else g) for i, g in enumerate(groups)]
        if not any(g.samples for g in credited(algorithm, groups)):
            continue
        _, gradient = step(algorithm, groups, logits)
        for i, group in enumerate(credited(algorithm, groups)):
            moves = any(np.abs(g).max() > 0 for g in gradient[4 * i : 4 * i + 4])
            assert learns_nothing(group) == (not moves), (seed, i)
            seen.add(moves)
    assert True in seen


# --- in a run

STRICT = Schedule(steps=9, groups_per_step=4, max_turned_away=3, on_no_signal="stop")


def constant(tmp: Path, reward: Callable[[Sample], float] = lambda _: 0.0, **changes: Any) -> Loop:
    """A loop whose samples all earn the same."""
    options = {"schedule": STRICT, "algorithm": GRPO(), **changes}
    return loop_of(tmp, verify=FakeVerify(reward), **options)


def told(loop: Loop) -> list[str]:
    return [text for kind, text in loop.report.events if kind == "no_signal"]  # type: ignore[attr-defined]


@pytest.mark.faults("F56")
@pytest.mark.parametrize("algorithm", PLAIN, ids=lambda a: a.name)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_a_constant_reward_ends_the_run_saved_whatever_the_algorithm(
    tmp_path: Path, algorithm: Any, reward: float
) -> None:
    algorithm = replace(algorithm, rollout=replace(algorithm.rollout, samples=3))
    loop = constant(tmp_path, lambda _: reward, algorithm=algorithm)
    with pytest.raises(DataError, match="nothing could be learned from 16 groups in a row") as caught:
        asyncio.run(loop.run())
    assert caught.value.exit_code == 4
    for said in ("RLKD-D020", "too hard" if reward < 0.5 else "too easy", "algorithm.rollout.samples=6"):
        assert said in str(caught.value)
    rows = [metrics for _, _, metrics in loop.report.rows]  # type: ignore[attr-defined]
    assert [(r[SHARE], r[IN_A_ROW]) for r in rows] == [(1.0, 4.0), (1.0, 8.0), (1.0, 12.0), (1.0, 16.0)]
    assert list(loop.checkpoints.store.steps()) == [4]


@pytest.mark.faults("F56")
def test_a_teacher_is_a_signal_whatever_the_rewards_are(tmp_path: Path) -> None:
    """KDRL distils groups that are all right or all wrong (§4.6): they are no reason to stop, and none is left out."""
    loop = constant(tmp_path, algorithm=KDRL(rollout=Sampled(samples=2)))
    loop.services = replace(loop.services, teachers={"big": FakePolicy()})
    assert asyncio.run(loop.run()) == 0
    assert all(metrics[SHARE] == 0.0 for _, _, metrics in loop.report.rows)  # type: ignore[attr-defined]
    assert len(loop.learner.trained) == 9  # type: ignore[attr-defined]


@pytest.mark.faults("F56")
def test_one_group_with_a_signal_is_enough_to_go_on(tmp_path: Path) -> None:
    """Negative control: of every 16 groups one has a contrast, at the place where the run would end."""
    loop = constant(tmp_path, lambda s: float(s.tokens[0] % 16 == 15) * (s.tokens[3] % 2))
    assert asyncio.run(loop.run()) == 0
    shares = [metrics[SHARE] for _, _, metrics in loop.report.rows]  # type: ignore[attr-defined]
    assert 0.75 in shares
    assert min(shares) > 0


@pytest.mark.faults("F56")
@pytest.mark.parametrize("said", [None, "skip_step"])
def test_or_it_is_told_and_the_run_goes_on(tmp_path: Path, said: Any) -> None:
    """As by default: it may be over its goal, and other prompts may be easier."""
    loop = constant(tmp_path, schedule=replace(STRICT, on_no_signal=said))
    assert asyncio.run(loop.run()) == 0
    assert len(loop.learner.trained) == 9  # type: ignore[attr-defined]
    assert ["16 groups in a row" in text for text in told(loop)] == [True, True]  # counted anew after the first
    assert "100%" in told(loop)[0]


@pytest.mark.faults("F56")
def test_interruptions_do_not_hide_that_nothing_is_learned(tmp_path: Path) -> None:
    """The count goes on where the checkpoint has it: after a resume, and after the learner was lost."""
    loop = constant(tmp_path, schedule=replace(STRICT, steps=3))
    assert asyncio.run(loop.run()) == 0
    policy = FakePolicy()
    dies = FakeLearner(policy, dies=lambda update: update == 2)
    saves = Checkpoints(Store(tmp_path / "checkpoints"), every=1)
    loop = constant(tmp_path, policy=policy, learner=dies, checkpoints=saves)
    with pytest.raises(DataError, match="16 groups in a row"):
        asyncio.run(loop.run())
    loop = constant(tmp_path, schedule=replace(STRICT, max_turned_away=4), checkpoints=saves)
    with pytest.raises(DataError, match="20 groups in a row"):
        asyncio.run(loop.run())


@pytest.mark.faults("F56")
def test_a_reward_that_was_mended_is_given_its_chance(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        asyncio.run(constant(tmp_path).run())
    assert asyncio.run(constant(tmp_path, lambda s: float(s.tokens[3] % 2)).run()) == 0


@pytest.mark.faults("F56")
def test_an_alarm_comes_first_with_advice() -> None:
    def one(rewards: list[float]) -> Group:
        return GRPO().credit(group_of(rewards, [3] * len(rewards)))

    def step(n: int, *groups: Group) -> list[str]:
        counted = Barren(99, PassRates()).step(groups)
        return [a.text for a in run.step(n, groups, counted) if a.kind == "no_signal"]

    run = Alarms(DEFAULTS["float32"])
    nothing, mixed = one([1.0, 1.0]), one([1.0, 0.0])
    assert [step(n, nothing, mixed) for n in range(1, 9)] == [[]] * 8
    texts = [step(n, nothing, nothing) for n in range(9, 15)]
    assert [len(t) for t in texts] == [0, 0, 0, 0, 1, 0]
    assert "step 13: nothing could be learned from any group of the last 5 steps" in texts[4][0]
    assert "too easy" in texts[4][0]
    assert texts[4][0].splitlines()[2].split()[1:3] == ["10", "100%"]  # of these five steps alone


def test_a_step_without_groups_says_nothing() -> None:
    counted = Barren(9, PassRates(), groups=3).step([])
    assert math.isnan(counted[SHARE])
    assert counted[IN_A_ROW] == 3.0
