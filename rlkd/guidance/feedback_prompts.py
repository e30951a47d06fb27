"""What a teacher is told before it gives feedback: a system message, four worked examples, the student's answer.

The kinds of feedback and their order are ThinkTuning's (self-agreement, self-conflict, self-consultation, self-critic);
the words are our own. A recipe replaces any of it by a yaml file, `algorithm.guidance.prompts`:

    system: …                            # names the tags below
    turn: "Question: {question}\\nResponse: {response}"
    tags: {opinion: opinion, reason: reason, phrase: phrase, opinions: [correct, incorrect]}
    examples:
      - {kind: self-agreement, question: …, response: …, opinion: correct, reason: …, phrase: …}
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rlkd.core.errors import ConfigError
from rlkd.guidance.feedback_form import Remark, Tags, parse

SYSTEM = """\
You are a teacher who thinks aloud in the first person, as if the response below were your own draft. Read the \
question and the response, and judge every step. Write exactly three blocks, in this order, and nothing before, \
between or after:
<opinion>correct</opinion> or <opinion>incorrect</opinion>: whether the response solves the question.
<reason>…</reason>: the thought that tells you so, as you would say it to yourself.
<phrase>…</phrase>: how you go on from there to the solution; its end states the final answer in the form that the \
question asks for."""


@dataclass(frozen=True)
class Example:
    """A student's answer and good feedback to it."""

    kind: str
    question: str
    response: str
    opinion: str
    reason: str
    phrase: str

    @property
    def remark(self) -> Remark:
        return Remark(self.opinion, self.reason, self.phrase)


EXAMPLES = (
    Example(
        kind="self-agreement",
        question="A baker makes 6 trays of 12 rolls and sells 50. How many are left? Put the answer in \\boxed{}.",
        response="6 trays of 12 rolls are 72 rolls. 72 − 50 = 22. The answer is \\boxed{22}.",
        opinion="correct",
        reason="I counted all the rolls and took away what was sold. 6 × 12 is 72, 72 − 50 is 22. Both hold.",
        phrase="So I am sure of it: 22 rolls are left. The answer is \\boxed{22}.",
    ),
    Example(
        kind="self-conflict",
        question="A jacket of 80 euros gets 25 % cheaper. What does it cost now? Put the answer in \\boxed{}.",
        response="25 % of 80 is 25, so it costs 80 − 25 = 55. The answer is \\boxed{55}.",
        opinion="incorrect",
        reason="Wait, something is off. I took 25 euros away, but 25 % of 80 is a quarter of 80, and that is 20.",
        phrase="Once more: a quarter of 80 is 20, and 80 − 20 = 60. The answer is \\boxed{60}.",
    ),
    Example(
        kind="self-consultation",
        question="Two trains leave one station in opposite directions at 60 and 80 km/h. How far apart are they after "
        "3 hours? Put the answer in \\boxed{}.",
        response="The difference of their speeds is 20 km/h. After 3 hours that is 60 km. The answer is \\boxed{60}.",
        opinion="incorrect",
        reason="What would my old maths teacher say? “Draw it first. Do they run after each other or away from each "
        "other?” Away: then every hour adds both speeds, and I had taken their difference.",
        phrase="Together they gain 60 + 80 = 140 km an hour, in 3 hours 3 × 140 = 420 km. The answer is \\boxed{420}.",
    ),
    Example(
        kind="self-critic",
        question="The sum of three consecutive whole numbers is 48. Which is the largest? Put the answer in \\boxed{}.",
        response="The middle one is 48 ÷ 3 = 16, so the numbers are 15, 16 and 17. The answer is \\boxed{17}.",
        opinion="correct",
        reason="It went quickly, so I check it another way. With n as the smallest, n + (n + 1) + (n + 2) = 48 gives "
        "3n = 45 and n = 15. 15 + 16 + 17 is 48 indeed, and I was asked for the largest, not the middle one.",
        phrase="Both ways agree: the largest is 17. The answer is \\boxed{17}.",
    ),
)


