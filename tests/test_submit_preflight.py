"""What `rlkd submit` finds on a cluster before it submits anything: room, versions, storage, files; and the grace."""

from pathlib import Path
from typing import Any

import pytest

from rlkd.config.stages import load
from rlkd.core.errors import PreflightError, RlkdError
from rlkd.submit import package, preflight
from rlkd.submit.client import Options, environment
from rlkd.submit.jobs import WAIT
from tests.submit_help import FakeClient, code_of, ended, node, submission, versions


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "rlkd_itself", dict)  # hundreds of files, which test_submit_package.py looks at


@pytest.mark.faults("F63")
def test_too_few_gpus_are_named_node_by_node(tmp_path: Path) -> None:
    busy = node("10.0.0.2", False, 8.0, 4.0, free={"CPU": 8.0, "GPU": 1.0})
    client = FakeClient(nodes=[node(cpu=8.0), busy])
    run, _, _ = submission(client, tmp_path, learner={"ranks": 4}, sampler={"workers": 2})
    with pytest.raises(PreflightError) as error:
        run.run()
    assert code_of(error) == "RLKD-E232"
    text = str(error.value)
    assert "needs 6 GPU, 7 CPU; missing: 5 GPU more" in text
    assert "10.0.0.1 (head) 8 of 8 CPU, 10.0.0.2 1 of 4 GPU and 8 of 8 CPU" in text
    assert client.runs == []


def test_one_actor_that_fits_no_node_is_named(tmp_path: Path) -> None:
    nodes = [node(f"10.0.0.{i}", i == 1, 8.0, 2.0) for i in (1, 2)]
    run, _, _ = submission(FakeClient(nodes=nodes), tmp_path, sampler={"engine": "vllm", "tensor_parallel": 3})
    with pytest.raises(PreflightError, match="a node with 3 GPU, 1 CPU free, for rollout-0"):
        run.run()


def test_nodes_that_do_not_stay_are_no_place_for_the_learner(tmp_path: Path) -> None:
    stays = node(cpu=8.0, stable=1.0)
    run, _, _ = submission(FakeClient(nodes=[stays, node("10.0.0.2", False, 8.0, 4.0)]), tmp_path)
    with pytest.raises(PreflightError, match="a node that stays with 1 GPU, 1 CPU free, for learner-0"):
        run.run()


def test_an_attempt_that_follows_another_waits_for_nodes_and_says_so(tmp_path: Path) -> None:
    client = FakeClient(
        ended(75, 4),
        ended(0, 9, "SUCCEEDED"),
        nodes=lambda asked: [node(cpu=0.0 if 1 < asked < 4 else 4.0)],
    )
    run, _, said = submission(client, tmp_path)
    assert run.run() == 0
    assert client.probed == 4
    assert len([line for line in said if line.startswith("waiting for room: needs")]) == 2


GPUS, NONE = [node(cpu=8.0, gpu=2.0)], [node(cpu=8.0)]


def test_an_attempt_that_had_gpus_waits_for_gpus(tmp_path: Path) -> None:
    """The last GPU node was taken: the head's CPUs are no place to go on."""
    client = FakeClient(ended(75, 4), ended(0, 9, "SUCCEEDED"), nodes=lambda asked: NONE if asked == 2 else GPUS)
    run, _, said = submission(client, tmp_path)
    assert run.run() == 0
    assert "waiting for room: needs 2 GPU, 3 CPU; missing: 2 GPU more" in said.text
    assert [client.jobs[name].entrypoint.endswith(" model.device=cuda") for name in client.runs] == [True, True]
    assert len({client.jobs[name].metadata["rlkd_package"] for name in client.runs}) == 1  # E237 does not see it


def test_a_later_client_knows_that_the_run_had_gpus(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4), ended(0, 9, "SUCCEEDED"), nodes=GPUS)
    submission(client, tmp_path, options=Options(retries=0))[0].run()
    client.nodes = NONE
    run, _, _ = submission(client, tmp_path, options=Options(retries=0))
    with pytest.raises(PreflightError, match="missing: 2 GPU more") as error:
        run.run()
    assert code_of(error) == "RLKD-E232"
    assert "model.device=cpu goes on without GPUs" in str(error.value)
    run, _, _ = submission(client, tmp_path, model={"device": "cpu"})
    assert run.run() == 0
    assert "cuda" not in client.jobs["demo-2"].entrypoint


