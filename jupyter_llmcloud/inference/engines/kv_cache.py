"""How much memory the keys and values of a model may take, decided before the engine allocates any."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from jupyter_llmcloud.errors import ModelError
from jupyter_llmcloud.system import cgroup

log = logging.getLogger(__name__)

PAGE_SIZE = 32
_FRACTION_OF_FREE = {"cpu": 0.4, "cuda": 0.8}
_AT_FIRST = {"cpu": 64 << 20, "cuda": 1 << 30}
_MIN_TOKENS_AT_FIRST = 1024


@dataclass(frozen=True)
class CachePlan:
    """The size of a paged cache.

    Attributes:
        context_length: the longest sequence that fits, at most the model's own.
        page_size: tokens in a page.
        num_pages: how many pages there may be.
        max_batch_tokens: tokens that one step may process.
        bytes_per_page: what a page takes, with what grows with the number of pages; 0: not known.
    """

    context_length: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    bytes_per_page: int = 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds."""
        return self.num_pages * self.page_size

    @property
    def num_bytes(self) -> int:
        """How much memory it takes."""
        return self.num_pages * self.bytes_per_page

    @property
    def longest(self) -> int:
        """The longest sequence. Two pages stay free, so that it never waits for one that nobody can give back."""
        return (self.num_pages - 2) * self.page_size

    def pages(self, num_tokens: int) -> int:
        """How many pages so many tokens of one sequence need."""
        return -(-num_tokens // self.page_size)

    def at_first(self, device_type: str) -> CachePlan:
        """What is allocated before anybody has asked: it grows when it is needed."""
        if not self.bytes_per_page:
            return self
        few = max(_AT_FIRST.get(device_type, 64 << 20) // self.bytes_per_page, _MIN_TOKENS_AT_FIRST // self.page_size)
        return self.with_pages(few)

    def with_pages(self, num_pages: int) -> CachePlan:
        """The same with fewer pages, or as many as there may be."""
        return replace(self, num_pages=min(self.num_pages, num_pages))

    def affordable(self, num_pages: int, device: torch.device) -> int:
        """To how many pages a cache of `num_pages` may grow with the memory that is free now."""
        more = int(free_memory(device) * _FRACTION_OF_FREE.get(device.type, 0.4)) // max(1, self.bytes_per_page)
        return min(self.num_pages, num_pages + more)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`, given other processes and a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = min(psutil.virtual_memory().available, _free_of_own_nodes())
    in_group = cgroup.memory_left()
    return free if in_group is None else min(free, in_group)


def share_of_free(device: torch.device, promised: int = 0) -> int:
    """Bytes that a cache may take of what is free; `promised`: to others, who have not taken it yet."""
    return int(max(0, free_memory(device) - promised) * _FRACTION_OF_FREE.get(device.type, 0.4))


def _free_of_own_nodes() -> int:
    """Besides what is free on the machine: transformers knows which memory nodes this process is confined to."""
    try:
        from transformers.generation.continuous_batching.utils import get_device_and_memory_breakdown

        _, total, reserved, allocated = get_device_and_memory_breakdown()
    except (ImportError, TypeError, ValueError):  # a private function: other versions may have none, or another one
        return psutil.virtual_memory().total - psutil.Process().memory_info().rss
    return int(total - max(reserved, allocated))


def plan_cache(
    config: Any,
    dtype: torch.dtype,
    *,
    context_length: int,
    max_concurrent: int,
    free: int,
    device_type: str,
    max_bytes: int | None = None,
) -> CachePlan:
    """Room for `max_concurrent` sequences of full length, or for what fits into a share of the `free` bytes.

    `max_bytes` is what was allowed for it, if anything was said.

    With less room than asked for, sequences still run: the engine lets some wait, or computes them again.
    """
    max_batch_tokens = max(256 if device_type == "cpu" else 2048, max_concurrent)
    per_token = _bytes_per_token(config.get_text_config(), dtype, max_batch_tokens)
    wanted = max_concurrent * (_pages(context_length) + 1)
    share = int(free * _FRACTION_OF_FREE.get(device_type, 0.4))
    affordable = (share if max_bytes is None else min(share, max_bytes)) // (per_token * PAGE_SIZE)
    num_pages = min(wanted, affordable)
    plan = CachePlan(context_length, PAGE_SIZE, num_pages, max_batch_tokens, per_token * PAGE_SIZE)
    if plan.longest < min(context_length, PAGE_SIZE):
        if max_bytes is not None and max_bytes < share:
            raise ModelError(
                f"{max_bytes / 2**20:.0f} MiB for keys and values (--kv-cache, --memory) hold no sequence of this "
                f"model: one token takes {per_token / 2**20:.2f} MiB. Allow more."
            )
        raise ModelError(
            f"{free / 2**30:.1f} GiB of free memory hold no sequence of this model: one token takes "
            f"{per_token / 2**20:.2f} MiB. Free memory or serve a smaller model."
        )
    if num_pages < wanted:
        log.info(
            "memory holds %d tokens of the %d that %d sequences of %d tokens could need",
            num_pages * PAGE_SIZE,
            wanted * PAGE_SIZE,
            max_concurrent,
            context_length,
        )
    return replace(plan, context_length=min(context_length, plan.longest))


def _pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


def _bytes_per_token(config: Any, dtype: torch.dtype, max_batch_tokens: int) -> int:
    """A token's keys and values in all layers, their copies while a layer reads them, its column of masks."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    kept = 2 * config.num_hidden_layers * num_kv_heads
    copied = 2 * num_heads + num_kv_heads
    masks = 2 * max_batch_tokens
    return int(((kept + copied) * head_size + masks) * dtype.itemsize + 16)
