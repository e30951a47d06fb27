"""Rows that are made, not read: reasoning-gym's tasks and the tiny student's arithmetic."""

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkd.core.errors import DataError, PreflightError, nearest
from rlkd.data import reasoning_gym_child
from rlkd.data.rows import Row

if TYPE_CHECKING:
    from rlkd.models.arithmetic import Problem

GENERATE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Pupil:
    """The arithmetic task's options: which problems, and who writes their demonstrations."""

    carries: int = 0  # of a problem, at least: 0 to 3 of its columns
    demonstrations: int = 0  # of each problem
    forgets: float = 0.0  # probability of dropping a carry; 0 is always right
    teacher: str = "pupil"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Pupil":
        """DataError for an option it does not have, or a value that makes no sense."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise _unknown_option("arithmetic", str(name), known)
        carries, count, forgets, teacher = (options.get(f.name, f.default) for f in fields(cls))
        sound = type(count) is int and count >= 0 and type(carries) is int and 0 <= carries <= 3
        sound = sound and type(forgets) in (int, float) and 0 <= forgets <= 1
        if not (sound and isinstance(teacher, str) and teacher):
            raise DataError(
                "RLKD-D122",
                f"the arithmetic task does not work with these options: {dict(options)}",
                where="options of the data source",
                fix="demonstrations: a whole number; carries: 0 to 3; forgets: a probability; teacher: a name",
            )
        return cls(carries, count, float(forgets), teacher)

    def writes(self, problem: "Problem", seed: int) -> list[dict[str, str]]:
        """The worked answers of one problem; the same for the same seed, whatever else is written."""
        chance = random.Random(f"{seed}:{problem.question}")
        texts = [problem.written(lambda: chance.random() < self.forgets) for _ in range(self.demonstrations)]
        return [{"teacher": self.teacher, "text": text} for text in texts]


def arithmetic(split: str, size: int, seed: int, options: Mapping[str, Any]) -> Iterator[Row]:
    """Raises DataError for an unknown split or option, PreflightError if there are not `size` such problems."""
    from rlkd.models.arithmetic import Split, problems

    pupil = Pupil.of(options)

    splits = [str(s) for s in Split]
    if split not in splits:
        raise DataError(
            "RLKD-D105",
            f"the arithmetic task has no split `{split}`",
            where="data source of kind arithmetic",
            fix=f"its splits: {', '.join(splits)}",
        )
    for number, problem in enumerate(problems(Split(split), size, seed, pupil.carries), start=1):
        values: dict[str, object] = {"prompt": problem.question, "answer": problem.answer}
        if pupil.demonstrations:
            values["demonstrations"] = pupil.writes(problem, seed)
        yield Row(number, f"arithmetic {split}: row {number}", values)


def reasoning_gym(task: str, size: int, seed: int, options: Mapping[str, Any]) -> Iterator[Row]:
    """Rows with the whole entry under "reasoning_gym", as its scorer wants it. The same in every process.

    The entry is kept as Python made it (tuples stay tuples: some scorers need them); it can be written as JSON.
    A task without one right answer has the answer "". Raises DataError for an unknown task or option, or if the
    generator refuses or does not end in time; PreflightError if reasoning-gym does not work at all.
    """
    made = in_child({"task": task, "size": size, "seed": seed, "options": dict(options)})
    _check(made, task)
    for number, entry in enumerate(made["entries"], start=1):
        name = entry["metadata"]["source_dataset"] if task == "composite" else task
        values = {
            "prompt": entry["question"],
            "answer": "" if entry["answer"] is None else entry["answer"],
            "reasoning_gym": {"task": name, "entry": entry},
        }
        yield Row(number, f"reasoning_gym {task}: row {number}", values)


def _check(made: Mapping[str, Any], task: str) -> None:
    if "unknown" in made:
        close = nearest(task, made["known"])
        raise DataError(
            "RLKD-D120",
            f"reasoning-gym has no task `{task}`",
            where="data source of kind reasoning_gym",
            fix=f"did you mean `{close}`?" if close else "its tasks: " + ", ".join(made["known"]),
        )
    if "unknown_option" in made:
        raise _unknown_option(task, made["unknown_option"], made["known"])
    if "refused" in made:
        raise DataError(
            "RLKD-D122",
            f"the task `{task}` does not work with these settings: {made['refused']}",
            where="options of the data source",
            fix="change its options or size",
        )


def _unknown_option(task: str, name: str, known: Sequence[str]) -> DataError:
    close = nearest(name, known)
    return DataError(
        "RLKD-D121",
        f"the task `{task}` has no option `{name}`",
        where="options of the data source",
        fix=(f"did you mean `{close}`? " if close else "") + f"its options: {', '.join(known)}",
    )


def as_json(request: Mapping[str, Any]) -> str:
    """Raises DataError for options that JSON does not know."""
    try:
        return json.dumps(request)
    except (TypeError, ValueError) as error:
        raise DataError(
            "RLKD-D121",
            f"options are not plain values: {error}",
            where="options of the data source",
            fix="use numbers, text, lists and tables",
        ) from error


def in_child(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `reasoning_gym_child` makes of it. Raises DataError if it takes too long, PreflightError if it dies."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(Path(reasoning_gym_child.__file__))],
            input=as_json(request).encode(),
            capture_output=True,
            timeout=GENERATE_TIMEOUT_S,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            "RLKD-D123",
            f"the task `{request['task']}` made no {request['size']} rows in {GENERATE_TIMEOUT_S:.0f} s",
            where="data source of kind reasoning_gym",
            fix="ask for fewer rows or easier options",
        ) from error
    if child.returncode != 0:
        said = child.stderr.decode(errors="replace").strip().splitlines()
        raise PreflightError(
            "RLKD-E158",
            f"reasoning-gym's generator ended with {child.returncode}: {said[-1] if said else 'it said nothing'}",
            where=f"task `{request['task']}`",
            fix="is the package reasoning-gym installed?",
        )
    made: Mapping[str, Any] = pickle.loads(child.stdout)  # by our own child
    return made
