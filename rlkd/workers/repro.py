"""The answer a reward failed on, in a file, and the one line that judges it again."""

import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkd.core.types import Answer, Prompt

MODULE = "rlkd.engines.replay"  # reads the file


@dataclass(frozen=True)
class Repro:
    """Callable: `Tally`'s `repro`. `rewards` as rlkd.rewards.table.pack makes them, `limits` as the jail takes them."""

    rewards: bytes
    limits: Mapping[str, Any]

    def __call__(self, prompt: Prompt, answer: Answer) -> str:
        """The command; or why there is none (a reward's options or the row cannot be written as JSON, a full disk)."""
        try:
            rows = [(name, target, pickle.loads(options)) for name, target, options in pickle.loads(self.rewards)]
            fields = ("id", "answer", "text", "source", "seed")
            case = {
                "rewards": rows,
                "limits": dict(self.limits),
                "prompt": {**{name: getattr(prompt, name) for name in fields}, "metadata": dict(prompt.metadata)},
                "answer": {"text": answer.text, "finish": str(answer.finish), "tokens": answer.tokens},
            }
            path = Path(tempfile.mkdtemp(prefix="rlkd-failed-")) / "answer.json"
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as f:
                json.dump(case, f)
        except (TypeError, ValueError, OSError) as e:
            return f"(no command: {e})"
        return f"python -m {MODULE} {path}"
