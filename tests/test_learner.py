"""The optimizer's guard and schedule, the metrics of an update, and the driver's view of the ranks."""

import asyncio
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor, nn
from torch.distributed import DistNetworkError, TCPStore

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import Shares, effective_sample_size, pack
from rlkd.core.errors import DivergedError, LearnerLost
from rlkd.core.ports import Learner, PolicyOutput, WeightRef
from rlkd.core.types import Origin
from rlkd.engines.deepspeed import Rank, _diagnosed, _layer
from rlkd.engines.optimizer import GuardedAdamW, decayed, learning_rate
from rlkd.workers import learner
from rlkd.workers.learner import LearnerGroup, LearnerRank
from tests.learner_help import random_groups
from tests.toys import group_of, prompt_of

# --- learning rate


@given(
    peak=st.floats(1e-7, 1.0),
    warmup=st.integers(0, 20),
    steps=st.integers(1, 50),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_the_learning_rate_rises_then_falls(peak: float, warmup: int, steps: int, shape: Any) -> None:
    rates = [learning_rate(step, peak, warmup, steps, shape) for step in range(steps + 5)]
    assert all(0 <= r <= peak for r in rates)
    up, down = rates[:warmup], rates[warmup:]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    if warmup <= steps:
        assert rates[warmup] == peak
    if warmup < steps and shape != "constant":
        assert down[-1] == pytest.approx(0, abs=1e-12), "after the run's steps nothing is left"
        assert rates[steps - 1] > 0


def test_learning_rates_by_hand() -> None:
    assert [learning_rate(s, 1.0, 2, 6, "linear") for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(4, 2.0, 0, 8, "cosine") == pytest.approx(1.0)
    assert learning_rate(1000, 3.0, 4, 8, "constant") == 3.0


# --- optimizer


def made(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), bound=st.floats(1e-2, 10.0))
def test_it_clips_and_steps_like_torch(scale: float, bound: float) -> None:
    ours, theirs = made(), made()
    guarded = GuardedAdamW(decayed(ours, 0.1), lr=0.1, weight_decay=0.1)
    guarded.clip_to = bound
    plain = torch.optim.AdamW([{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.1,
                              weight_decay=0.1)  # fmt: skip
    for step in range(3):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)) * scale
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
        plain.step()
        guarded.step()
        assert float(guarded._global_grad_norm) == pytest.approx(float(norm))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.faults("F54")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_it_does_not_step_on_what_is_not_finite(bad: float) -> None:
    """Negative control: AdamW itself does."""
    for kind in (GuardedAdamW, torch.optim.AdamW):
        model = made()
        before = model.weight.detach().clone()
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.clip_to = 1.0
        model(torch.ones(1, 4)).sum().backward()
        assert model.weight.grad is not None
        model.weight.grad[0, 0] = bad
        optimizer.step()
        assert torch.equal(model.weight, before) == (kind is GuardedAdamW)


@pytest.mark.faults("F54")
@pytest.mark.parametrize("veto", [True, False])
def test_with_a_veto_nothing_moves(veto: bool) -> None:
    """Not even a moment or the count. Negative control: without it all of them do."""
    model = made()
    optimizer = GuardedAdamW(model.parameters(), lr=0.1)
    optimizer.clip_to = 1.0
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    before = [model.weight.detach().clone(), *(v.clone() for s in optimizer.state.values() for v in s.values())]
    optimizer.veto = veto
    optimizer.step()
    after = [model.weight.detach(), *(v for s in optimizer.state.values() for v in s.values())]
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(same) if veto else not any(same)


def test_under_zero_the_norm_of_all_ranks_decides() -> None:
    class Zero:
        _global_grad_norm = math.inf

    model = made()
    before = model.weight.detach().clone()
    optimizer = GuardedAdamW(model.parameters(), lr=0.1)
    optimizer.norm_from = Zero()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()  # its own gradient is finite, another rank's is not
    assert torch.equal(model.weight, before)
    Zero._global_grad_norm = 2.0
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_only_matrices_decay() -> None:
    groups = decayed(made(), 0.5)
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.5, [(3, 4)]),
        (0.0, [(3,)]),
    ]
    assert len(decayed(made(), 0.0)) == 1


