"""`jupyter llmcloud manifests`: what is printed fits together; its fit to the Kubernetes API is in tests/compat."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jupyter_llmcloud.agent.preemption import CHECK_S
from jupyter_llmcloud.cluster.kinds.manifests import Deployment, helm_values, objects, render
from jupyter_llmcloud.config import ENV_PREEMPTION_NOTICE, LEAVE_S
from jupyter_llmcloud.errors import UsageError
from jupyter_llmcloud.server import cli

IMAGE = "registry.example.org:5000/team/llmcloud:7"


def by_kind(deployment: Deployment) -> dict[str, dict[str, Any]]:
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in objects(deployment)}


def test_workers_find_the_scheduler_and_every_pod_has_the_shared_root() -> None:
    found = by_kind(Deployment(IMAGE, "lab", "team", num_workers=3))
    service, worker = found["Service/lab-scheduler"], found["Deployment/lab-worker"]
    scheduler = found["Deployment/lab-scheduler"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= scheduler["metadata"]["labels"].items()
    container = worker["spec"]["template"]["spec"]["containers"][0]
    address = f"tcp://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert address in container["command"] and worker["spec"]["replicas"] == 3
    volumes = {volume["name"]: volume for volume in worker["spec"]["template"]["spec"]["volumes"]}
    assert volumes["root"]["persistentVolumeClaim"]["claimName"] == "lab-root"
    assert found["PersistentVolumeClaim/lab-root"]["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    environ = {row["name"]: row["value"] for row in container["env"]}
    assert environ["LLMCLOUD_ROOT"] == mounts["root"]
    assert not environ["LLMCLOUD_RUNTIME_DIR"].startswith(mounts["root"])
    assert {item["metadata"]["namespace"] for item in found.values()} == {"team"}


def test_a_worker_that_is_told_to_go_gives_its_agent_notice_and_time_before_the_signal_that_ends_the_container(
    tmp_path: Path,
) -> None:
    """SIGTERM is sent to the first process alone; with it the others are killed."""
    found = by_kind(Deployment(IMAGE))
    pod = found["Deployment/llmcloud-worker"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environ = {row["name"]: row["value"] for row in container["env"]}
    notice = environ[ENV_PREEMPTION_NOTICE]
    assert any(notice.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"])
    *shell, told = container["lifecycle"]["preStop"]["exec"]["command"]
    seconds = float(told.rpartition("sleep ")[2])
    assert LEAVE_S + CHECK_S < seconds < pod["terminationGracePeriodSeconds"] - 10
    here = tmp_path / "notice"
    subprocess.run([*shell, told.replace(notice, str(here)).replace(f"sleep {seconds:.0f}", "sleep 0")], check=True)
    assert here.exists()
    [scheduler] = found["Deployment/llmcloud-scheduler"]["spec"]["template"]["spec"]["containers"]
    assert "lifecycle" not in scheduler


def test_gpus_are_asked_for_only_where_they_are_wished() -> None:
    def limits(**options: Any) -> dict[str, str]:
        worker = by_kind(Deployment(IMAGE, **options))["Deployment/llmcloud-worker"]
        return worker["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]

    assert limits(num_gpus=4)["nvidia.com/gpu"] == "4"
    assert "nvidia.com/gpu" not in limits()


@pytest.mark.parametrize(
    ("image", "repository", "tag"),
    [
        (IMAGE, "registry.example.org:5000/team/llmcloud", "7"),
        ("registry.example.org:5000/llmcloud", "registry.example.org:5000/llmcloud", "latest"),
        ("llmcloud:1.2", "llmcloud", "1.2"),
    ],
)
def test_helm_values_take_an_image_apart_at_its_tag(image: str, repository: str, tag: str) -> None:
    values = helm_values(Deployment(image))
    assert values["worker"]["image"] == values["scheduler"]["image"] == {"repository": repository, "tag": tag}


def test_an_image_by_its_digest_is_refused_for_the_chart_only() -> None:
    deployment = Deployment("llmcloud@sha256:00")
    assert "llmcloud@sha256:00" in render("kubernetes", deployment)
    with pytest.raises(UsageError, match="digest"):
        render("helm", deployment)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "Lab"}, "--name 'Lab'"),
        ({"namespace": "a_b"}, "--namespace 'a_b'"),
        ({"memory": "lots"}, "--memory 'lots'"),
        ({"cpus": "-1"}, "--cpus '-1'"),
        ({"num_workers": 0}, "--workers 0"),
        ({"num_gpus": -1}, "--gpus -1"),
        ({"image": ""}, "--image ''"),
        ({"image": "a b"}, "--image 'a b'"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_with_its_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Deployment(**{"image": IMAGE, **options})


def test_the_command_prints_what_kubectl_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifests", "kubernetes", "--image", IMAGE, "--workers", "3", "--gpus", "1"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["items"] == objects(Deployment(IMAGE, num_workers=3, num_gpus=1))
    assert cli.main(["manifests", "containerfile"]) == 0
    assert "distributed==" in capsys.readouterr().out
    assert cli.main(["manifests", "nomad", "--image", IMAGE]) == 1
    assert "Choose one of kubernetes, helm, containerfile" in capsys.readouterr().err
    assert cli.main(["manifests", "kubernetes"]) == 1
    assert "--image" in capsys.readouterr().err
