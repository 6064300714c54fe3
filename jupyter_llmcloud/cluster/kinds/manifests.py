"""What a Kubernetes cluster needs for a Dask cluster of ours: plain manifests, values for Dask's Helm chart, an image.

The manifests are a scheduler and workers as Deployments, a Service, and a claim for `<root>`, the only folder that the
pods share (the runtime folder is a pod's own). A server connects with `%cluster connect
tcp://NAME-scheduler:8786`. The values are those of the chart `dask/dask`.

Sources: the Kubernetes API reference (apps/v1 Deployment, v1 Service, v1 PersistentVolumeClaim) and the values of
Dask's chart.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from jupyter_llmcloud.config import ENV_PREEMPTION_NOTICE, LEAVE_S
from jupyter_llmcloud.errors import UsageError

KINDS = ("kubernetes", "helm", "containerfile")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")  # a DNS label, with room for what is put behind it
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
_ROOT, _RUNTIME = "/llmcloud/root", "/llmcloud/run"
_NOTICE = "/llmcloud/notice"  # in a folder of the pod's own
_PORT, _DASHBOARD = 8786, 8787
CONTAINERFILE = """\
FROM python:{python}-slim
# The same versions as beside the Jupyter server: ranks, agents and the server speak one protocol.
RUN pip install --no-cache-dir "torch=={torch}" "dask=={dask}" "distributed=={distributed}" \\
    "jupyter-llmcloud=={version}"
RUN useradd --create-home --uid 1000 llmcloud
USER llmcloud
ENTRYPOINT ["dask"]
"""


@dataclass(frozen=True)
class Deployment:
    """What is asked for. Raises UsageError, naming the value, for what Kubernetes would refuse.

    Attributes:
        name: begins the names of all objects.
        image: has jupyter-llmcloud in the versions of the server.
        num_workers: pods with a node agent each.
        cpus, memory: of a worker's pod, as quantities of Kubernetes.
        num_gpus: of a worker's pod, as `nvidia.com/gpu`.
        storage: size of the shared root.
        storage_class: one that is mounted by many pods at a time (ReadWriteMany); the cluster's default when empty.
    """

    image: str
    name: str = "llmcloud"
    namespace: str = "default"
    num_workers: int = 2
    cpus: str = "4"
    memory: str = "16Gi"
    num_gpus: int = 0
    storage: str = "100Gi"
    storage_class: str = ""

    def __post_init__(self) -> None:
        for option, value in (("--name", self.name), ("--namespace", self.namespace)):
            if not _NAME.fullmatch(value):
                raise UsageError(
                    f"{option} {value!r}: expected small letters, digits and hyphens, a letter first, at most 52."
                )
        for option, value in (("--cpus", self.cpus), ("--memory", self.memory), ("--storage", self.storage)):
            if not _QUANTITY.fullmatch(value):
                raise UsageError(f"{option} {value!r}: expected a quantity of Kubernetes, for example 4, 500m or 16Gi.")
        for count_option, count, least in (("--workers", self.num_workers, 1), ("--gpus", self.num_gpus, 0)):
            if count < least:
                raise UsageError(f"{count_option} {count}: expected at least {least}.")
        if not self.image or re.search(r"\s", self.image):
            raise UsageError(f"--image {self.image!r}: expected an image, for example registry.example.org/llmcloud:1.")


def render(kind: str, deployment: Deployment) -> str:
    """The text of one kind: JSON, which is YAML too, of a List of objects or of the chart's values."""
    if kind == "kubernetes":
        listed = {"apiVersion": "v1", "kind": "List", "items": objects(deployment)}
        return json.dumps(listed, indent=2) + "\n"
    if kind == "helm":
        return json.dumps(helm_values(deployment), indent=2) + "\n"
    raise UsageError(f"jupyter llmcloud manifests {kind!r}: there is no such kind. Choose one of {', '.join(KINDS)}.")


def containerfile(python: str, versions: dict[str, str]) -> str:
    """A Containerfile of the image, with the versions of torch, dask, distributed and jupyter-llmcloud (`version`)."""
    return CONTAINERFILE.format(python=python, **versions)


def objects(deployment: Deployment) -> list[dict[str, Any]]:
    """The manifests, in the order in which they are created."""
    scheduler = ["dask", "scheduler", "--port", str(_PORT), "--dashboard-address", f":{_DASHBOARD}"]
    worker = ["dask", "worker", f"tcp://{deployment.name}-scheduler:{_PORT}", "--nworkers", "1", "--nthreads", "1"]
    worker += ["--memory-limit", "0", "--no-dashboard"]
    return [
        _claim(deployment),
        _service(deployment),
        _deployment(deployment, "scheduler", 1, scheduler, {"cpu": "1", "memory": "2Gi"}),
        _deployment(deployment, "worker", deployment.num_workers, worker, _worker_resources(deployment)),
    ]


