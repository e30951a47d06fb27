"""`rlkd plan`: from a recipe and a few options to the plan, the refusal with what would fit, or the comparison."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd import calibration, inputs
from rlkd.config.schema import Config
from rlkd.core.errors import ConfigError, PreflightError, RlkdError
from rlkd.plan import check, hardware, offers, words
from rlkd.plan.hardware import GIB, Hardware
from rlkd.plan.offers import Offer
from rlkd.plan.plan import Models, Plan, planned
from rlkd.plan.seconds import Learned
from rlkd.plan.shape import config_of, shape_of
from rlkd.plan.work import Lengths, assumed, scorers, work_of, writers
from rlkd.report.history import History

DEFAULT = "H100"  # of a recipe for GPUs
SCALE = tuple(2**i for i in range(11))  # 1 … 1024


@dataclass(frozen=True)
class Asked:
    """The command's options."""

    gpus: int | None = None
    hardware: str | None = None
    price: float | None = None
    prompt: float | None = None
    answer: float | None = None
    scale: bool = False
    calibrate: bool = True
    again: bool = False


@dataclass(frozen=True)
class Basis:
    """What a plan is made from."""

    models: Models
    hardware: Hardware
    lengths: Lengths
    learned: Learned | None

    def plan(self, config: Config) -> Plan:
        return planned(config, self.models, self.hardware, self.lengths, self.learned)


