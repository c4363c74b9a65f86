import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.evaluation.accuracy import paired, summarize, wilson

SHARE = st.floats(0, 1, allow_nan=False)
TRIALS = st.integers(1, 10_000)


def rows(scores: list[float], task: str = "attributes") -> list[dict[str, Any]]:
    """One question a picture."""
    return [{"image": f"{i}.png", "task": task, "prompt": "?", "score": score} for i, score in enumerate(scores)]


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for right, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right / total, total) == pytest.approx((low, high), abs=5e-5)


@given(SHARE, TRIALS)
def test_the_interval_contains_the_estimate_and_stays_in_0_1(p: float, n: int) -> None:
    low, high = wilson(p, n)
    assert 0 <= low <= p <= high <= 1


@given(SHARE, TRIALS)
def test_the_interval_is_symmetric_between_right_and_wrong(p: float, n: int) -> None:
    low, high = wilson(p, n)
    assert wilson(1 - p, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(SHARE, TRIALS)
def test_the_interval_shrinks_with_more_trials(p: float, n: int) -> None:
    low, high = wilson(p, n)
    lower, higher = wilson(p, n * 2)
    assert higher - lower < high - low


@given(TRIALS)
def test_all_right_is_not_certainty(n: int) -> None:
    assert wilson(1.0, n)[0] < 1


def test_summary_of_binary_tasks() -> None:
    summary = summarize(rows([1] * 8 + [0] * 2) + rows([1, 0], task="scene_context"))
    assert list(summary["tasks"]) == ["attributes", "scene_context"]
    entry = summary["tasks"]["attributes"]
    assert (entry["score"], entry["total"], entry["value"]) == (8, 10, 0.8)
    assert (entry["low"], entry["high"]) == wilson(0.8, 10)
    assert (summary["overall"]["score"], summary["overall"]["total"]) == (9, 12)


def test_captions_count_pictures_and_not_facts() -> None:
    entry = summarize(rows([0.5, 1.0, 0.75, 0.75], task="caption_brief"))["tasks"]["caption_brief"]
    assert (entry["score"], entry["total"], entry["value"]) == (3, 4, 0.75)
    assert (entry["low"], entry["high"]) == wilson(0.75, 4)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(VlmcError, match="no answers"):
        summarize([])


def five_questions(scores: list[list[float]]) -> list[dict[str, Any]]:
    return [
        {"image": f"{i}.png", "task": "t", "prompt": str(j), "score": score}
        for i, some in enumerate(scores)
        for j, score in enumerate(some)
    ]


def test_a_picture_that_is_all_right_or_all_wrong_counts_once() -> None:
    entry = summarize(five_questions([[1] * 5] * 30 + [[0] * 5] * 10))["overall"]
    assert (entry["low"], entry["high"]) == pytest.approx(wilson(0.75, 40), abs=1e-12)


def test_questions_that_fail_evenly_over_pictures_all_count() -> None:
    entry = summarize(five_questions([[1, 1, 1, 1, 0]] * 40))["overall"]
    assert (entry["low"], entry["high"]) == wilson(0.8, 200)


def test_the_effective_number_follows_the_variance_between_pictures() -> None:
    entry = summarize(five_questions([[1, 1], [1, 0], [1, 0], [0, 0]]))["overall"]
    # The pictures' sums are 1, 0, 0 and -1 off: p(1-p) / (4/3 · 2 / 8²) = 6, between 4 pictures and 8 questions.
    assert (entry["low"], entry["high"]) == pytest.approx(wilson(0.5, 6), abs=1e-12)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=5), min_size=1, max_size=20))
def test_the_effective_number_of_questions_lies_between_pictures_and_questions(scores: list[list[float]]) -> None:
    entry = summarize(five_questions(scores))["overall"]
    width = entry["high"] - entry["low"]
    widest = wilson(entry["value"], len(scores))
    narrowest = wilson(entry["value"], sum(map(len, scores)))
    assert narrowest[1] - narrowest[0] - 1e-12 <= width <= widest[1] - widest[0] + 1e-12
    assert entry["low"] <= entry["value"] <= entry["high"]


def test_four_lost_and_two_won_is_no_significant_difference() -> None:
    float_rows = rows([1] * 494 + [1] * 4 + [0] * 2)
    int8_rows = rows([1] * 494 + [0] * 4 + [1] * 2)
    assert paired(int8_rows, float_rows) == {
        "total": 500,
        "won": 2,
        "lost": 4,
        "same": 494,
        "p_value": 0.6875,  # 2 · (1 + 6 + 15) / 2⁶
        "significant": False,
    }


def test_ten_lost_and_none_won_is_significant() -> None:
    result = paired(rows([0] * 10), rows([1] * 10))
    assert result["p_value"] == 2 / 2**10
    assert result["significant"]


def test_questions_about_one_picture_are_no_independent_witnesses() -> None:
    # Ten questions lost and none won, but of two pictures: both go the same way in half of all cases.
    result = paired(five_questions([[0] * 5, [0] * 5, [1]]), five_questions([[1] * 5, [1] * 5, [1]]))
    assert (result["won"], result["lost"], result["p_value"], result["significant"]) == (0, 10, 0.5, False)


def test_the_sums_of_pictures_are_compared_by_every_assignment_of_signs() -> None:
    # a − b by picture: +2, +1, −1, of which the sum is 2; of all 8 signs, 4 (2+1+1), twice 2, and these mirrored.
    result = paired(five_questions([[1, 1], [1], [0]]), five_questions([[0, 0], [0], [1]]))
    assert (result["won"], result["lost"], result["p_value"]) == (3, 1, 0.75)


@given(st.integers(0, 30), st.integers(0, 30))
def test_with_one_question_a_picture_it_is_the_exact_mcnemar_test(won: int, lost: int) -> None:
    result = paired(rows([1] * won + [0] * lost + [1]), rows([0] * won + [1] * lost + [1]))
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1))
    assert result["p_value"] == min(1.0, 2 * tail / 2 ** (won + lost))


def test_a_better_caption_wins_its_question() -> None:
    result = paired(rows([0.5, 0.8, 1.0]), rows([0.25, 0.8, 1.0]))
    assert (result["won"], result["lost"], result["same"]) == (1, 0, 2)


def test_only_questions_that_both_answered_are_compared() -> None:
    assert paired(rows([1, 1, 1]), rows([1, 1]))["total"] == 2
    with pytest.raises(VlmcError, match="in common"):
        paired(rows([1]), rows([1], task="scene_context"))


def test_questions_of_one_task_about_one_picture_are_compared_one_by_one() -> None:
    result = paired(five_questions([[1, 0, 1]]), five_questions([[0, 1, 1]]))
    assert (result["total"], result["won"], result["lost"]) == (3, 1, 1)


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=60))
def test_the_comparison_is_antisymmetric(pairs: list[tuple[int, int]]) -> None:
    a, b = rows([x for x, _ in pairs]), rows([y for _, y in pairs])
    there, back = paired(a, b), paired(b, a)
    assert (there["won"], there["lost"]) == (back["lost"], back["won"])
    assert there["p_value"] == back["p_value"]
    assert 0 < there["p_value"] <= 1
    assert there["won"] + there["lost"] + there["same"] == there["total"] == len(pairs)