def test_layers_are_gathered_together() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.norm.weight",
        "lm_head.weight",
    ]
    assert [_layer(n) for n in names] == [names[0], "model.layers.3", "model.layers.3", names[3]]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_keeps_copies_of_the_gathered_weights(rank: int, tmp_path: Path) -> None:
    """Eight ranks of a node with a copy each of a 32B model are 488 GiB: the node would kill them at the first save."""
    asked = Mock(**{"cpu.return_value.clone.return_value": torch.ones(1)})
    one = object.__new__(Rank)
    one.rank, one.stage, one.policy, one.options = rank, 3, Mock(), Mock()
    one.options.model.path = str(tmp_path)
    gathered = iter([("a", asked), ("b", asked)])
    one.weights = lambda: gathered  # type: ignore[method-assign]
    one.export(str(tmp_path / "hf"))
    assert list(gathered) == []  # all ranks take part in the gathering
    assert asked.cpu.call_count == (2 if rank == 0 else 0)
    assert one.policy.model.save_pretrained.called == (rank == 0)


# --- metrics


def test_mismatch_is_of_the_tokens_the_policy_sampled() -> None:
    groups = [GRPO().credit(g) for g in random_groups(0, 3, 4, mixed=True)]
    g = torch.Generator().manual_seed(0)
    whole = Shares()
    apart: list[Tensor] = []
    for (x,) in pack(groups, 1, 40):
        logp = -torch.rand(len(x.tokens), generator=g) * 4
        logp[~x.mask(Origin.POLICY | Origin.TEACHER)] = torch.nan
        metrics, maxima = _diagnosed(PolicyOutput(logp, torch.ones_like(logp), lambda ids: ids.float()), x)
        whole.add(metrics, maxima, x.weight)
        apart.append((logp - x.behavior_logp)[x.mask(Origin.POLICY)])
    found, delta = Shares.merged([whole]), torch.cat(apart)
    assert found["mismatch/mean"] == pytest.approx(float(delta.abs().mean()), rel=1e-5)
    assert found["mismatch/max"] == pytest.approx(float(delta.abs().max()))
    assert found["mismatch/kl"] == pytest.approx(float((delta.exp() - 1 - delta).mean()), rel=1e-5)
    assert found["entropy"] == pytest.approx(1.0)
    trained = sum(int((s.origin & 6 != 0).sum()) for g in groups for s in g.samples)
    assert found["tokens"] == trained


def of_weights(weights: Sequence[Sequence[float]], ranks: int, max_tokens: int) -> list[Shares]:
    """Each rank's shares of a step whose tokens have these w = π/μ, a sample at a time."""
    groups = [group_of([0.0], [len(w)], None, prompt_of(2, f"p{i}")) for i, w in enumerate(weights)]
    of_length = {len(w): torch.tensor(w).log() - 1.0 for w in weights}  # μ is e⁻¹ everywhere
    assert len(of_length) == len(weights)
    found = [Shares() for _ in range(ranks)]
    for turn in pack(groups, ranks, max_tokens):
        for x, shares in zip(turn, found, strict=True):
            lengths = [int((x.mask(Origin.POLICY) & (x.segment == i)).sum()) for i in range(x.samples)]
            logp = torch.full(x.tokens.shape, torch.nan)
            logp[x.mask(Origin.POLICY)] = torch.cat([of_length[n] for n in lengths])
            metrics, maxima = _diagnosed(PolicyOutput(logp, torch.ones_like(logp), lambda ids: ids.float()), x)
            shares.add(metrics, maxima, x.weight)
    return found


