"""A port that somebody else has: how that is seen, and that an engine which finds it so is a lost worker."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import DistNetworkError, TCPStore

from rlkd.core.errors import PreflightError, WorkerLost
from rlkd.core.taken import port_taken
from rlkd.engines import vllm
from rlkd.engines.jobs import EngineOptions, Limits
from rlkd.engines.vllm import PORTS, VLLMEngine, environment


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def by_socket(port: int) -> None:
    socket.create_server(("127.0.0.1", port)).close()


def by_torch(port: int) -> None:
    TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)


def as_a_cause(port: int) -> None:
    try:
        by_socket(port)
    except OSError as error:
        raise RuntimeError("Engine core initialization failed. See root cause above.") from error


WAYS = [by_socket, by_torch, as_a_cause]


@pytest.mark.parametrize("bind", WAYS)
def test_it_is_seen(bind: Any, taken: int) -> None:
    with pytest.raises((OSError, RuntimeError)) as caught:
        bind(taken)
    assert port_taken(caught.value)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not port_taken(RuntimeError("CUDA error: device busy"))
    assert not port_taken(FileNotFoundError(2, "no such file", "in use.txt"))


def engine(monkeypatch: pytest.MonkeyPatch, build: Any) -> VLLMEngine:
    monkeypatch.setattr(vllm, "prepare", lambda _: None)
    monkeypatch.setattr(EngineOptions, "check", lambda _: None)
    made = VLLMEngine(EngineOptions("nowhere"))
    monkeypatch.setattr(made, "_build", build)
    return made


@pytest.mark.faults("F64")
@pytest.mark.parametrize("bind", WAYS)
def test_an_engine_without_a_port_is_lost_and_so_its_crew_makes_another_one(
    bind: Any, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/test_pool_starts.py has what the crew does. Control: what cannot be loaded is the recipe's error."""

    def build() -> Limits:
        bind(taken)
        raise AssertionError

    with pytest.raises(WorkerLost, match="no port of its own"):
        engine(monkeypatch, build).start()

    def cannot() -> Limits:
        raise RuntimeError("no such weights")

    with pytest.raises(PreflightError, match="no such weights"):
        engine(monkeypatch, cannot).start()


def test_a_network_that_torch_cannot_use_is_a_lost_worker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Limits:
        raise DistNetworkError("The client socket has timed out after 600000ms")

    with pytest.raises(WorkerLost, match="DistNetworkError"):
        engine(monkeypatch, build).start()


@pytest.mark.faults("F64")
@pytest.mark.parametrize(("said", "kept"), [("", False), ("23456", True), ("tcp://10.0.0.1:8000", False)])
def test_where_vllm_looks_for_a_port(said: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PORT", said)
    options = EngineOptions("nowhere", device="cpu")
    first = environment(options)["VLLM_PORT"]
    assert (first == said) is kept
    assert int(first) in PORTS
    if not kept:
        monkeypatch.setattr(os, "getpid", lambda: 1234)
        one = int(environment(options)["VLLM_PORT"])
        monkeypatch.setattr(os, "getpid", lambda: 1235)
        assert abs(int(environment(options)["VLLM_PORT"]) - one) >= 30
