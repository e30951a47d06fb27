"""Teachers on the real stack: Ray actors that score and write, one of them killed, and an endpoint that misbehaves."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlkd.algorithms.grpo import GRPO
from rlkd.core.errors import NoWorkers, WorkerLost
from rlkd.core.ports import Completion, Sampling, Services
from rlkd.core.types import Finish, Group, Prompt, Signal
from rlkd.data import HFTokenizer
from rlkd.models.get import get
from rlkd.rollout import Sampled
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints
from rlkd.train.evaluate import Evaluator
from rlkd.train.loop import Loop, Schedule
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.rollout import spawner as writer_spawner
from rlkd.workers.scorer import spawner as scorer_spawner
from rlkd.workers.teacher import Dispensable, Teacher
from rlkd.workers.writer import LocalWriter
from tests.fake_openai import KEY, FakeOpenAI, chat, drop, hang, raw, status
from tests.fakes import FakeLearner, FakePolicy, FakeReport, FakeVerify
from tests.toys import prompt_of

pytestmark = pytest.mark.stack
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return get("tiny", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def scorer_pool(tiny: Path, made: list[Any], **options_of_pool: Any) -> Pool:
    options = {"path": str(tiny), "dtype": "float32", "device": "cpu", "threads": 1}
    spawn = scorer_spawner(options, ENVIRONMENT, lambda _: {})

    def kept(index: int) -> Any:
        made.append(spawn(index))
        return made[-1]

    limits = PoolOptions(**{"timeout_s": 60.0, "start_s": 120.0, "backoff_s": 0.1, **options_of_pool})
    return Pool("teacher:big", kept, 1, options=limits)


def sequences(seed: int = 0, n: int = 4) -> list[np.ndarray]:
    """Prompts that begin alike, as a group's do."""
    draw = np.random.default_rng(seed)
    prompt = draw.integers(4, 30, 12)
    return [np.concatenate([prompt, draw.integers(4, 30, 20 + i)]).astype(np.int32) for i in range(n)]


@pytest.mark.usefixtures("cluster")
def test_what_a_scorer_says_is_what_the_model_says(tiny: Path) -> None:
    """The numbers a learner with these weights computes, here by transformers alone."""

    async def run() -> list[np.ndarray]:
        pool = scorer_pool(tiny, [])
        try:
            await pool.start()
            return await Teacher("teachers.big", pool, 256, 32, 32).logp(sequences())
        finally:
            pool.close()

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for tokens, logp in zip(sequences(), asyncio.run(run()), strict=True):
        ids = torch.tensor(tokens[None].astype(np.int64))
        with torch.no_grad():
            expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        np.testing.assert_allclose(logp[1:], expected, atol=1e-4)


# --- a teacher that is killed while it works


