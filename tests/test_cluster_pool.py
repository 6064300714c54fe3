"""Real Dask clusters: started, scaled, adopted, stopped; their agents and ranks outlive workers, not their lease."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jupyter_llmcloud import config
from jupyter_llmcloud.agent.client import AgentChannel
from jupyter_llmcloud.cluster.pool import ClusterPool
from jupyter_llmcloud.cluster.record import ClusterRecord
from jupyter_llmcloud.core.messages import Describe
from jupyter_llmcloud.errors import Busy, CapacityError, ConnectionLost, NameTaken, NotFound, UsageError
from tests.worlds import Ranks, alive, until
