"""The files of the learner's state, random generators, and numbers that are not finite. Without an engine."""

import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlkd.algorithms.grpo import GRPO
from rlkd.core.batch import MicroBatch, pack
from rlkd.core.errors import CheckpointError, DivergedError
from rlkd.core.ports import PolicyOutput
from rlkd.core.types import TRAINED, Origin
from rlkd.engines import nonfinite, rng
from rlkd.engines.learner_setup import RankOptions, steady
from rlkd.engines.model import ModelOptions
from rlkd.engines.shards import (
    MOMENTS,
    STATE,
    WEIGHT,
    Facts,
    Piece,
    RankFacts,
    Saved,
    readable,
    write_facts,
    write_pieces,
    write_rank,
)
from tests.learner_help import random_groups

CPU = torch.device("cpu")
SHAPES = {"embed.weight": (7, 3), "layers.0.up.weight": (4, 5), "norm.weight": (6,), "scale": ()}
KINDS = (WEIGHT, *MOMENTS)


def full(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """By kind and name, flat."""
    g = torch.Generator().manual_seed(seed)
    return {kind: {n: torch.randn(prod(s), generator=g) for n, s in SHAPES.items()} for kind in KINDS}


def cut(total: int, ranks: int, draw: random.Random) -> list[tuple[int, int]]:
    """[0, total) in `ranks` runs of any length, some empty."""
    places = sorted(draw.randint(0, total) for _ in range(ranks - 1))
    return list(zip([0, *places], [*places, total], strict=True))


def write(
    directory: Path, ranks: int = 2, seed: int = 0, moments: bool = True, file_bytes: int = 200
) -> dict[str, dict[str, Tensor]]:
    directory.mkdir(parents=True, exist_ok=True)
    content, draw = full(seed), random.Random(seed)
    runs = {name: cut(prod(shape), ranks, draw) for name, shape in SHAPES.items()}
    kinds = KINDS if moments else (WEIGHT,)
    for rank in range(ranks):
        pieces = [
            Piece(name, a, {kind: content[kind][name][a:b] for kind in kinds})
            for name, (a, b) in ((name, runs[name][rank]) for name in SHAPES)
            if b > a
        ]
        files = write_pieces(directory, rank, pieces, file_bytes)
        write_rank(directory, rank, RankFacts(files, "layout", {"weights": "abc"}, rng.capture(CPU)))
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    write_facts(directory, Facts(3, 3 if moments else 0, 0, 0, ranks, 1, "float32", "cpu", {}, shapes))
    return content


# --- shards


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.integers(1, 4),
    seed=st.integers(0, 999),
    moments=st.booleans(),
    file_bytes=st.sampled_from([1, 64, 300, 1 << 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@pytest.mark.faults("F26")
def test_what_any_ranks_wrote_fills_any_other_spans(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: int,
    seed: int,
    moments: bool,
    file_bytes: int,
    dtype: Any,
    data: Any,
) -> None:
    directory = tmp_path_factory.mktemp("state")
    content = write(directory, ranks, seed, moments, file_bytes)
    saved = Saved.open(directory)
    assert saved.facts.step == 3
    for kind in KINDS if moments else (WEIGHT,):
        for name, tensor in content[kind].items():
            a = data.draw(st.integers(0, len(tensor)))
            b = data.draw(st.integers(a, len(tensor)))
            into = torch.full((b - a,), torch.nan, dtype=dtype)
            saved.fill(into, kind, name, a)
            assert torch.equal(into, tensor[a:b].to(dtype))


def test_negative_zero_and_denormals_come_back_bit_by_bit(tmp_path: Path) -> None:
    values = torch.tensor([-0.0, 0.0, 1e-45, -1e-42, 3.4e38, torch.pi])
    save = [Piece("norm.weight", 0, {WEIGHT: values})]
    files = write_pieces(tmp_path, 0, save)
    write_rank(tmp_path, 0, RankFacts(files, "", {}, rng.capture(CPU)))
    write_facts(tmp_path, Facts(0, 0, 0, 0, 1, 0, "float32", "cpu", {}, {"norm.weight": [6]}))
    into = torch.empty(6)
    Saved.open(tmp_path).fill(into, WEIGHT, "norm.weight")
    assert torch.equal(into.view(torch.int32), values.view(torch.int32))


def edit(directory: Path, file: str, **changes: Any) -> None:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_file(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def doubled(directory: Path) -> None:
    """The same elements by two ranks."""
    facts = json.loads((directory / "rank-0001.json").read_text())
    edit(directory, "rank-0001.json", files=[*facts["files"], first_file(directory).name])


def halved(directory: Path) -> None:
    path = first_file(directory)
    save_file({k: v.half() for k, v in load_file(path).items()}, path, {"starts": "{}"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a rank is missing": (lambda d: (d / "rank-0001.json").unlink(), "rank-0001.json is missing"),
    "a shard is missing": (lambda d: first_file(d).unlink(), "No such file|cannot be loaded"),
    "a shard is not told of": (lambda d: edit(d, "rank-0000.json", files=[]), "missing"),
    "a shard twice": (doubled, "there twice|is missing or"),
    "a shard in half precision": (halved, "cannot be loaded"),
    "truncated": (lambda d: os.truncate(first_file(d), 40), "cannot be loaded"),
    "empty": (lambda d: os.truncate(first_file(d), 0), "cannot be loaded"),
    "garbled facts": (lambda d: (d / STATE).write_text("{" * 5000), "cannot be loaded"),
    "no facts": (lambda d: (d / STATE).unlink(), "there is no state.json"),
    "more ranks than there are": (lambda d: edit(d, STATE, ranks=3), "rank-0002.json is missing"),
    "fewer ranks than there are": (lambda d: edit(d, STATE, ranks=1), "missing"),
    "no ranks": (lambda d: edit(d, STATE, ranks=0), "ranks 0"),
    "a negative step": (lambda d: edit(d, STATE, step=-1), "not negative"),
    "a shape that is another": (lambda d: edit(d, STATE, parameters={"norm.weight": [8]}), "elements"),
    "an unknown parameter": (
        lambda d: edit(d, STATE, parameters={n: list(s) for n, s in {**SHAPES, "more": (2,)}.items()}),
        "0 of 2 elements",
    ),
    "a file elsewhere": (lambda d: edit(d, "rank-0000.json", files=["../../etc/x.safetensors"]), "not the name"),
    "another format": (lambda d: edit(d, STATE, format=99), "format 99; this version of rlkd reads format 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.faults("F26")
def test_a_directory_that_is_not_whole_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    write(tmp_path)
    Saved.open(tmp_path)
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        Saved.open(tmp_path)
    assert error.value.exit_code == 7
    assert str(tmp_path) in str(error.value)


def test_a_directory_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no state\.json"):
        Saved.open(tmp_path / "nothing")


class Canary:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["torch", "torch-old", "pickle"])
@pytest.mark.faults("F31")
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    """Whatever file it is put in the place of. Negative control: unpickled, it does what it was made for."""
    state, canary = tmp_path / "state", tmp_path / "canary"
    write(state)

    def put(path: Path) -> None:
        if how == "pickle":
            path.write_bytes(pickle.dumps(Canary(canary)))
        else:
            torch.save({"module": Canary(canary)}, path, _use_new_zipfile_serialization=how == "torch")

    for path in sorted(state.iterdir()):
        before = path.read_bytes()
        put(path)
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            Saved.open(state)
        assert not canary.exists(), path.name
        path.write_bytes(before)
    Saved.open(state)
    put(tmp_path / "control.pt")
    if how == "pickle":
        pickle.loads((tmp_path / "control.pt").read_bytes())
    else:
        torch.load(tmp_path / "control.pt", weights_only=False)
    assert canary.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fuzz")
    write(directory)
    return directory


@settings(deadline=None, max_examples=100)
@given(which=st.integers(0, 9), place=st.floats(0, 1), new=st.binary(max_size=40), cut_at=st.none() | st.floats(0, 1))
@pytest.mark.faults("F31")
def test_damaged_bytes_give_checkpoint_errors_only(
    whole: Path, which: int, place: float, new: bytes, cut_at: float | None
) -> None:
    """A change that still reads (a weight's byte) is the store's to find, by its hashes."""
    files = sorted(whole.iterdir())
    path = files[which % len(files)]
    before = path.read_bytes()
    content = bytearray(before)
    at = int(place * len(content))
    content[at : at + len(new)] = new
    path.write_bytes(content if cut_at is None else content[: int(cut_at * len(content))])
    try:
        saved = Saved.open(whole)
        for name, shape in SHAPES.items():
            saved.fill(torch.empty(prod(shape)), WEIGHT, name)
        with readable(whole):
            rng.restore(dict(saved.ranks[0].rng), CPU)
    except CheckpointError:
        return
    finally:
        path.write_bytes(before)


# --- generators


def draws() -> tuple[list[float], ...]:
    return (
        [random.random(), random.gauss(0, 1)],
        [float(np.random.rand()), float(np.random.randn())],
        torch.rand(3).tolist(),
    )


def test_generators_come_back_through_json_and_nothing_is_drawn() -> None:
    before = rng.capture(CPU)
    random.gauss(0, 1), np.random.randn()  # each keeps the second of a pair
    state = json.loads(json.dumps(rng.capture(CPU)))
    assert rng.capture(CPU) == state
    first = draws()
    assert draws() != first
    rng.restore(state, CPU)
    assert rng.capture(CPU) == state
    assert draws() == first
    rng.restore(before, CPU)


def test_generators_that_cannot_be_read_raise() -> None:
    state = rng.capture(CPU)
    for bad in ({}, {**state, "torch": "zz"}, {**state, "torch": "00"}, {**state, "python": [3, [1], None]}):
        with pytest.raises((ValueError, KeyError, TypeError, RuntimeError)):
            rng.restore(bad, CPU)
    rng.restore(state, CPU)


def test_a_deterministic_rank_fixes_threads_algorithms_and_generators() -> None:
    before, threads = rng.capture(CPU), torch.get_num_threads()
    made = RankOptions(ModelOptions("x"), steps=1)
    try:
        torch.set_num_threads(2)
        steady(made, 1)
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (2, False)
        states = []
        for rank in (1, 1, 2):
            draws()
            steady(replace(made, deterministic=True), rank)
            states.append(rng.capture(CPU))
        assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (1, True)
        assert states[0] == states[1] != states[2], "each rank its own"
        steady(replace(made, deterministic=True, threads=2), 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        rng.restore(before, CPU)


# --- numbers that are not finite


def batch() -> tuple[MicroBatch, PolicyOutput]:
    groups = [GRPO().credit(g) for g in random_groups(0, 2, 3)]
    ((x,),) = pack(groups, 1, 1000)
    logp = torch.where(x.mask(TRAINED), -1.0, torch.nan)
    return x, PolicyOutput(logp, -logp, lambda ids: ids.float())


def one(tensor: Tensor, x: MicroBatch, value: float) -> Tensor:
    """With `value` at the last token."""
    assert bool(x.mask(Origin.POLICY)[-1])
    changed = tensor.clone()
    changed[..., -1] = value
    return changed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.faults("F54")
def test_the_first_tensor_that_is_not_finite_is_named(value: float) -> None:
    x, pi = batch()
    weights = {"a.weight": torch.ones(2), "b.weight": torch.ones(3)}
    known = weights.items
    assert "are finite" in nonfinite.behind_loss(known(), x, pi)
    bad_pi = replace(pi, logp=one(pi.logp, x, value))
    assert nonfinite.behind_loss(known(), x, bad_pi).startswith("log-probs of the policy: 1 of ")
    bad_x = replace(x, behavior_logp=one(x.behavior_logp, x, value))
    assert nonfinite.behind_loss(known(), bad_x, pi).startswith("behavior_logp of the micro-batch: 1 of ")
    bad_x = replace(x, reference_logp=one(torch.zeros_like(pi.logp), x, value))
    assert nonfinite.behind_loss(known(), bad_x, pi).startswith("reference_logp of the micro-batch: 1 of ")
    bad_x = replace(x, teacher_logp=one(torch.zeros(2, len(x.tokens)), x, value))
    assert nonfinite.behind_loss(known(), bad_x, pi).startswith("teacher_logp of the micro-batch: 2 of ")
    weights["b.weight"][1] = value
    assert nonfinite.behind_loss(known(), x, bad_pi) == "the weight b.weight is not finite"


def test_gradients_are_looked_at_in_the_order_they_come() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    found: list[str] = []
    with nonfinite.watched_gradients(model, found):
        model(torch.ones(1, 2)).sum().backward()
        assert not found
        (model(torch.ones(1, 2)).sum() * torch.inf).backward()
    assert found[0].startswith("1.")
    count = len(found)
    (model(torch.ones(1, 2)).sum() * torch.inf).backward()
    assert len(found) == count, "nobody looks any more"


@pytest.mark.faults("F55")
def test_a_weight_that_is_not_finite_is_not_given_away() -> None:
    weight = torch.ones(3, 3)
    assert nonfinite.finite_weight("w", weight, 1) is weight
    huge = torch.full((4,), 3e38)
    assert nonfinite.finite_weight("w", huge, 1) is huge, "its sum is infinite, it is not"
    weight[1, 1] = torch.nan
    with pytest.raises(DivergedError, match="the weight w is not finite after step 7"):
        nonfinite.finite_weight("w", weight, 7)


def test_a_dumped_micro_batch_can_be_loaded_safely(tmp_path: Path) -> None:
    x, pi = batch()
    where = nonfinite.dump(str(tmp_path / "debug"), "step-000001", x, logp=pi.logp)
    content = torch.load(where, weights_only=True)
    assert torch.equal(content["tokens"], x.tokens)
    assert content["totals"] == asdict(x.totals)
    assert "set a debug directory" in nonfinite.dump(None, "step-000001", x)
    (tmp_path / "file").write_text("")
    assert "could not be written" in nonfinite.dump(str(tmp_path / "file"), "step-000001", x)
