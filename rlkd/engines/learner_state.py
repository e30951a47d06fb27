"""What one rank of the learner must keep, in and out of a DeepSpeed engine of any ZeRO stage.

Every rank keeps spans of the parameters: all of each under ZeRO-0, its partition under the others. Their float32
weights and their moments go into files by name (rlkd.engines.shards), and come back into whatever spans the ranks of
another run keep. DeepSpeed's own checkpoints are not used: they are pickles, tied to the number of ranks and the
stage, and its converter (`ds_to_universal`) reads pickles too, works beforehand on disk, and knows no ZeRO-0.

Read in DeepSpeed 0.19.8: under ZeRO-1 and 2 (and its BF16_Optimizer) `_hp_mapping` says where a parameter's elements
lie in the flat float32 tensor that is stepped; under ZeRO-3 `grad_position` does. `optimizer.state` is keyed by these
flat tensors. Nothing here is a collective: a rank that dies while it saves keeps no other waiting.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from jaxtyping import Float
from torch import Tensor

from rlkd.core.errors import CheckpointError
from rlkd.core.faults import fault
from rlkd.engines import rng
from rlkd.engines.model import Policy
from rlkd.engines.shards import (
    MOMENTS,
    WEIGHT,
    Facts,
    Piece,
    RankFacts,
    Saved,
    readable,
    write_facts,
    write_pieces,
    write_rank,
)  # fmt: skip

SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "tie_word_embeddings")  # fmt: skip
SHOWN = 4  # differences between two models


@dataclass(frozen=True)
class Counts:
    """What a learner counts, beside its tensors. The learning rate follows from `step`."""

    step: int = 0  # optimizer steps taken
    skipped: int = 0  # steps left out because something was not finite
    nonfinite: int = 0  # of these, in a row up to now


@dataclass(frozen=True)
class Span:
    """A run of one parameter's elements that this rank steps."""

    name: str
    start: int  # in the parameter, flattened
    count: int
    flat: Tensor  # float32: what the optimizer steps, and the key of its state
    offset: int  # in `flat`

    def of(self, whole: Tensor) -> Float[Tensor, "_"]:
        """This run in `flat` or in one of its moments."""
        return whole.detach().view(-1)[self.offset : self.offset + self.count]


