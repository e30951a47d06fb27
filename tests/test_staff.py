"""The pools of frozen models as a recipe asks for them: how they are watched, and what is advised when they fail."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from rlkd.config.load import load
from rlkd.core.errors import NoWorkers, WorkerLost
from rlkd.inputs import Inputs
from rlkd.staff import PROBE_S, Staff
from rlkd.workers.placement import Placement
from rlkd.workers.pool import Pool
from rlkd.workers.threads import Threads
from tests.pool_fakes import PROMPT, SAMPLING, Fakes, FakeWorker
from tests.test_config_teachers import recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Nowhere(Placement):
    async def seated(self, name: str) -> None:
        pass


def pools(folder: Path, algorithm: str, *overrides: str) -> dict[str, Pool]:
    config = load(recipe(folder, algorithm), overrides)
    read, frozen = object.__new__(Inputs), SimpleNamespace(path="models/big", context=256)
    object.__setattr__(read, "frozen", dict.fromkeys(config.teachers, frozen))
    staff = Staff(config, read, None, lambda *_: None, AsyncExitStack())
    staff.make(Nowhere.__new__(Nowhere), Threads(1, 1, 1))
    return staff.pools


@pytest.mark.faults("F3", "F7", "F20")
@pytest.mark.parametrize(("algorithm", "role"), [("Scored", "teacher:big"), ("Written", "writer:big")])
def test_a_teacher_is_watched_as_the_sampler_is(folder: Path, algorithm: str, role: str) -> None:
    assert pools(folder, algorithm, "teachers={big: {}}")[role]._options.stall_s == 120.0
    options = pools(folder, algorithm, "teachers={big: {stall_s: 7, timeout_s: 50}}")[role]._options
    assert (options.stall_s, options.timeout_s, options.probe_s) == (7.0, 50.0, PROBE_S)


def test_teachers_watched_differently_are_not_one_pool(folder: Path) -> None:
    for algorithm in ("Scored", "Written"):
        assert len(pools(folder, algorithm, "teachers={a: {}, b: {}}")) == 1
        assert len(pools(folder, algorithm, "teachers={a: {}, b: {stall_s: 7}}")) == 2


@pytest.mark.faults("F4")
@pytest.mark.parametrize(
    ("algorithm", "memory"),
    [
        ("Scored", "lower teachers.big.max_tokens"),
        ("Written", "lower teachers.big.writer.max_num_seqs or teachers.big.writer.kv_cache_gib"),
    ],
)
@pytest.mark.parametrize("full", [True, False])
def test_the_advice_names_the_teachers_own_keys(folder: Path, algorithm: str, memory: str, full: bool) -> None:
    """Out of memory, and lost too often."""

    async def test() -> str:
        async def dies(_: FakeWorker) -> None:
            raise WorkerLost("VLLMEngine stopped: MemoryError: ") if full else ActorDiedError()

        (pool,) = pools(folder, algorithm, "teachers={big: {on_unavailable: wait}}").values()
        fakes = Fakes(on_generate=dies)
        pool._spawn, pool._kill = fakes.spawn, fakes.killed.append
        pool._options = replace(pool._options, backoff_s=0.001)
        await pool.start()
        try:
            while True:
                try:
                    await pool.generate(PROMPT, sampling=SAMPLING)
                except WorkerLost:
                    continue
                except NoWorkers as end:
                    return str(end)
        finally:
            pool.close()

    said = asyncio.run(asyncio.wait_for(test(), 20))
    assert ("twice in a row" in said) is full
    assert memory in said
    assert full or "raise teachers.big.timeout_s or teachers.big.stall_s" in said
    assert "sampler." not in said
