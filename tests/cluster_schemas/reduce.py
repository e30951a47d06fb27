"""From KubeRay's published custom resource definitions to `kuberay.json`: what a RayJob and a RayCluster may contain.

    python -m tests.cluster_schemas.reduce FOLDER COMMIT     # FOLDER: KubeRay's helm-chart/kuberay-operator/crds

Field names, types and what is required, without the prose. Pods are cut (the package kubernetes-validate knows those),
and large parts that rlkd does not use. Fields that are unknown are refused, where Kubernetes would drop them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = ("additionalProperties", "enum", "format", "maximum", "maxItems", "minimum", "minItems", "pattern", "required")
CUT = (  # pods and the like, and whatever rlkd does not write
    "template", "submitterPodTemplate", "headService", "ingressOptions", "autoscalerOptions", "networkPolicy",
    "gcsFaultToleranceOptions", "historyServerOptions", "status",
)  # fmt: skip
LONGEST = {"RayJob": 47, "RayCluster": 53}  # of names; KubeRay's controllers refuse longer ones, not its definitions
NAME = "^[a-z]([-a-z0-9]*[a-z0-9])?$"


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    """Of one field, as JSON schema."""
    made = {key: schema[key] for key in KEPT if key in schema}
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = reduced(made["additionalProperties"])
    if schema.get("x-kubernetes-int-or-string"):
        return {**made, "type": ["integer", "string"]}
    made["type"] = schema["type"]
    if "items" in schema:
        made["items"] = reduced(schema["items"])
    if "properties" in schema:
        fields = schema["properties"].items()
        made["properties"] = {name: {"type": "object"} if name in CUT else reduced(field) for name, field in fields}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


def definition(file: Path) -> tuple[str, dict[str, Any]]:
    """The kind, and its schema in version v1."""
    text = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    kind = text["spec"]["names"]["kind"]
    (version,) = [v for v in text["spec"]["versions"] if v["name"] == "v1"]
    made = reduced(version["schema"]["openAPIV3Schema"])
    made["properties"] |= {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": kind},
        "metadata": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": NAME, "maxLength": LONGEST[kind]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    }
    return kind, {**made, "required": ["apiVersion", "kind", "metadata", "spec"]}


def main(folder: Path, commit: str) -> None:
    found = dict(definition(folder / f"ray.io_{name}.yaml") for name in ("rayjobs", "rayclusters"))
    job, cluster = found["RayJob"]["properties"]["spec"]["properties"], found["RayCluster"]["properties"]["spec"]
    assert job["rayClusterSpec"] == cluster
    job["rayClusterSpec"] = {"$ref": "#/definitions/RayCluster/properties/spec"}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": f"made by reduce.py from ray-project/kuberay, helm-chart/kuberay-operator/crds, commit {commit}; "
        "Apache License 2.0, The KubeRay Authors",
        "definitions": found,
    }
    (Path(__file__).parent / "kuberay.json").write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