@pytest.mark.faults("F57")
@pytest.mark.parametrize(
    ("weights", "ess"),
    [
        ([[1.0], [1.0, 1.0]], 1.0),
        ([[3.0], [3.0, 3.0]], 1.0),  # all alike
        ([[1.0], [1.0, 2.0], [4.0, 1.0, 1.0]], 10**2 / (6 * 24)),
        ([[0.01], [0.01, 100.0]], 100.02**2 / (3 * (100**2 + 2e-4))),  # one token outweighs the others: 1/3
    ],
)
@pytest.mark.parametrize(("ranks", "max_tokens"), [(1, 1000), (1, 5), (2, 5), (3, 1000), (4, 5)])
def test_effective_sample_size_is_of_the_whole_step_whatever_the_split(
    weights: list[list[float]], ess: float, ranks: int, max_tokens: int
) -> None:
    found = effective_sample_size(Shares.merged(of_weights(weights, ranks, max_tokens)))
    assert found["mismatch/ess"] == pytest.approx(ess, rel=1e-5)


@pytest.mark.faults("F57")
def test_a_mean_of_each_ranks_own_effective_sample_size_would_be_caught() -> None:
    """Negative control of the test above: two ranks whose weights differ only from one another."""
    weights = [[1.0, 1.0], [9.0, 9.0, 9.0]]
    ranks = of_weights(weights, 2, 1000)
    own = [effective_sample_size(Shares.merged([r]))["mismatch/ess"] for r in ranks]
    whole = effective_sample_size(Shares.merged(ranks))["mismatch/ess"]
    assert whole == pytest.approx(29**2 / (5 * 245), rel=1e-5)
    assert sum(own) / 2 != pytest.approx(whole, rel=0.1)


def test_without_sampled_tokens_there_is_no_effective_sample_size() -> None:
    assert effective_sample_size({"loss": 1.0}) == {}
    assert effective_sample_size({"mismatch/weight": 0.0, "mismatch/weight_squared": 0.0}) == {}


# --- the group of ranks, with actors in this process


class FakeMethod:
    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def remote(self, *arguments: Any) -> Any:
        return FakeRef(self.run(*arguments))


class FakeRef:
    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def __await__(self) -> Generator[Any, None, Any]:
        if self.outcome is NEVER:
            yield from asyncio.get_running_loop().create_future().__await__()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


NEVER = object()


class FakeRank:
    """Answers what `answers` says, or None; keeps what it was asked."""

    def __init__(self, rank: int, answers: Mapping[str, Any]) -> None:
        self.rank, self.answers, self.asked = rank, answers, list[tuple[str, tuple[Any, ...]]]()
        self.ended = False

    def __getattr__(self, method: str) -> FakeMethod:
        def run(*arguments: Any) -> Any:
            self.asked.append((method, arguments))
            return self.answers.get(method)

        return FakeMethod(run)


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("update", "traceback", cause)


def group(*answers: Mapping[str, Any], timeout_s: float = 5.0) -> tuple[LearnerGroup, list[FakeRank], list[WeightRef]]:
    ranks = [FakeRank(i, a) for i, a in enumerate(answers)]
    delivered: list[WeightRef] = []

    async def deliver(ref: WeightRef) -> None:
        delivered.append(ref)

    def end(rank: FakeRank) -> None:
        rank.ended = True

    return LearnerGroup(len(ranks), ranks.__getitem__, {"timeout_s": timeout_s}, GRPO(), deliver, end), ranks, delivered


def shares(loss: float, norm: float) -> Shares:
    made = Shares()
    weights = {"mismatch/weight": torch.tensor(loss), "mismatch/weight_squared": torch.tensor(1.0)}
    made.add({"loss": torch.tensor(loss), **weights}, {"grad_norm": torch.tensor(norm)}, 1.0)
    return made


def test_new_ranks_withdraw_what_the_old_ones_published() -> None:
    made, _, _ = group({"place": {}})
    order: list[str] = []
    made._withdraw = lambda: order.append("withdrawn")
    made._end = lambda _: order.append("ended")

    async def run() -> None:
        assert made.actors == ()
        await made.start()
        assert len(made.actors) == 1
        await made.rebuild()
        made.kill()
        assert made.actors == ()

    asyncio.run(run())
    assert order == ["withdrawn", "ended", "withdrawn", "ended"]


