"""A version of the model behind an endpoint, and how it is served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Revision:
    """A version of the model behind an endpoint, and how it is served.

    Attributes:
        number: counts from 1 within the endpoint.
        model: the folder that is loaded.
        target: what the user named: a run or a folder.
        fingerprint: changes when the files of the folder do.
        dtype: type of the weights while serving.
        num_replicas: how many processes serve it.
        weight: its share of the requests, relative to the other revisions; 0 gets none.
        priority: against runs that want the same slots, and of several revisions that need replicas: the highest
            comes first.
        base_model: of an adapter, the folder of its base model.
        max_model_len: tokens of prompt and answer together; None: as many as the model was made for.
        max_concurrent: sequences that a replica generates at once.
        threads: CPU threads of a replica; None: its share of the host's cores.
        role: stable (answers), canary (answers a share of the requests, and is withdrawn when it fails), shadow (gets
            copies of requests, whose answers are dropped), previous (gets none, but keeps its replicas for a while) or
            retired (has no replicas, and can come back).
        in_place_of: the revision whose replicas may load these weights between two steps, since everything else is
            alike; 0: none.
        cores: cores of its host that a replica has; None: it shares them.
        memory_bytes: what a replica may take of its host's memory; None: not stated.
        cache_bytes: what the keys and values of its sequences may take; None: a share of what is free.
        devices: GPUs of a replica: 0 is the CPU; None: one where there are some.
        min_replicas, max_replicas: the bounds between which the number follows the load; None: it does not.
        step: of a training run, the step that the weights are from; None: not known.
        keep_requests: keep what is asked and answered, for feedback.
        keep_previous: seconds that the replicas of the revision before it are kept; None: they are not.
        kept_until: of a previous one, when its replicas end, in seconds since the epoch.
        was_stable: whether it has been the stable one; None: it still is, or was written down before this was kept.
        note: why it was withdrawn.
        kind: what the model is for, as in `model_kind`; "": not known, as before there were kinds.
        engine: what computes it; auto: the fastest that answers as the model itself does.
        api_key_env: of an engine elsewhere, the environment variable that holds its key.
        source: a file with code of the user's own: a cell, an object, or the architecture of a run's model.
    """

    number: int
    model: str
    target: str = ""
    fingerprint: str = ""
    dtype: str = "auto"
    num_replicas: int = 1
    weight: int = 100
    priority: int = 0
    base_model: str = ""
    max_model_len: int | None = None
    max_concurrent: int = 32
    threads: int | None = None
    role: str = "stable"
    in_place_of: int = 0
    cores: int | None = None
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    devices: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    step: int | None = None
    keep_requests: bool = False
    note: str = ""
    kind: str = ""
    source: str = ""
    engine: str = "auto"
    api_key_env: str = ""
    keep_previous: float | None = None
    kept_until: float | None = None
    was_stable: bool | None = None

    @property
    def answers_by(self) -> str:
        """What decides about its answers: the files, and how they are computed. Other numbers give other tokens."""
        how = (self.fingerprint, self.dtype, self.engine, self.devices, self.max_model_len)
        return " ".join(map(str, how))
