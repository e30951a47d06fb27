"""What is known of a cluster before anything starts: places, words, packages, shared folders. Without Ray."""

import asyncio
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from rlkd.config.load import load
from rlkd.core.errors import ConfigError, PreflightError
from rlkd.workers import survey
from rlkd.workers.nodes import Node, in_words
from rlkd.workers.placement import A_LITTLE, NODE, Bundle, _elsewhere, _missing, bundles, seated

HEAD = Node("a" * 56, "10.0.0.1", {"CPU": 8.0, "GPU": 8.0, "stable": 1.0})
SPOT = Node("b" * 56, "10.0.0.2", {"CPU": 8.0, "GPU": 4.0})
ROLLOUT = Bundle("rollout-0", {"CPU": 1.0, "GPU": 4.0})


def test_where_nodes_stay_the_learner_asks_for_them_and_the_others_go_elsewhere() -> None:
    every = bundles(2, 1, 4, 1, {"reference": 1}, gpu=True, stable=True)
    assert [(b.role, b.resources.get("stable")) for b in every] == [
        ("learner-0", A_LITTLE), ("learner-1", A_LITTLE), ("rollout-0", None), ("reference-0", None),
        ("reward-0", None),
    ]  # fmt: skip
    assert _elsewhere(ROLLOUT, [HEAD, SPOT]) == {NODE: f"!in({HEAD.id})"}
    second = Node("d" * 56, "10.0.0.4", HEAD.total)
    assert _elsewhere(ROLLOUT, [HEAD, SPOT, second]) == {NODE: f"!in({HEAD.id},{second.id})"}  # a space would be a part
    assert _elsewhere(ROLLOUT, [HEAD]) == {}  # nowhere else to go
    assert _elsewhere(Bundle("rollout-0", {"CPU": 1.0, "GPU": 8.0}), [HEAD, SPOT]) == {}  # too large for the others
    assert _elsewhere(ROLLOUT, [SPOT]) == {}


def test_who_is_where_in_words() -> None:
    where = {"the driver": HEAD.id, "learner-0": HEAD.id, "rollout-0": SPOT.id, "rollout-1": "c" * 56}
    assert in_words(where, [HEAD, SPOT]) == (
        "the driver, learner-0 on 10.0.0.1 (aaaaaaaa, stable); rollout-0 on 10.0.0.2 (bbbbbbbb); "
        "rollout-1 on cccccccc (gone)"
    )


def test_what_is_missing_is_said_with_what_each_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkd.workers.placement.alive", lambda: [HEAD, SPOT])
    monkeypatch.setattr("rlkd.workers.drain.free", lambda: {HEAD.id: {"CPU": 8.0, "GPU": 8.0}, SPOT.id: {"CPU": 3.0}})
    wanted = bundles(1, 5, 4, 0, {}, gpu=True, stable=True)
    assert _missing(wanted[1:], wanted) == (
        "6 CPU needed; 21 GPU needed; no room for rollout-0 (1 CPU, 4 GPU), rollout-1 (1 CPU, 4 GPU), "
        "rollout-2 (1 CPU, 4 GPU) and 2 more; free now: 10.0.0.1 (aaaaaaaa, stable) has 8 of 8 CPU, 8 of 8 GPU; "
        "10.0.0.2 (bbbbbbbb) has 3 of 8 CPU, 0 of 4 GPU"
    )
    assert "learner-0 (1 CPU, 1 GPU, on a stable node)" in _missing(wanted[:1], wanted)


def test_roles_find_their_places_in_a_group_that_somebody_else_made() -> None:
    wanted = [Bundle("learner-0", {"CPU": 1.0}), ROLLOUT]
    found = seated(wanted, [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0, "GPU": 4.0}, {"CPU": 1.0}])
    assert [b.role for b in found] == ["", "learner-0", "rollout-0", ""]
    with pytest.raises(PreflightError, match=r"RLKD-E023.*rollout-0 needs 1 CPU, 4 GPU"):
        seated(wanted, [{"CPU": 1.0}, {"CPU": 1.0}])


