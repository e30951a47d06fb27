"""The learner on DeepSpeed: ranks, ZeRO stages, checkpoints, numbers that are not finite. gloo on CPU."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import ProcessExitedException

from rlkd.core.batch import Shares
from rlkd.core.errors import CheckpointError, DivergedError, PreflightError
from rlkd.core.types import Origin
from rlkd.engines import learner_state
from rlkd.engines.deepspeed import Rank
from rlkd.engines.shards import Saved
from rlkd.export import difference
from tests.learner_help import tiny_folder
from tests.stack import learner_ranks as ranks_help
from tests.stack.learner_ranks import (
    ALGORITHM,
    STEPS,
    Poisoned,
    batches,
    digests,
    in_processes,
    options,
    run,
    weights,
)

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


@pytest.mark.faults("F54")
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_rank(folder: Path, tmp_path: Path) -> None:
    in_processes(2, ranks_help.poisoned_on_one_rank, tmp_path, folder)
    for stage in (0, 1, 2, 3):
        for rank in (0, 1):
            found = torch.load(tmp_path / f"stage-{stage}-rank-{rank}.pt")
            assert "RLKD-T141" in found["raised"], (stage, rank)
            assert "of rank 1, was the first" in found["raised"], found["raised"]
            assert found["same"], (stage, rank)
            assert found["step"] == 1


@pytest.mark.faults("F54")
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


@pytest.mark.faults("F55")
def test_weights_that_are_not_finite_are_not_published(folder: Path) -> None:
    rank = Rank(ALGORITHM, options(folder, 0))
    with torch.no_grad():
        rank.policy.model.base_model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    with pytest.raises(DivergedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        dict(rank.weights())
    rank.close()


def test_offload_without_a_gpu_is_refused(folder: Path) -> None:
    with pytest.raises(PreflightError, match="on a CPU already"):
        Rank(ALGORITHM, options(folder, 0, offload=True))


# --- steps left out


@pytest.mark.faults("F54")
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
)
def test_a_step_that_is_skipped_leaves_no_trace(folder: Path, tmp_path: Path, stage: int, dtype: str) -> None:
    """Bit by bit the run that never had it; also if it is the first step of all."""
    made = partial(options, folder, stage, dtype=dtype)
    quiet = Rank(Poisoned(), made())
    run(quiet, [1, 2])
    expected = digests(quiet, tmp_path / "quiet")
    quiet.close()
    for what in ("loss", "gradient", "constant"):
        rank = Rank(Poisoned(what=what), made(on_nonfinite="skip", debug_directory=str(tmp_path / "debug")))
        steps = [(0, 1.0), (1, 0.0), (3, 1.0), (4, 1.0), (2, 0.0)]
        shares = [rank.update([t[0] for t in batches(1)[s]], {"poison": poison}) for s, poison in steps]
        assert [s.maxima["nonfinite"] for s in shares] == [1.0, 0.0, 1.0, 1.0, 0.0]
        assert ["grad_norm" in s.maxima for s in shares] == [False, True, False, False, True], "unknown, not 0"
        assert digests(rank, tmp_path / what) == expected, what
        assert rank.step == 2
        rank.close()
    kind = {"loss": "loss", "constant": "loss", "gradient": "gradient"}
    assert {p.name for p in (tmp_path / "debug").iterdir()} >= {
        f"step-{n:06d}-rank-0-{kind[what]}-0.pt" for n in (1, 3, 4) for what in kind
    }


@pytest.mark.faults("F54")
def test_without_the_veto_a_constant_that_is_not_finite_would_move_the_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above: nothing in the gradient shows it."""
    rank = Rank(Poisoned(what="constant"), options(folder, 0, on_nonfinite="skip"))
    before = digests(rank, tmp_path / "before")
    move = rank._move
    monkeypatch.setattr(rank, "_move", lambda **_: move(False))
    rank.update([t[0] for t in batches(1)[0]], {"poison": 1.0})
    assert digests(rank, tmp_path / "after") != before
    rank.close()


@pytest.mark.faults("F54")
def test_too_many_skipped_steps_in_a_row_end_the_run(folder: Path, tmp_path: Path) -> None:
    """The row goes on after a resume."""
    made = options(folder, 0, on_nonfinite="skip", max_nonfinite=2)
    rank = Rank(Poisoned(), made)
    bad, good = ([t[0] for t in batches(1)[0]], {"poison": 1.0}), ([t[0] for t in batches(1)[1]], {})
    for mine, knobs in (bad, bad, good, bad, bad):
        rank.update(mine, knobs)
    rank.save(str(tmp_path / "state"))
    again = Rank(Poisoned(), made)
    again.load(str(tmp_path / "state"))
    for one in (rank, again):
        with pytest.raises(DivergedError, match="step 6: 3 steps in a row were not finite") as error:
            one.update(*bad)
        assert "RLKD-T145" in str(error.value)
        assert "the loss is nan" in str(error.value)
        one.close()


