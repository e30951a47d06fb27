"""What benchmarks/papers.py compares: the task, the models, and each method as recipe + settings. Nothing runs here."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

STEPS, GROUPS, SAMPLES = 48, 8, 8  # of every method: steps × prompts × answers
CARRIES = 2  # every problem, trained and held out, has at least so many
TRAIN, HOLDOUT, HOLDOUT_SAMPLES = 4000, 300, 8  # problems; answers to each of those held out
SEEDS, PILOT_SEED = 5, 100  # 0 … SEEDS − 1; the pilot's is none of them
PASS_AT = (1, 4, 8)


@dataclass(frozen=True)
class Made:
    """A model that this benchmark trains (rlkd/models/tiny.py), all of the same size."""

    name: str
    forgets: float  # probability of dropping a carry
    seed: int
    about: str


STUDENT = Made("student", 0.8, 1, "what every method starts from")
TEACHER = Made("teacher", 0.0, 2, "the strong teacher: drops no carry")
PEER = Made("peer", 0.2, 3, "the better of the two peers")
WEAK = Made("weak-peer", 0.5, 4, "the weaker of the two peers")
MODELS = (STUDENT, TEACHER, PEER, WEAK)

TRACES: Mapping[str, tuple[Made, ...]] = {"teacher": (TEACHER,), "peer": (PEER,), "peers": (PEER, WEAK)}

LEARNING_RATES = (3e-5, 1e-4, 3e-4)  # that the pilot tries in each family; the recipes' own is the middle one
BETAS = (5e-3, 0.05, 0.5)  # the paper's is the first
ABOUT_AS_GOOD = 0.02  # of held-out pass@1: of values within this of the best one the smallest is taken


@dataclass(frozen=True)
class Rates:
    """What the pilot chooses, by family and not by method; the defaults are those of the recipes."""

    reward: float = 1e-4  # learning rate of everything that samples with a reward, chosen for GRPO
    imitation: float = 1e-4  # of SFT
    distillation: float = 1e-4  # of KD-RKL
    beta: float = 5e-3  # of every KDRL, chosen for the constant one


BEFORE = "{before}"  # in an override: the model folder that the stage before has made


@dataclass(frozen=True)
class Stage:
    """One `rlkd train`."""

    recipe: str
    overrides: tuple[str, ...]
    steps: int = STEPS


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    key: str
    label: str
    stages: tuple[Stage, ...]


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(**values: Any) -> tuple[str, ...]:
    """`a__b=1` → "a.b=1"."""
    return tuple(f"{name.replace('__', '.')}={plain(value)}" for name, value in values.items())


def scored_by(work: str, teacher: Made) -> tuple[str, ...]:
    return settings(teachers__adder__path=f"{work}/{teacher.name}", teachers__adder__threads=1)


def shown(work: str, traces: str) -> tuple[str, ...]:
    """Worked answers that teachers wrote down before, instead of the generator's."""
    return settings(data__train__traces=f"{work}/traces-{traces}.jsonl", data__train__options__demonstrations=0)


def methods(work: str, rates: Rates | None = None) -> dict[str, Method]:
    """All of them, by key. `work` is the folder that holds models and traces."""
    rates = rates or Rates()
    rl, sft, kd = (settings(learner__lr=lr) for lr in (rates.reward, rates.imitation, rates.distillation))
    joint = rl + settings(algorithm__beta_0=rates.beta)
    least = rates.beta / 5  # as in the paper, which gets there in the first 80 of about 280 steps
    fall = (rates.beta - least) / round(STEPS * 80 / 280)
    annealed = joint + settings(algorithm__beta_min=least, algorithm__beta_decay=fall)
    many = settings(schedule__groups_per_step=GROUPS * SAMPLES)  # SFT has one answer a prompt
    half = STEPS // 2
    writer = settings(
        teachers__twin__path=f"{work}/{PEER.name}",
        teachers__twin__threads=1,
        teachers__twin__writer__engine="hf",
        teachers__twin__writer__temperature=1,  # greedily even this peer drops no carry
        sampler__max_tokens=96,  # a guided answer is two; with 48 it ends no better
    )

    def one(key: str, label: str, recipe: str, *overrides: tuple[str, ...]) -> Method:
        return Method(key, label, (Stage(f"configs/{recipe}-tiny.yaml", sum(overrides, ())),))

    def kdrl(key: str, label: str, teacher: Made = TEACHER, **more: str) -> Method:
        return one(key, label, "kdrl", joint, scored_by(work, teacher), settings(**more))

    two_stages = (
        Stage("configs/sft-tiny.yaml", sft + many + shown(work, "teacher"), half),
        Stage("configs/grpo-tiny.yaml", (*rl, f"model.path={BEFORE}"), STEPS - half),
    )
    all_of_them = [
        one("grpo", "GRPO", "grpo", rl),
        one("sft", "SFT, teacher's traces", "sft", sft, many, shown(work, "teacher")),
        Method("sft-grpo", "SFT → GRPO, half the steps each", two_stages),
        one("kd-rkl", "KD-RKL (opd), teacher", "opd", kd, scored_by(work, TEACHER)),
        kdrl("kdrl", "KDRL, constant β, teacher"),
        one("kdrl-annealed", "KDRL, annealed β, teacher", "kdrl-annealed", annealed, scored_by(work, TEACHER)),
        kdrl("kdrl-wrong", "KDRL, KD on wrong answers, teacher", algorithm__distill="wrong"),
        kdrl("kdrl-failed", "KDRL, KD on failed groups, teacher", algorithm__distill="failed_group"),
        one("kd-rkl-peer", "KD-RKL (opd), peer", "opd", kd, scored_by(work, PEER)),
        kdrl("kdrl-peer", "KDRL, constant β, peer", PEER),
        one("luffy", "LUFFY, teacher's traces", "luffy", rl, shown(work, "teacher")),
        one("ampo-one", "AMPO, one peer's traces", "ampo", rl, shown(work, "peer")),
        one("ampo", "AMPO, two peers' traces", "ampo", rl, shown(work, "peers")),
        one("thinktuning", "ThinkTuning, the peer writes", "thinktuning", rl, writer),
    ]
    return {method.key: method for method in all_of_them}