def test_a_shared_folder_is_seen_from_both_sides(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")
    assert survey.look(str(tmp_path), "token", "node").folder is None
    assert (tmp_path / "token-node").read_text() == "node"
    assert survey.look(None, "", "node").folder is None


def test_a_folder_of_ones_own_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SEE_S", 0.3)
    own = tmp_path / "own"
    assert survey.look(str(own), "token", "node").folder == "it does not see what the driver writes there"
    own.mkdir()
    assert survey.look(str(own), "token", "node").folder == "it does not see what the driver writes there"
    (own / "token").write_text("x")
    (own / "token-node").mkdir()  # cannot be written: as on a file system that is read-only
    assert "cannot be used there: Is a directory" in str(survey.look(str(own), "token", "node").folder)


def test_a_file_may_take_a_moment_to_be_seen(tmp_path: Path) -> None:
    later = threading.Timer(0.3, lambda: (tmp_path / "token").write_text("x"))
    later.start()
    began = time.monotonic()
    assert survey.look(str(tmp_path), "token", "node").folder is None
    assert time.monotonic() - began < survey.SEE_S
    later.join()


@pytest.mark.faults("F63")
def test_other_packages_are_named_with_both_versions() -> None:
    here = {"python": "3.11.9", "torch": "2.13", "vllm": "0.32"}
    assert survey._different("n", {**here, "deepspeed": "0.19"}, lambda: here) == []  # more is no harm
    (problem,) = survey._different("10.0.0.2 (bbbbbbbb)", {"python": "3.11.9", "torch": "2.12"}, lambda: here)
    assert problem.what == (
        "node 10.0.0.2 (bbbbbbbb) has other packages: torch 2.12 there, 2.13 here; "
        "vllm is not installed there, 0.32 here"
    )
    assert survey.packages().keys() >= {"python", "ray", "torch"}


class Cluster:
    """Two nodes, of which SPOT answers with an error, and is alive so many times more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
        self.times = times

        def task(_: object) -> object:
            failed: Future[object] = Future()
            failed.set_exception(error)
            made = SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: failed))
            return SimpleNamespace(options=lambda **_: made)

        monkeypatch.setattr(survey.ray, "remote", task)
        monkeypatch.setattr(survey, "alive", self.alive)
        monkeypatch.setattr(survey, "AGAIN_S", 0.0)
        monkeypatch.setattr(survey, "GONE_S", 0.5)

    def alive(self) -> list[Node]:
        self.times -= 1
        return [HEAD, SPOT] if self.times >= 0 else [HEAD]


@pytest.mark.parametrize("times", [1, 3])  # Ray may take a moment to see it
def test_a_node_that_goes_while_it_is_looked_at_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    Cluster(monkeypatch, WorkerCrashedError(), times)
    folders = {HEAD.id: None, SPOT.id: tmp_path}
    assert asyncio.run(survey.survey(folders, HEAD.id)) == [SPOT.name]
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_stays_and_does_not_answer_cannot_run_rlkd(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, WorkerCrashedError(), 10**6)
    with pytest.raises(PreflightError, match=r"RLKD-E026.*WorkerCrashedError"):
        asyncio.run(survey.survey({SPOT.id: None}, HEAD.id))


def test_a_node_that_answers_with_an_error_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, RayTaskError("look", "trace", ModuleNotFoundError("rlkd")), 1)
    with pytest.raises(PreflightError, match=r"RLKD-E026.*ModuleNotFoundError: rlkd"):
        asyncio.run(survey.survey({SPOT.id: None}, HEAD.id))
    assert cluster.times == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sampler.min_workers=2"], "sampler.min_workers=2 is more than sampler.workers=1"),
        (["ray.share_gpus=true", "sampler.tensor_parallel=2"], "a part of one GPU, and tensor_parallel is 2"),
        (["sampler.workers=3", "sampler.max_workers=2"], "sampler.max_workers=2 is less than sampler.workers=3"),
        (["sampler.min_workers=0"], "must be at least 1"),
        (["sync.path=/x"], "used by sync.kind=disk only, and sync.kind=auto"),
        (["sync.kind=network"], "network"),
    ],
)
def test_contradictions(given: list[str], said: str) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "grpo-tiny.yaml"
    with pytest.raises(ConfigError, match=said):
        load(recipe, given)
    load(recipe, ["sampler.workers=2", "sampler.min_workers=1", "sampler.max_workers=8", "sync.kind=ray"])