def test_a_run_on_cpus_is_told_nothing_of_gpus(tmp_path: Path) -> None:
    client = FakeClient(ended(75, 4), ended(0, 9, "SUCCEEDED"))
    assert submission(client, tmp_path)[0].run() == 0
    assert not any("model.device" in job.entrypoint or "rlkd_gpu" in job.metadata for job in client.jobs.values())


def test_only_stages_that_leave_it_open_are_kept_on_gpus(tmp_path: Path) -> None:
    stages = [{"name": "one"}, {"name": "two", "model": {"device": "cpu"}}, {"name": "three"}]
    run, _, _ = submission(FakeClient(), tmp_path, stages=stages)
    kept = preflight.on_gpu(run.stages)
    assert kept == ["stages.one.model.device=cuda", "stages.three.model.device=cuda"]
    assert [s.config.model.device for s in load(tmp_path / "recipe.yaml", kept)] == ["cuda", "cpu", "cuda"]


def test_a_run_that_waits_for_an_autoscaler_itself_is_submitted(tmp_path: Path) -> None:
    client = FakeClient(ended(0, 9, "SUCCEEDED"), nodes=[node(cpu=0.0)])
    run, _, said = submission(client, tmp_path, ray={"wait_s": 900})
    assert run.run() == 0
    assert "the run will wait 900 s for it (ray.wait_s)" in said.text


@pytest.mark.faults("F63")
@pytest.mark.parametrize(
    ("name", "there", "told"),
    [
        ("ray", "2.9.0", "ray is 2.9.0 there and "),
        ("python", "3.9.1", "python is 3.9.1 there and 3."),
        ("rlkd", None, "rlkd is not installed there and "),
        ("deepspeed", None, "deepspeed is not installed there"),
    ],
)
def test_other_versions_are_refused_with_both(tmp_path: Path, name: str, there: str | None, told: str) -> None:
    client = FakeClient(versions=versions(**{name: there}))
    run, _, _ = submission(client, tmp_path)
    with pytest.raises(PreflightError) as error:
        run.run()
    assert code_of(error) == "RLKD-E231"
    assert told in str(error.value)
    assert client.runs == []


def test_a_driver_that_cannot_join_is_told_with_the_versions(tmp_path: Path) -> None:
    client = FakeClient(versions=versions(ray="2.9.0"), error="RuntimeError: Version mismatch", nodes=[])
    client.nodes = []
    with pytest.raises(PreflightError) as error:
        submission(client, tmp_path)[0].run()
    assert code_of(error) == "RLKD-E231"
    client = FakeClient(error="RuntimeError: other")
    client.nodes = []
    with pytest.raises(PreflightError) as error:
        submission(client, tmp_path)[0].run()
    assert code_of(error) == "RLKD-E238"


def test_one_node_with_another_rlkd_is_named(tmp_path: Path) -> None:
    old = node("10.0.0.9", False, looked={"versions": versions(rlkd="0.0.1")})
    with pytest.raises(PreflightError) as error:
        submission(FakeClient(nodes=[node(), old]), tmp_path)[0].run()
    assert [p.where for p in error.value.problems] == ["10.0.0.9"]


def test_pythons_third_number_does_not_matter(tmp_path: Path) -> None:
    major, minor, _ = str(versions()["python"]).split(".")
    client = FakeClient(ended(0, 9, "SUCCEEDED"), versions=versions(python=f"{major}.{minor}.99"))
    assert submission(client, tmp_path)[0].run() == 0


def test_a_folder_of_one_node_alone_is_refused_on_several(tmp_path: Path) -> None:
    blind = node("10.0.0.2", False, looked={"token": False})
    client = FakeClient(nodes=[node(), blind])
    run, _, _ = submission(client, tmp_path)
    with pytest.raises(PreflightError) as error:
        run.run()
    assert code_of(error) == "RLKD-E233"
    assert f"{tmp_path}/runs/demo is another folder on 10.0.0.2" in str(error.value)


