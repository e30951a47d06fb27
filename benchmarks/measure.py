"""What the benchmarks share: processes that take turns, memory beyond what there was, and the head of a result file."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rlkd.core.peak import peak_bytes
from rlkd.workers.threads import environment

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
START_S = 300.0  # for a child to import and to load its model
WORK_S = 600.0  # for one piece of work

Work = Callable[[Any], Any]


class Child:
    """A process that does one piece of work at a time, as it is asked to."""

    def __init__(self, name: str, make: Callable[[], Work]) -> None:
        context = get_context("spawn")
        self.name, (self._way, theirs) = name, context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), name=name, daemon=False)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        self._answer(START_S)

    def __call__(self, work: Any) -> Any:
        self._way.send(work)
        return self._answer(WORK_S)

    def _answer(self, seconds: float) -> Any:
        if not self._way.poll(seconds):
            raise SystemExit(f"{self.name}: no answer after {seconds:.0f} s")
        try:
            return self._way.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: its process ended (its own output says why)") from None

    def end(self) -> None:
        self._way.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(way: Connection, make: Callable[[], Work]) -> None:
    work = make()
    way.send("ready")
    while True:
        try:
            asked = way.recv()
        except EOFError:
            return
        way.send(work(asked))


@contextmanager
def children(makers: Mapping[str, Callable[[], Work]], threads: int) -> Iterator[dict[str, Child]]:
    """A process for each, with the environment of rlkd's own (threads, memory allocation): the same for all sides."""
    os.environ.update(environment(threads))
    found: dict[str, Child] = {}
    try:
        for name, make in makers.items():
            found[name] = Child(name, make)
        for child in found.values():
            child.ready()
        yield found
    finally:
        for child in found.values():
            child.end()


@contextmanager
def cluster() -> Iterator[None]:
    """Ray on this machine alone, unless there is one already."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
             configure_logging=False)  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def extra_bytes(call: Callable[[], Any]) -> float:
    """The most memory that `call` held beyond what was resident before; NaN where the kernel cannot say.

    Right for the first call of a process only: later ones find memory that the first one freed and the process kept.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    except OSError:
        return float("nan")
    before = peak_bytes()
    call()
    return float(peak_bytes() - before)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: Sequence[float], form: str = ".0f") -> str:
    """Median (lowest–highest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def about(*packages: str) -> str:
    """When, where and with what, for the head of a result file; and the load before, which should be near 0."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({cpu()}), no GPU; Python {platform.python_version()}, "
        f"{', '.join(found)}. Load before: {os.getloadavg()[0]:.1f}."
    )


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def written(name: str, lines: Sequence[str], results: Path = RESULTS) -> str:
    """The result file, and its text."""
    text = "\n".join(lines) + "\n"
    results.mkdir(parents=True, exist_ok=True)
    (results / name).write_text(text, encoding="utf-8")
    print(text)
    return text
