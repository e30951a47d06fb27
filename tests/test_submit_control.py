"""`rlkd status`, `logs` and `stop`, and the ways to be told nothing by a cluster."""

import socket
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from rlkd.core.errors import ConfigError, InfrastructureError, PreflightError
from rlkd.submit import control
from rlkd.submit.control import Stopping
from rlkd.submit.jobs import ENVIRONMENT, WAIT, Jobs, Unanswered, connect, within
from tests.submit_help import NODE_DIED, FakeClient, Heard, ended

GRACE = {"env_vars": {WAIT: "0"}}


def jobs(client: FakeClient) -> Jobs:
    return Jobs(client, "http://head:8265", answer_s=5.0)


def stopping(client: FakeClient, name: str = "demo", for_good: bool = False) -> tuple[Stopping, Heard, Heard]:
    written, said = Heard(), Heard()
    return Stopping(jobs(client), name, for_good, written.append, said.append, after_kill_s=2.0), written, said


class Saves(FakeClient):
    """A run that saves and ends when it is asked to."""

    def stop_job(self, job_id: str) -> bool:
        job, (_, _, log) = self.jobs[job_id], ended(75, 5, "STOPPED")
        job.status = "STOPPED"
        self.logs[job_id] += "saving step 5\n" + log
        return super().stop_job(job_id)


def test_status_of_a_run_tells_of_every_attempt() -> None:
    client = FakeClient()
    client.add("demo-1", *ended(75, 4, "STOPPED"))
    client.add("demo-2", "RUNNING", None, "run demo\nstep 7/9  reward 0.4\n")
    client.add("demo-10", "PENDING")
    client.add("demo-x-1", "RUNNING", None, "another")
    client.add("demo-2~stop", "SUCCEEDED")
    client.add("demo~preflight-123456", "SUCCEEDED")
    said = control.status(jobs(client), "demo")
    assert [row["id"] for row in said["attempts"]] == ["demo-1", "demo-2", "demo-10"]
    assert said["attempts"][0]["exit"] == 75
    assert said["attempts"][0]["saved"] == 4
    lines = said["text"].splitlines()
    assert "exit 75 (preempt); SIGTERM; saved: step 4" in lines[1]
    assert lines[2].endswith("step 7/9  reward 0.4")


def test_status_says_what_ray_says_of_a_job_that_failed_in_silence() -> None:
    client = FakeClient()
    client.add("demo-1", "FAILED", message=NODE_DIED, error_type="JOB_SUPERVISOR_ACTOR_DIED")
    client.add("demo-2", "FAILED", message="runtime_env setup failed: no such pip")
    said = control.status(jobs(client), "demo")
    assert "the driver's node was lost; Ray says: Job supervisor actor died" in said["text"]
    assert said["attempts"][1]["says"].startswith("failed without a word of its own; Ray says: runtime_env setup fail")


def test_status_without_a_name_tells_of_every_run() -> None:
    client = FakeClient()
    assert "no run was submitted" in control.status(jobs(client), None)["text"]
    client.add("demo-1", *ended(0, 9, "SUCCEEDED"))
    client.add("b-1", "RUNNING", None, "")
    client.add("raysubmit_x", "RUNNING", None, "somebody else's")
    client.add("demo~preflight-123456", "RUNNING", None, "")
    assert [run["name"] for run in control.status(jobs(client), None)["runs"]] == ["b", "demo"]


def test_the_end_of_a_job_that_was_submitted_by_hand_is_what_rlkd_printed() -> None:
    client = FakeClient()
    client.add("demo-1", "STOPPED", None, "SIGTERM: saved step 3; more text (exit 75)\nAttempt 1 ended\nMore: x\n")
    client.add("demo-2", "STOPPED", None, "step 1/9\n")
    found = control.status(jobs(client), "demo")["attempts"]
    assert [row["exit"] for row in found] == [75, None]


def test_logs_are_those_of_the_newest_attempt_or_of_the_one_that_is_named() -> None:
    client = FakeClient()
    client.add("demo-1", *ended(75, 4, "STOPPED"))
    client.add("demo-2", "SUCCEEDED", 0, "second\n")
    written, said = Heard(), Heard()
    assert control.logs(jobs(client), "demo", False, written.append, said.append) == 0
    assert written == ["second"]
    written.clear()
    control.logs(jobs(client), "demo-1", True, written.append, said.append)
    assert written == ["step 1/9  reward 0.5", "step 2/9  reward 0.6"]
    assert said == ["demo-1: exit 75 (preempt); SIGTERM; saved: step 4"]


