"""Train a model on many GPUs from a notebook cell, watch it live, and serve it from the same Jupyter server.

In a notebook: `%load_ext jupyter_llmcloud`, then `%%distribute`, `%serve`. In Python, the same by name:
`import jupyter_llmcloud as lc`, then `lc.cluster.start()`, `lc.distribute("...", n=2)`, `lc.serve("name")`.
Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "ClusterPanel",
    "Endpoint",
    "EndpointPanel",
    "WorldPanel",
    "cluster",
    "compress",
    "data",
    "distribute",
    "endpoints",
    "errors",
    "explain",
    "export",
    "pull",
    "push",
    "run",
    "runs",
    "serve",
    "sweep",
    "sweeps",
    "world",
]


def __getattr__(name: str) -> Any:
    if name == "data":  # also in ranks, which have no use for the rest
        import importlib

        return importlib.import_module("jupyter_llmcloud.magics.data")
    if name in __all__ and name != "errors":  # a module of its own
        from jupyter_llmcloud.magics import python_api

        return getattr(python_api, name)
    raise AttributeError(f"module 'jupyter_llmcloud' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext jupyter_llmcloud`."""
    from jupyter_llmcloud.magics.extension import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext jupyter_llmcloud`."""
    from jupyter_llmcloud.magics.extension import unload

    unload(shell)


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    from jupyter_llmcloud.server.extension import LLMCloudExtension

    return [{"module": "jupyter_llmcloud.server.extension", "app": LLMCloudExtension}]


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    return [{"src": "labextension", "dest": "jupyter-llmcloud"}]
