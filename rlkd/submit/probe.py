"""Run on the cluster, as a job, before the run itself: what is there? Asked and answered in JSON.

It travels as a file of its own and imports nothing of rlkd: another Python, another Ray or no rlkd at all is what it
has to tell. asked: {folder, paths: {key: path}, packages: [name], model: path or null, node_s: seconds for all nodes}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
import uuid
from typing import Any

MARK = "[rlkd-probe] "
SEE_S = 3.0  # a network disk may show a new file late


def versions(packages: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def look(asked: dict[str, Any], token: str | None) -> dict[str, Any]:
    """What one node has."""
    until = time.time() + SEE_S
    while token is not None and not os.path.exists(token) and time.time() < until:
        time.sleep(0.2)
    paths = asked["paths"].items()
    return {
        "versions": versions(asked["packages"]),
        "missing": sorted(key for key, path in paths if not os.path.exists(os.path.expanduser(path))),
        "token": token is not None and os.path.exists(token),
    }


def resources(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each node: all, and what is free; None where this Ray does not say what is free."""
    try:
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
    except (ImportError, AttributeError):
        free = {}
    found = []
    for node in nodes:
        has, left = node["Resources"], free.get(node["NodeID"])
        found.append(
            {
                "id": node["NodeID"],
                "address": node["NodeManagerAddress"],
                "head": "node:__internal_head__" in has,
                "stable": has.get("stable", 0.0),
                "all": {kind: has.get(kind, 0.0) for kind in ("CPU", "GPU")},
                "free": None if left is None else {kind: left.get(kind, 0.0) for kind in ("CPU", "GPU")},
            }
        )
    return found


def everywhere(asked: dict[str, Any], token: str | None, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """`look` on every node, this one included. A node that does not answer in time is left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    refs = {}
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["id"], soft=False)
        refs[task.options(scheduling_strategy=where).remote(asked, token)] = node["id"]
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=asked["node_s"])
    found = {}
    for ref in ready:
        try:
            found[refs[ref]] = ray.get(ref, timeout=asked["node_s"])
        except ray.exceptions.RayError as error:
            found[refs[ref]] = {"error": type(error).__name__}
    return found


def token_in(folder: str) -> tuple[str | None, str | None]:
    """A new small file in the folder, and what went wrong with it."""
    path = os.path.join(folder, ".rlkd-probe-" + uuid.uuid4().hex[:8])
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w") as file:
            file.write("written by rlkd submit; may be deleted\n")
    except OSError as error:
        return None, f"{error.strerror}: {error.filename}"
    return path, None


def config_of(model: str) -> Any:
    """config.json of the model, for its size."""
    try:
        with open(os.path.join(os.path.expanduser(model), "config.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def main(asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"versions": versions(asked["packages"]), "executable": sys.executable}
    import ray

    try:
        ray.init(log_to_driver=False)
    except Exception as error:  # another Ray or Python than the cluster's: the versions say which
        return dict(found, error=f"{type(error).__name__}: {error}", nodes=[], unwritable=None, config=None)
    nodes = resources([node for node in ray.nodes() if node["Alive"]])
    token, unwritable = token_in(asked["folder"])
    try:
        looked = everywhere(asked, token, nodes) if len(nodes) > 1 else {nodes[0]["id"]: look(asked, token)}
    finally:
        if token is not None:
            os.remove(token)
    found["unwritable"] = unwritable
    found["error"] = None
    found["nodes"] = [dict(node, looked=looked.get(node["id"])) for node in nodes]
    found["config"] = config_of(asked["model"]) if asked["model"] else None
    return found


if __name__ == "__main__":
    print(MARK + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
