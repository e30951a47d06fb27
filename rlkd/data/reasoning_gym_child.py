"""Makes the rows of a reasoning-gym task, in a process of its own. Run as a script by `generators.py`.

Why a process: five of the tasks (isomorphic_strings, knight_swap, polynomial_multiplication, ransom_note, word_ladder)
iterate over sets of strings, so the same seed gives other questions in every Python process, and a resumed run would
train on other data. PYTHONHASHSEED can only be set before a process starts.

In: JSON {"task", "size", "seed", "options"}. Out: a pickle (JSON would turn tuples into lists, and arc_agi and rearc
would then score a right answer 0.05), one of
    {"entries": [{"question", "answer", "metadata"}, …]}
    {"unknown": task, "known": [names]}     {"unknown_option": name, "known": [names]}     {"refused": why}
"""

import dataclasses
import json
import os
import pickle
import random
import sys
from typing import Any


def make(task: str, size: int, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        return {"unknown": task, "known": sorted(DATASETS)}
    fields = [f.name for f in dataclasses.fields(DATASETS[task][1]) if f.name not in ("size", "seed")]
    for name in options:
        if name not in fields:
            return {"unknown_option": name, "known": fields}
    random.seed(seed)
    try:
        if task == "composite":
            options = {**options, "datasets": [DatasetSpec(**spec) for spec in options.get("datasets", [])]}
        generator = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
        return {"entries": [generator[i] for i in range(size)]}
    except Exception as error:  # the tasks check their options with assert, and meet wrong types anywhere
        return {"refused": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what a task prints must not end up in the pickle
        out.write(pickle.dumps(make(**json.load(sys.stdin))))