@dataclass(frozen=True)
class FeedbackPrompts:
    """All that is said to the teacher but the question at hand. It never holds the prompt's right answer."""

    system: str = SYSTEM
    turn: str = "Question: {question}\n\nResponse: {response}"
    tags: Tags = field(default_factory=Tags)
    examples: tuple[Example, ...] = EXAMPLES

    def problems(self) -> list[str]:
        """What cannot be: a turn without its places, an example that is not of the form it is to teach."""
        found = [f"turn has no {place}" for place in ("{question}", "{response}") if place not in self.turn]
        if len(set(self.tags.names)) < 3:
            found.append(f"tags are not three different names: {', '.join(self.tags.names)}")
        for i, example in enumerate(self.examples):
            if parse(example.remark.text(self.tags), self.tags) is None:
                found.append(f"examples[{i}] ({example.kind}) is not of the form: three blocks, none blank")
        return found

    def asked(self, question: str, response: str) -> str:
        """One turn of the student. What it says is put in as it is, braces and all."""
        places = {"{question}": question, "{response}": response}
        return re.sub(r"\{question\}|\{response\}", lambda found: places[found[0]], self.turn)

    def messages(self, question: str, response: str) -> list[dict[str, str]]:
        """System, the examples as pairs of user and assistant, and the student's answer."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for example in self.examples:
            said.append({"role": "user", "content": self.asked(example.question, example.response)})
            said.append({"role": "assistant", "content": example.remark.text(self.tags)})
        return [*said, {"role": "user", "content": self.asked(question, response)}]


@lru_cache(maxsize=8)
def load(path: str | None) -> FeedbackPrompts:
    """The table of a yaml file, over the defaults; without a path the defaults. ConfigError for what is wrong in it."""
    if path is None:
        return FeedbackPrompts()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        prompts = _table(content)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise _wrong(path, f"{line}{error.problem or 'no yaml'}") from error
    except (OSError, yaml.YAMLError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise _wrong(path, first) from error
    problems = prompts.problems()
    if problems:
        raise _wrong(path, "; ".join(problems))
    return prompts


def _wrong(path: str, what: str) -> ConfigError:
    fix = "keys: system, turn, tags, examples; see rlkd/guidance/feedback_prompts.py"
    return ConfigError("RLKD-C011", f"the feedback prompts cannot be used: {what}", where=path, fix=fix)


def _table(content: Any) -> FeedbackPrompts:
    """ValueError for anything that is not of the table's shape."""
    table = dict(_section(content, FeedbackPrompts, "the file"))
    if "tags" in table:
        tags = dict(_section(table["tags"], Tags, "tags"))
        if "opinions" in tags:
            tags["opinions"] = tuple(_texts(tags["opinions"], "tags.opinions"))
        table["tags"] = Tags(**tags)
    if "examples" in table:
        if not isinstance(table["examples"], list):
            raise ValueError("examples is no list")
        table["examples"] = tuple(_example(e, f"examples[{i}]") for i, e in enumerate(table["examples"]))
    return FeedbackPrompts(**table)


def _example(content: Any, at: str) -> Example:
    section = _section(content, Example, at)
    missing = [f.name for f in fields(Example) if f.name not in section]
    if missing:
        raise ValueError(f"{at} lacks {', '.join(missing)}")
    return Example(**section)


def _section(content: Any, cls: type[Any], at: str) -> Mapping[str, Any]:
    known = [f.name for f in fields(cls)]
    if not isinstance(content, dict):
        raise ValueError(f"{at} is no section of keys ({', '.join(known)})")
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ValueError(f"{at} has unknown keys: {', '.join(unknown)} (known: {', '.join(known)})")
    for key, value in content.items():
        if key not in ("tags", "opinions", "examples") and not isinstance(value, str):
            raise ValueError(f"{at}: {key} is no text but {value!r}")
    return content


def _texts(value: Any, at: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
        raise ValueError(f"{at} is no list of texts")
    return value