@pytest.mark.parametrize("name", ["dem", "demo-3", "other", "demo-1~stop"])
def test_a_run_that_nobody_submitted(name: str) -> None:
    client = FakeClient()
    client.add("demo-1", "RUNNING")
    for ask in (
        lambda: control.status(jobs(client), name),
        lambda: control.logs(jobs(client), name, False, print, print),
        lambda: stopping(client, name)[0].run(),
    ):
        with pytest.raises(PreflightError) as error:
            ask()
        assert error.value.problems[0].code == "RLKD-E236"
        assert "demo" in str(error.value.problems[0].fix)


def test_stop_shows_the_save_and_nothing_of_before() -> None:
    client = Saves()
    client.add("demo-1", "RUNNING", None, "step 1/9\nstep 2/9\n", runtime_env=GRACE)
    run, written, said = stopping(client)
    assert run.run() == 0
    assert client.stopped == ["demo-1"]
    assert written[0] == "saving step 5"
    assert "step 2/9" not in written
    assert said[-1] == "demo-1: exit 75 (preempt); SIGTERM; saved: step 5"


def test_stop_says_that_a_client_will_submit_it_again_and_for_good_that_it_will_not() -> None:
    told = {"rlkd_retries": "20", "rlkd_by": "ann@laptop (pid 7)"}
    client = Saves()
    client.add("demo-1", "RUNNING", None, "", runtime_env=GRACE, metadata=told)
    run, _, said = stopping(client)
    run.run()
    assert "the client of ann@laptop (pid 7), if it is still there, submits it again (up to 20 times)" in said[-1]
    assert "rlkd stop demo --for-good" in said[-1]
    client = Saves()
    client.add("demo-1", "RUNNING", None, "", runtime_env=GRACE, metadata=told)
    run, _, said = stopping(client, for_good=True)
    run.run()
    assert "submits it again" not in said.text
    assert client.jobs["demo-1~stop"].metadata["rlkd"] == "stop"


def test_for_good_is_said_before_the_job_is_asked_to_end() -> None:
    """A client that sees it end at once must see this too."""
    order: list[str] = []

    class Ordered(Saves):
        def submit_job(self, **options: Any) -> str:  # type: ignore[override]
            order.append(options["submission_id"])
            return super().submit_job(**options)

        def stop_job(self, job_id: str) -> bool:
            order.append(f"stop {job_id}")
            return super().stop_job(job_id)

    client = Ordered()
    client.add("demo-1", "RUNNING", None, "", runtime_env=GRACE)
    stopping(client, for_good=True)[0].run()
    assert order == ["demo-1~stop", "stop demo-1"]
    assert stopping(client, for_good=True)[0].run() == 0  # a second time changes nothing
    assert order == ["demo-1~stop", "stop demo-1"]


def test_stop_of_what_is_over_says_how_it_ended() -> None:
    client = FakeClient()
    client.add("demo-1", *ended(5, 4))
    run, _, said = stopping(client)
    assert run.run() == 0
    assert client.stopped == []
    assert "is over already: exit 5" in said[-1]


def test_stop_does_not_leave_a_job_running_in_silence() -> None:
    client = FakeClient()
    client.add("demo-1", "RUNNING", None, "step 1/9\n", runtime_env=GRACE)
    run, _, _ = stopping(client)
    with pytest.raises(InfrastructureError, match="demo-1 is RUNNING 0 s after it was asked") as error:
        replace(run, after_kill_s=0.3).run()
    assert error.value.problems[0].code == "RLKD-I233"


class NoSockets(Saves):
    """Only HTTP comes through, and the save takes a moment."""

    async def tail_job_logs(self, job_id: str) -> Any:
        raise OSError("no WebSocket")
        yield

    def stop_job(self, job_id: str) -> bool:
        self.later = super().get_job_info(job_id), ended(75, 5, "STOPPED")[2]
        return FakeClient.stop_job(self, job_id)

    def get_job_info(self, job_id: str) -> Any:
        if self.stopped:
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked == 2:
                job, log = self.later
                job.status, self.logs[job_id] = "STOPPED", self.logs[job_id] + "saving step 5\n" + log
        return super().get_job_info(job_id)


