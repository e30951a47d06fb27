"""A plan for people."""

import math
from collections.abc import Sequence

from rlkd.plan.check import Compared
from rlkd.plan.hardware import GIB, Hardware
from rlkd.plan.memory import Memory
from rlkd.plan.offers import Offer
from rlkd.plan.plan import Plan
from rlkd.plan.shape import Shape


def text(plan: Plan, price: float | None) -> list[str]:
    """All of it, a line each."""
    lines = [*_what(plan), "", *_memory(plan), "", *_time(plan, price), "", *_checkpoint(plan)]
    return lines + [f"{'does not fit' if i == 0 else '':<13}{s.what}" for i, s in enumerate(plan.shortages)]


def _what(plan: Plan) -> list[str]:
    d, shape, c = plan.devices, plan.models.policy, plan.config
    lines = [f"model        {shape.name}: {_parameters(shape)}"]
    lines += [f"             {name}: {_parameters(frozen)}" for name, frozen in plan.models.frozen.items()]
    lines.append(f"lengths      {plan.work.lengths.said}; at most {plan.work.lengths.longest:,} together")
    lines.append(f"step         {plan.work.sequences:,} samples, {plan.work.written:,.0f} tokens of answers, "
                 f"{plan.work.computed:,.0f} computed by the learner")  # fmt: skip
    if not plan.hardware.gpu:
        machine = f"this machine: {plan.hardware.memory / GIB:.1f} GiB, {plan.hardware.flops / 1e9:.0f} GFLOP/s"
        return [*lines, f"hardware     {machine}, {plan.hardware.bandwidth / 1e9:.1f} GB/s of memory"]
    who = [f"learner {d.learner}", f"rollout {d.rollout} ({c.sampler.workers} × {c.sampler.tensor_parallel})"]
    who += [f"{name} {n}" for name, n in d.others.items()]
    how = "shared by " if d.shared else ""
    nodes = "1 node" if d.nodes == 1 else f"{d.nodes} nodes"
    return [*lines, f"devices      {d.total} × {plan.hardware.name} on {nodes}: {how}{', '.join(who)}"]


def _parameters(shape: Shape) -> str:
    parts = ", ".join(f"{name} {millions(n)}" for name, n in shape.parts.items() if n)
    tied = ", head tied" if shape.tied else ""
    return f"{millions(shape.parameters)} parameters ({parts}{tied}), {shape.kv_heads} of {shape.heads} heads have keys"


def millions(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M" if n < 1e7 else f"{n / 1e6:.0f} M"


def _memory(plan: Plan) -> list[str]:
    """One row a role: how many processes, what each needs, of which parts."""
    title = f"GiB on a {plan.hardware.name}" if plan.hardware.gpu else "GiB"
    lines = [f"memory       {'role':<12}{'processes':>9}{title:>16}  parts"]
    for role, memory in plan.memory.items():
        size = memory.total / GIB
        lines.append(f"             {role:<12}{plan.workers[role]:>9}{size:>16.2f}  {parts(memory)}")
        if memory.host and plan.hardware.gpu:
            host = ", ".join(f"{name} {gib(n)}" for name, n in memory.host.items())
            lines.append(f"             {'':<12}{'':>9}{memory.host_total / GIB:>16.2f}  in the host's memory: {host}")
    where = "the shared disk" if plan.config.sync.kind == "disk" else "the learner's shared memory"
    lines.append(f"             {'two versions of the weights':<21}{plan.published / GIB:>16.2f}  in {where}")
    rooms = f"{plan.kv_sequences:,.0f} of the longest samples" if plan.kv_sequences >= 1 else "not one whole sample"
    if plan.config.sampler.engine == "vllm":
        lines.append(f"             a rollout worker's keys and values hold {rooms} at once")
    return lines


def parts(memory: Memory) -> str:
    """The parts that matter, largest first."""
    shown = [(n, s) for n, s in sorted(memory.parts.items(), key=lambda part: -part[1]) if s >= 0.005 * memory.total]
    return ", ".join(f"{name} {gib(size)}" for name, size in shown)


def gib(size: int | float) -> str:
    value = size / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _time(plan: Plan, price: float | None) -> list[str]:
    s, steps = plan.step, plan.config.schedule.steps
    stages = f"rollout {seconds(s.rollout)}, learn {seconds(s.learn)}, sync {seconds(s.sync)}"
    stages += f", score {seconds(s.score)}" if s.score else ""
    lines = [f"time         {seconds(s.step)} a step, by {s.bound} ({stages}; verifiers are not foreseen)"]
    each = plan.tokens_per_s / plan.devices.total
    rate = f"{plan.tokens_per_s:,.0f} tokens of answers a second"
    if plan.devices.total > 1:
        rate += f", {each:,.0f} a device"
    idle = ", ".join(f"{role} {share:.0%}" for role, share in s.idle.items() if share > 0.005)
    lines.append(f"             {rate}; {s.bubbles:.0%} of device time unused" + (f" (idle: {idle})" if idle else ""))
    whole = f"{steps:,} steps: {duration(plan.train_s)} with saves, without evaluations"
    if price is not None:
        cost, hours = plan.cost(price), plan.train_s / 3600 * plan.devices.total
        whole += f"; {hours:,.1f} device hours × {price:g} = {cost:,.2f}"
    return [*lines, f"             {whole}"]


def _checkpoint(plan: Plan) -> list[str]:
    c, g = plan.checkpoint, plan.grace
    size = f"{bytes_(c.total)} each ({bytes_(c.learner)} learner, {bytes_(c.hf)} model)"
    every = plan.config.checkpoint.every
    when = (
        f"every {duration(plan.save_every_s)}" if every is None else f"every {every} steps" if every else "at the end"
    )
    keep = plan.config.checkpoint.keep
    lines = [f"checkpoints  {size}, saved in {seconds(plan.save_s)}, {when}; {keep} kept: {bytes_(keep * c.total)}"]
    parts = f"{seconds(g.drain_s)} for a step, {seconds(g.save_s)} a save"
    parts += f", {seconds(g.upload_s)} upload" if g.upload_s else ""
    return [*lines, f"grace        {g.total_s} s from a platform's notice to its kill ({parts}, and room)"]


def seconds(s: int | float) -> str:
    return f"{s:.2f} s" if s < 10 else f"{s:.0f} s" if s < 600 else duration(s)


def duration(s: int | float) -> str:
    if s < 120:
        return f"{s:.0f} s"
    if s < 7200:
        return f"{s / 60:.0f} min"
    return f"{s / 3600:.1f} h" if s < 48 * 3600 else f"{s / 86400:.1f} days"


def bytes_(n: int | float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.1f} kB"


def scale(rows: Sequence[tuple[int, Offer | None]], hardware: Hardware, price: float | None) -> list[str]:
    """One line for each number of GPUs."""
    head = f"{hardware.name:>8}{'step':>10}{'tokens/s':>11}{'each':>8}{'unused':>8}{'hours':>9}"
    lines = [head + (f"{'cost':>12}" if price is not None else "") + "  settings"]
    for gpus, offer in rows:
        if offer is None:
            lines.append(f"{gpus:>8}  nothing that is tried here fits")
            continue
        p = offer.plan
        line = f"{gpus:>8}{seconds(p.step.step):>10}{p.tokens_per_s:>11,.0f}{p.tokens_per_s / gpus:>8,.0f}"
        line += f"{p.step.bubbles:>8.0%}{p.train_s / 3600:>9.1f}"
        lines.append(line + (f"{p.cost(price):>12,.0f}" if price is not None else "") + f"  {offer}".rstrip())
    return lines


def check(rows: Sequence[Compared]) -> list[str]:
    """Predicted beside measured."""
    lines = [f"{'':<22}{'predicted':>12}{'measured':>12}{'off':>8}"]
    for r in rows:
        measured = "unknown" if math.isnan(r.measured) else f"{r.measured:.2f} {r.unit}"
        off = "" if math.isnan(r.off) else f"{r.off:+.0%}"
        lines.append(f"{r.name:<22}{f'{r.predicted:.2f} {r.unit}':>12}{measured:>12}{off:>8}")
    return lines
