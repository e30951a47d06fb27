"""`rlkd doctor`: is this machine fit to train on? One line a check, and how to mend what is not.

Heavy packages are not imported here: versions come from the installed packages' metadata. `--deep` imports them in
processes of their own.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rlkd.core.errors import OK, PREFLIGHT
from rlkd.doctor import machine, packages, sandbox
from rlkd.doctor.check import Check

PARTS: Sequence[Callable[[], Check]] = (
    packages.python,
    machine.gpu,
    packages.torch,
    packages.media,
    packages.transformers,
    packages.vllm,
    packages.ray,
    packages.deepspeed,
    packages.flash_attention,
    machine.cpu,
    machine.memory,
    machine.shared_memory,
    machine.open_files,
    machine.socket_path,
    machine.disk,
    machine.threads,
    sandbox.tier,
)


def main(deep: bool = False, as_json: bool = False) -> int:
    """Prints every check; the exit code is 3 if one failed."""
    found = []
    for check in checks(deep):
        found.append(check)
        if not as_json:
            _print(check)
    failed = sum(check.status == "fail" for check in found)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}))
    else:
        print(f"ready to train on {'a GPU' if machine.gpus() else 'the CPU'}: {'no' if failed else 'yes'}")
    return PREFLIGHT if failed else OK


def checks(deep: bool = False) -> Iterator[Check]:
    """All checks, one after the other; only the deep ones take more than a second."""
    for part in PARTS:
        yield part()
    if deep:
        yield from (packages.imports(name) for name in ("transformers", "deepspeed", "vllm", "ray"))
        yield packages.cuda()


def _print(check: Check) -> None:
    """One line, and the fix below it; ticks in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    mark, style = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}[check.status]
    line = Text.assemble((mark, style), f" {check.name:<14} {check.detail}")
    if check.fix and check.status != "ok":
        line.append(f"\n  {'':<14} → {check.fix}", style)
    Console(highlight=False).print(line, soft_wrap=True)