def helm_values(deployment: Deployment) -> dict[str, Any]:
    """Values of the chart `dask/dask`: `helm install NAME dask/dask -f FILE`."""
    repository, tag = _split_image(deployment.image)
    image = {"repository": repository, "tag": tag}
    resources = _worker_resources(deployment)
    mounts = {"volumes": _volumes(deployment), "volumeMounts": _mounts()}
    return {
        "scheduler": {"image": image, "replicas": 1},
        "worker": {
            "image": image,
            "replicas": deployment.num_workers,
            "threads_per_worker": 1,
            "env": _environment(),
            "resources": {"limits": resources, "requests": resources},
            "mounts": mounts,
        },
        "jupyter": {"enabled": False},
    }


def _split_image(image: str) -> tuple[str, str]:
    """Repository and tag; a colon before the last slash is a port of the registry."""
    if "@" in image:
        raise UsageError(f"--image {image!r}: Dask's chart takes an image by its tag, not by its digest.")
    folder, _, last = image.rpartition("/")
    name, _, tag = last.partition(":")
    return (f"{folder}/{name}" if folder else name), tag or "latest"


def _worker_resources(deployment: Deployment) -> dict[str, str]:
    gpus = {"nvidia.com/gpu": str(deployment.num_gpus)} if deployment.num_gpus else {}
    return {"cpu": deployment.cpus, "memory": deployment.memory, **gpus}


def _metadata(deployment: Deployment, name: str, part: str = "") -> dict[str, Any]:
    return {"name": name, "namespace": deployment.namespace, "labels": _labels(deployment, part)}


def _labels(deployment: Deployment, part: str) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "jupyter-llmcloud", "app.kubernetes.io/instance": deployment.name}
    return {**labels, "app.kubernetes.io/component": part} if part else labels


def _environment() -> list[dict[str, str]]:
    settings = {
        "LLMCLOUD_ROOT": _ROOT,
        "LLMCLOUD_RUNTIME_DIR": _RUNTIME,
        "DASK_DISTRIBUTED__WORKER__DAEMON": "False",  # a node agent is a child of the worker that outlives it
    }
    return [{"name": name, "value": value} for name, value in settings.items()]


def _volumes(deployment: Deployment) -> list[dict[str, Any]]:
    shared_memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # 64 MB otherwise: too little for data loaders
    root = {"name": "root", "persistentVolumeClaim": {"claimName": f"{deployment.name}-root"}}
    return [root, {"name": "run", "emptyDir": {}}, shared_memory]


def _mounts() -> list[dict[str, str]]:
    paths = {"root": _ROOT, "run": "/llmcloud", "shm": "/dev/shm"}
    return [{"name": name, "mountPath": path} for name, path in paths.items()]


def _claim(deployment: Deployment) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": deployment.storage}},
    }
    if deployment.storage_class:
        spec["storageClassName"] = deployment.storage_class
    metadata = _metadata(deployment, f"{deployment.name}-root")
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _service(deployment: Deployment) -> dict[str, Any]:
    ports = [{"name": "comm", "port": _PORT, "targetPort": _PORT}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(deployment, f"{deployment.name}-scheduler", "scheduler"),
        "spec": {"type": "ClusterIP", "selector": _labels(deployment, "scheduler"), "ports": ports},
    }


def _deployment(
    deployment: Deployment, part: str, replicas: int, command: list[str], resources: dict[str, str]
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": part,
        "image": deployment.image,
        "command": command,
        "env": _environment(),
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "runAsUser": 1000},
        "volumeMounts": _mounts(),
    }
    if part == "worker":
        # SIGTERM reaches the first process of a container alone, and when that has ended the others are killed: a node
        # agent would never hear of it. So it is given notice, and the time to save, before that signal is sent.
        told = f"touch {_NOTICE}; sleep {LEAVE_S + 5:.0f}"
        container["lifecycle"] = {"preStop": {"exec": {"command": ["sh", "-c", told]}}}
        container["env"].append({"name": ENV_PREEMPTION_NOTICE, "value": _NOTICE})
    # Longer than that takes.
    pod = {"terminationGracePeriodSeconds": 60, "securityContext": {"fsGroup": 1000}, "volumes": _volumes(deployment)}
    labels = _labels(deployment, part)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(deployment, f"{deployment.name}-{part}", part),
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {**pod, "containers": [container]}},
        },
    }