class Taught(GRPO):
    """Asks for every teacher's log-probs, and trains as GRPO does."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.TEACHER})


@dataclass
class Drawn:
    """Numbered prompts that the tiny model has tokens for."""

    cursor: int = 0

    def draw(self) -> Prompt:
        self.cursor += 1
        return replace(
            prompt_of(3, f"p{self.cursor}"), tokens=np.array([1, 4, self.cursor], np.int32), seed=self.cursor
        )

    def observe(self, group: Group) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class Kept(FakeReport):
    groups: dict[str, Group] = field(default_factory=dict)

    def observe(self, group: Group, seconds: Mapping[str, float]) -> None:
        self.groups[group.prompt.id] = group


class TinyPolicy(FakePolicy):
    async def generate(
        self, tokens: np.ndarray, n: int = 1, seed: int = 0, sampling: Sampling | None = None
    ) -> list[Completion]:
        draw = np.random.default_rng(seed)
        ids = [draw.integers(4, 30, 10).astype(np.int32) for _ in range(n)]
        return [Completion(i, np.full(10, -1.0, np.float32), Finish.STOP, (self.version, self.version)) for i in ids]


@dataclass
class KilledInTheMiddle:
    """The teacher, whose worker is stopped before its second call, so that the call cannot be over, and then killed."""

    model: Any
    pool: Pool
    made: list[Any]
    calls: int = 0
    lost: int = 0

    async def logp(self, asked: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.calls += 1
        if self.calls != 2:
            return await self.model.logp(asked)
        pid = await self.made[-1].pid.remote()
        os.kill(pid, signal.SIGSTOP)
        call = asyncio.create_task(self.model.logp(asked))
        await asyncio.sleep(0.3)
        assert not call.done()
        os.kill(pid, signal.SIGKILL)
        try:
            return await call
        except (WorkerLost, NoWorkers):
            self.lost += 1
            raise

    async def generate(self, *_: Any, **__: Any) -> list[Completion]:
        raise AssertionError

    async def topk(self, *_: Any) -> list[Any]:
        raise AssertionError


@dataclass
class WaitsForThePool(FakeLearner):
    """No step is over before the teacher has a worker again."""

    pool: Any = None

    async def update(self, batch: Any, knobs: Any) -> Mapping[str, float]:
        async with asyncio.timeout(100):
            while not self.pool.ready:
                await asyncio.sleep(0.05)
        return await super().update(batch, knobs)


def trained(tmp: Path, tiny: Path, kill: bool, unavailable: str = "wait") -> tuple[dict[str, Group], list[str], int]:
    async def run() -> tuple[dict[str, Group], list[str], int]:
        made: list[Any] = []
        policy, report = TinyPolicy(), Kept()
        limits = {"wait": {}, "fail": {"replacements": 0}, "skip_kd": {"patient": False}}  # as staff.py has it
        pool = scorer_pool(tiny, made, **limits[unavailable])
        asked: Any = KilledInTheMiddle(pool, pool, made) if kill else pool
        if unavailable == "skip_kd":
            asked = Dispensable("teachers.big", asked, report.event)
        teacher: Any = Teacher("teachers.big", asked, 256, 32, 32)
        loop = Loop(
            Schedule(steps=2, groups_per_step=3),
            Taught(rollout=Sampled(samples=4)),
            Drawn(),
            {},
            Services(policy, FakeVerify(), {"big": teacher}),
            WaitsForThePool(policy, pool=pool),
            Checkpoints(Store(tmp / "checkpoints")),
            Evaluator([], Sampling(8)),
            report,
        )
        try:
            await pool.start()
            assert await loop.run() == 0
            return report.groups, [kind for kind, _ in report.events], getattr(asked, "lost", 0)
        finally:
            pool.close()

    return asyncio.run(run())


@pytest.mark.faults("F7")
@pytest.mark.usefixtures("cluster")
def test_a_teacher_killed_in_the_middle_of_a_call_is_asked_again(tmp_path: Path, tiny: Path) -> None:
    calm, _, _ = trained(tmp_path / "calm", tiny, kill=False)
    groups, events, lost = trained(tmp_path / "killed", tiny, kill=True)
    assert lost == 1
    assert 1 <= events.count("worker_lost") <= 3  # the calls that were under way on it, of a step's three groups
    assert groups.keys() == calm.keys() == {f"p{i}" for i in range(1, 7)}
    for name, group in groups.items():
        for sample, other in zip(group.samples, calm[name].samples, strict=True):
            np.testing.assert_array_equal(sample.tokens, other.tokens)
            assert sample.teacher_logp is not None
            known = sample.teacher_logp[0, 1:]
            assert np.isfinite(known).all()
            assert (known < 0).all()
            np.testing.assert_allclose(sample.teacher_logp, other.teacher_logp, atol=1e-6)


@pytest.mark.faults("F3", "F7")
@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_hangs_is_found_long_before_its_deadline(tiny: Path) -> None:
    made: list[Any] = []

    async def run() -> None:
        pool = scorer_pool(tiny, made, probe_s=1.0, stall_s=5.0, replacements=0)
        try:
            await pool.start()
            pid = pool.roster()["teacher:big-0"]["pid"]
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(NoWorkers, match="teacher:big-0 was lost"):
                await asyncio.wait_for(pool.logp(sequences()), 20)  # of the 60 that a call may take
            async with asyncio.timeout(20):
                while psutil.pid_exists(pid):
                    await asyncio.sleep(0.1)
        finally:
            pool.close()

    asyncio.run(run())


@pytest.mark.faults("F7")
@pytest.mark.usefixtures("cluster")
def test_a_run_goes_on_without_a_teacher_that_may_be_away(tmp_path: Path, tiny: Path) -> None:
    """What it said is what it says on a quiet day; what it could not say is unknown, for a whole group at once."""
    calm, _, _ = trained(tmp_path / "calm", tiny, kill=False)
    groups, events, _ = trained(tmp_path / "killed", tiny, kill=True, unavailable="skip_kd")
    assert groups.keys() == calm.keys()
    assert events.count("worker_lost") == 0
    assert "teacher_skipped" in events
    without = set()
    for name, group in groups.items():
        rows = [s.teacher_logp for s in group.samples if s.teacher_logp is not None]
        assert len(rows) == len(group.samples)
        if np.isnan(np.concatenate(rows, 1)).all():
            without.add(name)
            continue
        for row, other in zip(rows, calm[name].samples, strict=True):
            assert other.teacher_logp is not None
            np.testing.assert_allclose(row, other.teacher_logp, atol=1e-6)
    assert without
    assert without <= {"p1", "p2", "p3"}  # the step in which it was killed


@pytest.mark.faults("F7")
@pytest.mark.usefixtures("cluster")
def test_a_run_ends_with_a_teacher_that_must_not_be_lost(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(NoWorkers, match="teacher:big-0 was lost, and is not to be replaced") as caught:
        trained(tmp_path, tiny, kill=True, unavailable="fail")
    assert caught.value.exit_code == 6


# --- teachers that write


@pytest.mark.usefixtures("cluster")
def test_a_pool_writes(tiny: Path) -> None:
    tokenizer = HFTokenizer.load(str(tiny))

    async def run() -> list[Any]:
        options = {"path": str(tiny), "dtype": "float32", "device": "cpu", "threads": 1}
        pool = Pool("writer:big", writer_spawner("hf", options, ENVIRONMENT, lambda _: {}), 1,
                    options=PoolOptions(timeout_s=60.0, start_s=120.0))  # fmt: skip
        sampling = Sampling(48, 0.0, 1.0, tokenizer.stop_tokens)
        writer = LocalWriter("teachers.big", pool, tokenizer, sampling, 256)
        try:
            await pool.start()
            ask = [{"role": "user", "content": "123+456="}]
            return [await writer.write(ask), await writer.write(ask, seed=9)]
        finally:
            pool.close()

    first, second = asyncio.run(run())
    assert first == second  # greedy: the seed says nothing
    assert first.finish is Finish.STOP
    assert first.text
    assert "<eos>" not in first.text


OWN = '''
from dataclasses import dataclass, field

from rlkd.algorithms.grpo import GRPO
from rlkd.core.types import Signal
from rlkd.guidance import NoGuidance


@dataclass(frozen=True)
class Seeing(NoGuidance):
    async def __call__(self, group, ask, knobs):
        for found in await ask.traces(group.prompt) if ask.traces else ():
            ask.report("seen", f"{found.teacher} helps with {group.prompt.id}: {ask.tokenizer.decode(found.tokens)}")
        return group


@dataclass(frozen=True)
class Helped(GRPO):
    """GRPO whose guidance asks for traces and, with `scored`, for the teachers' log-probs."""

    guidance: Seeing = field(default_factory=Seeing)
    scored: bool = False

    @property
    def needs(self):
        return frozenset({Signal.TEACHER if self.scored else Signal.TEACHER_TEXT})