def test_each_rank_gets_its_column_and_shares_add_up() -> None:
    both, ranks, delivered = group({"update": shares(0.25, 2.0), "publish": WeightRef(3, "x", "d")},
                                   {"update": shares(0.5, 2.0)})  # fmt: skip
    groups = [GRPO().credit(g) for g in random_groups(0, 3, 4)]
    batch = pack(groups, 2, 30)
    assert isinstance(both, Learner)

    async def run() -> Mapping[str, float]:
        await both.start()
        metrics = await both.update(batch, {"beta": 0.1})
        await both.publish(3)
        return metrics

    assert asyncio.run(run()) == {"loss": 0.75, "grad_norm": 2.0, "mismatch/weight": 0.75,
                                  "mismatch/weight_squared": 2.0, "mismatch/ess": 0.75**2 / 2}  # fmt: skip
    for i, rank in enumerate(ranks):
        mine, knobs = dict(rank.asked)["update"]
        assert mine == [turn[i] for turn in batch]
        assert knobs == {"beta": 0.1}
        assert dict(rank.asked)["publish"] == (3,)
    assert delivered == [WeightRef(3, "x", "d")]
    assert not any(r.ended for r in ranks)


@pytest.mark.parametrize(
    ("outcome", "expected", "message"),
    [
        (task_error(DivergedError("RLKD-T140", "the loss is nan")), DivergedError, "the loss is nan"),
        (RayActorError(), LearnerLost, r"learner-1\.update: RayActorError"),
        (NEVER, LearnerLost, r"learner-1\.update: no answer within 0\.3 s"),
    ],
)
def test_the_first_error_ends_all_ranks(outcome: Any, expected: type[Exception], message: str) -> None:
    """The other rank waits in a collective, for ever."""
    first = NEVER if outcome is not NEVER else shares(0.0, 0.0)
    both, ranks, _ = group({"update": first}, {"update": outcome}, timeout_s=0.3 if outcome is NEVER else 60.0)

    async def run() -> None:
        await both.start()
        with pytest.raises(expected, match=message):
            await both.update([[None, None]], {})  # type: ignore[list-item]
        assert all(r.ended for r in ranks)
        with pytest.raises(LearnerLost, match="was stopped"):
            await both.publish(1)
        await both.finish()

    asyncio.run(run())


def test_a_broken_connection_is_not_taken_for_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's error at the living rank comes first; that rank 1 died comes a moment later. A bug stays a bug."""
    monkeypatch.setattr(learner, "CAUSE_S", 0.5)
    broken = task_error(RuntimeError("Connection closed by peer"))

    async def run(second: Any, delay: float) -> Exception:
        both, _, _ = group({"update": broken}, {"update": NEVER})
        await both.start()
        real = both._one

        async def later(rank: int, method: str, timeout_s: float, *arguments: Any) -> Any:
            if rank == 1 and method == "update":
                await asyncio.sleep(delay)
                raise second
            return await real(rank, method, timeout_s, *arguments)

        monkeypatch.setattr(both, "_one", later)
        with pytest.raises(Exception) as error:  # noqa: PT011
            await both.update([[None, None]], {})  # type: ignore[list-item]
        return error.value

    found = asyncio.run(run(LearnerLost("learner-1.update: RayActorError"), 0.05))
    assert isinstance(found, LearnerLost)
    assert isinstance(asyncio.run(run(LearnerLost("too late"), 60.0)), ray.exceptions.RayTaskError)


@pytest.mark.faults("F64")
def test_learners_of_one_machine_meet_on_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system chooses them. Control: a port that is given and taken is an error."""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    ranks = [LearnerRank(0, 2, "") for _ in range(3)]  # of three runs, all at once
    places = [rank.open_store() for rank in ranks]
    assert len(set(places)) == 3
    taken = int(places[0].rpartition(":")[2])
    with pytest.raises(DistNetworkError, match="in use"):
        TCPStore("127.0.0.1", taken, 2, is_master=True, wait_for_workers=False)
