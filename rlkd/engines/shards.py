"""The learner's state as files: every rank writes the elements it keeps, any number of ranks reads them back.

    state.json                 step, ranks, ZeRO stage, dtype, the model's sizes, names and shapes of its parameters
    rank-0003.json             this rank's generators, digests and files
    rank-0003-000.safetensors  float32, flat: "weight NAME", "exp_avg NAME", "exp_avg_sq NAME", and in the file's
                               metadata the place of each piece's first element within its parameter

Only safetensors and JSON are read: there is no pickle that could run code. What is read must cover every element of
every parameter exactly once; otherwise it is a CheckpointError before anything is changed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from jaxtyping import Float, Float32
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlkd.core.errors import CheckpointError

FORMAT = 1
STATE = "state.json"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
FILE_BYTES = 1 << 30  # of one file: what is copied to host memory at once


@dataclass(frozen=True)
class Facts:
    """What state.json says about all ranks together."""

    step: int  # optimizer steps of the run
    moments_step: int  # of the optimizer's own count; 0: there are no moments
    skipped: int  # steps left out because something was not finite
    nonfinite: int  # of these, in a row up to here
    ranks: int
    zero_stage: int
    dtype: str  # of the weights the model computes with; what is stored is float32
    device: str
    model: Mapping[str, Any]  # sizes for people
    parameters: Mapping[str, Sequence[int]]  # name → shape
    format: int = FORMAT


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements, flattened, beginning at element `start`: its weight and its moments."""

    name: str
    start: int
    tensors: Mapping[str, Float32[Tensor, "_"]]  # by kind, all of one length


@dataclass(frozen=True)
class RankFacts:
    """What rank-….json says about one rank."""

    files: Sequence[str]
    layout: str  # of which pieces this rank keeps
    digests: Mapping[str, str]  # of each component, as it was saved
    rng: Mapping[str, Any]


def write_pieces(directory: Path, rank: int, pieces: Sequence[Piece], file_bytes: int = FILE_BYTES) -> list[str]:
    """This rank's safetensors files, by name. OSError if they cannot be written."""
    names = []
    for part, few in enumerate(_split(pieces, file_bytes)):
        tensors = {f"{kind} {p.name}": t.detach().cpu().contiguous() for p in few for kind, t in p.tensors.items()}
        names.append(f"rank-{rank:04d}-{part:03d}.safetensors")
        starts = json.dumps({p.name: p.start for p in few})
        try:
            save_file(tensors, directory / names[-1], metadata={"starts": starts})
        except SafetensorError as error:  # as it calls a full disk, too
            raise OSError(f"{directory / names[-1]}: {error}") from error
    return names


