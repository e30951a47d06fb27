"""The learner on DeepSpeed: ranks, ZeRO stages, checkpoints, numbers that are not finite. gloo on CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlkd.core.batch import Shares
from rlkd.core.errors import CheckpointError, DivergedError, PreflightError
from rlkd.core.types import Origin
from rlkd.engines.deepspeed import Rank
from rlkd.export import difference
from tests.learner_help import tiny_folder
from tests.stack import learner_ranks as ranks_help
from tests.stack.learner_ranks import ALGORITHM, STEPS, Poisoned, batches, in_processes, options, run, weights

pytestmark = pytest.mark.stack
TWO_LAYERS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_folder(tmp_path_factory.mktemp("model"), **TWO_LAYERS)
    (made / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[dict[str, Tensor], list[Shares]]:
    """What one rank without ZeRO makes of the steps."""
    rank = Rank(ALGORITHM, options(folder, None))
    assert rank.stage == 0
    shares = run(rank, range(STEPS))
    return weights(rank), shares


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("two")
    in_processes(2, ranks_help.train_save_load, scratch, folder)
    return scratch


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a weight tensor, in norm."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - w).norm() / w.norm()) for n, w in expected.items())


def start(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_make_the_same_weights_as_one(two_ranks: Path, alone: Any, folder: Path, stage: int) -> None:
    expected, shares = alone
    for rank in (0, 1):
        found = torch.load(two_ranks / f"stage-{stage}-rank-{rank}.pt")
        assert off(found["through"], expected) < 1e-5
        assert off(found["resumed"], found["through"]) < 1e-6
        assert found["resumed_at"] == 3
    assert off(expected, start(folder)) > 1e-2, "nothing was learnt: the test would show nothing"
    parts = [torch.load(two_ranks / f"stage-{stage}-rank-{rank}.pt") for rank in (0, 1)]
    for step in range(STEPS):
        for name, value in shares[step].sums.items():
            assert sum(p["sums"][step][name] for p in parts) == pytest.approx(value, rel=1e-3, abs=1e-5), name
        for name in ("grad_norm", "lr", "mismatch/max"):
            both = max(p["maxima"][step][name] for p in parts)
            assert both == pytest.approx(shares[step].maxima[name], rel=1e-3), name


@pytest.mark.parametrize("stage", [0, 3])
def test_the_exported_folder_computes_the_same(two_ranks: Path, folder: Path, stage: int) -> None:
    exported = two_ranks / f"hf-{stage}"
    probe = torch.load(two_ranks / f"stage-{stage}-rank-0.pt")["probe"]
    assert probe["dtype"] == "float32"
    assert difference(exported, probe["tokens"], probe["logp"]) < 1e-4
    assert difference(folder, probe["tokens"], probe["logp"]) > 1e-2, "the start computes the same: shows nothing"
    assert (exported / "tokenizer.json").read_text() == "{}"


def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_rank(folder: Path, tmp_path: Path) -> None:
    in_processes(2, ranks_help.poisoned_on_one_rank, tmp_path, folder)
    for stage in (0, 1, 2, 3):
        for rank in (0, 1):
            found = torch.load(tmp_path / f"stage-{stage}-rank-{rank}.pt")
            assert "RLKD-T141" in found["raised"], (stage, rank)
            assert found["same"], (stage, rank)
            assert found["step"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_leaves_the_weights_alone(
    folder: Path, tmp_path: Path, stage: int, what: str, dtype: str
) -> None:
    """Negative control: the step before, without poison, moves them."""
    made = options(folder, stage, dtype=dtype, debug_directory=str(tmp_path / "debug"))
    rank = Rank(Poisoned(what=what), made)
    first = weights(rank)
    run(rank, [0])
    before = weights(rank)
    assert any(not torch.equal(first[name], before[name]) for name in first)
    with pytest.raises(DivergedError, match={"loss": "RLKD-T140", "gradient": "RLKD-T141"}[what]) as error:
        rank.update([turn[0] for turn in batches(1)[1]], {"poison": 1.0})
    assert all(torch.equal(w, before[name]) for name, w in weights(rank).items())
    where = error.value.problems[0].where
    assert where is not None
    dumped = torch.load(where)
    assert len(dumped["tokens"]) == len(dumped["segment"])
    assert (dumped["origin"] == Origin.POLICY).any()
    rank.close()


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_keeps_a_float32_copy(folder: Path, stage: int) -> None:
    """Steps too small for bfloat16 add up."""
    rank = Rank(ALGORITHM, options(folder, stage, dtype="bfloat16", lr=1e-5, lr_schedule="constant", warmup_steps=0))
    before = weights(rank)
    for _ in range(8):
        run(rank, range(STEPS))
    moved = [float((w != before[name]).float().mean()) for name, w in weights(rank).items()]
    assert max(moved) > 0.1
    rank.close()


def test_weights_that_are_not_finite_are_not_published(folder: Path) -> None:
    rank = Rank(ALGORITHM, options(folder, 0))
    with torch.no_grad():
        rank.policy.model.base_model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    with pytest.raises(DivergedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        dict(rank.weights())
    rank.close()


def test_a_checkpoint_that_cannot_be_loaded_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    rank = Rank(ALGORITHM, options(folder, 0))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        rank.load(str(tmp_path / "nothing"))
    rank.save(str(tmp_path / "one"))
    broken = next((tmp_path / "one").rglob("*model_states.pt"))
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        rank.load(str(tmp_path / "one"))
    rank.close()


def test_offload_without_a_gpu_is_refused(folder: Path) -> None:
    with pytest.raises(PreflightError, match="on a CPU already"):
        Rank(ALGORITHM, options(folder, 0, offload=True))
