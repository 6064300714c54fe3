"""An id of a response tells its replica."""

from __future__ import annotations

import pytest

from jupyter_llmcloud.core.serving.endpoint.response_id import new_response_id, replica_of


@pytest.mark.parametrize("replica", ["tiny-0a1b2c3d", "my_model.v2-0a1b2c3d", "a" * 49])
def test_the_replica_is_read_from_the_id_of_its_response(replica: str) -> None:
    assert replica_of(new_response_id(replica)) == replica
    assert new_response_id(replica) != new_response_id(replica)


@pytest.mark.parametrize("replica", ["", "a b", "x" * 65, "ü", "a\n"])
def test_a_replica_without_a_proper_id_is_not_told(replica: str) -> None:
    assert new_response_id(replica).startswith("resp_")
    assert replica_of(new_response_id(replica)) == ""


@pytest.mark.parametrize("text", ["", "resp_", "resp_x", f"resp_a_{'0' * 31}", f"chatcmpl_a_{'0' * 32}", "resp_\0"])
def test_any_other_text_names_no_replica(text: str) -> None:
    assert replica_of(text) == ""
