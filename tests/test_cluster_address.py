"""Where a run finds its Ray cluster, and what it says if there is none."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import services

from rlkd.core.errors import PreflightError
from rlkd.workers import cluster


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What ray.init is asked; no token in the home."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(cluster, "_asks_for_token", lambda _: False)
    return calls


@pytest.fixture
def head() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def join(address: str | None) -> None:
    cluster.join("rlkd-x", address, 1 << 20)


def test_without_an_address_a_cluster_of_its_own(asked: list[dict[str, object]]) -> None:
    join(None)
    (call,) = asked
    assert (call["address"], call["object_store_memory"], call["namespace"]) == ("local", 1 << 20, "rlkd-x")


# --- ports


def init(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> list[str]:
    """ray.init fails like this, then no more; what is called."""
    called: list[str] = []

    def fake(**_: object) -> None:
        called.append("init")
        if called.count("init") <= len(errors):
            raise errors[called.count("init") - 1]

    monkeypatch.setattr(ray, "init", fake)
    monkeypatch.setattr(ray, "shutdown", lambda: called.append("shutdown"))
    return called


# Of Ray 2.60, when its GCS finds its port taken.
GCS = RuntimeError("Failed to start GCS. Check failed: server_ Failed to start the grpc server. The specified port is "
                   "43261. … If the server startup error message is `Address already in use`, …")  # fmt: skip


@pytest.mark.faults("F64")
@pytest.mark.usefixtures("asked")
def test_a_cluster_whose_port_is_taken_is_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called = init(monkeypatch, GCS, OSError(errno.EADDRINUSE, "in use"))
    join(None)
    assert called == ["init", "shutdown", "init", "shutdown", "init"]
    said = [record.getMessage() for record in caplog.records]
    assert ["try 1 of 5" in said[0], "try 2 of 5" in said[1], "43261" in said[0], len(said)] == [True, True, True, 2]


@pytest.mark.faults("F64")
@pytest.mark.usefixtures("asked")
def test_not_for_ever_and_not_for_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    called = init(monkeypatch, *[GCS] * 9)
    with pytest.raises(PreflightError, match=r"RLKD-E192.*5 times, the last time because a port was taken"):
        join(None)
    assert called.count("init") == called.count("shutdown") == 5
    called = init(monkeypatch, RuntimeError("no space left on device"))
    with pytest.raises(RuntimeError, match="no space"):
        join(None)
    assert called.count("init") == 1


@pytest.mark.usefixtures("asked")
def test_a_machine_too_busy_for_ray_is_no_bug_of_rlkd(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Exception("The current node timed out during startup. This could happen because …")
    called = init(monkeypatch, late)
    join(None)
    assert called == ["init", "shutdown", "init"]
    init(monkeypatch, *[late] * 9)
    with pytest.raises(PreflightError, match="because it was not up in time") as caught:
        join(None)
    assert "overloaded" in str(caught.value)


def test_the_recipe_comes_before_the_environment(
    asked: list[dict[str, object]], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    join(head)
    assert [call["address"] for call in asked] == [head]
    assert "object_store_memory" not in asked[0]
    join("auto")
    assert asked[1]["address"] == "auto"


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("asks", [True, False])
def test_a_token_is_sent_to_a_cluster_that_asks(head: str, monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    """And to no other: a driver that sends one refuses the answers of workers that send none."""
    monkeypatch.setattr(cluster, "_asks_for_token", lambda _: asks)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s" * 8)
    join(None)
    assert "RAY_AUTH_MODE" not in os.environ
    sent: list[bool] = []
    monkeypatch.setattr(cluster, "_send_token", lambda: sent.append(True))
    join(head)
    assert sent == ([True] if asks else [])


@pytest.mark.usefixtures("asked")
def test_what_the_user_says_of_tokens_stays(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_asks_for_token", lambda _: True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s" * 8)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    join(head)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_a_token_that_is_not_known(asked: list[dict[str, object]], head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_asks_for_token", lambda _: True)
    with pytest.raises(PreflightError, match="it asks for a token") as caught:
        join(head)
    assert "RAY_AUTH_TOKEN" in caught.value.problems[0].fix
    assert not asked


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:x", "127.0.0.1:99999999"])
def test_nobody_there_is_said_within_seconds(asked: list[dict[str, object]], address: str) -> None:
    start = time.monotonic()
    with pytest.raises(PreflightError, match="RLKD-E191") as caught:
        join(address)
    assert time.monotonic() - start < cluster.REACHED_S + 5
    (problem,) = caught.value.problems
    assert f"ray.address={address}" in problem.what
    assert "6379" in problem.fix
    assert not asked


@pytest.mark.usefixtures("asked")
def test_a_dashboards_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(PreflightError, match="RAY_ADDRESS=http://head:8265") as caught:
        join(None)
    assert "rlkd submit" in caught.value.problems[0].fix


@pytest.mark.usefixtures("asked")
def test_a_token_that_is_refused(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("no") from RuntimeError("Unauthenticated: RPC error: InvalidAuthToken: missing")

    monkeypatch.setenv("RAY_AUTH_TOKEN", "s" * 8)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(PreflightError, match="this is not it") as caught:
        join(head)
    assert "RAY_AUTH_TOKEN" in caught.value.problems[0].fix


@pytest.mark.usefixtures("asked")
def test_a_cluster_whose_nodes_are_elsewhere(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are Ray's own (_private/services.py): they say nothing of what to do."""
    words = "No node info found matching attributes: '' when trying to resolve node to connect to."

    def refuse(**_: object) -> None:
        raise ConnectionError("no") from RuntimeError(words)

    assert words[-38:] in Path(services.__file__).read_text()
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(PreflightError, match="no Ray node runs on this machine") as caught:
        join(head)
    assert f"ray start --address={head}" in caught.value.problems[0].fix
    assert "rlkd submit" in caught.value.problems[0].fix


@pytest.mark.usefixtures("asked")
def test_other_failures_of_ones_own_cluster_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(ValueError, match="a bug"):
        join(None)
