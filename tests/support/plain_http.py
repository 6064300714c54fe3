"""For HTTP clients of tests that speak without TLS.

Each `httpx.Client` reads all certificates of the machine otherwise, which takes longer than most tests that use one.
"""

from __future__ import annotations

import ssl

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody
