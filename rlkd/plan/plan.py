"""The whole plan of a recipe on some hardware: what every process needs, how long a step takes, what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlkd.config.schema import Config
from rlkd.plan import memory as memories
from rlkd.plan import saving, seconds
from rlkd.plan.devices import Devices, devices
from rlkd.plan.hardware import GIB, Hardware
from rlkd.plan.memory import Memory
from rlkd.plan.precision import weight_size, zero_stage
from rlkd.plan.saving import Checkpoint, Grace, interval_s
from rlkd.plan.seconds import Learned, Step
from rlkd.plan.shape import Shape
from rlkd.plan.work import Lengths, Work, scorers, work_of, writers


@dataclass(frozen=True)
class Models:
    """The policy's shape, and those of the frozen models by name."""

    policy: Shape
    frozen: Mapping[str, Shape]


@dataclass(frozen=True)
class Shortage:
    """Something that does not fit, with the sum it follows from."""

    role: str
    what: str


@dataclass(frozen=True)
class Plan:
    config: Config
    models: Models
    hardware: Hardware
    devices: Devices
    work: Work
    memory: Mapping[str, Memory]  # by role, of one process
    workers: Mapping[str, int]  # processes by role
    published: float  # bytes in shared memory, or on the shared disk
    kv_sequences: float  # of the longest length, at once, of one rollout worker
    step: Step
    checkpoint: Checkpoint
    save_s: float
    save_every_s: float
    grace: Grace
    shortages: tuple[Shortage, ...]

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers a second."""
        return self.work.written / self.step.step

    @property
    def train_s(self) -> float:
        """Seconds of all steps, and of the saves between them."""
        steps_s = self.config.schedule.steps * self.step.step
        every = self.config.checkpoint.every
        saves = steps_s / self.save_every_s
        if every is not None:
            saves = self.config.schedule.steps / every if every else 1.0
        return steps_s + max(1.0, saves) * self.save_s

    def cost(self, price: float) -> float:
        """At so much an hour of one device."""
        return self.train_s / 3600 * self.devices.total * price


def planned(
    config: Config, models: Models, hardware: Hardware, lengths: Lengths, learned: Learned | None = None
) -> Plan:
    """What the recipe needs on this hardware. Whether it fits is in `shortages`."""
    shape, work = models.policy, work_of(config, lengths)
    memory, workers = _memories(config, models, work, hardware)
    scored = {name: (models.frozen[name], n) for name, n in scorers(config).items()}
    step = seconds.step(config, shape, work, hardware, scored, learned)
    n, w = shape.parameters, weight_size(config, hardware.gpu)
    writing = config.learner.ranks if zero_stage(config, hardware.gpu) else 1
    save_s = saving.save_seconds(n, writing, weight_bytes=w)
    room = memories.kv_room(config, shape, work, hardware)
    published = memories.published(config, shape, hardware)
    return Plan(
        config, models, hardware, devices(config, hardware), work, memory, workers, published, room, step,
        saving.checkpoint(n, w), save_s, interval_s(save_s, config.checkpoint.between_failures_s),
        saving.grace(config, shape), tuple(_shortages(config, models, work, hardware, memory, workers, published)),
    )  # fmt: skip


def fits(config: Config, models: Models, hardware: Hardware, lengths: Lengths) -> bool:
    """Whether the plan would have no shortage; quicker than the plan."""
    work = work_of(config, lengths)
    memory, workers = _memories(config, models, work, hardware)
    published = memories.published(config, models.policy, hardware)
    return not _shortages(config, models, work, hardware, memory, workers, published)


def _memories(
    config: Config, models: Models, work: Work, hardware: Hardware
) -> tuple[dict[str, Memory], dict[str, int]]:
    shape = models.policy
    memory = {
        "learner": memories.learner(config, shape, work, hardware),
        "rollout": memories.sampler(config, shape, work, hardware),
    }
    workers = {"learner": config.learner.ranks, "rollout": config.sampler.workers}
    for name, count in scorers(config).items():
        settings = config.reference if name == "reference" else config.teachers[name]
        most = min(float(settings.max_tokens), work.most_computed)
        memory[name] = memories.scorer(config, models.frozen[name], int(most), config.learner.head_rows, hardware)
        workers[name] = count
    for name, count in writers(config).items():
        role = f"writer:{name}"
        memory[role] = memories.writer(config, models.frozen[name], name, hardware)
        workers[role] = count
    return memory, workers


def _shortages(
    config: Config,
    models: Models,
    work: Work,
    hardware: Hardware,
    memory: Mapping[str, Memory],
    workers: Mapping[str, int],
    published: float,
) -> list[Shortage]:
    """What is too large for its device; on a CPU all processes share one machine."""
    if not hardware.gpu:
        store = config.ray.object_store_gib * GIB
        needs = sum(m.total * workers[role] for role, m in memory.items()) + published + store
        if needs <= hardware.memory:
            return []
        most = max(memory, key=lambda role: memory[role].total * workers[role])
        return [Shortage(most, f"all processes need {needs / GIB:.1f} GiB, and the machine has {_gib(hardware)}")]
    found = []
    if config.ray.share_gpus:
        needs = sum(m.total for m in memory.values())
        if needs > hardware.memory:
            sums = " + ".join(f"{role} {m.total / GIB:.1f}" for role, m in memory.items())
            found.append(Shortage("learner", f"{sums} GiB on one {hardware.name}, which has {_gib(hardware)}"))
    else:
        for role, m in memory.items():
            if m.total > hardware.memory:
                text = f"{role} needs {m.total / GIB:.1f} GiB, and a {hardware.name} has {_gib(hardware)}"
                found.append(Shortage(role, f"{text} ({_largest(m)})"))
    return found + _sampler_shortages(config, models.policy, work, hardware)


def _sampler_shortages(config: Config, shape: Shape, work: Work, hardware: Hardware) -> list[Shortage]:
    s, found = config.sampler, []
    if config.ray.share_gpus and s.tensor_parallel > 1:  # it gets a share of one GPU (workers/placement.py)
        what = f"sampler.tensor_parallel={s.tensor_parallel} needs GPUs of its own, and ray.share_gpus is true"
        found.append(Shortage("rollout", what))
    if shape.heads % s.tensor_parallel:
        what = f"sampler.tensor_parallel={s.tensor_parallel} does not divide the model's {shape.heads} heads"
        found.append(Shortage("rollout", what))
    if s.engine != "vllm":
        return found
    context = config.model.context or shape.context
    room = memories.kv_room(config, shape, work, hardware) * work.lengths.longest
    if room < context:  # vLLM does not start then
        taken = f"{s.gpu_memory_utilization:.0%} of a {hardware.name}"
        what = f"beside the weights {taken} hold keys and values of {room:,.0f} tokens; one context has {context:,}"
        found.append(Shortage("rollout", what))
    return found


def _largest(memory: Memory) -> str:
    """Its three largest parts, in words."""
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)


def _gib(hardware: Hardware) -> str:
    return f"{hardware.memory / GIB:.1f} GiB"