def _split(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    few: list[Piece] = []
    held = 0
    for piece in pieces:
        needs = sum(t.numel() * 4 for t in piece.tensors.values())
        if few and held + needs > size:
            yield few
            few, held = [], 0
        few.append(piece)
        held += needs
    if few:
        yield few


def write_rank(directory: Path, rank: int, facts: RankFacts) -> None:
    (directory / _rank_file(rank)).write_text(json.dumps(asdict(facts)))


def write_facts(directory: Path, facts: Facts) -> None:
    (directory / STATE).write_text(json.dumps(asdict(facts), indent=1))


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.json"


@dataclass(frozen=True)
class _Stored:
    """Where `count` elements of a tensor from element `start` on lie."""

    start: int
    count: int
    key: str
    file: Any  # an open safetensors file


class Saved:
    """What a directory holds. `open` raises CheckpointError unless it is whole; nothing is read but headers."""

    def __init__(self, directory: Path, facts: Facts, ranks: Sequence[RankFacts]) -> None:
        self.directory, self.facts, self.ranks = directory, facts, ranks

    @classmethod
    def open(cls, directory: str | Path) -> "Saved":
        directory = Path(directory)
        with readable(directory):
            if not (directory / STATE).is_file():
                raise unreadable(directory, f"there is no {STATE} in it")
            raw = json.loads((directory / STATE).read_text())
            if raw["format"] != FORMAT:
                raise CheckpointError(
                    "RLKD-K143",
                    f"the learner's state has format {raw['format']!r}; this version of rlkd reads format {FORMAT}",
                    where=str(directory / STATE),
                    fix="resume with the version of rlkd that wrote it, or start anew from its exported model",
                )
            facts = _facts(raw)
            found = cls(directory, facts, [_rank_facts(directory, r) for r in range(facts.ranks)])
            found.check_whole()
        return found

    @cached_property
    def _stored(self) -> dict[str, list[_Stored]]:
        """By "kind name", in the order of their elements."""
        found: dict[str, list[_Stored]] = {}
        for name in [name for rank in self.ranks for name in rank.files]:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise unreadable(self.directory, f"{name!r} is not the name of a file of the learner's")
            file = safe_open(self.directory / name, "pt")
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(key)
                if part.get_dtype() != "F32" or len(part.get_shape()) != 1:
                    raise unreadable(self.directory, f"{name}: {key} is not flat float32")
                start = int(starts[key.partition(" ")[2]])
                found.setdefault(key, []).append(_Stored(start, part.get_shape()[0], key, file))
        return {key: sorted(parts, key=lambda p: p.start) for key, parts in found.items()}

    def check_whole(self) -> None:
        """CheckpointError unless each element of each tensor is there once."""
        kinds = (WEIGHT, *MOMENTS) if self.facts.moments_step else (WEIGHT,)
        wanted = {f"{kind} {name}": prod(s) for name, s in self.facts.parameters.items() for kind in kinds}
        for key, count in wanted.items():
            end = 0
            for part in self._stored.get(key, []):
                if part.start != end:
                    raise unreadable(self.directory, f"{key}: element {min(end, part.start)} is missing or there twice")
                end += part.count
            if end != count:
                raise unreadable(self.directory, f"{key}: {end} of {count} elements; is a rank's file missing?")
        if more := sorted(self._stored.keys() - wanted.keys()):
            raise unreadable(self.directory, f"{more[0]} is in its files and not in {STATE}")

    def fill(self, into: Float[Tensor, "n"], kind: str, name: str, start: int = 0) -> None:
        """Copy elements of a tensor from element `start` on, wherever they lie; `into` may have any dtype."""
        end = start + len(into)
        with readable(self.directory):
            for part in self._stored[f"{kind} {name}"]:
                a, b = max(start, part.start), min(end, part.start + part.count)
                if a < b:
                    some = part.file.get_slice(part.key)[a - part.start : b - part.start]
                    into[a - start : b - start].copy_(some)


def _facts(raw: Mapping[str, Any]) -> Facts:
    whole = ("step", "moments_step", "skipped", "nonfinite", "ranks", "zero_stage")
    if not all(isinstance(raw[name], int) and raw[name] >= 0 for name in whole):
        raise ValueError(f"{', '.join(whole)} must be whole numbers, not negative")
    if not 1 <= raw["ranks"] <= 9999:
        raise ValueError(f"ranks {raw['ranks']}")
    shapes = {str(name): [int(n) for n in shape] for name, shape in raw["parameters"].items()}
    return Facts(**{**raw, "model": dict(raw["model"]), "parameters": shapes})


def _rank_facts(directory: Path, rank: int) -> RankFacts:
    path = directory / _rank_file(rank)
    if not path.is_file():
        raise unreadable(directory, f"{path.name} is missing")
    facts = RankFacts(**json.loads(path.read_text()))
    if not all(isinstance(name, str) for name in facts.files):
        raise ValueError(f"{path.name}: files {facts.files}")
    return facts


@contextmanager
def readable(directory: str | Path) -> Iterator[None]:
    """Whatever a damaged or foreign file makes of its reader is one CheckpointError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError, SafetensorError,
            RecursionError) as error:  # fmt: skip
        raise unreadable(directory, f"{type(error).__name__}: {str(error)[:300]}") from error


def unreadable(directory: str | Path, why: str) -> CheckpointError:
    return CheckpointError(
        "RLKD-K140",
        f"the learner's state cannot be loaded: {why}",
        where=str(directory),
        fix="resume from another checkpoint (`rlkd ckpt ls RUN` lists them)",
    )


__all__ = [
    "FORMAT", "MOMENTS", "STATE", "WEIGHT", "Facts", "Piece", "RankFacts", "Saved", "readable", "unreadable",
    "write_facts", "write_pieces", "write_rank",
]  # fmt: skip