'''


WRONG = chat("1 #0", usage=(20, 10))  # right for nobody: sums of three-digit numbers are larger


def recipe(folder: Path, tiny: Path, **changes: Any) -> Path:
    (folder / "own.py").write_text(OWN)
    base: dict[str, Any] = {
        "name": "t",
        "model": {"path": str(tiny)},
        "data": {"train": {"kind": "arithmetic", "size": 40}},
        "algorithm": {"name": "own:Helped", "rollout": {"samples": 4}},
        "rewards": {"arithmetic": {}},
        "schedule": {"steps": 2, "groups_per_step": 3},
        "sampler": {"engine": "hf", "max_tokens": 40},
        "learner": {"lr": 1e-4, "max_tokens": 1024},
        "evaluate": {"at_start": False, "at_end": False},
        "report": {"directory": str(folder / "runs"), "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base | changes))
    return path


def rlkd(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlkd", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=800, check=False, env=env)


def events(folder: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "runs" / "t" / "events.jsonl").read_text().splitlines()]
    return [(row["kind"], row["text"]) for row in rows]


@pytest.mark.faults("F51")
def test_a_run_with_an_endpoint_that_misbehaves(tmp_path: Path, tiny: Path) -> None:
    """429, 500, a hang, a drop and junk in the middle of a run; then a budget that is reached; then no more of it. The
    key is in no file and nothing printed."""
    endpoint = {"model": "large", "key_env": "BIG_KEY", "retries": 3, "timeout_s": 3.0, "at_once": 2}
    with FakeOpenAI(key=KEY).running() as server:
        server.usual = WRONG
        endpoint["url"] = server.url
        teachers = {"big": {"endpoint": endpoint, "writer": {"max_tokens": 30}}}
        path = recipe(tmp_path, tiny, teachers=teachers)
        server.script = [WRONG, status(429, Retry_After="1"), status(500), hang, drop, raw(f"{KEY} junk")]
        done = rlkd("train", str(path), cwd=tmp_path, BIG_KEY=KEY)
        assert done.returncode == 0, done.stderr[-3000:]
        run = tmp_path / "runs" / "t"
        rows = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
        assert {r["teacher"] for r in rows} == {"big"}
        assert len(rows) == len({r["id"] for r in rows}) >= 6
        assert all(r["reward"] == 0.0 for r in rows)
        account = json.loads((run / "teachers" / "big.json").read_text())
        assert account["requests"] == len(rows) + 1 + account["unknown"]  # the self-test; the hang, the drop, the junk
        assert account["unknown"] == 3
        spent = account["tokens_in"] + account["tokens_out"]
        asked = len(server.seen)

        more = ("schedule.steps=40", f"teachers.big.endpoint.max_total_tokens={spent + 400}")
        ended = rlkd("train", str(path), *more, cwd=tmp_path, BIG_KEY=KEY)
        assert ended.returncode == 6, ended.stderr[-3000:]
        assert "the budget of teachers.big is reached" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert len(server.seen) > asked
        account = json.loads((run / "teachers" / "big.json").read_text())
        assert account["tokens_in"] + account["tokens_out"] <= spent + 400
        assert max(int(p.parent.name[5:]) for p in run.glob("checkpoints/step-*/MANIFEST.json")) >= 2
        everything = [done.stdout, done.stderr, ended.stdout, ended.stderr]
        everything += [p.read_bytes().decode("utf-8", "replace") for p in run.rglob("*") if p.is_file()]
        assert not [text for text in everything if KEY in text]


def test_a_run_and_a_check_with_a_local_writer(tmp_path: Path, tiny: Path) -> None:
    """Of vLLM, as by default. Its right texts come back as traces."""
    path = recipe(tmp_path, tiny, teachers={"big": {"writer": {"max_tokens": 40, "kv_cache_gib": 0.1}}})
    done = rlkd("train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "t" / "traces.jsonl").read_text().splitlines()]
    seen = [text for kind, text in events(tmp_path) if kind == "seen"]
    assert {r["id"] for r in rows if r["reward"] == 1.0} == {s.split()[3].rstrip(":") for s in seen}
    checked = rlkd("check", str(path), cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr[-3000:]
    assert "teacher    big writes to" in checked.stdout
    assert "the teachers were started and ended again" in checked.stdout


def test_a_run_and_a_check_with_local_scorers(tmp_path: Path, tiny: Path) -> None:
    """Two with the same settings: one actor serves both."""
    asks = {"name": "own:Helped", "scored": True, "rollout": {"samples": 4}}
    path = recipe(tmp_path, tiny, algorithm=asks, teachers={"one": {}, "two": {}})
    checked = rlkd("check", str(path), cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr[-3000:]
    lines = [line for line in checked.stdout.splitlines() if line.startswith("teacher ")]
    assert [line.split()[1] for line in lines] == ["one:", "two:"]
    assert lines[0].split(":", 1)[1] == lines[1].split(":", 1)[1]
    done = rlkd("train", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    started = [text for kind, text in events(tmp_path) if kind == "starting"]
    assert started == ["rollout workers", "reward workers", "teacher:one workers", "learner workers"]
