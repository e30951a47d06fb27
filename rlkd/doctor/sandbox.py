"""Whether this machine can keep in the code that models write (rewards that run it need that; nothing else does)."""

import json
import subprocess
import sys

from rlkd.doctor.check import Check

TIMEOUT_S = 60.0
SANDBOX = "userns+landlock"
FIX = (
    "only rewards that run code need it: Linux 5.13 or newer with Landlock and unprivileged user namespaces; in a "
    "container also a seccomp and an AppArmor profile that allow unshare and mount"
)


def tier() -> Check:
    """The sandbox is built and looked at, in a process of its own (rlkd/engines/sandbox.py)."""
    command = [sys.executable, "-m", "rlkd.engines.sandbox"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (subprocess.TimeoutExpired, OSError) as e:
        return Check("sandbox", "warn", f"unknown: {e}", FIX)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        return Check("sandbox", "warn", f"unknown: {lines[-1] if lines else f'exit {done.returncode}'}", FIX)
    found = json.loads(lines[-1])
    if found["tier"] != SANDBOX:
        return Check("sandbox", "warn", f"tier {found['tier']}, below {SANDBOX}: {found['reason']}", FIX)
    return Check("sandbox", "ok", f"tier {SANDBOX} (Landlock {found['landlock']}, seccomp), for code that models write")
