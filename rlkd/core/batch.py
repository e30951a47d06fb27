"""From groups to micro-batches, and the one way to average.

Every mean is over the whole optimizer step: a micro-batch knows the counts of the step (`Totals`), `MicroBatch.mean`
returns its *share*, and shares of all micro-batches on all ranks sum to the step's mean. So neither the number of ranks
nor the micro-batch size nor the order of samples changes a gradient.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64, Shaped, UInt8
from torch import Tensor

from rlkd.core.types import Finish, Group, Origin, Sample

Norm = Literal["token", "sequence", "sequence-sum", "constant"]

_UNIONS = tuple(range(2, 16, 2))  # every union of POLICY, TEACHER and ENVIRONMENT


@dataclass(frozen=True)
class Totals:
    """Counts over the whole step. Keys are unions of Origin."""

    samples: int
    tokens: Mapping[int, int]  # tokens written by any member of the union
    sequences: Mapping[int, int]  # samples with at least one such token

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Totals":
        tokens = dict.fromkeys(_UNIONS, 0)
        sequences = dict.fromkeys(_UNIONS, 0)
        for sample in samples:
            for union in _UNIONS:
                n = int(((sample.origin & union) != 0).sum())
                tokens[union] += n
                sequences[union] += n > 0
        return cls(len(samples), tokens, sequences)


@dataclass(frozen=True)
class MicroBatch:
    """Whole samples laid end to end: T tokens of S samples. Torch on the learner; pickles as numpy, so that Ray ships
    it without a copy."""

    tokens: Int32[Tensor, "t"]
    origin: UInt8[Tensor, "t"]
    segment: Int64[Tensor, "t"]  # which sample: 0 … S−1, ascending
    group: Int64[Tensor, "s"]  # which group of the step a sample belongs to
    behavior_logp: Float32[Tensor, "t"]  # NaN where the policy did not sample
    advantage: Float32[Tensor, "t"]
    reward: Float32[Tensor, "s"]
    truncated: Bool[Tensor, "s"]  # which samples were cut at their limit
    totals: Totals
    reference_logp: Float32[Tensor, "t"] | None = None
    teacher_logp: Float32[Tensor, "m t"] | None = None
    teacher_ids: Int32[Tensor, "t k"] | None = None  # top-k of a teacher
    teacher_ids_logp: Float32[Tensor, "t k"] | None = None
    streams: Mapping[str, Float32[Tensor, "t"]] = field(default_factory=dict)
    weight: float = 1.0  # 0 for a copy that only keeps ranks in step

    @property
    def samples(self) -> int:
        return int(self.group.shape[0])

    def mask(self, origin: Origin) -> Bool[Tensor, "t"]:
        return (self.origin & int(origin)) != 0

    def required(self, name: Literal["reference_logp", "teacher_logp"]) -> Float32[Tensor, "*_ t"]:
        """A signal the algorithm cannot do without; ValueError if a sample came without it (never taken as 0)."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{name} is missing for at least one sample of the micro-batch: was the group scored?")
        return value

    def mean(
        self, values: Float[Tensor, "t"], origin: Origin, norm: Norm = "token", length: int | None = None
    ) -> Float[Tensor, ""]:
        """This micro-batch's share of a mean over the step's tokens of `origin`; other tokens' values are ignored,
        NaN included. M tokens, N samples in the step:

            token         Σ v / M
            sequence      Σ_i (Σ_t v / |o_i|) / N
            sequence-sum  Σ v / N
            constant      Σ v / (N · length)        Dr. GRPO; `length` must be given
        """
        values = torch.where(self.mask(origin), values, torch.zeros_like(values))
        if norm == "token":
            return values.sum() / max(self.totals.tokens[int(origin)], 1)
        if norm == "constant":
            if length is None:
                raise ValueError("norm='constant' needs `length`, the constant number of tokens a sample is divided by")
            return values.sum() / (self.totals.samples * length)
        sequences = max(self.totals.sequences[int(origin)], 1)
        if norm == "sequence-sum":
            return values.sum() / sequences
        return self.per_sequence(values, origin).sum() / sequences

    def share(self, per_sample: Float[Tensor, "s"]) -> Float[Tensor, ""]:
        """This micro-batch's share of a mean over the step's samples."""
        return per_sample.sum() / self.totals.samples

    def per_sequence(
        self, values: Float[Tensor, "t"], origin: Origin, how: Literal["mean", "sum"] = "mean"
    ) -> Float[Tensor, "s"]:
        """Each sample's mean or sum over its tokens of `origin`; 0 for a sample without such tokens."""
        mask = self.mask(origin)
        values = torch.where(mask, values, torch.zeros_like(values))
        sums = torch.zeros(self.samples, dtype=values.dtype, device=values.device).index_add(0, self.segment, values)
        if how == "sum":
            return sums
        counts = torch.zeros_like(sums).index_add(0, self.segment, mask.to(values.dtype))
        return sums / counts.clamp(min=1)

    def spread(self, per_sample: Shaped[Tensor, "s"]) -> Shaped[Tensor, "t"]:
        """Each sample's value at each of its tokens."""
        return per_sample[self.segment]

    def to(self, device: torch.device | str) -> "MicroBatch":
        moved = {f.name: _map(getattr(self, f.name), lambda a: a.to(device)) for f in fields(self)}
        return replace(self, **moved)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: _map(getattr(self, f.name), lambda a: a.numpy()) for f in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, _map(value, lambda a: torch.from_numpy(np.array(a))))


