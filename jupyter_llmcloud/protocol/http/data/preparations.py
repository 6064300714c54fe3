"""Preparations of data: what is asked for, how far they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from jupyter_llmcloud.core.data.spec import PrepareSpec
from jupyter_llmcloud.protocol.http.base import Body, Query, Response
from jupyter_llmcloud.protocol.http.options import Options, options_body

MAX_WAIT_S = 20


class PackedStep(Body, frozen=True):
    """A cleaning step."""

    name: str
    source_hash: Annotated[str, Meta(description="SHA-256 of its source; empty for a named step.")] = ""


class PackedTokenizer(Body, frozen=True):
    """A tokenizer that comes along as an object."""

    name: str
    fingerprint: str
    vocab_size: int
    eos: int | None = None
    pad: int = 0


class PackedCode(Body, frozen=True):
    """The user's own steps and tokenizer, as they are in the kernel. Unpacked on the workers only."""

    content: Annotated[str, Meta(description="cloudpickle's bytes in base64.")]
    steps: Annotated[list[PackedStep], Meta(description="All steps, in order.")] = []
    tokenizer: PackedTokenizer | None = None


if TYPE_CHECKING:

    class StartPreparation(Options, frozen=True):
        """A source to prepare, with the options of a PrepareSpec."""

        source: list[str]
        code: PackedCode | None = None
        storage_options: dict[str, Any] | None = None

else:
    StartPreparation = options_body(
        "StartPreparation",
        "A source to prepare, and how.",
        PrepareSpec,
        [
            (
                "source",
                Annotated[list[str], Meta(min_length=1, description="Paths, folders, globs or URLs, in this order.")],
            ),
            ("code", Annotated[PackedCode | None, Meta(description="What is no text: sent by a kernel.")], None),
            (
                "storage_options",
                Annotated[
                    dict[str, Any] | None,
                    Meta(description="Options for fsspec, such as key, secret, endpoint_url; never kept."),
                ],
                None,
            ),
        ],
    )


class PreparationQuery(Query, frozen=True):
    """How long to wait."""

    wait_s: Annotated[
        float,
        Meta(ge=0, le=MAX_WAIT_S, description="Answer when there is a change since `seen`, or after these seconds."),
    ] = 0
    seen: Annotated[int, Meta(description="`version` of the answer that is known.")] = -1


class DataPreparation(Response, frozen=True):
    """A preparation."""

    id: str
    out: str
    cluster: str
    state: Literal["running", "finished", "failed", "stopped"]
    reason: Annotated[str, Meta(description="Why it failed.")] = ""
    error: Annotated[str, Meta(description="The class of that error.")] = ""
    version: Annotated[int, Meta(description="Counts its changes.")] = 0
    note: Annotated[str, Meta(description="What is new beside data that was there; empty for new data.")] = ""
    phase: str = ""
    done: Annotated[int, Meta(description="Partitions, of `total`, in this phase.")] = 0
    total: int = 0
    processes: int = 0
    documents: int = 0
    tokens: int = 0
    rows: int = 0
    dropped: int = 0
    began: float = 0.0
    ended: float | None = None
    num_shards: Annotated[int, Meta(description="Of the whole data set, when it is finished.")] = 0
    num_new_shards: int = 0
    fingerprint: str = ""


class DataPreparations(Response, frozen=True):
    """Preparations of this server, the newest first."""

    preparations: list[DataPreparation]
