"""Streams beside a measurement, in a process of their own: whoever measures does not wait for their pieces.

python -m tests.bench.bodies.gateway_streams URL STREAMS PIECES GAP_MS     with the key in LLMCLOUD_BENCH_KEY
"""

from __future__ import annotations

import asyncio
import os
import sys

import aiohttp

from tests.bench.gateway import stream


async def main(url: str, num_streams: int, num_pieces: int, gap_ms: float) -> None:
    """Take them all, to their ends."""
    headers = {"Authorization": f"Bearer {os.environ['LLMCLOUD_BENCH_KEY']}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        await asyncio.gather(*(stream(session, url, num_pieces, gap_ms) for _ in range(num_streams)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
