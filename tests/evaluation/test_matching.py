"""Zero-shot classification and retrieval, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.evaluation.matching import RECALL, ZERO_SHOT, retrieval, summarize, zero_shot

LABELS = ("cat", "dog", "boat")


def answer(file: str, facts: list[str], cosines: list[float]) -> dict[str, Any]:
    return {"file": file, "facts": facts, "answer": LABELS[cosines.index(max(cosines))], "cosines": cosines}


ANSWERS = [
    answer("1", ["cat"], [0.9, 0.1, 0.2]),
    answer("2", ["cat", "dog"], [0.1, 0.3, 0.2]),  # either label of its own will do
    answer("3", ["dog"], [0.4, 0.2, 0.5]),  # nearest to a boat, which no picture here has
]


def test_a_picture_counts_where_the_nearest_label_is_one_of_its_own() -> None:
    assert [row["score"] for row in zero_shot(ANSWERS)] == [1, 1, 0]


def test_a_label_counts_where_the_nearest_picture_has_it() -> None:
    found = {row["image"]: row["score"] for row in retrieval(ANSWERS, LABELS)}
    assert found == {"cat": 1, "dog": 1}
    turned = [ANSWERS[0], ANSWERS[1] | {"cosines": [1.0, 0.1, 0.2]}, ANSWERS[2] | {"cosines": [0.4, 0.9, 0.5]}]
    assert [row["score"] for row in retrieval(turned, LABELS)] == [1, 1]
    assert [row["score"] for row in retrieval([*turned[:2], turned[2] | {"facts": ["boat"]}], LABELS)] == [1, 0, 1]


def test_overall_is_zero_shot_alone() -> None:
    found = summarize(ANSWERS, LABELS)
    assert (found["tasks"][ZERO_SHOT]["score"], found["tasks"][ZERO_SHOT]["total"]) == (2, 3)
    assert (found["tasks"][RECALL]["score"], found["tasks"][RECALL]["total"]) == (2, 2)
    assert found["overall"] == found["tasks"][ZERO_SHOT]


def test_no_answers_are_a_sentence() -> None:
    with pytest.raises(VlmcError, match="no answers"):
        summarize([], LABELS)


@given(st.permutations(range(4)))
def test_features_that_tell_all_apart_are_always_right(order: list[int]) -> None:
    names = [f"label {index}" for index in range(4)]
    rows = [
        {"file": str(i), "facts": [names[i]], "answer": names[i], "cosines": [float(i == j) for j in range(4)]}
        for i in order
    ]
    assert {entry["value"] for entry in summarize(rows, names)["tasks"].values()} == {1.0}
