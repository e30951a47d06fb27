"""Being in a Ray cluster: one that is there, or one started in this machine."""

import os
import socket
from pathlib import Path
from typing import Any

import ray

from rlkd.core.errors import PreflightError

REACHED_S = 5.0  # for a connection: Ray itself tries for minutes, and says little
FIX = "the head node's HOST:PORT as `ray start --head` prints it (the port is 6379 if not told otherwise)"
SUBMIT = "from outside the cluster: rlkd submit RECIPE --ray http://HEAD:8265"


def join(namespace: str, address: str | None, object_store_bytes: int) -> None:
    """Join the cluster at `address` (the recipe's ray.address) or RAY_ADDRESS, else start one in this machine.

    PreflightError RLKD-E191 if there is none, or it refuses.
    """
    key = "ray.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"  # with None Ray would join any it finds here
    own: dict[str, Any] = {"object_store_memory": object_store_bytes, "include_dashboard": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after ray.shutdown must fail, not start another cluster
    if address != "local":
        own = {}
        _reach(address, key)
        if token() is not None:  # Ray sends it only if told so; a cluster that asks for none does not mind
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, **own)
    except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
        if address == "local":
            raise
        raise _refused(address, key, error) from error


def token() -> str | None:
    """The one clusters ask for, from where Ray looks for it, in its order."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if said := os.environ.get("RAY_AUTH_TOKEN"):
        return said
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _reach(address: str, key: str) -> None:
    """PreflightError if nobody listens at HOST:PORT. Other words, `auto` among them, are for Ray."""
    if "://" in address:
        what = f"{key}={address} is where jobs are submitted; a run joins the cluster itself"
        raise PreflightError("RLKD-E191", what, key, f"{FIX}; {SUBMIT}")
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _refused(address, key, error) from error


def _refused(address: str, key: str, error: Exception) -> PreflightError:
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    said = " ".join(str(causes[-1]).split())
    fix = FIX
    if "resolve node to connect to" in said:
        said = "no Ray node runs on this machine, and a driver must be on one"
        fix = f"`ray start --address={address}` on this machine first; or {SUBMIT}"
    if any(isinstance(cause, ray.exceptions.AuthenticationError) for cause in causes):
        said = "it asks for a token, and this is not it" if token() is not None else "it asks for a token"
        fix = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's: ~/.ray/auth_token on its head node"
    return PreflightError("RLKD-E191", f"cannot join the Ray cluster at {key}={address}: {said}", key, fix)
