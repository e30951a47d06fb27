"""Numbers that are not finite: which tensor was the first, and the micro-batch written for people to look at."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rlkd.core.batch import MicroBatch
from rlkd.core.errors import DivergedError
from rlkd.core.ports import PolicyOutput
from rlkd.core.types import TRAINED, Origin

SIGNALS = ("reference_logp", "teacher_logp", "teacher_ids_logp")  # may be NaN for samples a loss gives no weight


def behind_loss(weights: Iterable[tuple[str, Tensor]], x: MicroBatch, pi: PolicyOutput) -> str:
    """What a loss that is not finite comes from, as far as it can be seen: weights first, then what came from them."""
    for name, weight in weights:
        if not bool(weight.isfinite().all()):
            return f"the weight {name} is not finite"
    looked = [
        ("log-probs of the policy", pi.logp, TRAINED),
        ("entropies of the policy", pi.entropy, TRAINED),
        ("behavior_logp of the micro-batch", x.behavior_logp, Origin.POLICY),
        ("advantage of the micro-batch", x.advantage, TRAINED),
    ]
    for name in SIGNALS:
        signal: Tensor | None = getattr(x, name)
        if signal is not None:
            looked.append((f"{name} of the micro-batch", signal.T if name == "teacher_logp" else signal, TRAINED))
    follows = torch.ones_like(x.segment, dtype=torch.bool)  # nobody says anything about a sample's first token
    follows[0], follows[1:] = False, x.segment[1:] == x.segment[:-1]
    for name, tensor, where in looked:
        values = tensor.detach()[x.mask(where) & follows]
        if bad := int((~values.isfinite()).sum()):
            return f"{name}: {bad} of {values.numel()} are not finite"
    return "the loss itself: weights, log-probs and the micro-batch are finite"


@contextmanager
def watched_gradients(module: nn.Module, found: list[str]) -> Iterator[None]:
    """While it lasts, names of parameters whose gradient is not finite go to `found`, the first one first."""

    def look(name: str, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            found.append(name)

    hooks = [p.register_hook(partial(look, name)) for name, p in module.named_parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def finite_weight(name: str, weight: Tensor, step: int) -> Tensor:
    """The weight, or DivergedError: such a version is not given to samplers."""
    # a sum is not finite if a term is not; the reverse is looked at more closely
    if not bool(weight.sum().isfinite()) and not bool(weight.isfinite().all()):
        raise DivergedError(
            "RLKD-T142",
            f"the weight {name} is not finite after step {step}; it was not published",
            fix="go back to a checkpoint and lower learner.lr",
        )
    return weight


def diverged(code: str, what: str, where: str) -> DivergedError:
    """A step that was not taken."""
    fix = "the weights have not moved; look at the micro-batch written there, lower learner.lr"
    return DivergedError(code, what, where=where or None, fix=fix)


def dump(directory: str | None, name: str, x: MicroBatch, **more: Tensor) -> str:
    """Write a micro-batch for people to look at (`torch.load`); where, or why not."""
    if directory is None:
        return "set a debug directory to have the micro-batch written"
    path = Path(directory) / f"{name}.pt"
    x = x.to("cpu")
    plain = {f.name: getattr(x, f.name) for f in fields(x) if f.name != "totals"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**plain, **more, "streams": dict(x.streams), "totals": asdict(x.totals)}, path)
    except (OSError, RuntimeError) as error:  # it must not hide why it was to be written
        return f"{path} could not be written: {error}"
    return str(path)


__all__ = ["behind_loss", "diverged", "dump", "finite_weight", "watched_gradients"]
