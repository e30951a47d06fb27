"""Real vLLM in real Ray actors, on a small random Llama: log-probs, weight updates, prompt cache, seeds, losses.

One actor, and so one vLLM, serves most tests: it begins with a tied model as version 0. `probe` runs a function inside
it, which is how the controls take a protection away and how tests act in the middle of a sample.
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from rlkd.core.errors import DataError, WorkerLost
from rlkd.core.ports import Completion, Sampling, WeightRef
from rlkd.core.types import Finish
from rlkd.engines.weights import Publisher
from rlkd.train.canary import Off, compare
from rlkd.workers.pool import Pool, PoolOptions
from rlkd.workers.rollout import ENGINES, RolloutWorker, spawner
from tests.engine_checks import CONTEXT, agreement, error_of, forward_logp, prompts, random_llama, shake

pytestmark = pytest.mark.stack

SEQUENCES = 16  # max_num_seqs
PROMPT = np.arange(70, dtype=np.int32)  # two blocks of the prompt cache, and a bit
OPTIONS = {"dtype": "float32", "kv_cache_gib": 0.125, "max_num_seqs": SEQUENCES, "threads": 1}
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
MEAN, MAX = 1e-4, 1e-3  # how far sampler and learner may be apart, in nats
Function = Callable[[Any], Awaitable[Any]]


class Probed(RolloutWorker):
    """A rollout worker that tests can look into."""

    async def probe(self, function: Function) -> Any:
        return await function(self._engine)


@dataclass
class Sampler:
    """The shared worker, the weights it has as a model of its own, and the way from one to the other."""

    actor: Any
    model: Any
    publisher: Publisher
    version: int = 0

    async def generate(self, tokens: np.ndarray, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        return list(await within(60, self.actor.generate.remote(tokens, n, seed, sampling)))

    async def load(self, ref: WeightRef) -> str:
        return str(await within(60, self.actor.load.remote(ref)))

    async def probe(self, function: Function) -> Any:
        return await within(60, self.actor.probe.remote(function))

    def changed(self) -> WeightRef:
        """Change the model, and publish it as the next version."""
        self.version += 1
        shake(self.model, seed=1000 + self.version)
        return self.publisher.publish(self.version, self.model.named_parameters())


async def within(seconds: float, ref: Any) -> Any:
    return await asyncio.wait_for(ref, seconds)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    folder = tmp_path_factory.mktemp("tied")
    model = random_llama(folder, tied=True)
    publisher = Publisher(str(tmp_path_factory.mktemp("weights")))
    made = ray.remote(Probed).options(max_restarts=0, runtime_env={"env_vars": ENVIRONMENT})
    actor = made.remote(ENGINES["vllm"], {"path": str(folder), **OPTIONS})
    ray.get(actor.start.remote(), timeout=180)
    yield Sampler(actor, model, publisher)
    ray.kill(actor)
    publisher.close()


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, 280))


def same(a: list[Completion], b: list[Completion]) -> bool:
    return all(np.array_equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True))


async def begun(engine: Any) -> None:
    """Until as many samples as fit are ten tokens long."""
    while True:
        states = list(engine._engine.output_processor.request_states.values())
        if sum(s.detokenizer.num_output_tokens() >= 10 for s in states) >= min(len(states), SEQUENCES) > 0:
            return
        await asyncio.sleep(0.001)


# --- log-probs and weight updates


def test_logp_agrees_with_a_forward_pass_over_five_updates(sampler: Sampler) -> None:
    errors = run(agreement(sampler.generate, sampler.load, sampler.model, sampler.publisher, prompts(4)))
    sampler.version += 5
    assert len(errors) == 6
    for error in errors:
        assert error.mean <= MEAN
        assert error.max <= MAX


def test_a_stale_head_is_found(sampler: Sampler) -> None:
    """The control of the test above: without packing the LM head again a tied model drifts away, update by update."""

    async def keep_the_head(engine: Any) -> None:
        import rlkd.engines.vllm_weights as module

        engine.kept, module.refresh_heads = module.refresh_heads, lambda _: None

    async def mend(engine: Any) -> None:
        import rlkd.engines.vllm_weights as module

        module.refresh_heads = engine.kept

    async def one_update() -> float:
        await sampler.load(sampler.changed())
        written = await sampler.generate(PROMPT, 8, 1, Sampling(24))
        return error_of(sampler.model, [PROMPT], [written]).mean

    async def test() -> None:
        await sampler.probe(keep_the_head)
        stale = [await one_update() for _ in range(3)]
        await sampler.probe(mend)
        assert stale[0] > 100 * MEAN
        assert stale[2] > stale[0]
        assert await one_update() <= MEAN

    run(test())


def test_weights_change_what_is_sampled(sampler: Sampler) -> None:
    async def test() -> None:
        before = await sampler.generate(PROMPT, 4, 3, Sampling(20))
        assert same(await sampler.generate(PROMPT, 4, 3, Sampling(20)), before)
        ref = sampler.changed()
        assert await sampler.load(ref) == ref.digest
        assert (await sampler.actor.status.remote())[:2] == (ref.version, ref.digest)
        after = await sampler.generate(PROMPT, 4, 3, Sampling(20))
        assert not same(after, before)
        assert {c.versions for c in after} == {(ref.version, ref.version)}

    run(test())


def test_an_update_in_the_middle_of_samples(sampler: Sampler) -> None:
    """Running samples go on and span both versions. Those that wait are written with the new weights alone, although
    they share their prompt with the running ones."""

    async def test() -> None:
        undisturbed = await sampler.generate(PROMPT, 8, 1, Sampling(150))
        old, ref = sampler.version, sampler.changed()
        running = [asyncio.create_task(sampler.generate(PROMPT, 8, seed, Sampling(150))) for seed in (1, 2)]
        await asyncio.sleep(0)
        waiting = asyncio.create_task(sampler.generate(PROMPT, 8, 3, Sampling(20)))
        await sampler.probe(begun)
        await sampler.load(ref)
        for group in await asyncio.gather(*running):
            assert {c.versions for c in group} == {(old, ref.version)}
            assert {(len(c.tokens), len(c.logp), c.finish) for c in group} == {(150, 150, Finish.LENGTH)}
        assert all(
            np.array_equal(a.tokens[:5], b.tokens[:5]) for a, b in zip(await running[0], undisturbed, strict=True)
        )
        assert not same(await running[0], undisturbed)
        assert {c.versions for c in await waiting} == {(ref.version, ref.version)}
        assert error_of(sampler.model, [PROMPT], [await waiting]).max <= MAX

    run(test())


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("protected", [True, False])
def test_the_prompt_cache_serves_nothing_of_old_weights(sampler: Sampler, protected: bool, busy: bool) -> None:
    """While samples run vLLM refuses to empty its cache, and what they computed stays: the salt must keep it apart.
    Without salt and emptying (control) a prompt is continued from what the old weights made of it."""

    async def take_away(engine: Any) -> None:
        engine._salt, engine._forget_old = (lambda: "same"), (lambda: None)

    async def give_back(engine: Any) -> None:
        del engine._salt, engine._forget_old
        engine._engine.reset_prefix_cache()

    async def test() -> None:
        if not protected:
            await sampler.probe(take_away)
        ref = sampler.changed()  # before anything runs: its file is synced to a disk that may be slow
        running = [asyncio.create_task(sampler.generate(PROMPT, 8, 5, Sampling(180)))] if busy else []
        await (sampler.probe(begun) if busy else sampler.generate(PROMPT, 8, 5, Sampling(5)))
        await sampler.load(ref)
        written = await sampler.generate(PROMPT, 8, 6, Sampling(20))
        if busy:
            assert not running[0].done(), "nothing ran while the prompt was sampled: the test shows nothing"
        await asyncio.gather(*running)
        error = error_of(sampler.model, [PROMPT], [written])
        if protected:
            assert error.max <= MAX
        else:
            await sampler.probe(give_back)
            assert error.mean > 10 * MEAN

    run(test())


@pytest.mark.faults("F17", "F19")
@pytest.mark.parametrize("protected", [True, False])
def test_the_canary_sees_old_weights_and_an_old_prompt_cache(sampler: Sampler, protected: bool) -> None:
    """Without the salt and the emptying of the cache (control) what it writes is off from what it scores."""
    tokens = np.random.default_rng(3).integers(0, 128, 32).astype(np.int32)

    async def take_away(engine: Any) -> None:
        engine._salt, engine._forget_old = (lambda: "same"), (lambda: None)

    async def give_back(engine: Any) -> None:
        del engine._salt, engine._forget_old
        engine._engine.reset_prefix_cache()

    async def off() -> Off:
        expected = forward_logp(sampler.model, tokens).tolist()
        [worst] = compare([None, *expected[1:]], {"rollout-0": await within(60, sampler.actor.canary.remote(tokens))})
        return worst

    async def test() -> None:
        if not protected:
            await sampler.probe(take_away)
        assert (await off()).learner <= MAX  # and its prompt is in the cache now
        ref = sampler.changed()
        assert (await off()).learner > 0.01, "weights that were not delivered"
        await sampler.load(ref)
        after = await off()
        assert after.learner <= MAX
        assert after.cached <= MAX if protected else after.cached > 0.01
        if not protected:
            await sampler.probe(give_back)

    run(test())


# --- sampling


def test_the_same_seed_gives_the_same_samples_whatever_n_and_whatever_else_runs(sampler: Sampler) -> None:
    asked, sampling = prompts(4, seed=5), Sampling(20, stop_tokens=(1, 2, 3))

    async def test() -> None:
        alone = [await sampler.generate(p, 5, i, sampling) for i, p in enumerate(asked)]
        for order, n in [([0, 1, 2, 3], 5), ([3, 1, 0, 2], 3)]:
            together = await asyncio.gather(*(sampler.generate(asked[i], n, i, sampling) for i in order))
            for i, written in zip(order, together, strict=True):
                assert same(written, alone[i][:n])
        assert len({tuple(c.tokens) for c in alone[0]}) == 5
        ends = [c for group in alone for c in group if c.finish == Finish.STOP]
        assert ends
        assert all(c.tokens[-1] in (1, 2, 3) and not set(c.tokens[:-1].tolist()) & {1, 2, 3} for c in ends)

    run(test())


def test_more_prompt_tokens_than_one_step_computes(sampler: Sampler) -> None:
    """Seeded samples whose prompts were computed in parts ended vLLM on CPU: its generators cannot be rewound."""

    async def test() -> None:
        asked = [np.full(CONTEXT - 10, token, np.int32) for token in range(SEQUENCES)]
        written = await asyncio.gather(*(sampler.generate(p, 1, 0, Sampling(10)) for p in asked))
        assert error_of(sampler.model, asked, written).max <= MAX

    run(test())


SAMPLINGS = [
    Sampling(16, temperature=0.7, top_p=0.8),
    Sampling(16, stop_tokens=tuple(range(0, 128, 3)), min_tokens=8),
    Sampling(16, temperature=0.0),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_logp_is_that_of_the_distribution_sampled_from(sampler: Sampler, sampling: Sampling) -> None:
    """As the Hugging Face engine computes it, whose own test does it by hand."""
    from rlkd.engines.hf import processed

    for completion in run(sampler.generate(PROMPT, 6, 5, sampling)):
        tokens = np.concatenate([PROMPT, completion.tokens])
        logits = sampler.model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, len(PROMPT) - 1 : -1].float()
        for i, token in enumerate(completion.tokens):
            expected = processed(logits[i : i + 1], sampling, written=i)[0, token]
            assert completion.logp[i] == pytest.approx(float(expected), abs=MAX)
        assert len(completion.tokens) >= max(sampling.min_tokens, 1)


@pytest.mark.faults("F64")
def test_vllm_takes_its_port_from_where_it_is_told(sampler: Sampler) -> None:
    async def first_free(_: Any) -> tuple[int, int]:
        from vllm.utils.network_utils import get_open_port

        return int(os.environ["VLLM_PORT"]), get_open_port()

    told, found = run(sampler.probe(first_free))
    assert told <= found < told + 30


def test_scoring(sampler: Sampler) -> None:
    sequences = prompts(3, seed=9)
    scored = run(within(60, sampler.actor.logp.remote(sequences)))
    for tokens, logp in zip(sequences, scored, strict=True):
        np.testing.assert_allclose(logp, forward_logp(sampler.model, tokens), atol=MAX)
    top = run(within(60, sampler.actor.topk.remote(sequences, 3)))
    for tokens, found in zip(sequences, top, strict=True):
        expected = sampler.model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1).topk(3)
        np.testing.assert_array_equal(found.ids[1:], expected.indices[:-1].numpy())
        np.testing.assert_allclose(found.logp[1:], expected.values[:-1].numpy(), atol=MAX)


def test_abort_returns_what_was_written(sampler: Sampler) -> None:
    async def test() -> None:
        undisturbed = await sampler.generate(PROMPT, 4, 1, Sampling(180))
        writing = asyncio.create_task(sampler.generate(PROMPT, 4, 1, Sampling(180)))
        await sampler.probe(begun)
        assert await sampler.actor.abort.remote() == 4
        for cut, whole in zip(await writing, undisturbed, strict=True):
            assert cut.finish == Finish.ABORTED
            assert 10 <= len(cut.tokens) == len(cut.logp) < 180
            assert np.array_equal(cut.tokens[:10], whole.tokens[:10])
        assert (await sampler.actor.status.remote())[2] == 0

    run(test())


def test_a_cancelled_call_is_not_computed_any_further(sampler: Sampler) -> None:
    async def test() -> None:
        ref = sampler.actor.generate.remote(PROMPT, 4, 1, Sampling(180))
        await sampler.probe(begun)
        ray.cancel(ref)
        while (await sampler.actor.status.remote())[2]:
            await asyncio.sleep(0.001)
        assert len(await sampler.generate(PROMPT, 1, 1, Sampling(2))) == 1

    run(test())


def test_what_does_not_fit_is_one_clear_error(sampler: Sampler) -> None:
    async def test() -> None:
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            await sampler.generate(np.zeros(CONTEXT - 10, np.int32), 1, 0, Sampling(11))
        assert isinstance(caught.value.cause, DataError)
        assert f"the model has room for {CONTEXT} tokens" in str(caught.value.cause)
        assert len(await sampler.generate(PROMPT, 1, 1, Sampling(2))) == 1

    run(test())


# --- losses


@pytest.mark.faults("F1")
def test_a_killed_worker_is_replaced_by_one_with_the_current_weights(tmp_path: Path) -> None:
    """On an untied model. kill -9 in the middle of samples: WorkerLost within seconds, not at the call's deadline."""
    random_llama(tmp_path / "model", tied=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).requires_grad_(False)
    publisher = Publisher(str(tmp_path / "weights"))
    spawn = spawner("vllm", {"path": str(tmp_path / "model"), **OPTIONS}, ENVIRONMENT, lambda _: {})

    async def test() -> None:
        pool = Pool("rollout", spawn, 1, options=PoolOptions(timeout_s=300.0))
        await pool.start()
        try:
            errors = await agreement(pool.generate, pool.deliver, model, publisher, prompts(2), updates=2)
            assert max(e.max for e in errors) <= MAX
            with pytest.raises(DataError, match="room for"):
                await pool.generate(PROMPT, 1, 0, Sampling(1000))

            actor = pool._slots[0].handle
            pid = await actor.pid.remote()
            writing = [asyncio.create_task(pool.generate(PROMPT, 4, s, Sampling(180))) for s in range(16)]
            while (await actor.status.remote())[2] < 64:
                await asyncio.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            results = await asyncio.gather(*writing, return_exceptions=True)
            assert time.monotonic() - killed < 10
            assert [type(r) for r in results] == [WorkerLost] * 16
            assert re.match(
                r"rollout-0\.generate\(prompt 70, samples 4\): Actor(Died|Unavailable)Error", str(results[0])
            )

            written = await pool.generate(PROMPT, 4, 1, Sampling(20))  # by the replacement, once it is ready
            assert {c.versions for c in written} == {(2, 2)}
            assert error_of(model, [PROMPT], [written]).max <= MAX
            assert pool.counts() == {"lost": 1, "preempted": 0, "replaced": 1}
            assert await pool._slots[0].handle.pid.remote() != pid
        finally:
            pool.close()
            publisher.close()

    run(test())
