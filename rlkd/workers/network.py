"""Which network a process of several nodes should talk over."""

import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import psutil

GLOO = "GLOO_SOCKET_IFNAME"


def interface_of(address: str, there: Mapping[str, Sequence[Any]] | None = None) -> str | None:
    """The network interface that has this IP address; None if none has."""
    known = psutil.net_if_addrs() if there is None else there
    kinds = (socket.AF_INET, socket.AF_INET6)
    return next((n for n, addresses in known.items() if any(a.family in kinds and a.address == address
                                                            for a in addresses)), None)  # fmt: skip


def talk_over(address: str, environment: MutableMapping[str, str]) -> None:
    """Have gloo use the interface of this node's address, unless the user chose one. By itself it takes what the
    machine's name resolves to, and on many machines that is 127.0.1.1: ranks of other nodes would wait for ever."""
    found = interface_of(address)
    if found is not None:
        environment.setdefault(GLOO, found)