def test_stop_sees_the_save_without_the_logs_own_connection() -> None:
    client = NoSockets()
    client.add("demo-1", "RUNNING", None, "step 1/9\n", runtime_env=GRACE)
    run, written, said = stopping(client)
    assert run.run() == 0
    assert written[0] == "saving step 5"
    assert said[-1] == "demo-1: exit 75 (preempt); SIGTERM; saved: step 5"


def test_stop_asks_once_more_before_it_says_that_a_job_still_runs() -> None:
    """The dashboard was away until the time was up."""

    class Away(NoSockets):
        def get_job_info(self, job_id: str) -> Any:
            found = super().get_job_info(job_id)
            if self.stopped and self.asked == 1:
                raise ConnectionError("gone")
            return found

    client = Away()
    client.add("demo-1", "RUNNING", None, "", runtime_env=GRACE)
    run, _, said = stopping(client)
    assert replace(run, after_kill_s=0.0).run() == 0
    assert said[-1] == "demo-1: exit 75 (preempt); SIGTERM; saved: step 5"


def test_stop_of_a_job_that_was_killed_is_no_success() -> None:
    class Killed(FakeClient):
        def stop_job(self, job_id: str) -> bool:
            self.jobs[job_id].status = "STOPPED"
            return super().stop_job(job_id)

    client = Killed()
    client.add("demo-1", "RUNNING", None, "step 1/9\n", runtime_env=GRACE)
    run, _, said = stopping(client)
    assert run.run() == 6
    assert "killed" in said[-1]


def test_a_job_without_the_grace_is_warned_of() -> None:
    client = Saves()
    client.add("demo-1", "RUNNING", None, "")
    run, _, said = stopping(client)
    run.run()
    assert "without RAY_JOB_STOP_WAIT_TIME_S: Ray kills it after 3 s" in said[0]


# --- no answer


def test_an_address_where_nobody_is() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(PreflightError) as error:
        connect(address)
    problem = error.value.problems[0]
    assert (problem.code, problem.where) == ("RLKD-E230", f"--ray {address}")
    assert "8265" in str(problem.fix)


def test_an_address_that_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(PreflightError, match="no answer in 0 s") as error:
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.4)
    assert error.value.problems[0].code == "RLKD-E230"


def test_the_address_that_is_given_is_not_replaced_by_one_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "http://elsewhere.invalid:1")
    with pytest.raises(PreflightError) as given:
        connect("http://127.0.0.1:9")
    assert "elsewhere" not in str(given.value)
    with pytest.raises(PreflightError, match=r"elsewhere\.invalid"):
        connect(None)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError) as error:
        connect(None)
    assert error.value.problems[0].code == "RLKD-C230"


def test_whatever_goes_wrong_on_the_way_is_no_answer() -> None:
    def raises(error: Exception) -> Any:
        raise error

    for error in (ConnectionError("reset"), TimeoutError("slow"), OSError("no route")):
        with pytest.raises(Unanswered, match="the list"):
            within(5.0, "the list", lambda error=error: raises(error))
    with pytest.raises(KeyError):
        within(5.0, "the list", lambda: raises(KeyError("x")))


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["submit", "no-such-recipe.yaml", "--ray", "http://127.0.0.1:9"], 2, "RLKD-C001"),
        (["submit", "configs/grpo-tiny.yaml", "--ray", "http://127.0.0.1:9"], 3, "RLKD-E230"),
        (["submit", "configs/grpo-tiny.yaml", "--ray", "http://127.0.0.1:9", "--limit-mb", "1"], 3, "RLKD-E234"),
        (["submit", "configs/grpo-tiny.yaml", "--env", "NOT_THERE_AT_ALL"], 2, "RLKD-C231"),
        (["status", "--ray", "http://127.0.0.1:9"], 3, "RLKD-E230"),
        (["stop", "demo", "--ray", "http://127.0.0.1:9"], 3, "RLKD-E230"),
        (["logs", "demo", "--ray", "http://127.0.0.1:9"], 3, "RLKD-E230"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments: list[str], exit_code: int, code: str) -> None:
    from rlkd.cli import app

    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == exit_code
    assert f"error[{code}]" in found.stderr
    assert "Traceback" not in found.stderr
