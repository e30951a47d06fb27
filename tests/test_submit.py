"""`rlkd submit` against a cluster in memory: attempts, retries, Ctrl-C; tests/cluster has a real one."""

import asyncio
import signal
from pathlib import Path

import pytest

from rlkd.core.errors import InfrastructureError, PreflightError
from rlkd.submit import package
from rlkd.submit.client import Options
from tests.submit_help import NODE_DIED, FakeClient, code_of, ended, node, recipe, submission


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "rlkd_itself", dict)  # hundreds of files, which test_submit_package.py looks at


def test_exit_75_is_submitted_again_until_it_is_done(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4, "STOPPED"), ended(75, 6), ended(0, 9, "SUCCEEDED"))
    pauses: list[float] = []
    run, written, said = submission(client, tmp_path, pauses.append)
    assert run.run() == 0
    assert client.runs == ["demo-1", "demo-2", "demo-3"]
    assert written.count("step 1/9  reward 0.5") == 3
    assert not [line for line in written if "rlkd-exit" in line]
    assert "demo-1: exit 75 (preempt); SIGTERM; saved: step 4" in said
    assert pauses == [10.0, 10.0]
    assert "attempt 3 (retry 2 of 20)" in said.text


def test_the_small_job_that_looks_at_the_cluster_leaves_nothing_behind(tmp_path: Path) -> None:
    client = FakeClient(ended(0, 9, "SUCCEEDED"))
    submission(client, tmp_path)[0].run()
    assert client.probed == 1
    assert list(client.jobs) == ["demo-1"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 7, 130])
def test_any_other_exit_ends_it_and_says_why(tmp_path: Path, code: int) -> None:
    client = FakeClient(ended(code, 4, cause="RLKD-D310: no", hint="mend the reward"), ended(0, 9))
    run, _, said = submission(client, tmp_path)
    assert run.run() == code
    assert client.runs == ["demo-1"]
    assert "RLKD-D310: no" in said.text
    assert "mend the reward" in said.text


def test_a_job_that_was_killed_is_not_taken_for_one_that_saved(tmp_path: Path) -> None:
    run, _, said = submission(FakeClient(("STOPPED", None, "step 1/9\n")), tmp_path)
    assert run.run() == 6
    assert "killed: it said nothing at its end" in said.text
    assert "--grace gives more" in said.text


def test_a_driver_whose_node_died_is_submitted_again(tmp_path: Path) -> None:
    lost = ("FAILED", None, "step 1/9\n", NODE_DIED, "JOB_SUPERVISOR_ACTOR_DIED")
    client = FakeClient(lost, ended(75, 4), ended(0, 9, "SUCCEEDED"))
    run, _, said = submission(client, tmp_path)
    assert run.run() == 0
    assert client.runs == ["demo-1", "demo-2", "demo-3"]
    assert "demo-1: the driver's node was lost; Ray says: Job supervisor actor died: " in said.text
    assert "Node Id: 6c0d the actor's node was preempted: spot; the last checkpoint stands" in said.text
    assert "JobSupervisor" not in said.text
    client = FakeClient(lost, lost)
    run, _, _ = submission(client, tmp_path, options=Options(retries=1))
    assert run.run() == 6
    assert client.runs == ["demo-1", "demo-2"]


@pytest.mark.parametrize(
    ("code", "message", "kind", "told"),
    [
        (None, "Job supervisor actor died: killed by the memory monitor", "JOB_SUPERVISOR_ACTOR_DIED", "memory"),
        (None, "runtime_env setup failed: no such pip", "RUNTIME_ENV_SETUP_FAILURE", "no such pip"),
        (-9, "Job entrypoint command failed with exit code -9, last available logs (truncated): because its node has "
         "died", "JOB_ENTRYPOINT_COMMAND_ERROR", "exit code -9; the last"),
    ],
)  # fmt: skip
def test_a_job_that_failed_without_an_exit_code_is_told_as_ray_does(
    tmp_path: Path, code: int | None, message: str, kind: str, told: str
) -> None:
    client = FakeClient(("FAILED", code, "step 1/9\n", message, kind))
    run, _, said = submission(client, tmp_path)
    assert run.run() == 6
    assert client.runs == ["demo-1"]
    assert "demo-1: failed without a word of its own; Ray says: " in said.text
    assert told in said.text
    assert "--grace gives more" not in said.text
    assert "The same rlkd submit command goes on with it" in said.text


NO_ROOM = "RLKD-E020: the cluster cannot place this run within 10 s: 2 GPU needed"


def test_a_retry_whose_nodes_went_before_it_had_its_places_is_tried_again(tmp_path: Path) -> None:
    script = [ended(75, 4), ended(3, 4, cause=NO_ROOM), ended(3, 4, cause="RLKD-E021: no node has a GPU")]
    client, pauses = FakeClient(*script, ended(0, 9, "SUCCEEDED")), list[float]()
    run, _, said = submission(client, tmp_path, pauses.append)
    assert run.run() == 0
    assert client.runs == ["demo-1", "demo-2", "demo-3", "demo-4"]
    assert pauses == [10.0, 20.0, 40.0]
    assert f"demo-2: exit 3 (config); {NO_ROOM}; saved: step 4" in said
    client = FakeClient(*script)
    assert submission(client, tmp_path, options=Options(retries=2))[0].run() == 3
    assert client.runs == ["demo-1", "demo-2", "demo-3"]


