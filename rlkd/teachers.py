"""What a run knows of its frozen models, the reference and the teachers, before anything is started."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Int32

from rlkd.config.schema import Config, ScorerConfig, TeacherConfig
from rlkd.core.errors import ConfigError, Problem
from rlkd.core.types import Prompt, Signal
from rlkd.data import HFTokenizer
from rlkd.data.demonstrations import Demonstrations, cleaned
from rlkd.data.vocabulary import ids_of, mismatch, retold
from rlkd.model_folder import model_config, own_context, vocabulary

SAMPLED = ("max_tokens", "temperature", "top_p", "chat", "system")  # of a WriterConfig: said with each call
SCORED = frozenset({Signal.TEACHER, Signal.TEACHER_TOPK})
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Frozen:
    """A frozen model's folder, read."""

    path: str
    tokenizer: HFTokenizer
    context: int  # tokens its model takes
    vocabulary: int  # token ids its model takes
    foreign_ends: tuple[int, ...]  # tokens that end the policy's answers, and not its own


def scorers(config: Config) -> dict[str, ScorerConfig]:
    """Who gives log-probs, as the algorithm asks: `reference` and the teachers by name."""
    wanted: dict[str, ScorerConfig] = {}
    if Signal.REFERENCE in config.algorithm.needs:
        wanted["reference"] = config.reference
    if config.algorithm.needs & SCORED:
        wanted |= config.teachers
    return wanted


def writers(config: Config) -> dict[str, TeacherConfig]:
    """Who writes, as the algorithm asks: local teachers and endpoints."""
    return dict(config.teachers) if Signal.TEACHER_TEXT in config.algorithm.needs else {}


def unused(config: Config) -> list[str]:
    """A warning if there are teachers that nobody asks."""
    if not config.teachers or config.algorithm.needs & (SCORED | {Signal.TEACHER_TEXT}):
        return []
    names = ", ".join(f"teachers.{name}" for name in config.teachers)
    return [f"{names}: not started, for the algorithm {config.algorithm.name} asks no teacher"]


def known(config: Config, policy: HFTokenizer) -> dict[str, Frozen]:
    """The folders of all frozen local models that the algorithm asks, by name.

    PreflightError for one that is no model, ConfigError with all whose log-probs would be those of other tokens.
    """
    asked = scorers(config)
    found: dict[str, Frozen] = {}
    problems: list[Problem] = []
    for name, settings in {**writers(config), **asked}.items():
        if isinstance(settings, TeacherConfig) and settings.endpoint is not None:
            continue
        key = key_of(name)
        found[name] = _frozen(config, settings, policy, f"{key}.path")
        if name in asked and settings.path is not None:
            other, method = found[name].tokenizer, config.algorithm.name
            problem = mismatch(ids_of(policy), ids_of(other), key, method) or retold(policy, other, key, method)
            problems += [] if problem is None else [problem]
        problems += _context(settings, found[name].context, key)
    if problems:
        raise ConfigError.of(problems)
    return found


def key_of(name: str) -> str:
    """Where the recipe says it."""
    return name if name == "reference" else f"teachers.{name}"


def scored_by(config: Config) -> dict[str, str]:
    """name → the first name with the same model and settings: they are served by one pool."""

    def same(s: ScorerConfig) -> Hashable:
        path = s.path or config.model.path
        return (path, s.workers, s.max_tokens, s.timeout_s, s.stall_s, s.threads, unavailable(s))

    return _shared(scorers(config), same)


def written_by(config: Config) -> dict[str, str]:
    """The same of those that write on machines of this run."""

    def same(t: TeacherConfig) -> Hashable:
        engine = tuple(getattr(t.writer, f.name) for f in fields(t.writer) if f.name not in SAMPLED)
        path = t.path or config.model.path
        return (path, t.workers, t.timeout_s, t.stall_s, t.threads, t.on_unavailable, *engine)

    return _shared({name: t for name, t in writers(config).items() if t.endpoint is None}, same)


def unavailable(scorer: ScorerConfig) -> str:
    """What happens while it has no workers; nobody goes on without the reference."""
    return scorer.on_unavailable if isinstance(scorer, TeacherConfig) else "wait"


def _shared(wanted: Mapping[str, Settings], same: Callable[[Settings], Hashable]) -> dict[str, str]:
    first: dict[Hashable, str] = {}
    return {name: first.setdefault(same(settings), name) for name, settings in wanted.items()}


def workers_of(config: Config) -> dict[str, int]:
    """Workers of each role of frozen models, for placement and threads."""
    scoring, writing = scorers(config), writers(config)
    counts = {scorer_role(name): scoring[name].workers for name in scored_by(config).values()}
    return counts | {writer_role(name): writing[name].workers for name in written_by(config).values()}


def scorer_role(name: str) -> str:
    return name if name == "reference" else f"teacher:{name}"


def writer_role(name: str) -> str:
    return f"writer:{name}"


def reader(tokenizer: HFTokenizer) -> Callable[[Prompt, str], Int32[np.ndarray, "_"] | str]:
    """Makes the policy's tokens of what a teacher wrote to a prompt, its end token last; or says why it cannot."""
    worked = Demonstrations(tokenizer)

    def read(prompt: Prompt, text: str) -> Int32[np.ndarray, "_"] | str:
        rendered = tokenizer.decode(prompt.tokens, special=True)
        (ids,) = tokenizer.encode_many([cleaned(text, rendered, worked.ends)], special=False)
        why_not = worked.why_not(ids)
        return np.append(ids, tokenizer.eos).astype(np.int32) if why_not is None else why_not

    return read


def _frozen(config: Config, settings: ScorerConfig, policy: HFTokenizer, where: str) -> Frozen:
    path = settings.path or config.model.path
    content = model_config(path, where)
    own = settings.path is not None
    tokenizer = HFTokenizer.load(path, trust_remote_code=config.model.trust_remote_code) if own else policy
    foreign = tuple(sorted(set(policy.stop_tokens) - set(tokenizer.stop_tokens)))
    return Frozen(str(Path(path).resolve()), tokenizer, own_context(content, where), vocabulary(content), foreign)


def _context(settings: ScorerConfig, own: int, key: str) -> list[Problem]:
    wanted = settings.writer.context if isinstance(settings, TeacherConfig) else None
    if wanted is None or wanted <= own:
        return []
    what = f"{key}.writer.context={wanted:,} is more than the model's {own:,} tokens"
    return [Problem("RLKD-C711", what, f"{key}.writer.context", f"at most {own:,}, or leave it out")]
