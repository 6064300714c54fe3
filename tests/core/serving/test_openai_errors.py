"""When a client may ask again, as it is told."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.openai_errors import ApiError
from jupyter_llmcloud.core.serving.usage.quota import KeyLimits, KeyQuota, QuotaExceeded


@pytest.mark.parametrize("header", ["Retry-After", "retry-after-ms"])
def test_who_waits_as_long_as_is_told_is_let_in(header: str) -> None:
    """30.4 s were told as 30, after which the key was refused once more."""
    quota, limits = KeyQuota(), KeyLimits(requests_per_minute=1)
    quota.reserve(limits, 0, now=100.0)
    with pytest.raises(QuotaExceeded) as refused:
        quota.reserve(limits, 0, now=130.60004)
    told = ApiError(429, "", retry_after_s=refused.value.retry_after_s).headers()[header]
    waited_s = int(told) / (1000 if header.endswith("ms") else 1)
    quota.reserve(limits, 0, now=130.60004 + waited_s)
