"""What an earlier rlkd saved, this one reads: every checkpoint in tests/fixtures is loaded, and is what it was.

Weights, moments, random state, ledger and curriculum are read by the code that a resumed run reads them with, into a
model, an optimizer and a curriculum of today; only DeepSpeed's engine is not there. Where a test fails, users' runs
cannot be gone on with: read the old format too, or count `FORMAT` up and say so.
"""

import asyncio
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlkd import fingerprint, inputs
from rlkd.config.load import load
from rlkd.config.schema import Config
from rlkd.core.errors import CheckpointError
from rlkd.core.types import Prompt
from rlkd.engines import shards
from rlkd.engines.learner_state import Counts, LearnerState
from rlkd.engines.model import ModelOptions, Policy
from rlkd.engines.optimizer import GuardedAdamW, decayed
from rlkd.export import difference
from rlkd.run import curriculum
from rlkd.store import manifest
from rlkd.store.store import Store
from rlkd.train.checkpoint import Checkpoints, State

FIXTURES = Path(__file__).parent / "fixtures"
OLD = sorted(FIXTURES.glob("checkpoint-*"))


@pytest.fixture(params=OLD, ids=lambda path: path.name.removeprefix("checkpoint-"))
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a run's folder with an old checkpoint, which a test may change."""
    return Path(shutil.copytree(request.param, tmp_path / "run"))


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Loading sets them: other tests do not see it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


class Learner:
    """Rank 0's part of the learner, around a model of today."""

    def __init__(self, folder: Path) -> None:
        self.policy = Policy.load(ModelOptions(path=str(folder), device="cpu", dtype="float32"))
        with torch.no_grad():
            for weight in self.policy.parameters():
                weight.zero_()  # whatever is right afterwards was loaded
        optimizer = GuardedAdamW(decayed(self.policy, 0.0), lr=1e-6)
        engine: Any = SimpleNamespace(zero_optimization_stage=lambda: 0, optimizer=None, device=torch.device("cpu"))
        self.state = LearnerState(self.policy, engine, optimizer, 0, 1)
        self.counts = Counts()

    async def load(self, path: str) -> Mapping[str, str]:
        self.counts, digests = self.state.load(path)
        return {f"rank-0/{name}": digest for name, digest in digests.items()}


def config_of(run: Path) -> Config:
    (hf,) = run.glob("checkpoints/step-*/hf")
    return load(FIXTURES / "recipe.yaml", [f"model.path={hf}"])


def restored(run: Path) -> tuple[State, Learner, Any, Any]:
    """As a resumed run does it; CheckpointError if a part is not what was saved."""
    config = config_of(run)
    read = inputs.read(config)
    prompts: Mapping[str, Prompt] = {p.id: p for p in read.data.train.prompts}
    order = curriculum(config, read.data.train.prompts, read.data.train.fingerprint)
    learner, store = Learner(Path(config.model.path)), Store(run / "checkpoints")
    saves: Any = Checkpoints(store)
    state = asyncio.run(saves.restore(learner, order, lambda name, seed: replace(prompts[name], seed=seed)))
    return state, learner, order, store.newest(mend=False)


def test_there_is_a_checkpoint_of_today_s_format() -> None:
    manifests = [json.loads(next(run.glob("checkpoints/*/MANIFEST.json")).read_text()) for run in OLD]
    assert manifest.FORMAT in [m["format"] for m in manifests], "make one: tests/fixtures/make_checkpoint.py"
    states = [json.loads(next(run.glob("checkpoints/*/learner/state.json")).read_text()) for run in OLD]
    assert shards.FORMAT in [s["format"] for s in states]


def test_fixtures_are_small() -> None:
    for run in OLD:
        assert sum(p.stat().st_size for p in run.rglob("*") if p.is_file()) <= 100_000
    assert not [p for run in OLD for p in run.rglob("*") if p.is_symlink() or (os.access(p, os.X_OK) and p.is_file())]


@pytest.mark.faults("F70")
def test_every_part_is_what_was_saved(run: Path) -> None:
    """`restore` compares the digests of weights, moments, generators, counts, ledger and curriculum."""
    state, learner, order, found = restored(run)
    saved = json.loads((found.path / "driver.json").read_text())
    assert set(found.manifest.facts["digests"]) == {
        "rank-0/weights", "rank-0/optimizer", "rank-0/rng", "rank-0/step",
        "driver/step", "driver/last", "driver/ledger", "driver/curriculum",
    }  # fmt: skip
    assert state.step == found.manifest.step == learner.counts.step
    assert state.ledger.state_dict() == saved["ledger"]
    assert state.ledger.pending, "a fixture has prompts that are pending"
    assert order.state_dict() == saved["curriculum"]
    assert order.state_dict()["records"], "a fixture has pass rates"


def test_the_learner_s_weights_are_those_of_the_model_folder(run: Path) -> None:
    _, learner, _, found = restored(run)
    from safetensors.torch import load_file

    exported = load_file(found.path / "hf" / "model.safetensors")
    named = {name.removeprefix("model."): p for name, p in learner.policy.model.named_parameters()}
    for name, weight in exported.items():
        assert torch.equal(named[name.removeprefix("model.")], weight), name


def test_the_model_folder_computes_what_the_learner_computed(run: Path) -> None:
    (path,) = run.glob("checkpoints/step-*")
    probe = json.loads((path / "probe.json").read_text())
    assert difference(path / "hf", probe["tokens"], probe["logp"]) < 1e-4


def test_the_run_is_the_same_run(run: Path) -> None:
    """Model, tokenizer and data have the fingerprints of then: else the resume would be refused."""
    found = Store(run / "checkpoints").newest(mend=False)
    assert found is not None
    config = config_of(run)
    now = fingerprint.of(config, inputs.read(config))
    compared = fingerprint.compare(found.manifest.facts["fingerprint"], now)
    assert not compared.refused
    assert not compared.data


def test_a_part_that_is_not_what_was_saved_is_noticed(run: Path) -> None:
    """Negative control: a moment and its file's checksum were changed, the digest of when it was saved was not."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    store = Store(run / "checkpoints")
    found = store.newest(mend=False)
    assert found is not None
    file = found.path / "learner" / "rank-0000-000.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    next(t for name, t in tensors.items() if name.startswith("exp_avg_sq"))[0] += 1e-3
    draft = store.draft(found.manifest.step)
    shutil.copytree(found.path, draft, dirs_exist_ok=True)
    save_file(tensors, draft / "learner" / file.name, metadata=metadata)
    store.drop(found.manifest.step)
    store.commit(draft, found.manifest.step, found.manifest.facts)
    with pytest.raises(CheckpointError, match="optimizer"):
        restored(run)
