"""Scoring by a frozen model: what transformers itself would say, whatever shares a prompt or a forward pass."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkd.core.errors import DataError
from rlkd.core.ports import WeightRef
from rlkd.engines.scorer import Scorer, common_beginning
from tests.learner_help import VOCABULARY, tiny_folder, tiny_model

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("scorer"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    made = Scorer.create(path=str(folder), device="cpu", temperature=TEMPERATURE, max_tokens=40, head_rows=4)
    made.start()
    return made


def naive(tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs of the tokens, of all tokens at each place, and of the k likeliest."""
    with torch.no_grad():
        logits = tiny_model().eval()(torch.tensor(tokens[None].astype(np.int64))).logits[0, :-1]
    table = (logits / TEMPERATURE).log_softmax(-1)
    top = table.topk(k, dim=-1)
    logp = table.gather(1, torch.tensor(tokens[1:, None].astype(np.int64)))[:, 0]
    return logp.numpy(), table.numpy(), top.values.numpy()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shared=st.integers(0, 8),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    k=st.sampled_from([0, 1, 5]),
)
def test_scores_are_the_models_own(seed: int, shared: int, lengths: list[int], k: int, scorer: Scorer) -> None:
    draw = np.random.default_rng(seed)
    prompt = draw.integers(0, VOCABULARY, shared)
    sequences = [np.concatenate([prompt, draw.integers(0, VOCABULARY, n)]).astype(np.int32) for n in lengths]
    sequences.append(sequences[0])  # the same one twice
    scored = scorer.score(sequences, k)
    assert len(scored) == len(sequences)
    for tokens, (logp, top) in zip(sequences, scored, strict=True):
        expected, table, likeliest = naive(tokens, max(k, 1))
        assert logp.dtype == np.float32
        assert np.isnan(logp[0])
        np.testing.assert_allclose(logp[1:], expected, rtol=1e-4, atol=2e-5)
        assert top.ids.shape == top.logp.shape == (len(tokens), k)
        if k:
            assert (top.ids[0] == 0).all()
            assert np.isnan(top.logp[0]).all()
            named = np.take_along_axis(table, top.ids[1:].astype(np.int64), 1)  # two may be as likely as each other
            np.testing.assert_allclose(named, likeliest, rtol=1e-4, atol=2e-5)
            assert all(len(set(row)) == k for row in top.ids[1:].tolist())
            np.testing.assert_allclose(top.logp[1:], likeliest, rtol=1e-4, atol=2e-5)


def test_what_is_shared_is_computed_once(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    hidden = scorer.policy.hidden
    monkeypatch.setattr(
        scorer.policy, "hidden", lambda tokens, where: (computed.append(len(where.computed)), hidden(tokens, where))[1]
    )
    prompt = np.arange(10, dtype=np.int32)
    sequences = [np.concatenate([prompt, np.full(6, 20 + i, np.int32)]) for i in range(8)]
    scorer.score(sequences)
    assert computed == [10 + 5 * 6, 10 + 3 * 6], "at most max_tokens=40 at once, the prompt once in each"


def test_common_beginning() -> None:
    a, b = np.array([1, 2, 3, 4], np.int32), np.array([1, 2, 9], np.int32)
    assert common_beginning([a, b]) == 2
    assert common_beginning([a, a]) == 4
    assert common_beginning([a, a[:2]]) == 2
    assert common_beginning([a]) == 0
    assert common_beginning([a, np.array([7], np.int32)]) == 0


@pytest.mark.parametrize("tokens", [[], [1, VOCABULARY], [1, -1], [1] * 41])
def test_what_cannot_be_scored_is_one_clear_error(scorer: Scorer, tokens: list[int]) -> None:
    with pytest.raises(DataError, match="cannot be scored: 1 … 40 tokens with ids below 61 can"):
        scorer.score([np.array(tokens, np.int32)])


def test_calls_queue_and_are_counted(scorer: Scorer) -> None:
    sequences = [np.arange(3, 3 + n, dtype=np.int32) for n in (2, 5, 9)]

    async def all_at_once() -> list[list[np.ndarray]]:
        calls = [asyncio.create_task(scorer.logp([s])) for s in sequences]
        await asyncio.sleep(0)
        assert scorer.status() == (0, "", 3)
        return await asyncio.gather(*calls)

    found = asyncio.run(all_at_once())
    assert scorer.status() == (0, "", 0)
    for tokens, (logp,) in zip(sequences, found, strict=True):
        np.testing.assert_allclose(logp[1:], naive(tokens, 1)[0], rtol=1e-4, atol=2e-5)
    top = asyncio.run(scorer.topk(sequences, 2))
    assert [t.ids.shape for t in top] == [(2, 2), (5, 2), (9, 2)]


@pytest.mark.faults("F3", "F7", "F20")
def test_a_long_forward_pass_shows_progress_at_every_layer_and_piece_of_the_head(folder: Path) -> None:
    """Who watches must be able to tell one that computes from one that hangs."""
    scorer = Scorer.create(path=str(folder), device="cpu", head_rows=1)
    scorer.start()
    seen: list[int] = []
    for part in scorer.policy.model.base_model.layers:
        part.register_forward_hook(lambda *_: seen.append(scorer.written))
    asked, answer = [], scorer.policy.logp

    def piecewise(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append(len(states))
        seen.append(scorer.written)
        return answer(states, targets)

    scorer.policy.logp = piecewise  # type: ignore[method-assign]
    sequences = [np.random.default_rng(0).integers(0, VOCABULARY, 40).astype(np.int32)]
    scorer.score(sequences, 3)
    assert asked == [8] * 4 + [7]
    assert seen == sorted(set(seen))  # each says more than the one before
    assert len(seen) == len(scorer.policy.model.base_model.layers) + 5
    assert 0 < seen[0] < seen[-1] < scorer.written == 40
    scorer.score(sequences)
    assert scorer.written == 80


def test_a_scorer_is_frozen(scorer: Scorer) -> None:
    assert not any(p.requires_grad for p in scorer.policy.parameters())
    with pytest.raises(ValueError, match="frozen"):
        asyncio.run(scorer.load(WeightRef(1, "nowhere", "")))