class LearnerState:
    """A rank's weights, moments, counts and generators."""

    def __init__(self, policy: Policy, engine: Any, optimizer: torch.optim.Optimizer, rank: int, ranks: int) -> None:
        """`engine` is DeepSpeed's around `policy`, `optimizer` the one that was given to it."""
        self._policy, self._optimizer, self._rank, self._ranks = policy, optimizer, rank, ranks
        self._stage = int(engine.zero_optimization_stage())
        self._zero = engine.optimizer
        self._named = list(policy.model.named_parameters())
        self._device: torch.device = engine.device

    # --- out

    def save(self, directory: str | Path, counts: Counts) -> dict[str, str]:
        """Write this rank's part; digests of each component. OSError if it cannot be written."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        spans, steps = self._spans(), self._moments_step()
        mine = spans if self._stage or self._rank == 0 else []  # under ZeRO-0 all ranks keep the same
        files = write_pieces(directory, self._rank, [self._piece(s, steps) for s in mine])
        fault("learner.save", self._rank)
        generators = rng.capture(self._device)
        digests = self._digests(spans, counts, generators)
        write_rank(directory, self._rank, RankFacts(files, self._layout(spans), digests, generators))
        if self._rank == 0:
            write_facts(directory, self._facts(counts, steps))
        return digests

    def _facts(self, counts: Counts, moments_step: int) -> Facts:
        config = self._policy.model.config.get_text_config()
        return Facts(
            step=counts.step,
            moments_step=moments_step,
            skipped=counts.skipped,
            nonfinite=counts.nonfinite,
            ranks=self._ranks,
            zero_stage=self._stage,
            dtype=str(self._named[0][1].dtype).removeprefix("torch."),
            device=self._device.type,
            model={key: value for key in SIZES if isinstance(value := getattr(config, key, None), int | str)},
            parameters={name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._named},
        )

    def _piece(self, span: Span, moments_step: int) -> Piece:
        tensors = {WEIGHT: span.of(span.flat)}
        if moments_step:
            tensors |= {kind: span.of(self._optimizer.state[span.flat][kind]) for kind in MOMENTS}
        return Piece(span.name, span.start, tensors)

    # --- in

    def load(self, directory: str | Path) -> tuple[Counts, dict[str, str]]:
        """Put back what `save` wrote, with any number of ranks, ZeRO stage and dtype; generators come last.

        With another number of ranks all generators start from those of rank 0. Digests are of the components that can
        be compared with rank 0's (same ranks: this rank's) of the save; CheckpointError if one of these is another
        now, or for what cannot be read or belongs to another model.
        """
        saved = Saved.open(directory)
        facts, source = saved.facts, self._rank if saved.facts.ranks == self._ranks else 0
        self._check_model(saved)
        spans = self._spans()
        with torch.no_grad():
            if self._stage == 3:
                self._zero.checkpoint_event_prologue()  # small parameters are kept whole between steps
            self._load_stepped(saved, spans)
            self._load_computed(saved, spans)
            if self._stage == 3:
                self._zero.checkpoint_event_epilogue()
        counts = Counts(facts.step, facts.skipped, facts.nonfinite)
        with readable(directory):
            rng.restore(dict(saved.ranks[source].rng), self._device)
        found = self._digests(spans, counts, rng.capture(self._device))
        same = self._comparable(facts, saved.ranks[source].layout == self._layout(spans))
        digests = {name: digest for name, digest in found.items() if name in same}
        self._check_digests(directory, digests, saved.ranks[source].digests)
        return counts, digests

    def _load_stepped(self, saved: Saved, spans: Sequence[Span]) -> None:
        """What the optimizer steps, and its moments."""
        for flat in {id(s.flat): s.flat for s in spans}.values():
            self._optimizer.state.pop(flat, None)
            if saved.facts.moments_step:
                step = torch.tensor(float(saved.facts.moments_step), device=flat.device)  # as torch makes it if fused
                moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                self._optimizer.state[flat] = {"step": step, **moments}
        for span in spans:
            for kind, tensor in self._piece(span, saved.facts.moments_step).tensors.items():
                saved.fill(tensor, kind, span.name, span.start)

    def _load_computed(self, saved: Saved, spans: Sequence[Span]) -> None:
        """What the model computes with, where it is not the same tensor."""
        if self._stage == 3:
            parameters = dict(self._named)
            for span in spans:
                parameters[span.name].ds_tensor.view(-1)[: span.count].copy_(span.of(span.flat))
        elif self._stage:
            for name, p in self._named:
                saved.fill(p.detach().view(-1), WEIGHT, name)

    def _check_model(self, saved: Saved) -> None:
        mine = self._facts(Counts(), 0)
        theirs = saved.facts
        differ = [f"{key} {theirs.model.get(key)!r}, here {mine.model.get(key)!r}"
                  for key in SIZES if theirs.model.get(key) != mine.model.get(key)]  # fmt: skip
        for name in sorted(mine.parameters.keys() | theirs.parameters.keys()):
            a, b = theirs.parameters.get(name), mine.parameters.get(name)
            if a is None or b is None or list(a) != list(b):
                differ.append(f"{name} {_shape(a)}, here {_shape(b)}")
        if {n: list(s) for n, s in theirs.parameters.items()} != {n: list(s) for n, s in mine.parameters.items()}:
            more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
            raise CheckpointError(
                "RLKD-K141",
                f"the checkpoint is of another model: {'; '.join(differ[:SHOWN])}{more}",
                where=str(saved.directory),
                fix="set model.path to the model it was trained from, or start a new run in another directory",
            )

    def _comparable(self, facts: Facts, same_spans: bool) -> set[str]:
        """The components whose digest must be that of the save."""
        mine = self._facts(Counts(), 0)
        found = {"step"}
        if facts.device == mine.device:
            found.add("rng")
        if facts.dtype == mine.dtype:
            whole = 3 not in (facts.zero_stage, mine.zero_stage)  # every rank computes with all weights
            found |= ({"weights"} if whole or same_spans else set()) | ({"optimizer"} if same_spans else set())
        return found

    def _check_digests(self, directory: str | Path, found: Mapping[str, str], saved: Mapping[str, str]) -> None:
        if wrong := sorted(name for name, digest in found.items() if saved.get(name) != digest):
            raise CheckpointError(
                "RLKD-K142",
                f"rank {self._rank}: {' and '.join(wrong)} after loading are not what was saved",
                where=str(directory),
                fix="this is a bug of rlkd or a fault of the machine's memory; resume from another checkpoint",
            )

    # --- where everything lies

    def _spans(self) -> list[Span]:
        if self._stage == 0:
            return [Span(name, 0, p.numel(), p, 0) for name, p in self._named]
        found = [self._span3(name, p) if self._stage == 3 else self._span12(name, p) for name, p in self._named]
        return [span for span in found if span is not None and span.count > 0]

    def _span12(self, name: str, p: Any) -> Span | None:
        mapping = p._hp_mapping
        if mapping is None:  # all of it lies with other ranks
            return None
        flat = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        at, inside = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Span(name, inside.start, inside.numel, flat, at.start)

    def _span3(self, name: str, p: Any) -> Span:
        group, offset, count = self._zero.grad_position[self._zero.get_param_id(p)]
        start = self._rank * count
        return Span(name, start, min(count, p.ds_numel - start), self._zero.fp32_partitioned_groups_flat[group], offset)

    def _moments_step(self) -> int:
        """The optimizer's own count of steps; 0 if it has taken none."""
        steps = {int(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        if len(steps) > 1:
            raise RuntimeError(f"the parameters were stepped unequally often: {sorted(steps)}")
        return steps.pop() if steps else 0

    # --- digests

    def _layout(self, spans: Sequence[Span]) -> str:
        return _digest_text([self._stage > 0, [(s.name, s.start, s.count) for s in spans]])

    def _digests(self, spans: Sequence[Span], counts: Counts, generators: Mapping[str, Any]) -> dict[str, str]:
        """blake3 of each component of this rank: what the model computes with, what the optimizer steps with."""
        weights, optimizer = blake3(max_threads=blake3.AUTO), blake3(max_threads=blake3.AUTO)
        if self._stage == 3:
            parameters = dict(self._named)
            computed = [(s.name, parameters[s.name].ds_tensor.view(-1)[: s.count]) for s in spans]
        else:
            computed = [(name, p) for name, p in self._named]
        for name, tensor in computed:
            _digest_tensor(weights, name, tensor)
        steps = self._moments_step()
        optimizer.update(str(steps).encode())
        for span in spans:
            for kind, tensor in self._piece(span, steps).tensors.items():
                if self._stage or kind != WEIGHT:  # under ZeRO-0 it is the weight above
                    _digest_tensor(optimizer, f"{kind} {span.name}", tensor)
        return {
            "weights": weights.hexdigest(),
            "optimizer": optimizer.hexdigest(),
            "rng": _digest_text(generators),
            "step": _digest_text([counts.step, counts.skipped, counts.nonfinite]),
        }


def _digest_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tensor.numel()}\n".encode())
    digest.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy())


def _digest_text(value: Any) -> str:
    return str(blake3(json.dumps(value, sort_keys=True).encode()).hexdigest())


def _shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "one number"


__all__ = ["Counts", "LearnerState", "Span"]
