"""What detectors find in the answers of an endpoint, and what they leave alone."""

from __future__ import annotations

import random

from jupyter_llmcloud.core.detect.endpoint_detectors import RECENT_PROMPTS, USUAL, AnsweredRequest, EndpointDetectors


def told(detectors: EndpointDetectors, requests: list[AnsweredRequest]) -> list[str]:
    return [alert.detector for request in requests for alert in detectors.answered(request)]


def answers(num: int, first_byte_s: float = 0.2, tokens: float = 40, errors: float = 0.0) -> list[AnsweredRequest]:
    dice = random.Random(num)
    return [
        AnsweredRequest(
            500 if dice.random() < errors else 200,
            first_byte_s=first_byte_s * dice.lognormvariate(0, 0.4),
            prompt_tokens=round(tokens * dice.lognormvariate(0, 0.6)),
        )
        for _ in range(num)
    ]


def test_an_ordinary_endpoint_gives_no_alert() -> None:
    assert told(EndpointDetectors(), answers(3000, errors=0.005)) == []


def test_slow_answers_are_told_when_they_begin_and_when_they_begin_again() -> None:
    detectors = EndpointDetectors()
    told(detectors, answers(400))
    assert told(detectors, answers(100, first_byte_s=0.8)) == ["latency"]
    assert told(detectors, answers(200)) == []
    assert told(detectors, answers(100, first_byte_s=0.8)) == ["latency"]


def test_what_lasts_becomes_usual() -> None:
    detectors = EndpointDetectors()
    told(detectors, answers(400))
    assert told(detectors, answers(USUAL + 500, first_byte_s=0.8)) == ["latency"]
    assert told(detectors, answers(100, first_byte_s=3.2)) == ["latency"]


def test_failures_are_told_even_of_a_young_endpoint_and_what_clients_do_wrong_is_not() -> None:
    detectors = EndpointDetectors()
    told(detectors, answers(60))
    refused = [AnsweredRequest(status) for status in (400, 404, 429, 499)] * 30
    assert told(detectors, refused) == []
    assert told(detectors, [AnsweredRequest(503)] * 20) == ["errors"]


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    assert AnsweredRequest(200, is_whole=False).is_error and not AnsweredRequest(404, is_whole=False).is_error


def test_prompts_of_another_length_are_told_once_and_are_usual_then() -> None:
    detectors = EndpointDetectors()
    told(detectors, answers(800))
    assert told(detectors, answers(1500, tokens=200)) == ["prompt-drift"]


def test_the_evidence_of_a_drift_says_over_how_many_prompts() -> None:
    """They were counted when they had been forgotten: 0."""
    detectors = EndpointDetectors()
    told(detectors, answers(800))
    [alert] = [alert for seen in answers(1500, tokens=200) for alert in detectors.answered(seen)]
    assert f"the last {RECENT_PROMPTS} prompts beside those before" in alert.evidence
