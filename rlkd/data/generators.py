"""Rows that are made, not read: reasoning-gym's tasks and the tiny student's arithmetic."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlkd.core.errors import DataError, PreflightError, nearest
from rlkd.data import reasoning_gym_child
from rlkd.data.rows import Row

GENERATE_TIMEOUT_S = 600.0


def arithmetic(split: str, size: int, seed: int) -> Iterator[Row]:
    """Raises DataError for an unknown split, PreflightError if the split does not hold `size` problems."""
    from rlkd.models.arithmetic import Split, problems

    splits = [str(s) for s in Split]
    if split not in splits:
        raise DataError(
            "RLKD-D105",
            f"the arithmetic task has no split `{split}`",
            where="data source of kind arithmetic",
            fix=f"its splits: {', '.join(splits)}",
        )
    for number, problem in enumerate(problems(Split(split), size, seed), start=1):
        yield Row(number, f"arithmetic {split}: row {number}", {"prompt": problem.question, "answer": problem.answer})


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
        name, known = made["unknown_option"], made["known"]
        close = nearest(name, known)
        raise DataError(
            "RLKD-D121",
            f"the task `{task}` has no option `{name}`",
            where="options of the data source",
            fix=(f"did you mean `{close}`? " if close else "") + f"its options: {', '.join(known)}",
        )
    if "refused" in made:
        raise DataError(
            "RLKD-D122",
            f"the task `{task}` does not work with these settings: {made['refused']}",
            where="options of the data source",
            fix="change its options or size",
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