def _map(value: Any, change: Any) -> Any:
    """`change` applied to an array, or to each array of a mapping; anything else as it is."""
    if isinstance(value, Tensor | np.ndarray):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value


def microbatch(samples: Sequence[Sample], groups: Sequence[int], totals: Totals, weight: float = 1.0) -> MicroBatch:
    """Lay samples end to end. `groups[i]` says which group of the step sample i belongs to.

    A signal is taken only if every sample has it; a missing advantage or stream is an error of the algorithm's credit.
    """

    def flat(arrays: Sequence[np.ndarray], axis: int = 0) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays, axis=axis))

    def optional(name: str, axis: int = 0) -> Tensor | None:
        arrays = [getattr(s, name) for s in samples]
        return None if any(a is None for a in arrays) else flat(arrays, axis)

    lengths = [len(s.tokens) for s in samples]
    topk = [s.teacher_topk for s in samples]
    known = [t for t in topk if t is not None]
    everywhere = len(known) == len(samples)
    return MicroBatch(
        tokens=flat([s.tokens for s in samples]),
        origin=flat([s.origin for s in samples]),
        segment=torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)),
        group=torch.tensor(groups, dtype=torch.int64),
        behavior_logp=flat([s.behavior_logp for s in samples]),
        advantage=flat([np.zeros(n, np.float32) if s.advantage is None else s.advantage
                        for s, n in zip(samples, lengths, strict=True)]),
        reward=torch.tensor([s.reward for s in samples], dtype=torch.float32),
        truncated=torch.tensor([s.finish == Finish.LENGTH for s in samples]),
        totals=totals,
        reference_logp=optional("reference_logp"),
        teacher_logp=optional("teacher_logp", axis=1),
        teacher_ids=flat([t.ids for t in known]) if everywhere else None,
        teacher_ids_logp=flat([t.logp for t in known]) if everywhere else None,
        streams={name: flat([s.streams[name] for s in samples]) for name in samples[0].streams},
        weight=weight,
    )  # fmt: skip


@dataclass(frozen=True)
class _Unit:
    """Samples of one group that stay together, and how many tokens the learner computes for them."""

    group: int
    samples: tuple[Sample, ...]
    cost: int


def shared_prompt(samples: Sequence[Sample]) -> int:
    """How many leading PROMPT tokens all samples have in common; a forward pass computes them once."""
    first = samples[0]
    n = _prompt_length(first)
    for sample in samples[1:]:
        m = min(n, _prompt_length(sample))
        same = first.tokens[:m] == sample.tokens[:m]
        n = m if same.all() else int(np.argmin(same))
    return n


def _prompt_length(sample: Sample) -> int:
    written = np.flatnonzero(sample.origin != Origin.PROMPT)
    return int(written[0]) if len(written) else len(sample.tokens)


