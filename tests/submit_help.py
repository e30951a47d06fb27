"""A cluster that exists in memory: what `rlkd submit` asks of Ray's JobSubmissionClient, answered by a script."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rlkd.config.stages import load
from rlkd.core.errors import RlkdError
from rlkd.submit import preflight, probe
from rlkd.submit.client import Options, Submission
from rlkd.submit.ending import line
from rlkd.submit.jobs import Jobs
from rlkd.submit.package import packed

# status, exit code, log; and what Ray says of it: its message, its JobErrorType
Ended = tuple[str, int | None, str] | tuple[str, int | None, str, str, str]
NODE_DIED = (
    "Job supervisor actor died: The actor died unexpectedly before finishing this task.\n"
    "\tclass_name: JobSupervisor\n\tactor_id: 4d1f\n\tname: _ray_internal_job_actor_demo-1\n\tip: 10.0.0.7\n"
    "The actor died because its node has died. Node Id: 6c0d\n\tthe actor's node was preempted: spot\n"
)


def ended(code: int, saved: int | None, status: str = "FAILED", **record: Any) -> Ended:
    """How a run ends that says so itself; Ray has no exit code of one that was stopped."""
    kinds = {75: "preempt", 0: "done", 6: "infra"}
    said = {"class": kinds.get(code, "config"), "cause": "SIGTERM", "saved": saved, "hint": None, **record}
    log = f"step 1/9  reward 0.5\nstep 2/9  reward 0.6\n{line(code, said, 2.0, 1.0)}\n"
    return status, None if status == "STOPPED" else code, log


def node(address: str = "10.0.0.1", head: bool = True, cpu: float = 4.0, gpu: float = 0.0, **changes: Any) -> Any:
    """As probe.py tells of one."""
    room = {"CPU": cpu, "GPU": gpu}
    looked = {"versions": versions(), "missing": [], "token": True, **changes.pop("looked", {})}
    base = {"id": address, "address": address, "head": head, "stable": 0.0, "all": room, "free": room, "looked": looked}
    return base | changes


def versions(**changes: str | None) -> dict[str, str | None]:
    return {**preflight.here(), **dict.fromkeys(preflight.INSTALLED, "1"), **changes}


class FakeClient:
    """`script`: how the runs end, one after the other; `nodes`: what probe.py finds, or a function of how often it was
    asked."""

    def __init__(self, *script: Ended, nodes: Any = None, **said: Any) -> None:
        self.script, self.nodes = list(script), nodes or [node()]
        self.said = {"versions": versions(), "unwritable": None, "config": None, "error": None, **said}
        self.jobs: dict[str, Any] = {}
        self.logs: dict[str, str] = {}
        self.probed = 0
        self.stopped: list[str] = []
        self.packages: list[set[str]] = []
        self.hiccups: list[Exception] = []  # raised by the next tails, in the middle of the log
        self.deaf: list[Exception] = []  # raised by the next questions for a job

    def submit_job(
        self, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str:
        assert submission_id not in self.jobs
        self.add(submission_id, "SUCCEEDED", 0, "", runtime_env, metadata, entrypoint)
        if folder := runtime_env.get("working_dir"):
            self.packages.append({str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()})
        if "rlkd_probe.py" in entrypoint:
            self.probed += 1
            nodes = self.nodes(self.probed) if callable(self.nodes) else self.nodes
            self.logs[submission_id] = probe.MARK + json.dumps({**self.said, "nodes": nodes}) + "\n"
        elif "rlkd.submit.entry" in entrypoint:
            status, code, log, *why = self.script.pop(0)
            self.add(submission_id, status, code, log, runtime_env, metadata, entrypoint, *why)
        return submission_id

    def add(
        self, job_id: str, status: str, code: int | None = None, log: str = "", runtime_env: Any = None,
        metadata: Any = None, entrypoint: str = "", message: str = "", error_type: str | None = None,
    ) -> None:  # fmt: skip
        self.jobs[job_id] = SimpleNamespace(
            submission_id=job_id, status=status, driver_exit_code=code, message=message, error_type=error_type,
            start_time=1000, end_time=61000, metadata=metadata, runtime_env=runtime_env, entrypoint=entrypoint,
        )  # fmt: skip
        self.logs[job_id] = log

    def get_job_info(self, job_id: str) -> Any:
        if self.deaf:
            raise self.deaf.pop(0)
        if job_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: {job_id} does not exist.")
        return self.jobs[job_id]

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True

    def delete_job(self, job_id: str) -> bool:
        del self.jobs[job_id]
        return True

    def get_job_logs(self, job_id: str) -> str:
        return self.logs[job_id]

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        log = self.logs[job_id]
        for start in range(0, len(log), 7):  # in pieces that are no lines
            if self.hiccups and start > len(log) // 2:
                raise self.hiccups.pop(0)
            yield log[start : start + 7]

    @property
    def runs(self) -> list[str]:
        return [job_id for job_id in self.jobs if "~" not in job_id]


def code_of(error: "pytest.ExceptionInfo[RlkdError]") -> str:
    return error.value.problems[0].code


class Heard(list[str]):
    """Lines, as they come."""

    @property
    def text(self) -> str:
        return "\n".join(self)


def recipe(folder: Path, **changes: Any) -> Path:
    """A small recipe with a model's folder beside it, and the current folder."""
    (folder / "models/tiny").mkdir(parents=True, exist_ok=True)
    base: dict[str, Any] = {
        "name": "demo",
        "model": {"path": "models/tiny"},
        "data": {"train": {"kind": "arithmetic", "size": 20}},
        "algorithm": {"name": "grpo", "rollout": {"samples": 4}},
        "rewards": {"arithmetic": {}},
        "schedule": {"steps": 9, "groups_per_step": 2},
        "sampler": {"engine": "hf"},
        "evaluate": {"at_start": False, "at_end": False},
    }
    for key, value in changes.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


def submission(
    client: FakeClient, folder: Path, sleep: Callable[[float], None] = lambda _: None, options: Options | None = None,
    **changes: Any,
) -> tuple[Submission, Heard, Heard]:  # fmt: skip
    """Of a small recipe in the current folder; what it writes of the log, and what it says."""
    path = recipe(folder, **changes)
    stages = load(path)
    written, said = Heard(), Heard()
    jobs = Jobs(client, "http://head:8265", answer_s=5.0)
    package = packed(stages, path.relative_to(Path.cwd()), ())
    return Submission(jobs, stages, package, options or Options(), written.append, said.append, sleep), written, said
