"""No score is silently wrong: fitness functions of many kinds, under a trainer and in a plain loop over the members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import trust_draws
import trust_holders
import trust_models
import trust_outer
import trust_places
import trust_uses
import trust_waits
from trust_oracle import Judge, Kind, Variation, Verdict

TABLES: list[dict[str, Variation]] = [
    trust_places.VARIATIONS, trust_outer.VARIATIONS, trust_uses.VARIATIONS, trust_draws.VARIATIONS,
    trust_waits.VARIATIONS, trust_holders.VARIATIONS, trust_models.VARIATIONS,
]  # fmt: skip
VARIATIONS = {name: variation for table in TABLES for name, variation in table.items()}
ALL = VARIATIONS | trust_waits.STUCK

RIGHT = {"right", "right, with a warning"}


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge("test_trust.ALL")
    yield judge
    judge.close()


@pytest.mark.parametrize("name", VARIATIONS)
def test_no_score_is_silently_wrong(name: str, judge: Judge) -> None:
    kind, verdict = VARIATIONS[name].kind, judge(name)
    assert verdict.outcome in accepted(kind), explained(kind, verdict)


@pytest.mark.parametrize("name", trust_waits.STUCK)
def test_what_waits_for_ever_is_an_error(name: str, judge: Judge) -> None:
    verdict = judge(name)
    assert verdict.outcome == "raised" and "create it inside the function" in verdict.detail, verdict.detail


def accepted(kind: Kind) -> set[str]:
    """Return what may become of a variation: what depends on the history of calls may differ, if the user is told."""
    return RIGHT | {"wrong with a warning"} if kind is Kind.HISTORY else RIGHT


def explained(kind: Kind, verdict: Verdict) -> str:
    return "\n".join([f"{verdict.outcome}, {kind}", verdict.detail, *verdict.warnings])


def test_there_are_variations_of_every_kind() -> None:
    assert len(VARIATIONS) == sum(map(len, TABLES)) >= 200
    kinds = Counter(variation.kind for variation in VARIATIONS.values())
    assert all(kinds[kind] >= 3 for kind in Kind), kinds
