"""The manifests against the schemas of the Kubernetes API that the package kubernetes-validate carries."""

from __future__ import annotations

from typing import Any

import pytest

from jupyter_llmcloud.cluster.kinds.manifests import Deployment, helm_values, objects

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
FULL = Deployment("llmcloud:1", "lab", "team", 3, "500m", "16Gi", 4, "1Ti", "shared")
VERSIONS = ("1.28", kubernetes_validate.latest_version())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("deployment", [Deployment("llmcloud"), FULL], ids=["defaults", "everything"])
def test_manifests_fit_the_api(deployment: Deployment, version: str) -> None:
    for item in objects(deployment):
        kubernetes_validate.validate(item, version, strict=True)


def test_what_the_chart_hands_on_to_a_pod_fits_the_api_too() -> None:
    """The chart puts env, resources and mounts of its values into the worker's pod as they are."""
    worker = helm_values(FULL)["worker"]
    container: dict[str, Any] = {"name": "worker", "image": "llmcloud:1", "env": worker["env"]}
    container |= {"resources": worker["resources"], "volumeMounts": worker["mounts"]["volumeMounts"]}
    spec = {"containers": [container], "volumes": worker["mounts"]["volumes"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": spec}
    kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_a_field_that_is_none_is_found() -> None:
    [claim, *_] = objects(FULL)
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(claim, VERSIONS[-1], strict=True)
