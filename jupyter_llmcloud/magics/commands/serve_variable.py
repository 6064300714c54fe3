"""%serve VARIABLE: a model of the ranks or of the notebook, with its tokenizer, as an endpoint.

A variable of the ranks is saved by them as `--save` does it, as a run of its own, and that run is served: so a model is
unwrapped and gathered, and an architecture of a cell comes with its source. One of the notebook goes along by value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_llmcloud.client.revision_wait import wait_for_revision
from jupyter_llmcloud.core.names import NAME_PATTERN
from jupyter_llmcloud.core.serving.models.variable_role import CODE, MODEL, TOKENIZER, choose_tokenizer, role_of
from jupyter_llmcloud.errors import LLMCloudError, NotFound, UsageError
from jupyter_llmcloud.magics.commands.serve_code import serve_object
from jupyter_llmcloud.magics.serving import kernel_models
from jupyter_llmcloud.magics.serving.as_asked import say_what_stays
from jupyter_llmcloud.magics.serving.endpoint import Endpoint
from jupyter_llmcloud.magics.session import session
from jupyter_llmcloud.magics.session.cell import Cell, current_number
from jupyter_llmcloud.magics.session.run_handle import RunHandle

RANKS, NOTEBOOK = "on the ranks", "in this notebook"
Progress = Callable[[str], None]
ServeRun = Callable[..., Endpoint]


@dataclass(frozen=True)
class NamedVariable:
    """A variable that was named, and what is beside it.

    Attributes:
        roles: of all variables there, by name.
        value: of one of the notebook.
        type_name: of its class.
    """

    name: str
    where: str
    roles: Mapping[str, str]
    type_name: str
    value: Any = None

    @property
    def role(self) -> str:
        """What it can be served as."""
        return self.roles.get(self.name, "")


def find(name: str, shell: Any) -> NamedVariable | None:
    """The variable with this name: on the ranks, if there are any, else in the notebook."""
    if not name.isidentifier():
        return None
    own = shell.user_ns if shell is not None else {}
    on_ranks = _on_ranks(name)
    if on_ranks is not None:
        if name in own and role_of(own[name]):
            print(f"{name} is a variable of the ranks and of this notebook, too: that of the ranks is served.")
        return on_ranks
    if name not in own:
        return None
    roles = {other: role_of(value) for other, value in own.items() if not other.startswith("_")}
    return NamedVariable(name, NOTEBOOK, roles, type(own[name]).__name__, own[name])


def _on_ranks(name: str) -> NamedVariable | None:
    world = session.current().attach_world()
    if world is None:
        return None
    try:
        rows = world.variables()
    except LLMCloudError:  # its agent has gone, and the ranks with it
        return None
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        return None
    return NamedVariable(name, RANKS, {row["name"]: row["role"] for row in rows}, found["type"])


def takes_place_of(variable: str, endpoint: Mapping[str, Any]) -> bool:
    """Whether an endpoint serves an earlier value of a variable: this one is to be served in its place."""
    target = str(endpoint["target"])
    is_object = target.endswith(f" {variable} {NOTEBOOK}")
    return is_object or target == run_name(variable) or kernel_models.is_kept(str(endpoint["model"]))


def run_name(variable: str) -> str:
    """How the run is called that saves a variable of the ranks."""
    return f"serve-{''.join(char if char.isascii() else f'u{ord(char):x}' for char in variable)}"[:128]


def serve_variable(
    variable: NamedVariable, shell: Any, serve_run: ServeRun, *, progress: Progress | None = None, **options: Any
) -> Endpoint:
    """Serve a variable; one that is served already under that name is replaced by its present value.

    Args:
        serve_run: serves a run by its id.
        options: of an EndpointSpec, `tokenizer` among them.

    Raises UsageError for what cannot be served, by name.
    """
    given = options.pop("tokenizer", None)
    name = options.pop("name", None) or variable.name
    if variable.role == TOKENIZER:
        raise UsageError(f"{variable.name} is a tokenizer ({variable.type_name}): name the model that it belongs to.")
    if variable.role not in (MODEL, CODE):
        raise UsageError(
            f"{variable.name} {variable.where} is of type {variable.type_name}, which cannot be served: name a model "
            "(torch.nn.Module), an object with predict(inputs) or a function."
        )
    if variable.role == CODE:
        if given is not None:
            raise UsageError(f"--tokenizer {given}: {variable.name} is a {variable.type_name}, which takes none.")
        value = variable.value if variable.where == NOTEBOOK else _pulled(variable.name)
        return serve_object(value, name, progress=progress, called=f"{variable.name} {NOTEBOOK}", **options)
    tokenizer = choose_tokenizer(variable.name, given, variable.roles, variable.where)
    if variable.where == NOTEBOOK:
        beside = None if tokenizer is None else shell.user_ns[tokenizer]
        called = f"{variable.name} {NOTEBOOK}"
        return serve_object(variable.value, name, tokenizer=beside, progress=progress, called=called, **options)
    run_id = _save(variable.name, tokenizer, shell, progress)
    return _serve_saved(variable.name, run_id, name, serve_run, progress, options)


def _pulled(name: str) -> Any:
    world = session.current().attach_world()
    if world is None:
        raise NotFound(f"the ranks that had {name} have gone.")
    return world.pull([name])[name]


def _save(name: str, tokenizer: str | None, shell: Any, progress: Progress | None) -> str:
    """Have the ranks save a model as a run; returns its id. Raises what that run failed with."""
    names = [name, *([tokenizer] if tokenizer else [])]
    if progress is not None:
        progress(f"the ranks save {', '.join(names)}")
    number = current_number(shell)
    source = f"pass  # %serve {name}"
    cell = Cell(source, source, 0, shell.compile.get_code_name(source, source, number), number)
    options = {"save": names, "name": run_name(name), "background": True, "no_replay": True}
    handle = session.current().distribute(shell, cell, options)
    assert isinstance(handle, RunHandle)
    handle.result()
    return handle.run_id


def _serve_saved(
    variable: str, run_id: str, name: str, serve_run: ServeRun, progress: Progress | None, options: dict[str, Any]
) -> Endpoint:
    server = session.current().server
    try:
        known = server.endpoint(name)
    except NotFound:
        known = None
    is_served = known is not None and known["state"] in ("starting", "ready") and takes_place_of(variable, known)
    if known is None or not is_served:
        return serve_run(run_name(variable), name=name, progress=progress, **options)
    say_what_stays(known, options)
    record = wait_for_revision(server, server.update_endpoint(name, run_name(variable)), progress)
    return Endpoint(record["name"], server, record["kind"])


def is_run_or_folder(target: str) -> bool:
    """Whether something older than a variable has this name: a run, or a folder that is here."""
    if Path(target).is_dir():
        return True
    if not NAME_PATTERN.fullmatch(target):  # as no run is called: `_model`, `modèle`
        return False
    try:
        session.current().server.run(target)
    except NotFound:
        return False
    return True
