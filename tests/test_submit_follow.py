"""A job's log, over hiccups of the dashboard."""

import pytest

from rlkd.core.errors import InfrastructureError
from rlkd.submit.follow import Follower
from rlkd.submit.jobs import Jobs
from tests.submit_help import FakeClient, Heard, code_of


def follower(client: FakeClient, job_id: str = "demo-1", **options: float) -> tuple[Follower, Heard, Heard]:
    written, said = Heard(), Heard()
    jobs = Jobs(client, "http://head:8265", answer_s=5.0)
    return Follower(jobs, job_id, written.append, said.append, again_s=0.0, **options), written, said  # type: ignore[arg-type]


def test_hiccups_of_the_dashboard_lose_no_line_and_repeat_none() -> None:
    client = FakeClient()
    lines = [f"step {i}/9" for i in range(1, 10)]
    client.add("demo-1", "SUCCEEDED", 0, "\n".join(lines))
    client.hiccups = [ConnectionError("gone"), RuntimeError("WebSocket connection closed unexpectedly"), OSError("no")]
    run, written, said = follower(client)
    job = run.run()
    assert job is not None
    assert job.status == "SUCCEEDED"
    assert written == lines
    assert len([line for line in said if "does not answer (gone)" in line]) == 1
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
    client.hiccups = [ConnectionError("gone")] * 3
    run, _, _ = follower(client, patience_s=-1.0)
    with pytest.raises(InfrastructureError, match="nobody knows how demo-1 is") as error:
        run.run()
    assert code_of(error) == "RLKD-I230"


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
