"""The program that talks to Weights & Biases, in a process of its own: it can be killed when wandb hangs.

From standard input: a line with settings, then a line a row, all json. To standard output: lines {"note": …},
{"ready": …} or {"failed": …}. It ends when its input ends, and no later than `finish_s` seconds after that. Imports
nothing of rlkd.
"""

import json
import os
import signal
import sys
import threading
from typing import Any, TextIO

STRICT = ("disabled", "offline", "online")  # the environment's WANDB_MODE may only make the recipe's mode stricter


def main() -> int:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what wandb prints must not get among the messages
    settings = json.loads(sys.stdin.readline())
    try:
        run = start(settings, channel)
    except Exception as e:  # wandb raises much: not installed, no login, no network, no disk
        say(channel, "failed", first_line(e))
        return 1
    say(channel, "ready", settings["mode"])
    failed = copy(run, sys.stdin, channel)
    threading.Thread(target=stop_late, args=(settings["finish_s"],), daemon=True).start()
    if failed:
        say(channel, "note", f"{failed} rows were refused")
    run.finish()
    return 0


def start(settings: dict[str, Any], channel: TextIO) -> Any:
    """A wandb run; offline when online is asked for and refused, so that nothing is lost."""
    import wandb

    mode = min(settings["mode"], os.environ.get("WANDB_MODE", "online"), key=rank)
    try:
        run = init(wandb, settings, mode)
    except Exception as e:
        if mode != "online":
            raise
        say(channel, "note", f"online does not work ({first_line(e)}); kept offline, `wandb sync` can send it later")
        run = init(wandb, settings, "offline")
    run.define_metric("*", step_metric="step")
    return run


def rank(mode: str) -> int:
    return STRICT.index(mode) if mode in STRICT else len(STRICT)


def init(wandb: Any, settings: dict[str, Any], mode: str) -> Any:
    return wandb.init(
        project=settings["project"],
        name=settings["name"],
        id=settings["id"],
        resume="allow" if mode == "online" else None,
        dir=settings["dir"],
        mode=mode,
        config=settings["config"],
        settings=wandb.Settings(console="off", init_timeout=settings["init_s"]),
    )


def copy(run: Any, rows: TextIO, channel: TextIO) -> int:
    """Log every row; how many wandb refused. The first refusal of a series is told."""
    failed, failing = 0, False
    for line in rows:
        try:
            run.log(json.loads(line))
            failing = False
        except Exception as e:
            failed += 1
            if not failing:
                say(channel, "note", f"a row was refused: {first_line(e)}")
            failing = True
    return failed


def say(channel: TextIO, kind: str, text: str) -> None:
    try:
        channel.write(json.dumps({kind: text}) + "\n")
        channel.flush()
    except OSError:
        sys.stderr.write(f"{kind}: {text}\n")  # the run has gone; wandb still gets its rows


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"


def stop_late(finish_s: float) -> None:
    """End this process and those it started, if it has not ended by then: a network that is down must not keep it."""
    threading.Event().wait(finish_s)
    sys.stderr.write(f"not finished after {finish_s:g} s: stopped\n")
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
