"""What was measured of this machine, kept for the next plan: a minute once, not every time."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rlkd.config.schema import Config
from rlkd.core.errors import PreflightError
from rlkd.plan.hardware import Hardware, cpu
from rlkd.plan.seconds import Learned
from rlkd.plan.work import Work
from rlkd.report.files import replace_file
from rlkd.workers.threads import environment

FORMAT = 1
VARIABLE = "RLKD_CACHE"  # where it is kept, instead of the user's cache folder
TOKENS = 1024  # of the micro-batch that is measured, at most
TIMEOUT_S = 300.0
COMMAND = ["-m", "rlkd.engines.calibrate"]
LOOK_S, BUSY = 1.0, 0.2  # how long is looked at who else works here; the share of the cores that is too much


def this_machine() -> Hardware:
    """As a device, not measured."""
    return cpu(float(psutil.virtual_memory().total), cores())


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calibrated(
    config: Config, content: Mapping[str, Any], work: Work, say: Callable[[str], None], again: bool = False
) -> tuple[Hardware, Learned]:
    """This machine and its learner, measured now or before. What was measured while others worked here is told, and
    not kept; so is a cache that cannot be written."""
    lengths = work.lengths
    group = lengths.prompt + work.samples * lengths.answer
    groups = max(1, min(work.groups, int(min(config.learner.max_tokens, TOKENS) // group)))
    batch = {"groups": groups, "samples": work.samples}
    batch |= {"prompt": max(1, round(lengths.prompt)), "answer": max(1, round(lengths.answer))}
    options = {"head_rows": config.learner.head_rows, "checkpointing": config.learner.gradient_checkpointing}
    key = _key({"model": _sizes(content), "batch": batch, **options})
    file = folder() / f"{key}.json"
    found = None if again else _read(file)
    if found is None:
        busy = _busy()
        found = _measured(content, batch, options, say)
        if busy:
            say(f"others use {busy:.0%} of this machine: what was measured is too slow, and is not kept")
        else:
            _keep(file, found, say)
    machine = cpu(float(psutil.virtual_memory().total), cores(), found["flops"], found["bandwidth"])
    return machine, Learned(**{name: found[name] for name in ("micro_s", "layer_s", "token_s", "token_layer_s")})


def _busy() -> float:
    """Share of the cores that others use now; 0 where it is too little to matter."""
    share = psutil.cpu_percent(interval=LOOK_S) / 100
    return share if share > BUSY else 0.0


def _keep(file: Path, found: Mapping[str, float], say: Callable[[str], None]) -> None:
    try:
        replace_file(file, json.dumps(found, indent=1))
    except OSError as e:
        say(f"not kept for the next time: {e.strerror}: {e.filename}")


def _measured(
    content: Mapping[str, Any], batch: Mapping[str, int], options: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, float]:
    """In a process of its own, with the environment that workers get and all cores."""
    say(f"measuring this machine, once (kept in {folder()})")
    asked = json.dumps({"model": dict(content), "batch": batch, "threads": cores(), **options})
    command = [sys.executable, *COMMAND]
    try:
        done = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **environment(cores())},
        )
    except subprocess.TimeoutExpired as e:
        raise PreflightError(
            "RLKD-E183", f"this machine was not measured within {TIMEOUT_S:.0f} s", "rlkd plan", "--no-calibrate"
        ) from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        fix = "--no-calibrate plans without; report this, if the model trains"
        raise PreflightError("RLKD-E183", f"this machine cannot be measured: {last}", "rlkd plan", fix)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def folder() -> Path:
    """$RLKD_CACHE, else rlkd's in the user's cache folder."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlkd" / "calibration"


def _sizes(content: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in content.items() if not k.startswith("_") and k not in ("transformers_version",)}


def _key(what: Mapping[str, Any]) -> str:
    """Of everything that a measurement depends on."""
    here = {"format": FORMAT, "cores": cores(), "cpu": _cpu_name(), "torch": version("torch")}
    here["transformers"] = version("transformers")
    text = json.dumps({**here, **what}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read(file: Path) -> dict[str, float] | None:
    """What was measured before; None if it was not, or the file is broken: then it is measured again."""
    try:
        found = json.loads(file.read_text())
        names = ("flops", "bandwidth", "micro_s", "layer_s", "token_s", "token_layer_s")
        return {name: float(found[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
