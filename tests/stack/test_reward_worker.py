"""Reward workers as real Ray actors: concurrency, a killed actor, the policies for failures."""

import asyncio
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rlkd.core.errors import DataError, PreflightError, WorkerLost
from rlkd.core.ports import Verify
from rlkd.core.types import Origin, Prompt, Sample
from rlkd.engines.sandbox import Tier, probe
from rlkd.rewards.mix import Mix
from rlkd.rewards.table import find, pack
from rlkd.workers.reward import RewardPool, WorkerOptions

pytestmark = pytest.mark.stack

PATHOLOGICAL = str(Path(__file__).parents[1] / "pathological.py")
PROMPT = Prompt("p7", np.array([1, 2], np.int32), "42")
WORDS = ["<eos>", "prompt", "question", "42", "41", "poison", "0.3"]
EOS = 0
Make = Callable[..., RewardPool]


def text_of(tokens: np.ndarray) -> str:
    return " ".join(WORDS[t] for t in tokens if t != EOS)


def sample(word: str) -> Sample:
    tokens = np.array([1, 2, WORDS.index(word), EOS], np.int32)
    origin = np.array([Origin.PROMPT, Origin.PROMPT, Origin.POLICY, Origin.POLICY], np.uint8)
    return Sample(tokens, origin, np.zeros(4, np.float32), (0, 0))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def failed_answers_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver writes the answers that a reward failed on."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def pool() -> Iterator[Make]:
    made: list[RewardPool] = []

    def make(*names: str, options: dict[str, Any] | None = None, **settings: Any) -> RewardPool:
        rewards = {n.rpartition(":")[2]: find(n)() for n in names}
        limits = WorkerOptions(**{"timeout_s": 1.0, **(options or {})})
        made.append(RewardPool(pack(rewards), Mix.of(rewards), text_of, options=limits, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rewards_of(samples: tuple[Sample, ...]) -> list[float]:
    return [s.reward for s in samples]


def test_scores_are_filled_in_and_the_tokens_stay(pool: Make) -> None:
    made = pool("exact", "length")
    assert isinstance(made, Verify)
    before = [sample("42"), sample("41")]
    after = asyncio.run(made(PROMPT, before))
    assert [s.scores["exact"] for s in after] == [1.0, 0.0]
    assert [s.scores["length"] for s in after] == [pytest.approx(1 - 2 / 256)] * 2  # two tokens: the answer and its end
    assert rewards_of(after) == [pytest.approx(s.scores["exact"] + s.scores["length"]) for s in after]
    assert all(a.tokens is b.tokens for a, b in zip(after, before, strict=True))
    assert made.counts()["scored"] == 2


def test_groups_are_judged_at_once_on_workers_and_children(tmp_path: Path) -> None:
    """Four groups that wait for one another: two workers of two children each, or a timeout."""
    rewards = {"meets": find(f"{PATHOLOGICAL}:meets")(folder=str(tmp_path))}
    options = WorkerOptions(processes=2, timeout_s=30.0)
    made = RewardPool(pack(rewards), Mix.of(rewards), text_of, workers=2, options=options)

    async def judge() -> list[tuple[Sample, ...]]:
        await made.start()
        return await asyncio.gather(*(made(PROMPT, [sample(w)]) for w in ("41", "42", "0.3", "poison")))

    try:
        assert [rewards_of(group) for group in asyncio.run(judge())] == [[1.0]] * 4
        assert made.counts()["recovered"] == 0
    finally:
        made.close()


@pytest.mark.faults("F6")
def test_a_killed_actor_is_replaced_and_its_group_judged_again(pool: Make) -> None:
    made = pool(f"{PATHOLOGICAL}:Slow")

    async def judge() -> tuple[Sample, ...]:
        await made.start()
        worker = made._workers[0]
        pid = await worker._ask(worker._actor, "pid", 10.0)
        children = psutil.Process(pid).children(recursive=True)
        assert len(children) == 2  # the keeper and its child
        task = asyncio.ensure_future(made(PROMPT, [sample("0.3")] * 2))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        judged = await task
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
        return judged

    assert rewards_of(asyncio.run(judge())) == [1.0, 1.0]
    assert made.counts()["workers_lost"] == 1


def test_a_worker_that_does_not_answer_is_given_up(pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.workers.reward.ANSWER_S", 0.5)
    made = pool(f"{PATHOLOGICAL}:Slow")

    async def judge() -> None:
        await made.start()
        worker = made._workers[0]
        worker._longest_s = 0.0
        stopped = psutil.Process(await worker._ask(worker._actor, "pid", 10.0))
        stopped.suspend()
        try:
            with pytest.raises(WorkerLost, match=r"reward-0\.score: no answer within 0.5 s"):
                await worker.score(PROMPT, [])
        finally:
            stopped.kill()
        assert worker._actor is None
        assert rewards_of(await made(PROMPT, [sample("0.3")])) == [1.0]

    asyncio.run(judge())


def test_on_error_fail_stops_with_one_error_that_says_it_all(pool: Make) -> None:
    with pytest.raises(DataError) as caught:
        asyncio.run(pool(f"{PATHOLOGICAL}:raises")(PROMPT, [sample("42"), sample("poison")]))
    for part in ("RLKD-D301", "`raises`", "'p7'", "'poison'", "ValueError: I cannot read poison", "verifier.on_error"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "outcome"),
    [("raises", "raised"), ("hangs", "timeout"), ("segfaults", "crashed"), ("eats_memory", "memory")],
)
def test_on_error_drop_leaves_the_sample_unjudged_and_counts_it(pool: Make, reward: str, outcome: str) -> None:
    made = pool(f"{PATHOLOGICAL}:{reward}", on_error="drop", options={"memory_gib": 0.25})
    judged = asyncio.run(made(PROMPT, [sample("42"), sample("poison"), sample("41")]))
    assert rewards_of(judged) == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert {k: n for k, n in made.counts().items() if n} == {"scored": 2, outcome: 1, "recovered": 2}


def test_on_error_zero(pool: Make) -> None:
    made = pool(f"{PATHOLOGICAL}:raises", on_error="zero")
    assert rewards_of(asyncio.run(made(PROMPT, [sample("42"), sample("poison")]))) == [1.0, 0.0]
    assert made.counts()["zeroed"] == 1


@pytest.mark.faults("F40", "F41")
def test_code_runs_in_the_sandbox_of_the_worker_s_machine_or_the_pool_does_not_start() -> None:
    tier = probe().tier
    rewards = {"code": find("code")()}
    prompt = replace(PROMPT, metadata={"tests": ["assert True"]})
    limits = WorkerOptions(timeout_s=60.0, recheck_fraction=1.0)
    made = RewardPool(pack(rewards), Mix.of(rewards), text_of, options=limits)

    async def judge() -> tuple[Sample, ...]:
        await made.start()
        return await made(prompt, [sample("42"), sample("poison")])

    try:
        if tier is not Tier.SANDBOX:
            with pytest.raises(PreflightError, match="RLKD-E310"):
                asyncio.run(judge())
            return
        assert rewards_of(asyncio.run(judge())) == [1.0, 0.0]  # `42` is a program, `poison` is a NameError
        assert made.notes() == ["reward-0 runs the models' code in tier userns+landlock"]
        assert made.metrics() == {"verifier_disagreement": 0.0}
        assert made.counts()["rechecked"] == 2
    finally:
        made.close()


@pytest.mark.faults("F41")
def test_a_pool_refuses_code_with_exit_3_through_ray(tmp_path: Path) -> None:
    poor = tmp_path / "poor.py"
    poor.write_text(POOR)
    rewards = {"code": find(f"{poor}:Mine")()}
    made = RewardPool(pack(rewards), Mix.of(rewards), text_of)
    accepted = RewardPool(pack(rewards), Mix.of(rewards), text_of, options=WorkerOptions(accept_unsafe_code=True))
    try:
        with pytest.raises(PreflightError, match="RLKD-E310") as caught:
            asyncio.run(made.start())
        assert caught.value.exit_code == 3
        asyncio.run(accepted.start())
        (note,) = accepted.notes()
        assert note.startswith("WARNING, accepted by verifier.accept_unsafe_code: no Landlock here; ")
    finally:
        made.close()
        accepted.close()


POOR = """
import sys
from dataclasses import dataclass
import rlkd.engines.sandbox_rules as rules
from rlkd.engines.sandbox import Found, Tier
from rlkd.rewards.code import Code

@dataclass(frozen=True)
class Mine(Code):
    pass

if "pytest" not in sys.modules:  # in the keeper's process, a machine without a sandbox
    rules.probe = lambda: Found(Tier.PROCESS, "no Landlock here")
"""


def test_a_reward_that_cannot_be_loaded_in_the_worker(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def score(prompt, answer):\n    return 1.0\n")
    rewards = {"mine": find(f"{mine}:score")()}
    made = RewardPool(pack(rewards), Mix.of(rewards), text_of)
    mine.unlink()
    with pytest.raises(DataError, match="RLKD-D303") as caught:
        asyncio.run(made.start())
    made.close()
    assert "there is no file" in str(caught.value)


@pytest.mark.faults("F10")
def test_who_leaves_its_node_is_nowhere_until_there_is_room(pool: Make) -> None:
    """Its successor was told to be where it had been, and waited for a node inside Ray, where that counts as lost."""

    async def judge() -> None:
        room = asyncio.Event()
        room.set()

        async def seated(_: str) -> None:
            await room.wait()

        made = pool("exact", options={"seated": seated})
        await made.start()
        node = made.roster()["reward-0"]["node"]
        room.clear()
        assert made.leave(node) == 1
        assert "node" not in made.roster()["reward-0"]
        waiting = asyncio.create_task(made(PROMPT, [sample("42")]))
        await asyncio.sleep(0.2)
        (row,) = made.roster().values()
        assert row["state"] == "waits for a node with room"
        assert "node" not in row
        room.set()
        assert rewards_of(await waiting) == [1.0]
        assert made.roster()["reward-0"]["node"] == node
        assert made.counts()["workers_lost"] == 0

    asyncio.run(judge())
