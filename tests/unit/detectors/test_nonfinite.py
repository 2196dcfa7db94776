from __future__ import annotations

import math

import pytest

from guardrail.core.records.findings import FindingKind, Severity
from guardrail.core.records.signals import GRAD_NORM, LOSS
from guardrail.detectors.impossible import LARGEST, Impossible
from guardrail.detectors.no_tokens import NoTokens
from guardrail.detectors.nonfinite import NonFinite
from tests.support.feed import obs
from tests.support.texts import numbers_in


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_rejected_from_the_first_step(value: float) -> None:
    for signals, name in (((value, 1.0), LOSS), ((2.0, value), GRAD_NORM)):
        (finding,) = NonFinite().observe(obs(1, *signals))
        assert (finding.signal, finding.kind, finding.severity) == (
            name,
            FindingKind.NONFINITE,
            Severity.REJECT,
        )


def test_the_rank_that_saw_it_is_named_even_if_the_sum_hides_it() -> None:
    (finding,) = NonFinite().observe(obs(5, 2.0, 1.0, nonfinite_loss=(1, 3)))
    assert finding.ranks == (1, 3) and math.isnan(finding.value)
    assert numbers_in(finding.sentence()) == [1, 3] and " nan " in finding.sentence()
    (finding,) = NonFinite().observe(obs(5, 2.0, math.inf, nonfinite_grad=(1,)))
    assert (finding.signal, finding.value, finding.ranks) == (GRAD_NORM, math.inf, (1,))
    assert numbers_in(finding.sentence()) == [1] and " inf " in finding.sentence()


def test_the_embedding_norm_alone_is_enough() -> None:
    (finding,) = NonFinite().observe(obs(5, 2.0, 1.0, embed=math.nan))
    assert finding.signal == "embed_grad_norm"


@pytest.mark.parametrize("loss", [0.0, -0.0, 1e30, -1e30, 2 * LARGEST])
def test_a_loss_that_no_model_has_is_rejected(loss: float) -> None:
    assert NonFinite().observe(obs(1, loss, 1.0)) == []
    (finding,) = Impossible().observe(obs(1, loss, 1.0))
    assert finding.kind is FindingKind.IMPOSSIBLE and finding.severity is Severity.REJECT


def test_small_and_large_and_missing_numbers_are_none_of_its_business() -> None:
    for loss, grad in ((1e-12, 0.0), (1e6, 1e12), (None, None), (-3.0, 1.0), (LARGEST, LARGEST)):
        assert NonFinite().observe(obs(1, loss, grad)) == []
        assert Impossible().observe(obs(1, loss, grad)) == []


def test_a_batch_without_label_tokens_is_no_trouble_of_the_weights() -> None:
    (finding,) = NoTokens().observe(obs(3, math.nan, 0.0, tokens=0))
    assert finding.kind is FindingKind.NO_TOKENS and finding.severity is Severity.REJECT
    assert (finding.signal, finding.ranks) == (LOSS, ()) and numbers_in(finding.sentence()) == []
    assert NoTokens().observe(obs(3, 2.0, 1.0, tokens=1)) == []
