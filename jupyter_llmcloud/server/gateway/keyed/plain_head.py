"""The head of a request, read where it is written as every client writes it; any other one is for tornado to judge."""

from __future__ import annotations

import re
from typing import NamedTuple

_HEAD = re.compile(rb"POST ([\x21-\x7e]+) HTTP/1\.1\r\n((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e]*\r\n)+)")


class PlainHead(NamedTuple):
    """What it says.

    Attributes:
        uri: as it stands there.
        headers: by their names in lower case, none of which came twice.
    """

    uri: str
    headers: dict[str, str]


def plain_head(head: bytes | bytearray) -> PlainHead | None:
    """Of a head up to the empty line that ends it, without that; None where there is anything to judge in it."""
    found = _HEAD.fullmatch(head)
    if found is None:
        return None
    lines = found[2].decode("ascii").split("\r\n")
    lines.pop()  # behind the last line
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return PlainHead(found[1].decode("ascii"), headers) if len(headers) == len(lines) else None