def test_a_first_attempt_without_room_and_a_retry_with_another_error_are_not(tmp_path: Path) -> None:
    client = FakeClient(ended(3, None, cause=NO_ROOM))
    assert submission(client, tmp_path)[0].run() == 3
    assert client.runs == ["demo-1"]
    client = FakeClient(ended(75, 4), ended(3, 4, cause="RLKD-E024: not shared; RLKD-E020: never"))
    assert submission(client, tmp_path)[0].run() == 3
    assert client.runs == ["demo-1", "demo-2"]


def test_the_retries_are_bounded(tmp_path: Path) -> None:
    client = FakeClient(*[ended(75, 4)] * 3)
    run, _, said = submission(client, tmp_path, options=Options(retries=2))
    assert run.run() == 75
    assert client.runs == ["demo-1", "demo-2", "demo-3"]
    assert "not submitted again: that was retry 2 of 2" in said.text


def test_attempts_that_come_to_nothing_are_given_longer_pauses(tmp_path: Path) -> None:
    pauses: list[float] = []
    script = [ended(75, 4), ended(75, 4), ended(75, 4), ended(75, 5), ended(0, 9, "SUCCEEDED")]
    submission(FakeClient(*script), tmp_path, pauses.append)[0].run()
    assert pauses == [10.0, 20.0, 40.0, 10.0]


def test_a_stop_for_good_is_not_submitted_again(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4, "STOPPED"))
    run, _, said = submission(client, tmp_path)
    client.add("demo-1~stop", "SUCCEEDED", 0)
    assert run.run() == 75
    assert client.runs == ["demo-1"]
    assert "stopped demo for good" in said.text


def test_a_stop_for_good_in_the_pause_counts_too(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4, "STOPPED"))
    run, _, _ = submission(client, tmp_path, lambda _: client.add("demo-1~stop", "PENDING"))
    assert run.run() == 75
    assert client.runs == ["demo-1"]


def test_a_stop_for_good_while_it_waits_for_room_counts_too(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4, "STOPPED"), nodes=lambda asked: [node(cpu=0.0 if asked > 1 else 4.0)])
    waited: list[float] = []

    def stops(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # the pause, and two rounds without room
            client.add("demo-1~stop", "SUCCEEDED")

    run, _, said = submission(client, tmp_path, stops)
    assert run.run() == 75
    assert client.runs == ["demo-1"]
    assert client.probed == 3
    assert "stopped demo for good" in said.text


def test_a_stop_for_good_during_the_look_at_the_cluster_counts_too(tmp_path: Path) -> None:
    def stopped(asked: int) -> object:
        if asked == 2:
            client.add("demo-1~stop", "SUCCEEDED")
        return [node()]

    client = FakeClient(ended(75, 4, "STOPPED"), ended(0, 9), nodes=stopped)
    assert submission(client, tmp_path)[0].run() == 75
    assert client.runs == ["demo-1"]


def test_an_earlier_stop_for_good_does_not_bind_who_gives_the_command_again(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 5), ended(0, 9, "SUCCEEDED"))
    client.add("demo-1", *ended(75, 4, "STOPPED"))
    client.add("demo-1~stop", "SUCCEEDED")
    assert submission(client, tmp_path)[0].run() == 0
    assert client.runs == ["demo-1", "demo-2", "demo-3"]


def test_ctrl_c_lets_go_and_says_how_to_go_on(tmp_path: Path) -> None:
    client = FakeClient(("RUNNING", None, ""))
    run, _, said = submission(client, tmp_path)

    async def pressed(_: str):  # type: ignore[no-untyped-def]
        yield "step 1/9\n"
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    client.tail_job_logs = pressed  # type: ignore[method-assign]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run.run() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert client.stopped == []
    assert "demo-1 goes on" in said[-1]
    assert "rlkd logs demo --follow" in said[-1]
    assert "rlkd stop demo" in said[-1]


def test_ctrl_c_in_the_pause_leaves_nothing_running(tmp_path: Path) -> None:
    def pressed(_: float) -> None:
        raise KeyboardInterrupt

    run, _, said = submission(FakeClient(ended(75, 4)), tmp_path, pressed)
    assert run.run() == 130
    assert "nothing runs" in said[-1]


def test_ctrl_c_while_an_attempt_is_being_submitted_does_not_hide_it(tmp_path: Path) -> None:
    client = FakeClient(("RUNNING", None, ""))

    def pressed(_: str) -> None:
        raise KeyboardInterrupt

    run, _, said = submission(client, tmp_path)
    client.get_job_info = lambda job_id: pressed(job_id) if job_id == "demo-1" else client.jobs[job_id]  # type: ignore[method-assign]
    assert run.run() == 130
    assert "demo-1 goes on" in said[-1]


