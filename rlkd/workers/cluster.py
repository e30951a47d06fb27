"""Being in a Ray cluster: one that is there, or one started in this machine."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

from rlkd.core.errors import PreflightError
from rlkd.core.taken import port_taken

log = logging.getLogger("rlkd.workers")
REACHED_S = 5.0  # for a connection: Ray itself tries for minutes, and says little
ASKED_S, ASKS = 60.0, 9
ASK = f"""
import sys
from ray.exceptions import AuthenticationError
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).check_alive([b"?" * 28], timeout=30)
except AuthenticationError:
    sys.exit({ASKS})
"""
FIX = "the head node's HOST:PORT as `ray start --head` prints it (the port is 6379 if not told otherwise)"
STARTS = 5  # of a cluster of its own, while ports it chose are taken by others, or this machine is too busy
TAKEN = "`ss -ltnp` shows who has which port; unset RAY_GCS_SERVER_PORT, if it is set, and Ray chooses"
LATE = "timed out during startup"  # Ray's words, after the 30 s that it gives its own processes
BUSY = "is this machine overloaded, or out of memory or disk? `rlkd doctor` looks, and Ray's own logs say more"
SUBMIT = "from outside the cluster: rlkd submit RECIPE --ray http://HEAD:8265"


def join(namespace: str, address: str | None, object_store_bytes: int) -> None:
    """Join the cluster at `address` (the recipe's ray.address) or RAY_ADDRESS, else start one in this machine.

    PreflightError RLKD-E191 if there is none, or it refuses; RLKD-E192 if it cannot be started here: each time somebody
    else had a port that it needs, or it did not come up in time.
    """
    key = "ray.address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS") or "local"  # with None Ray would join any it finds here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after ray.shutdown must fail, not start another cluster
    if address == "local":
        _start(namespace, object_store_bytes)
        return
    if _reach(address, key) and "RAY_AUTH_MODE" not in os.environ and _asks_for_token(address):
        if token() is None:
            raise _refused(address, key, ray.exceptions.AuthenticationError("no token"))
        _send_token()
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False)
    except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise _refused(address, key, error) from error


def _start(namespace: str, object_store_bytes: int) -> None:
    """A cluster in this machine. Ray looks for free ports first, and others may take them before it does."""
    own: dict[str, Any] = {"object_store_memory": object_store_bytes, "include_dashboard": False}
    for tries in range(1, STARTS + 1):
        try:
            ray.init(address="local", namespace=namespace, log_to_driver=False, **own)
            return
        except Exception as error:  # what Ray raises here has no type of its own
            late = LATE in str(error)
            if not (late or port_taken(error)):
                raise
            ray.shutdown()  # what did come up
            why, said = "it was not up in time" if late else "a port was taken", " ".join(str(error).split())[:500]
            log.warning("Ray did not start: %s (try %d of %d): %s", why, tries, STARTS, said)
            if tries == STARTS:
                what = f"Ray cannot start here, {STARTS} times, the last time because {why}: {said}"
                raise PreflightError("RLKD-E192", what, "ray.address", BUSY if late else TAKEN) from error


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


def _asks_for_token(address: str) -> bool:
    """Asked by a child, for Ray reads once in a process whether to send one. It must not be sent unasked: a driver that
    sends one wants one of its workers, too. False if unknown: ray.init will tell."""
    try:
        done = subprocess.run([sys.executable, "-c", ASK, address], capture_output=True, timeout=ASKED_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == ASKS


def _send_token() -> None:
    """As Ray itself does for `auto` alone. It has read RAY_AUTH_MODE before, and reads it again here."""
    from ray._private.authentication import authentication_token_setup as ray_tokens

    ray_tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _reach(address: str, key: str) -> bool:
    """PreflightError if nobody listens at HOST:PORT; False for other words, `auto` among them, which are for Ray."""
    if "://" in address:
        what = f"{key}={address} is where jobs are submitted; a run joins the cluster itself"
        raise PreflightError("RLKD-E191", what, key, f"{FIX}; {SUBMIT}")
    host, colon, port = address.rpartition(":")
    if not colon:
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _refused(address, key, error) from error
    return True


def _refused(address: str, key: str, error: Exception) -> PreflightError:
    causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
    said = " ".join(str(causes[-1]).split())
    fix = FIX
    if "resolve node to connect to" in said:
        said = "no Ray node runs on this machine, and a driver must be on one"
        fix = f"`ray start --address={address}` on this machine first; or {SUBMIT}"
    if isinstance(error, ray.exceptions.AuthenticationError) or "InvalidAuthToken" in said:
        said = "it asks for a token, and this is not it" if token() is not None else "it asks for a token"
        fix = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's: ~/.ray/auth_token on its head node"
    return PreflightError("RLKD-E191", f"cannot join the Ray cluster at {key}={address}: {said}", key, fix)