def shared(work: str, stage: Stage) -> tuple[str, ...]:
    """What all runs have in common; a stage's own settings come after these."""
    return settings(
        model__path=f"{work}/{STUDENT.name}",
        data__train__size=TRAIN,
        data__train__options__carries=CARRIES,
        data__holdout__size=HOLDOUT,
        data__holdout__options__carries=CARRIES,
        schedule__steps=stage.steps,
        schedule__groups_per_step=GROUPS,
        evaluate__samples=HOLDOUT_SAMPLES,
        evaluate__temperature=1,
        evaluate__k="[" + ",".join(map(str, PASS_AT)) + "]",
        evaluate__at_start="false",
        checkpoint__every=stage.steps // 2,
        learner__threads=1,
        sampler__threads=1,
        sampler__engine=ENGINE,
        sampler__kv_cache_gib=0.25,
        ray__object_store_gib=0.1,
        report__tensorboard="false",
        report__samples_per_step=1,
        report__directory=f"{work}/runs",
    )


ENGINE = "vllm"  # of the sampler; measured: the whole short run takes less than with `hf`


def overrides(work: str, stage: Stage, seed: int, before: str | None = None) -> tuple[str, ...]:
    """All settings of one run but its name; `before` is the folder that BEFORE stands for."""
    own = (text.replace(BEFORE, before or BEFORE) for text in stage.overrides)
    return (*shared(work, stage), *own, f"seed={seed}")


def run_name(key: str, stage: Stage, number: int, seed: int, work: str) -> str:
    """Other settings are another run: the name holds a digest of them, and of how the models are made."""
    made = [(m.name, m.forgets, m.seed) for m in MODELS]
    what = repr((stage.recipe, stage.steps, overrides(work, stage, seed), made, CARRIES))
    part = f"-{number + 1}" if number else ""
    return f"{key}{part}-seed{seed}-{hashlib.blake2b(what.encode(), digest_size=3).hexdigest()}"


@dataclass(frozen=True)
class Trial:
    """One run of the pilot: a value of one of the Rates."""

    rate: str  # its field
    value: float
    method: Method


TRIED: Mapping[str, tuple[str, str, tuple[float, ...]]] = {  # rate → method, setting, values
    "reward": ("grpo", "learner.lr", LEARNING_RATES),
    "imitation": ("sft", "learner.lr", LEARNING_RATES),
    "distillation": ("kd-rkl", "learner.lr", LEARNING_RATES),
    "beta": ("kdrl", "algorithm.beta_0", BETAS),
}
FIRST, THEN = ("reward", "imitation", "distillation"), ("beta",)  # β is tried at the learning rate chosen before


def trials(work: str, which: Sequence[str], rates: Rates | None = None) -> list[Trial]:
    """The runs that choose these rates; the others are as given. They are judged by held-out problems of their own."""
    other = settings(data__holdout__seed=1)
    found = []
    for rate in which:
        key, _, values = TRIED[rate]
        for value in values:
            method = methods(work, replace(rates or Rates(), **{rate: value}))[key]
            stages = tuple(replace(stage, overrides=stage.overrides + other) for stage in method.stages)
            found.append(Trial(rate, value, replace(method, key=f"pilot-{key}-{value:g}", stages=stages)))
    return found


def best(tried: Mapping[float, float]) -> float:
    """Of values with their held-out pass@1 the smallest that is about as good as the best."""
    limit = max(tried.values()) - ABOUT_AS_GOOD
    return min(value for value, rate in tried.items() if rate >= limit)