@pytest.mark.faults("F54")
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(folder: Path, tmp_path: Path) -> None:
    in_processes(2, ranks_help.skipped_on_one_rank, tmp_path, folder)
    for what in ("loss", "gradient", "constant"):
        for stage in (0, 2, 3):
            for rank in (0, 1):
                found = torch.load(tmp_path / f"{what}-{stage}-rank-{rank}.pt")
                assert found == {"counted": [0.0, 1.0, 0.0], "same": True, "step": 2}, (what, stage, rank)


@pytest.mark.faults("F54")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_message_names_the_first_tensor(folder: Path, stage: int) -> None:
    """A gradient (poisoned by a hook) and a weight."""
    rank = Rank(ALGORITHM, options(folder, stage))
    poisoned = "model.layers.1.mlp.up_proj.weight"
    parameter = dict(rank.policy.model.named_parameters())[poisoned]
    hook = parameter.register_hook(lambda g: g * torch.inf)
    with pytest.raises(DivergedError, match=f"that of {poisoned}, in micro-batch 1 of rank 0, was the first"):
        rank.update([turn[0] for turn in batches(1)[0]], {})
    hook.remove()
    with torch.no_grad():
        getattr(parameter, "ds_tensor", parameter).view(-1)[5] = torch.nan
    with pytest.raises(DivergedError, match=f"the loss is nan .the weight {poisoned} is not finite"):
        rank.update([turn[0] for turn in batches(1)[0]], {})
    rank.close()


# --- checkpoints


def test_what_is_loaded_is_what_was_saved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Level L1. Negative controls: generators, a moment or a weight that are not put back are noticed."""
    rank = Rank(ALGORITHM, options(folder, 1))
    run(rank, [0, 1])
    saved = rank.save(str(tmp_path / "state"))
    torch.rand(3)
    run(rank, [2])
    assert rank.load(str(tmp_path / "state")) == saved
    assert saved.keys() == {"weights", "optimizer", "rng", "step"}
    assert rank.step == 2
    torch.rand(3)
    fill = Saved.fill

    def without(kind: str, name: str) -> Any:
        def half(self: Saved, into: Tensor, k: str, n: str, start: int = 0) -> None:
            if (k, n) != (kind, name):
                fill(self, into, k, n, start)

        return half

    with monkeypatch.context() as patch:
        patch.setattr(learner_state.rng, "restore", lambda *_: None)
        with pytest.raises(CheckpointError, match="rank 0: rng after loading are not what was saved"):
            rank.load(str(tmp_path / "state"))
    name = "model.layers.0.mlp.up_proj.weight"
    for kind, component in (("exp_avg_sq", "optimizer"), ("weight", "optimizer and weights")):
        run(rank, [2])
        with monkeypatch.context() as patch:
            patch.setattr(Saved, "fill", without(kind, name))
            with pytest.raises(CheckpointError, match=f"rank 0: {component} after"):
                rank.load(str(tmp_path / "state"))
    assert rank.load(str(tmp_path / "state")) == saved
    rank.close()


@pytest.mark.faults("F31")
def test_nothing_is_unpickled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever DeepSpeed might read with: a load works without it."""
    rank = Rank(ALGORITHM, options(folder, 2))
    run(rank, [0])
    rank.save(str(tmp_path / "state"))
    assert {p.suffix for p in (tmp_path / "state").iterdir()} == {".json", ".safetensors"}

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load")

    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr("pickle.load", refused)
    monkeypatch.setattr("pickle.loads", refused)
    rank.load(str(tmp_path / "state"))
    rank.close()


@pytest.mark.faults("F26")
def test_a_checkpoint_that_cannot_be_loaded_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    """And then nothing has changed."""
    other = tiny_folder(tmp_path, **{**TWO_LAYERS, "num_hidden_layers": 3, "intermediate_size": 80})
    rank = Rank(ALGORITHM, options(folder, 0))
    before = digests(rank, tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"there is no state\.json"):
        rank.load(str(tmp_path / "nothing"))
    stranger = Rank(ALGORITHM, options(other, 0))
    run(stranger, [0])
    stranger.save(str(tmp_path / "other"))
    stranger.close()
    with pytest.raises(CheckpointError, match="RLKD-K141") as error:
        rank.load(str(tmp_path / "other"))
    assert "intermediate_size 80, here 96; num_hidden_layers 3, here 2" in str(error.value)
    broken = next((tmp_path / "one").glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        rank.load(str(tmp_path / "one"))
    assert digests(rank, tmp_path / "two") == before
    assert rank.step == 0
    rank.close()


@pytest.fixture(scope="module")
def one_rank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, dict[str, Tensor]]]:
    """Checkpoints of one rank after 3 steps, by dtype and stage; weights then, and after 5 further steps."""
    directory, found = tmp_path_factory.mktemp("one"), {}
    for dtype in ("float32", "bfloat16"):
        for stage in (0, 1, 2, 3):
            rank = Rank(ALGORITHM, options(folder, stage, dtype=dtype))
            run(rank, range(3))
            name = f"checkpoint-{stage}" if dtype == "float32" else f"low-{stage}"
            rank.save(str(directory / name))
            found[dtype, stage, "then"] = weights(rank)
            run(rank, range(5))
            found[dtype, stage, "end"] = weights(rank)
            rank.close()
    return directory, found