def plan(config: Config, asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan; PreflightError RLKD-E182 (exit 3) if it does not fit, with what would."""
    _valid(asked)
    basis = _basis(config, asked, say)
    found, offer = basis.plan(config), None
    if asked.scale:
        rows = offers.table(found, SCALE, basis.lengths)
        return _scaled(found, rows, asked.price)
    if asked.gpus is not None and asked.gpus != found.devices.total:
        offer = offers.best(found, asked.gpus, basis.lengths)
        if offer is None:
            what = f"nothing that was tried makes this recipe fit into {asked.gpus} × {basis.hardware.name}"
            raise PreflightError("RLKD-E182", what, "rlkd plan", _fix(found, basis))
        found = offer.plan
    if not found.fits:
        say("\n".join(words.text(found, asked.price)))
        what = "; ".join(s.what for s in found.shortages)
        raise PreflightError("RLKD-E182", what, "rlkd plan", _fix(found, basis))
    lines = words.text(found, asked.price)
    if offer is not None and offer.changes:
        lines += ["", f"settings     {offer}   (give them to `rlkd train` too)"]
    return {**_numbers(found, asked.price), "settings": dict(offer.changes) if offer else {}, "text": "\n".join(lines)}


def compare(config: Config, run: Path, asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """Predicted beside what this run measured."""
    try:
        rows = History.read(run).rows
    except (OSError, ValueError) as e:
        what = f"the run's metrics cannot be read: {e}"
        raise PreflightError("RLKD-E184", what, where=str(run), fix="give a run's folder") from e
    if not rows:
        fix = "let it train a few steps, then compare"
        raise PreflightError("RLKD-E184", "the run has trained no step yet", where=str(run), fix=fix)
    prompt = asked.prompt if asked.prompt is not None else _read_prompt(config, say)
    shape = shape_of(config.model.path)
    guess = assumed(config, shape).prompt
    try:
        lengths = check.lengths_of(rows, guess if prompt is None else prompt)
    except ValueError as e:
        raise PreflightError("RLKD-E184", str(e), where=str(run / "metrics.jsonl"), fix="compare a newer run") from e
    basis = _basis(config, asked, say, lengths)
    found = basis.plan(config)
    compared = check.compared(found, rows)
    lines = [f"{run}: {len(rows)} steps; {lengths.said}", *words.check(compared)]
    numbers = {c.name: {"unit": c.unit, "predicted": c.predicted, "measured": _known(c.measured)} for c in compared}
    return {"run": str(run), "steps": len(rows), "compared": numbers, "text": "\n".join(lines)}


def _valid(asked: Asked) -> None:
    for name, value in (("price", asked.price), ("prompt-tokens", asked.prompt), ("answer-tokens", asked.answer)):
        least = 0 if name == "price" else 1
        if value is not None and not least <= value < math.inf:
            raise ConfigError("RLKD-C432", f"--{name} {value:g}", "command line", f"a finite number, at least {least}")


def _basis(config: Config, asked: Asked, say: Callable[[str], None], lengths: Lengths | None = None) -> Basis:
    name = asked.hardware
    if name is None:
        name = DEFAULT if config.model.device == "cuda" or asked.gpus is not None or asked.scale else hardware.CPU
    machine = hardware.of(name, calibration.this_machine())
    if asked.gpus is not None or asked.scale:
        offers.wanted(1 if asked.gpus is None else asked.gpus, machine)
    policy = shape_of(config.model.path)
    frozen = {n: shape_of(_path(config, n), f"{_key(n)}.path") for n in {**scorers(config), **writers(config)}}
    if lengths is None:
        prompt = asked.prompt if asked.prompt is not None else _read_prompt(config, say)
        lengths = assumed(config, policy, prompt, asked.answer)
    learned = None
    if not machine.gpu and asked.calibrate:
        content = config_of(config.model.path)
        machine, learned = calibration.calibrated(config, content, work_of(config, lengths), say, asked.again)
    return Basis(Models(policy, frozen), machine, lengths, learned)


def _path(config: Config, name: str) -> str:
    settings = config.reference if name == "reference" else config.teachers[name]
    return settings.path or config.model.path


def _key(name: str) -> str:
    return name if name == "reference" else f"teachers.{name}"


def _read_prompt(config: Config, say: Callable[[str], None]) -> float | None:
    """Mean tokens of a prompt, of the recipe's own data; None where model or data are not on this machine."""
    try:
        prompts = inputs.read(config, teachers=False).data.train.prompts
    except RlkdError as e:
        say(f"the lengths of prompts are assumed, for the data cannot be read here: {e.problems[0].what}")
        return None
    return sum(len(p.tokens) for p in prompts) / len(prompts)


def _fix(found: Plan, basis: Basis) -> str:
    """What would fit, in words."""
    ways = offers.offers(found, basis.lengths, basis.learned)
    if not ways:
        return "nothing that is tried here fits: a smaller model, shorter answers, or larger devices"
    lines = []
    for way in ways:
        d, s = way.plan.devices, way.plan.step.step
        on = f"{d.total} × {basis.hardware.name}" if basis.hardware.gpu else "this machine"
        lines.append(f"{way}   (on {on}: {words.seconds(s)} a step)")
    return "what fits:\n      " + "\n      ".join(lines)


def _scaled(found: Plan, rows: list[tuple[int, Offer | None]], price: float | None) -> dict[str, Any]:
    lines = [f"{found.models.policy.name}; {found.work.lengths.said}", *words.scale(rows, found.hardware, price)]
    table = [{"gpus": n, "settings": None} if o is None else {**_numbers(o.plan, price), "settings": dict(o.changes)}
             for n, o in rows]  # fmt: skip
    return {"table": table, "text": "\n".join(lines)}


def _numbers(p: Plan, price: float | None) -> dict[str, Any]:
    """For programs."""
    memory = {role: {"processes": p.workers[role], "gib": m.total / GIB, "host_gib": m.host_total / GIB,
                     "parts": {name: size / GIB for name, size in m.parts.items()}}
              for role, m in p.memory.items()}  # fmt: skip
    s, c, g, shape = p.step, p.checkpoint, p.grace, p.models.policy
    saves = {"bytes": c.total, "learner": c.learner, "hf": c.hf, "save_s": p.save_s, "every_s": p.save_every_s}
    return {
        "model": {"name": shape.name, "parameters": shape.parameters, "parts": shape.parts},
        "hardware": p.hardware.name,
        "devices": p.devices.total,
        "nodes": p.devices.nodes,
        "lengths": {"prompt": p.work.lengths.prompt, "answer": p.work.lengths.answer, "from": p.work.lengths.said},
        "memory": memory,
        "published_gib": p.published / GIB,
        "kv_sequences": p.kv_sequences,
        "seconds": {"step": s.step, "rollout": s.rollout, "score": s.score, "learn": s.learn, "sync": s.sync},
        "bound": s.bound,
        "idle": dict(s.idle),
        "bubbles": s.bubbles,
        "tokens_per_s": p.tokens_per_s,
        "hours": p.train_s / 3600,
        "cost": None if price is None else p.cost(price),
        "checkpoint": saves,
        "grace_s": g.total_s,
    }


def _known(value: float) -> float | None:
    return None if value != value else value
