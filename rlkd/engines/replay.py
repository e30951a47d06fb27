"""`python -m rlkd.engines.replay FILE`: judges one answer again, alone, in the jail. FILE is what an error names
(rlkd/workers/repro.py). Prints the scores, or why there are none; the exit code is 0 or 4."""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlkd.core.errors import DATA, OK, USAGE, RlkdError
from rlkd.core.types import Answer, Finish, Prompt
from rlkd.engines.jail import Jail

USE = "use: python -m rlkd.engines.replay FILE, where FILE is named in the error of a reward that failed"


def main(arguments: list[str]) -> int:
    """The exit code: 0 if every reward gave a score."""
    try:
        case = json.loads(Path(arguments[0]).read_text())
        rewards = pickle.dumps([(name, target, pickle.dumps(options)) for name, target, options in case["rewards"]])
        prompt = Prompt(tokens=np.zeros(1, np.int32), **case["prompt"])
        answer = Answer(case["answer"]["text"], Finish(case["answer"]["finish"]), case["answer"]["tokens"])
        limits: dict[str, Any] = case["limits"]
    except (IndexError, OSError, ValueError, KeyError, TypeError) as e:
        print(f"{USE}\n  {type(e).__name__}: {e}", file=sys.stderr)
        return USAGE
    jail = Jail(rewards, **limits)
    try:
        (verdict,) = jail.score(prompt, [answer])
    except RlkdError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    finally:
        jail.close()
    if verdict.failure is None:
        print(f"prompt {prompt.id!r}: {dict(verdict.scores)}")
        return OK
    failure = verdict.failure
    print(f"prompt {prompt.id!r}: `{failure.reward}` {failure.outcome}\n{failure.detail}\n{failure.output}".rstrip())
    return DATA


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