@pytest.mark.faults("F26")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_zero_stage_loads_every_other(folder: Path, one_rank: Any, stage: int, dtype: str) -> None:
    """Weights bit by bit; 5 further steps within 1e-5 of the run that kept its stage, and bit by bit where the stage
    stays. bfloat16: DeepSpeed's stages themselves round differently, by 5e-4 over these steps."""
    directory, known = one_rank
    for other in (0, 1, 2, 3):
        rank = Rank(ALGORITHM, options(folder, other, dtype=dtype))
        rank.load(str(directory / (f"checkpoint-{stage}" if dtype == "float32" else f"low-{stage}")))
        assert rank.step == 3
        assert off(weights(rank), known[dtype, stage, "then"]) == 0.0
        assert all(torch.equal(w, known[dtype, stage, "then"][n]) for n, w in weights(rank).items())
        run(rank, range(5))
        bound = {"float32": 1e-5, "bfloat16": 2e-3}[dtype] if other != stage else 0.0
        assert off(weights(rank), known[dtype, stage, "end"]) <= bound, (stage, other)
        rank.close()


@pytest.mark.faults("F26")
def test_the_dtype_may_change(folder: Path, one_rank: Any) -> None:
    """What is kept is float32."""
    directory, known = one_rank
    low = Rank(ALGORITHM, options(folder, 1, dtype="bfloat16"))
    assert sorted(low.load(str(directory / "checkpoint-1"))) == ["rng", "step"]
    expected = {n: w.bfloat16() for n, w in known["float32", 1, "then"].items()}
    assert all(torch.equal(w, expected[n]) for n, w in weights(low).items())
    low.close()


@pytest.mark.faults("F26")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_go_on_as_one(two_ranks: Path, folder: Path, stage: int) -> None:
    """A checkpoint of two ranks, loaded by one in the next stage."""
    expected = torch.load(two_ranks / f"stage-{stage}-rank-0.pt")["through"]
    rank = Rank(ALGORITHM, options(folder, (stage + 1) % 4))
    rank.load(str(two_ranks / f"checkpoint-{stage}"))
    run(rank, range(3, STEPS))
    assert off(weights(rank), expected) < 1e-5
    rank.close()


@pytest.mark.faults("F26")
def test_one_rank_goes_on_as_two(folder: Path, alone: Any, one_rank: Any, tmp_path: Path) -> None:
    directory, known = one_rank
    in_processes(2, ranks_help.load_and_go_on, tmp_path, folder, directory)
    for stage in (0, 1, 2, 3):
        found = [torch.load(tmp_path / f"on-{stage}-rank-{rank}.pt") for rank in (0, 1)]
        for one in found:
            assert all(torch.equal(w, known["float32", stage, "then"][n]) for n, w in one["loaded"].items()), stage
            assert off(one["end"], alone[0]) < 1e-5, stage
            assert set(one["compared"]) >= {"rng", "step"}
        assert torch.equal(found[0]["draw"], found[1]["draw"]), "both start from rank 0's generators"


@pytest.mark.faults("F8")
@pytest.mark.parametrize("point", ["learner.backward", "learner.step", "learner.save", "learner.load"])
def test_a_rank_that_is_killed_leaves_no_half_state_that_loads(folder: Path, tmp_path: Path, point: str) -> None:
    """What the other rank wrote alone is refused; the state is whole if it was killed later."""
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_processes(2, ranks_help.struck, tmp_path, folder, point)
    if point == "learner.load":
        assert Saved.open(tmp_path / "state").facts.step == 1
        return
    if point == "learner.save":
        assert list((tmp_path / "state").glob("rank-0001-*.safetensors")), "not in the middle"
    with pytest.raises(CheckpointError, match=r"there is no state\.json|rank-0001\.json is missing"):
        Saved.open(tmp_path / "state")


# --- bit by bit (level L3)


def bits(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    same = all(torch.equal(w, expected["weights"][n]) for n, w in found["weights"].items())
    return same and found["losses"] == expected["losses"][-2:] and found["norms"] == expected["norms"][-2:]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2)])
def test_a_resumed_run_is_the_same_bit_by_bit(folder: Path, tmp_path: Path, ranks: int, stage: int) -> None:
    """4 steps with dropout; 2 steps, and 2 more in new processes. Negative control: generators are not put back."""

    def train(*jobs: ranks_help.Job) -> None:
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        in_processes(ranks, ranks_help.train_jobs, tmp_path, folder, stage, jobs)

    train(([0, 1, 2, 3], "", "", "quiet"), ([0, 1], "", "state", "first"))
    train(([2, 3], "state", "", "resumed"), ([2, 3], "state!", "", "forgot"))
    for rank in range(ranks):
        quiet, resumed, forgot = (torch.load(tmp_path / f"{n}-{rank}.pt") for n in ("quiet", "resumed", "forgot"))
        assert bits(resumed, quiet)
        assert not bits(forgot, quiet)
