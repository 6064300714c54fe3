"""`jupyter llmcloud manifests`: what a Kubernetes cluster needs, printed for `kubectl`, `helm` or an image's build."""

from __future__ import annotations

import argparse
import platform
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from jupyter_llmcloud.cluster.kinds.manifests import KINDS, Deployment, containerfile, render

_OPTIONS = {
    "name": ("--name", "begins the names of all objects"),
    "namespace": ("--namespace", "of the objects"),
    "num_workers": ("--workers", "pods with a node agent each"),
    "cpus": ("--cpus", "of a worker"),
    "memory": ("--memory", "of a worker"),
    "num_gpus": ("--gpus", "of a worker"),
    "storage": ("--storage", "size of the root that all pods share"),
    "storage_class": ("--storage-class", "of that root, one that many pods mount at a time (default: the cluster's)"),
}


def add_manifests(nouns: Any) -> None:
    """The command and its options."""
    command = nouns.add_parser("manifests", help="print manifests, Helm values or a Containerfile of a Dask cluster")
    command.add_argument("kind", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    command.add_argument("--image", default="", help="an image with the versions of this installation")
    defaults = {field.name: field.default for field in fields(Deployment)}
    for name, (option, text) in _OPTIONS.items():
        default = defaults[name]
        shown = f"{text} ({default})" if default != "" else text
        command.add_argument(option, dest=name, type=type(default), default=default, help=shown)
    command.set_defaults(run=_print, noun="manifests")


def _print(arguments: argparse.Namespace) -> None:
    if arguments.kind == "containerfile":
        packages = {name: version(name).partition("+")[0] for name in ("torch", "dask", "distributed")}
        python = ".".join(platform.python_version_tuple()[:2])
        text = containerfile(python, {**packages, "version": version("jupyter-llmcloud")})
    else:
        deployment = Deployment(arguments.image, **{name: getattr(arguments, name) for name in _OPTIONS})
        text = render(arguments.kind, deployment)
    print(text, end="")
