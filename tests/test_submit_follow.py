"""A job's log, over hiccups of the dashboard."""

import pytest

from rlkd.core.errors import InfrastructureError
from rlkd.submit.follow import Follower
from rlkd.submit.jobs import Jobs
from tests.submit_help import FakeClient, Heard, code_of, ended


def follower(client: FakeClient, job_id: str = "demo-1", **options: float) -> tuple[Follower, Heard, Heard]:
    written, said = Heard(), Heard()
    jobs = Jobs(client, "http://head:8265", answer_s=5.0)
    return Follower(jobs, job_id, written.append, said.append, again_s=0.0, **options), written, said  # type: ignore[arg-type]


def test_hiccups_of_the_dashboard_lose_no_line_and_repeat_none() -> None:
    client = FakeClient()
    lines = [f"step {i}/9" for i in range(1, 10)]
    client.add("demo-1", "SUCCEEDED", 0, "\n".join(lines))
    client.hiccups = [ConnectionError("cut"), RuntimeError("WebSocket connection closed unexpectedly"), OSError("no")]
    client.deaf = [ConnectionError("gone"), RuntimeError("status code 502"), OSError("no")]
    run, written, said = follower(client)
    job = run.run()
    assert job is not None
    assert job.status == "SUCCEEDED"
    assert written == lines
    assert len([line for line in said if "does not answer (the state of demo-1: gone)" in line]) == 1
    assert "answers again" in said.text


def test_a_connection_that_ends_too_early_each_time_is_no_end() -> None:
    """ray#60665: the log's connection closes as if the job were over."""
    client = FakeClient()
    client.add("demo-1", "RUNNING", None, "step 1/9\n")
    run, written, _ = follower(client)

    async def closes(job_id: str):  # type: ignore[no-untyped-def]
        client.logs[job_id] += "more\n"
        if len(client.logs[job_id]) > 30:
            client.jobs[job_id].status = "SUCCEEDED"
        return
        yield

    client.tail_job_logs = closes  # type: ignore[method-assign]
    job = run.run()
    assert job is not None
    assert job.over
    assert written == ["step 1/9", *["more"] * 5]


def test_a_dashboard_that_stays_away_is_told() -> None:
    client = FakeClient()
    client.add("demo-1", "RUNNING", None, "step 1/9\n" * 9)
    client.hiccups, client.deaf = [ConnectionError("cut")] * 3, [ConnectionError("gone")] * 3
    run, _, _ = follower(client, patience_s=-1.0)
    with pytest.raises(InfrastructureError, match="nobody knows how demo-1 is") as error:
        run.run()
    assert code_of(error) == "RLKD-I230"


class NoSockets(FakeClient):
    """Behind something that lets HTTP through and no WebSocket. The job does a step whenever its log is asked for."""

    async def tail_job_logs(self, job_id: str):  # type: ignore[no-untyped-def,override]
        raise OSError("certificate verify failed")
        yield

    def get_job_logs(self, job_id: str) -> str:
        found = super().get_job_logs(job_id)
        done = found.count("step") + 1
        self.logs[job_id] += f"step {done}/9\n"
        if done == 5:
            self.jobs[job_id].status = "SUCCEEDED"
        return found


def test_a_log_without_its_own_connection_is_asked_for() -> None:
    client = NoSockets()
    client.add("demo-1", "RUNNING", None, "")
    run, written, said = follower(client, patience_s=-1.0)
    job = run.run()
    assert job is not None
    assert job.over
    assert written == [f"step {i}/9" for i in range(1, 6)]
    assert said == [
        "the log's own connection fails (certificate verify failed): the log is asked for now and then instead"
    ]


def test_it_does_not_ask_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    client, pauses = NoSockets(), list[float]()
    client.add("demo-1", "RUNNING", None, "")

    async def slept(seconds: float) -> None:
        pauses.append(seconds)

    run, _, _ = follower(client)
    monkeypatch.setattr("rlkd.submit.follow.asyncio.sleep", slept)
    run.again_s = 2.0
    run.run()
    assert pauses == [4.0, 8.0, 10.0, 10.0, 10.0]  # never longer than where the connection is quiet


def test_a_cluster_that_was_started_anew_is_told() -> None:
    client = FakeClient()
    client.add("demo-1", "RUNNING", None, "step 1/9\n")
    run, _, _ = follower(client)
    tail = client.tail_job_logs

    async def forgets(job_id: str):  # type: ignore[no-untyped-def]
        async for text in tail(job_id):
            yield text
        client.jobs.clear()

    client.tail_job_logs = forgets  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError) as error:
        run.run()
    assert code_of(error) == "RLKD-I231"


@pytest.mark.parametrize("unreadable", [1, 3])
def test_the_last_line_of_a_job_that_is_over_is_asked_for_again(unreadable: int) -> None:
    """It says that the run has saved and is to be submitted again; the log's connection may have missed it, and the
    dashboard may be busy."""
    client = FakeClient()
    client.add("demo-1", *ended(75, 4))
    run, _, _ = follower(client)
    asked, answers = [0], client.get_job_logs

    async def cut(_: str):  # type: ignore[no-untyped-def]
        return
        yield

    def log(job_id: str) -> str:
        asked[0] += 1
        if asked[0] <= unreadable:
            raise RuntimeError("Request failed with status code 500")
        return answers(job_id)

    client.tail_job_logs, client.get_job_logs = cut, log  # type: ignore[method-assign]
    job = run.run()
    assert job is not None
    assert run.ending(job).again
    assert asked == [unreadable + 1]
