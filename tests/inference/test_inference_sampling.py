"""Choosing tokens: the right distribution, limits, penalties, and seeds that do not depend on the company."""

from __future__ import annotations

import pytest
import torch

from jupyter_llmcloud.inference.engines.base import Sampling
from jupyter_llmcloud.inference.engines.sampling import Row, Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0])


def choose(sampling: Sampling, count: int = 1, generated: tuple[int, ...] = ()) -> torch.Tensor:
    rows = [Row(sampling, generated) for _ in range(count)]
    scores = Sampler(torch.device("cpu")).scores(LOGITS.repeat(count, 1), rows)
    return scores.argmax(dim=1)


def shares(sampling: Sampling, count: int = 20_000) -> torch.Tensor:
    return torch.bincount(choose(sampling, count), minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_from_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(dim=0)
    assert torch.allclose(shares(Sampling(temperature=temperature)), expected, atol=0.02)


def test_temperature_zero_takes_the_likeliest_and_leaves_the_scores_alone() -> None:
    logits = LOGITS.unsqueeze(0)
    assert Sampler(logits.device).scores(logits, [Row(Sampling(temperature=0.0))]) is logits


def test_top_k_keeps_the_k_likeliest() -> None:
    limited = shares(Sampling(top_k=2))
    assert torch.allclose(limited[:2], LOGITS[:2].softmax(dim=0), atol=0.02)
    assert limited[2:].sum() == 0


def test_top_p_keeps_the_smallest_set_that_holds_p() -> None:
    # The softmax is 0.64, 0.24, 0.09, 0.03, 0.00.
    assert (shares(Sampling(top_p=0.3)) > 0).tolist() == [True, False, False, False, False]
    assert (shares(Sampling(top_p=0.8)) > 0).tolist() == [True, True, False, False, False]
    assert (shares(Sampling(top_p=0.8, top_k=1)) > 0).tolist() == [True, False, False, False, False]


def test_a_seed_gives_the_same_token_alone_and_in_any_batch() -> None:
    sampler, seeded = Sampler(LOGITS.device), Sampling(seed=7)
    alone = [int(sampler.scores(LOGITS.unsqueeze(0), [Row(seeded, [0] * position)]).argmax()) for position in range(40)]
    company = [Row(Sampling()), Row(Sampling(temperature=0.0)), Row(Sampling(seed=8, top_p=0.5))]
    together = [
        int(sampler.scores(LOGITS.repeat(4, 1), [*company, Row(seeded, [0] * position)]).argmax(dim=1)[3])
        for position in range(40)
    ]
    assert alone == together
    assert len(set(alone)) > 1


def test_penalties_and_biases_change_the_choice() -> None:
    greedy = {"temperature": 0.0}
    assert int(choose(Sampling(**greedy, presence_penalty=1.5), generated=(0,))) == 1
    assert int(choose(Sampling(**greedy, frequency_penalty=0.5), generated=(0,))) == 0
    assert int(choose(Sampling(**greedy, frequency_penalty=0.5), generated=(0, 0, 0))) == 1
    assert int(choose(Sampling(**greedy, logit_bias=((4, 100.0),)))) == 4


def test_logprobs_are_the_models_own() -> None:
    row = Row(Sampling(temperature=0.0, num_logprobs=2))
    Sampler(LOGITS.device).scores(LOGITS.unsqueeze(0), [row])
    expected = LOGITS.log_softmax(dim=0)
    (entry,) = row.logprobs
    assert entry.token == 0
    assert entry.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in entry.top] == [0, 1]


def test_rows_of_sequences_that_get_no_token_yet_do_not_matter() -> None:
    scores = Sampler(LOGITS.device).scores(LOGITS.repeat(3, 1), [Row(Sampling(top_k=1))])
    assert int(scores[0].argmax()) == 0
    assert scores.shape == (3, 5)