def _cost(samples: Sequence[Sample]) -> int:
    return sum(len(s.tokens) for s in samples) - (len(samples) - 1) * shared_prompt(samples)


def _units(groups: Sequence[Group], max_tokens: int, whole_groups: bool) -> list[_Unit]:
    """A group that fits is one unit; a larger one is cut into runs that fit, longest sample first."""
    units = []
    for index, group in enumerate(groups):
        run: list[Sample] = []
        for sample in sorted(group.samples, key=lambda s: -len(s.tokens)):
            if run and not whole_groups and _cost([*run, sample]) > max_tokens:
                units.append(_Unit(index, tuple(run), _cost(run)))
                run = []
            run.append(sample)
        if run:
            units.append(_Unit(index, tuple(run), _cost(run)))
    return units


def pack(groups: Sequence[Group], ranks: int, max_tokens: int, whole_groups: bool = False) -> list[list[MicroBatch]]:
    """One step as micro-batches [turn][rank] of at most `max_tokens` computed tokens each, balanced over ranks.

    Longest unit to the least loaded rank, then first fit per rank. Every rank gets the same number of turns; a rank
    with nothing left gets a copy of weight 0, or collectives would hang. A unit that alone exceeds `max_tokens` (a
    sample, or a group under `whole_groups`) raises ValueError.
    """
    totals = Totals.of([s for g in groups for s in g.samples])
    units = sorted(_units(groups, max_tokens, whole_groups), key=lambda u: -u.cost)
    if not units:
        raise ValueError("nothing to pack: the step has no samples")
    if units[0].cost > max_tokens:
        what = "a group" if whole_groups else "a sample"
        raise ValueError(f"{what} of {units[0].cost} tokens does not fit in learner.max_tokens={max_tokens}")
    load = [0] * ranks
    bins: list[list[list[_Unit]]] = [[] for _ in range(ranks)]
    for unit in units:
        rank = load.index(min(load))
        load[rank] += unit.cost
        for content in bins[rank]:
            if sum(u.cost for u in content) + unit.cost <= max_tokens:
                content.append(unit)
                break
        else:
            bins[rank].append([unit])
    packed = [[_assemble(content, totals) for content in bins[rank]] for rank in range(ranks)]
    turns = max(len(p) for p in packed)
    spare = replace(packed[0][0], weight=0.0)
    return [[p[turn] if turn < len(p) else spare for p in packed] for turn in range(turns)]


def _assemble(units: Sequence[_Unit], totals: Totals) -> MicroBatch:
    samples = [s for u in units for s in u.samples]
    return microbatch(samples, [u.group for u in units for _ in u.samples], totals)


class Shares:
    """Adds up shares of metrics, micro-batch by micro-batch; maxima keep the largest value."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.maxima: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], maxima: Mapping[str, Tensor], weight: float) -> None:
        if weight == 0.0:
            return
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * weight
        for name, value in maxima.items():
            if not torch.isnan(value):
                self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    @staticmethod
    def merged(parts: Sequence["Shares"]) -> dict[str, float]:
        """The step's metrics from every rank's shares. Ranks may know different names."""
        total: dict[str, float] = {}
        for part in parts:
            for name, value in part.sums.items():
                total[name] = total.get(name, 0.0) + value
        for part in parts:
            for name, value in part.maxima.items():
                total[name] = max(total.get(name, float("-inf")), value)
        return total


def effective_sample_size(metrics: Mapping[str, float]) -> dict[str, float]:
    """`mismatch/ess` of a whole step, from its means of w = π/μ and w² over n tokens: (Σw)² / (n Σw²), the share of the
    tokens that as many equal weights would be worth. 1: sampler and learner agree; 1/n: one token outweighs all others.
    Of sums over the step alone: a mean of micro-batches' own shares would be too large. Nothing without sampled tokens.
    """
    mean, square = metrics.get("mismatch/weight", 0.0), metrics.get("mismatch/weight_squared", 0.0)
    return {"mismatch/ess": mean**2 / square} if square else {}


__all__ = ["MicroBatch", "Norm", "Shares", "Totals", "effective_sample_size", "microbatch", "pack", "shared_prompt"]