@pytest.mark.parametrize(
    "nodes",
    [
        [node(stable=1.0), node("10.0.0.2", False, looked={"token": False})],
        [node(cpu=8.0, gpu=4.0), node("10.0.0.2", False, cpu=8.0, looked={"token": False})],
    ],
)
def test_nodes_that_no_learner_is_put_on_need_not_see_it(tmp_path: Path, nodes: list[Any]) -> None:
    assert submission(FakeClient(ended(0, 9, "SUCCEEDED"), nodes=nodes), tmp_path)[0].run() == 0


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run, _, _ = submission(FakeClient(unwritable="Permission denied: /runs"), tmp_path)
    with pytest.raises(PreflightError, match="Permission denied: /runs") as error:
        run.run()
    assert code_of(error) == "RLKD-E233"


def test_a_model_that_is_not_on_a_node_is_named_with_it(tmp_path: Path) -> None:
    client = FakeClient(nodes=[node(), node("10.0.0.2", False, looked={"missing": ["model.path"]})])
    with pytest.raises(PreflightError) as error:
        submission(client, tmp_path)[0].run()
    problem = error.value.problems[0]
    assert (problem.code, problem.where) == ("RLKD-E235", "model.path")
    assert problem.what == f"{tmp_path}/models/tiny is not on 10.0.0.2"


def test_a_small_job_that_fails_says_what_it_said(tmp_path: Path) -> None:
    client = FakeClient()
    run, _, _ = submission(client, tmp_path, options=Options(python="python9"))
    submit = client.submit_job

    def fails(**options):  # type: ignore[no-untyped-def]
        submit(**options)
        client.add(options["submission_id"], "FAILED", 127, "sh: 1: exec: python9: not found\n")

    client.submit_job = fails  # type: ignore[method-assign,assignment]
    with pytest.raises(PreflightError, match="python9: not found") as error:
        run.run()
    assert code_of(error) == "RLKD-E238"
    assert "--python" in str(error.value)


# --- the grace


def wait_of(client: FakeClient, job: str) -> str:
    return str(client.jobs[job].runtime_env["env_vars"][WAIT])


def test_the_grace_is_that_of_the_save_that_was_measured(tmp_path: Path) -> None:
    small = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 256}  # fmt: skip
    status, code, log = ended(75, 4, "STOPPED")
    slow = log.replace('"save_s": 2.0', '"save_s": 200.0')
    assert slow != log
    client = FakeClient((status, code, slow), ended(0, 9, "SUCCEEDED"), config=small)
    run, _, said = submission(client, tmp_path)
    assert run.run() == 0
    first, second = int(wait_of(client, "demo-1")), int(wait_of(client, "demo-2"))
    assert 60 <= first <= 120
    assert second >= 300
    assert "reckoned" in said.text
    assert "a save takes 200 s, measured" in said.text


def test_the_grace_of_the_platform_or_of_the_user_is_taken_as_it_is(tmp_path: Path) -> None:
    client = FakeClient(ended(0, 9, "SUCCEEDED"))
    submission(client, tmp_path, preempt={"grace_s": 25.5})[0].run()
    assert wait_of(client, "demo-1") == "26"
    client = FakeClient(ended(0, 9, "SUCCEEDED"))
    submission(client, tmp_path, options=Options(grace_s=77))[0].run()
    assert wait_of(client, "demo-1") == "77"


def test_a_model_of_unknown_size_gets_a_grace_that_says_so(tmp_path: Path) -> None:
    client = FakeClient(ended(0, 9, "SUCCEEDED"))
    run, _, said = submission(client, tmp_path)
    run.run()
    assert wait_of(client, "demo-1") == "180"
    assert "nothing is known of this model's size" in said.text


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    assert environment(["A_KEY", "B=1=2"]) == {"A_KEY": "secret", "B": "1=2"}
    for wrong in ("NOT_THERE_AT_ALL", "=1"):
        with pytest.raises(RlkdError) as error:
            environment([wrong])
        assert code_of(error) == "RLKD-C231"
