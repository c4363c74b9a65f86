import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from vlmc.evaluation.agreement import cosine, first_divergence, summarize

TOKENS = st.lists(st.integers(0, 3), max_size=8)


def test_cosine_is_of_directions_and_zero_where_a_number_is_missing() -> None:
    assert cosine(np.array([[1.0, 0.0]]), np.array([[5.0, 0.0]])) == 1.0
    assert cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])) == -1.0
    for bad in (np.nan, np.inf):
        assert cosine(np.array([1.0, bad]), np.array([1.0, 1.0])) == 0.0
    assert cosine(np.zeros(2), np.ones(2)) == 0.0


def test_arrays_of_different_sizes_do_not_agree_at_all() -> None:
    assert cosine(np.ones(3), np.ones(2)) == 0.0


def test_equal_tokens_do_not_diverge() -> None:
    assert first_divergence([5, 6, 7], [5, 6, 7]) is None
    assert first_divergence([], []) is None


def test_the_first_differing_position_is_named() -> None:
    assert first_divergence([5, 9, 9], [5, 6, 7]) == 1
    assert first_divergence([9], [5]) == 0


def test_a_missing_or_surplus_token_differs() -> None:
    assert first_divergence([5, 6], [5, 6, 7]) == 2
    assert first_divergence([5, 6, 7, 8], [5, 6, 7]) == 3


def test_the_summary_counts_equal_cases_and_keeps_their_order() -> None:
    assert summarize([([1, 2], [1, 2]), ([1, 3], [1, 2]), ([], [])]) == {
        "cases": 3,
        "equal": 2,
        "first_divergence": [None, 1, None],
    }


def test_no_cases_is_an_empty_summary() -> None:
    assert summarize([]) == {"cases": 0, "equal": 0, "first_divergence": []}


@given(TOKENS, TOKENS)
def test_all_before_the_divergence_is_equal_and_it_is_symmetric(a: list[int], b: list[int]) -> None:
    position = first_divergence(a, b)
    assert first_divergence(b, a) == position
    assert (position is None) == (a == b)
    if position is not None:
        assert a[:position] == b[:position]
        assert a[position : position + 1] != b[position : position + 1]
