"""The Hugging Face engine, and with it what all engines have in common: the thread, its calls, its end."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlkd.core.errors import DataError, InfrastructureError, PreflightError, WorkerLost
from rlkd.core.ports import Completion, Model, Sampling, WeightRef
from rlkd.core.types import Finish
from rlkd.engines.device import pick_dtype
from rlkd.engines.hf import HFEngine, processed
from rlkd.engines.jobs import EngineOptions, seed_of
from rlkd.engines.weights import Publisher
from tests.engine_checks import CONTEXT, VOCABULARY, agreement, error_of, forward_logp, prompts, random_llama, shake

PROMPT = np.arange(3, 15, dtype=np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    random_llama(path, tied=True)
    return path


class Stepped(HFEngine):
    """Can be held before a step, so that tests act in the middle of a sample without racing it."""

    hold_at = -1  # before which step; -1: never
    steps = 0
    fail_at = -1

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.held, self.go_on = threading.Event(), threading.Event()

    def _step(self) -> None:
        if self.steps == self.hold_at:
            self.held.set()
            self.go_on.wait(20)
            self.steps += 1
            return  # the calls made in the meantime come first
        if self.steps == self.fail_at:
            raise MemoryError("no memory for the cache")
        self.steps += 1
        super()._step()


@pytest.fixture
def engine(folder: Path) -> Iterator[Stepped]:
    made = Stepped(EngineOptions(str(folder), dtype="float32"))
    made.start()
    yield made
    made.close()


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[Publisher]:
    made = Publisher(str(tmp_path))
    yield made
    made.close()


@pytest.fixture
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, 60))


def same(a: list[Completion], b: list[Completion]) -> bool:
    return all(np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))


def test_it_is_a_model(engine: Stepped) -> None:
    assert isinstance(engine, Model)
    assert engine.status() == (0, "", 0)


@pytest.mark.parametrize("tied", [True, False])
def test_logp_agrees_with_a_forward_pass_over_five_updates(tied: bool, tmp_path: Path, publisher: Publisher) -> None:
    model = random_llama(tmp_path / "model", tied)
    engine = HFEngine(EngineOptions(str(tmp_path / "model"), dtype="float32"))
    engine.start()
    errors = run(agreement(engine.generate, engine.load, model, publisher, prompts(3)))
    assert max(e.max for e in errors) < 1e-4
    engine.close()


def test_without_the_update_the_log_probs_are_wrong(engine: Stepped, model: Any, publisher: Publisher) -> None:
    """The control of the test above: an engine that only says it loaded is found out."""
    engine._load = lambda _: None  # type: ignore[method-assign]
    errors = run(agreement(engine.generate, engine.load, model, publisher, prompts(3), updates=2))
    assert errors[0].max < 1e-4
    assert errors[1].mean > 0.01
    assert errors[2].mean > errors[1].mean


SAMPLINGS = [
    Sampling(12, temperature=0.7),
    Sampling(12, temperature=1.3, top_p=0.6),
    Sampling(12, top_p=0.05),
    Sampling(12, stop_tokens=tuple(range(0, 128, 3)), min_tokens=8),
    Sampling(12, temperature=0.0),
]


def by_hand(logits: np.ndarray, sampling: Sampling, written: int) -> np.ndarray:
    """The distribution a token is drawn from, computed another way: a loop over tokens, likeliest first."""
    logits = logits.astype(np.float64).copy()
    if written < sampling.min_tokens:
        logits[list(sampling.stop_tokens)] = -np.inf
    scaled = logits / (sampling.temperature or 1.0)
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    kept, total = np.zeros(len(p), bool), 0.0
    for token in np.argsort(-p):
        kept[token] = True
        total += p[token]
        if total >= sampling.top_p:
            break
    p = np.where(kept, p, 0.0) / p[kept].sum()
    with np.errstate(divide="ignore"):
        return np.log(p)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_logp_is_that_of_the_distribution_sampled_from(sampling: Sampling, engine: Stepped, model: Any) -> None:
    for completion in run(engine.generate(PROMPT, 6, 5, sampling)):
        tokens = np.concatenate([PROMPT, completion.tokens])
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
        for i, token in enumerate(completion.tokens):
            expected = by_hand(logits[len(PROMPT) + i - 1], sampling, i)
            assert completion.logp[i] == pytest.approx(expected[token], abs=1e-4)
            if sampling.temperature == 0:
                assert token == expected.argmax()
        if sampling.stop_tokens:
            assert len(completion.tokens) >= sampling.min_tokens
            assert completion.tokens[-1] in sampling.stop_tokens
            assert not set(completion.tokens[:-1][sampling.min_tokens :].tolist()) & set(sampling.stop_tokens)
            assert completion.finish == Finish.STOP
        else:
            assert (len(completion.tokens), completion.finish) == (12, Finish.LENGTH)


def test_tokens_come_as_often_as_they_are_likely(engine: Stepped, model: Any) -> None:
    """8000 first tokens against their probabilities: chi-square over the tokens expected at least 10 times."""
    n = 8000
    drawn = np.bincount([c.tokens[0] for c in run(engine.generate(PROMPT, n, 3, Sampling(1)))], minlength=VOCABULARY)
    with torch.no_grad():
        p = model(torch.from_numpy(PROMPT.astype(np.int64))[None]).logits[0, -1].softmax(-1).numpy() * n
    likely = p >= 10
    chi = ((drawn - p)[likely] ** 2 / p[likely]).sum()
    freedom = int(likely.sum())
    assert freedom > 20
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


def test_the_same_seed_gives_the_same_samples_whatever_n_and_whatever_else_runs(engine: Stepped) -> None:
    asked, sampling = prompts(4), Sampling(20, stop_tokens=(1, 2, 3))

    async def together(order: list[int], n: int) -> dict[int, list[Completion]]:
        written = await asyncio.gather(*(engine.generate(asked[i], n, i, sampling) for i in order))
        return dict(zip(order, written, strict=True))

    alone = {i: run(engine.generate(asked[i], 5, i, sampling)) for i in range(4)}
    for order, n in [([0, 1, 2, 3], 5), ([3, 1, 0, 2], 5), ([2, 0], 3)]:
        for i, written in run(together(order, n)).items():
            assert same(written, alone[i][:n])
    assert not same(run(engine.generate(asked[0], 5, 99, sampling)), alone[0])
    assert len({tuple(c.tokens) for c in alone[0]}) == 5


def test_seeds_differ_and_any_integer_is_a_seed() -> None:
    seeds = {seed_of(s, k) for s in (-1, 0, 1, 2**63, 2**64 - 2) for k in range(50)}
    assert len(seeds) == 250
    assert all(0 <= s < 2**63 for s in seeds)


def test_scoring(engine: Stepped, model: Any) -> None:
    sequences = prompts(4)
    scored = run(engine.logp(sequences))
    for tokens, logp in zip(sequences, scored, strict=True):
        np.testing.assert_allclose(logp, forward_logp(model, tokens), atol=1e-5)
        assert np.isnan(logp[0])
        assert logp.dtype == np.float32
    for tokens, top in zip(sequences, run(engine.topk(sequences, 3)), strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1).topk(3)
        np.testing.assert_array_equal(top.ids[1:], expected.indices[:-1].numpy())
        np.testing.assert_allclose(top.logp[1:], expected.values[:-1].numpy(), atol=1e-5)
    assert run(engine.logp([])) == []


def test_weights_exchanged_in_the_middle_of_samples(engine: Stepped, model: Any, publisher: Publisher) -> None:
    """The samples go on, and say which versions wrote them; tokens from before are those without the exchange."""
    undisturbed = run(engine.generate(PROMPT, 3, 1, Sampling(30)))
    shake(model, 1)
    ref = publisher.publish(7, model.named_parameters())

    async def test() -> list[Completion]:
        engine.steps, engine.hold_at = 0, 10
        writing = asyncio.create_task(engine.generate(PROMPT, 3, 1, Sampling(30)))
        await asyncio.to_thread(engine.held.wait, 20)
        loading = asyncio.create_task(engine.load(ref))
        while engine._calls.empty():
            await asyncio.sleep(0.001)
        engine.go_on.set()
        assert await loading == ref.digest
        assert engine.status()[:2] == (7, ref.digest)
        return await writing

    written = run(test())
    assert [c.versions for c in written] == [(0, 7)] * 3
    for a, b in zip(written, undisturbed, strict=True):
        assert len(a.tokens) == 30
        assert np.array_equal(a.tokens[:10], b.tokens[:10])
    assert not same(written, undisturbed)
    after = run(engine.generate(PROMPT, 3, 1, Sampling(30)))
    assert [c.versions for c in after] == [(7, 7)] * 3
    assert error_of(model, [PROMPT], [after]).max < 1e-4


def test_abort_returns_what_was_written(engine: Stepped) -> None:
    undisturbed = run(engine.generate(PROMPT, 3, 1, Sampling(30)))

    async def test() -> list[list[Completion]]:
        engine.steps, engine.hold_at = 0, 10
        writing = [asyncio.create_task(engine.generate(PROMPT, 3, seed, Sampling(30))) for seed in (1, 2)]
        await asyncio.to_thread(engine.held.wait, 20)
        assert engine.status()[2] in (3, 6)  # the second may not have been taken up yet
        aborting = asyncio.create_task(engine.abort())
        while engine._calls.qsize() < (1 if engine.status()[2] == 6 else 2):
            await asyncio.sleep(0.001)
        engine.go_on.set()
        assert await aborting == 6
        return list(await asyncio.gather(*writing))

    first, second = run(test())
    for cut, whole in zip(first, undisturbed, strict=True):
        assert cut.finish == Finish.ABORTED
        assert np.array_equal(cut.tokens, whole.tokens[:10])
        assert len(cut.logp) == 10
    assert [(len(c.tokens), c.finish) for c in second] == [(0, Finish.ABORTED)] * 3
    assert engine.status()[2] == 0
    assert same(run(engine.generate(PROMPT, 3, 1, Sampling(30))), undisturbed)


def test_a_cancelled_call_is_not_computed_any_further(engine: Stepped) -> None:
    async def test() -> None:
        engine.hold_at = 5
        writing = asyncio.create_task(engine.generate(PROMPT, 3, 1, Sampling(200)))
        await asyncio.to_thread(engine.held.wait, 20)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        engine.go_on.set()
        await engine.generate(PROMPT, 1, 1, Sampling(2))
        assert engine.status()[2] == 0
        assert engine.steps < 20

    run(test())


def test_an_engine_that_dies_tells_everybody_at_once(engine: Stepped) -> None:
    async def test() -> None:
        engine.fail_at = 3
        calls = [engine.generate(PROMPT, 2, seed, Sampling(100)) for seed in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(r) for r in results] == [WorkerLost] * 3
        assert "MemoryError: no memory for the cache" in str(results[0])
        for call in (engine.generate(PROMPT, 1, 0, Sampling(1)), engine.logp([PROMPT]), engine.abort()):
            with pytest.raises(WorkerLost, match="no memory"):
                await call
        with pytest.raises(WorkerLost, match="no memory"):
            engine.status()

    run(test())


def test_closing_ends_who_waits(engine: Stepped) -> None:
    async def test() -> None:
        engine.hold_at = 5
        writing = asyncio.create_task(engine.generate(PROMPT, 3, 1, Sampling(200)))
        await asyncio.to_thread(engine.held.wait, 20)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while engine._calls.empty():
            await asyncio.sleep(0.001)
        engine.go_on.set()
        with pytest.raises(WorkerLost, match="was closed"):
            await writing
        await closing

    run(test())


def test_weights_that_are_damaged_are_refused_and_the_old_ones_stay(
    engine: Stepped, model: Any, publisher: Publisher
) -> None:
    before = run(engine.generate(PROMPT, 2, 1, Sampling(10)))
    shake(model, 1)
    ref = publisher.publish(1, model.named_parameters())
    with pytest.raises(InfrastructureError, match="version 1"):
        run(engine.load(WeightRef(1, ref.where, "0" * 64)))
    assert engine.status() == (0, "", 0)
    assert same(run(engine.generate(PROMPT, 2, 1, Sampling(10))), before)


def test_weights_of_another_model_break_the_engine(engine: Stepped, model: Any, publisher: Publisher) -> None:
    """Half of them may be in by then: it must not go on with a mixture."""
    some = [(name, w) for name, w in model.named_parameters() if "layers.1" not in name]
    with pytest.raises(InfrastructureError, match="lack 9 of the model's parameters"):
        run(engine.load(publisher.publish(1, some)))
    with pytest.raises(WorkerLost, match="lack 9"):
        run(engine.generate(PROMPT, 1, 0, Sampling(1)))


def test_what_does_not_fit_is_one_clear_error(engine: Stepped, folder: Path) -> None:
    long = np.zeros(CONTEXT - 10, np.int32)
    assert len(run(engine.generate(long, 1, 0, Sampling(10)))[0].tokens) == 10
    with pytest.raises(DataError, match=f"246 tokens and an answer of up to 11: the model has room for {CONTEXT}"):
        run(engine.generate(long, 1, 0, Sampling(11)))
    with pytest.raises(DataError, match=f"{CONTEXT + 1} tokens to be scored"):
        run(engine.logp([np.zeros(CONTEXT + 1, np.int32)]))
    with pytest.raises(DataError, match="empty sequence"):
        run(engine.generate(np.zeros(0, np.int32), 1, 0, Sampling(1)))
    for token in (-1, VOCABULARY):
        with pytest.raises(DataError, match=f"token {token} is not in the model's vocabulary of {VOCABULARY}"):
            run(engine.generate(np.array([1, token], np.int32), 1, 0, Sampling(1)))
    assert len(run(engine.generate(PROMPT, 1, 0, Sampling(1)))) == 1  # and nothing is broken by it
    short = HFEngine(EngineOptions(str(folder), context=20, dtype="float32"))
    short.start()
    with pytest.raises(DataError, match="room for 20 tokens"):
        run(short.generate(PROMPT, 1, 0, Sampling(9)))
    short.close()


def test_a_model_that_cannot_be_loaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(PreflightError, match="no model: it has no") as caught:
        HFEngine(EngineOptions(str(tmp_path / "nothing"))).start()
    assert "nothing" in str(caught.value)
    with pytest.raises(PreflightError, match=f"context={CONTEXT + 1} is more than the {CONTEXT} tokens"):
        HFEngine(EngineOptions(str(folder), context=CONTEXT + 1)).start()
    with pytest.raises(PreflightError, match="this process sees no GPU"):
        HFEngine(EngineOptions(str(folder), device="cuda")).start()
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(PreflightError, match=r"the model cannot be loaded: OSError: .*safetensors"):
        HFEngine(EngineOptions(str(tmp_path))).start()


def test_top_p_keeps_at_least_one_token() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    logp = processed(logits, Sampling(1, top_p=1e-6), written=0)
    assert logp.tolist() == [[-torch.inf, 0.0, -torch.inf]]


@pytest.mark.parametrize("flags", ["avx512f avx512_bf16", "avx512f amx_bf16 amx_tile"])
def test_bfloat16_only_where_it_is_fast(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor : 0\nflags : fpu {flags}\n\nprocessor : 1\n")
    assert pick_dtype("auto", "cpu") == (torch.bfloat16 if "amx" in flags else torch.float32)
    assert pick_dtype("auto", "cuda") == torch.bfloat16
    assert pick_dtype("float32", "cuda") == torch.float32
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16