def test_a_cluster_that_is_away_between_two_attempts_is_asked_again(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4), ended(0, 9, "SUCCEEDED"))
    run, _, said = submission(client, tmp_path)
    away, asked = [ConnectionError("gone"), RuntimeError("status code 500")], client.list_jobs

    def listed() -> list[object]:
        if "demo-1" in client.jobs and away:
            raise away.pop()
        return asked()

    client.list_jobs = listed  # type: ignore[method-assign]
    assert run.run() == 0
    assert client.runs == ["demo-1", "demo-2"]
    assert len([line for line in said if line.startswith("no answer of the cluster")]) == 2


def test_a_cluster_that_stays_away_between_two_attempts_ends_it(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4))
    run, _, _ = submission(client, tmp_path, options=Options(patience_s=-1.0))
    asked = client.list_jobs

    def listed() -> list[object]:
        if "demo-1" in client.jobs:
            raise ConnectionError("gone")
        return asked()

    client.list_jobs = listed  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError) as error:
        run.run()
    assert code_of(error) == "RLKD-I232"


def test_an_attempt_that_came_through_without_an_answer_is_followed_and_not_submitted_twice(tmp_path: Path) -> None:
    """The same where somebody else, who followed the run too, was faster."""
    client = FakeClient(ended(75, 4), ("RUNNING", None, ""))
    run, _, said = submission(client, tmp_path)
    submit, tail = client.submit_job, client.tail_job_logs

    def lost(**options):  # type: ignore[no-untyped-def]
        submit(**options)
        if options["submission_id"] == "demo-2":
            raise TimeoutError("lost")

    async def ends(job_id: str):  # type: ignore[no-untyped-def]
        if job_id == "demo-2":
            client.add(job_id, *ended(0, 9, "SUCCEEDED"), metadata=client.jobs[job_id].metadata)
        async for text in tail(job_id):
            yield text

    client.submit_job, client.tail_job_logs = lost, ends  # type: ignore[method-assign,assignment]
    assert run.run() == 0
    assert client.runs == ["demo-1", "demo-2"]
    assert "demo-2 is RUNNING already, with this package: it is followed" in said


def test_an_attempt_of_another_run_is_none_of_this_one(tmp_path: Path) -> None:
    """The second attempt of `demo` has the name of the run `demo-2`."""
    client = FakeClient(ended(0, 9, "SUCCEEDED"))
    client.add("demo-2", "RUNNING", metadata={"rlkd_package": "another"})
    run, _, _ = submission(client, tmp_path, name="demo-2")
    assert run.run() == 0
    assert client.runs == ["demo-2", "demo-2-1"]


def test_detached_it_is_not_followed(tmp_path: Path) -> None:
    client = FakeClient(("RUNNING", None, ""))
    run, _, said = submission(client, tmp_path, options=Options(detach=True))
    assert run.run() == 0
    assert client.jobs["demo-1"].metadata["rlkd_retries"] == "0"
    assert "nobody submits it again" in said.text


def test_the_same_command_follows_what_runs_already(tmp_path: Path) -> None:
    client = FakeClient()
    run, written, said = submission(client, tmp_path)
    client.add("demo-7", "RUNNING", None, "", metadata={"rlkd_package": run.package.digest})
    client.add("demo-7", *ended(0, 9, "SUCCEEDED"), metadata={"rlkd_package": run.package.digest})
    client.jobs["demo-7"].status = "RUNNING"
    state = client.jobs["demo-7"]
    tail = client.tail_job_logs

    async def ends(job_id: str):  # type: ignore[no-untyped-def]
        async for text in tail(job_id):
            yield text
        state.status = "SUCCEEDED"

    client.tail_job_logs = ends  # type: ignore[method-assign]
    assert run.run() == 0
    assert client.runs == ["demo-7"]
    assert client.probed == 0
    assert "demo-7 is RUNNING already, with this package: it is followed" in said
    assert "step 2/9  reward 0.6" in written


def test_what_runs_already_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    client = FakeClient()
    client.add("demo-7", "RUNNING", metadata={"rlkd_package": "another"})
    run, _, _ = submission(client, tmp_path)
    with pytest.raises(PreflightError) as error:
        run.run()
    assert code_of(error) == "RLKD-E237"
    assert client.runs == ["demo-7"]


def test_the_recipe_is_named_as_it_is_in_the_package(tmp_path: Path) -> None:
    client = FakeClient(ended(0, 9, "SUCCEEDED"))
    submission(client, tmp_path)[0].run()
    entrypoint = client.jobs["demo-1"].entrypoint
    assert entrypoint.startswith("exec python -m rlkd.submit.entry ")
    assert f"{tmp_path}/runs/demo recipe.yaml model.path={tmp_path}/models/tiny" in entrypoint
    assert {"recipe.yaml", "rlkd_probe.py"} <= client.packages[-1]
    assert recipe(tmp_path).name == "recipe.yaml"
