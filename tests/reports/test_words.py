import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.reports import words
from vlmc.reports.document import Agreement, Comparison, parse


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123, "0.0123"),
        (1.2, "1.20"),
        (9.999, "10.0"),
        (99.96, "100"),
        (517.4, "517"),
        (1190.2, "1,190"),
        (-34.25, "-34.2"),
        (1e-7, "1.00e-07"),
        (2.5e12, "2.50e+12"),
    ],
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


@given(st.floats(1e-300, 1e300))
def test_a_printed_number_is_off_by_half_a_percent_at_most(value: float) -> None:
    assert float(words.number(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.98, "0.98×"),
        (3.476, "3.48×"),
        (9.996, "10.0×"),
        (15.24, "15.2×"),
        (99.96, "100×"),
        (140.3, "140×"),
        (1400.2, "1,400×"),
    ],
)
def test_ratios_keep_three_digits_and_two_below_one(value: float, text: str) -> None:
    assert words.ratio(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (64000, "64.0 kB"), (13.9e6, "13.9 MB"), (1.2e9, "1.20 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert words.size(count) == text


def compare(won: int, lost: int, p_value: float) -> str:
    return words.comparison(Comparison("int8", "float", 500, won, lost, p_value, p_value < 0.05))


def test_comparisons_are_told_in_words() -> None:
    assert compare(2, 4, 0.6875) == (
        "Against float, int8 lost 4 and won 2 of 500 questions: no significant difference "
        "(exact test, the questions about a picture taken together, p = 0.69)."
    )
    assert "a significant difference (exact test, the questions about a picture taken together, p < 0.001)" in compare(
        0, 25, 6e-8
    )
    assert compare(0, 0, 1.0) == "int8 and float score alike on each of 500 questions."


@pytest.mark.parametrize(("p_value", "text"), [(0.004, "p = 0.004"), (0.001, "p = 0.001"), (0.0009, "p < 0.001")])
def test_chances_are_given_down_to_one_in_a_thousand(p_value: float, text: str) -> None:
    assert f", {text})." in compare(1, 12, p_value)


def test_agreement_names_the_first_difference() -> None:
    assert words.agreement(Agreement(3, 1, (None, 7, 4))) == "1 of 3 (token 4)"
    assert words.agreement(Agreement(2, 2, (None, None))) == "2 of 2"


def test_random_weights_are_said_first(sample: dict) -> None:
    assert words.RANDOM_WEIGHTS not in words.findings(parse(sample))
    sample["artifact"]["random_weights"] = True
    assert words.findings(parse(sample))[0] == words.RANDOM_WEIGHTS


def test_a_report_without_a_verdict_says_so(bare: dict) -> None:
    assert words.findings(parse(bare)) == []
    assert words.lead(parse(bare)) == "1 measured; none of them is what `vlmc build` kept."
    assert words.subject(parse(bare)) == "1 variant of bare."


def test_on_a_gpu_the_subject_names_it(sample: dict) -> None:
    sample["device"]["sm"], sample["machine"]["gpu"] = 90, "NVIDIA H100"
    assert "measured on NVIDIA H100, " in words.subject(parse(sample))


def test_the_lead_says_what_is_kept_how_fast_it_is_and_whether_answers_suffer(sample: dict) -> None:
    assert words.lead(parse(sample)) == (
        "ONNX Runtime int8 is kept: 3.48× as fast as PyTorch eager, 15.2× as fast as PyTorch fake-quant int8, "
        "1.64× as fast as ONNX Runtime float. On 500 questions its answers are not significantly worse."
    )
    sample["comparisons"][0] |= {"lost": 30, "won": 1, "significant": True}
    assert words.lead(parse(sample)).endswith("Its answers are significantly worse than those of PyTorch eager.")


def test_answers_that_are_significantly_better_are_not_worse(sample: dict) -> None:
    sample["comparisons"][0] |= {"lost": 1, "won": 30, "significant": True}
    assert words.lead(parse(sample)).endswith("On 500 questions its answers are not significantly worse.")


def test_the_lead_claims_no_more_questions_than_every_comparison_has(sample: dict) -> None:
    sample["comparisons"][0]["total"] = 40
    assert words.lead(parse(sample)).endswith("On 40 questions its answers are not significantly worse.")


def test_the_lead_claims_no_gain_where_turns_disagree(sample: dict) -> None:
    for entry in sample["speedups"]:
        entry |= {"end_to_end": 1.1, "ranges": {"end_to_end": {"low": 0.9, "high": 1.3}}}
    assert words.lead(parse(sample)).startswith("ONNX Runtime int8 is kept: no clear difference to PyTorch eager, no ")


def test_the_lead_claims_the_least_of_turns_that_lie_far_apart(sample: dict) -> None:
    pair = ("ONNX Runtime int8", "PyTorch eager")
    entry = next(one for one in sample["speedups"] if (one["of"], one["over"]) == pair)
    entry |= {"end_to_end": 30.8, "ranges": {"end_to_end": {"low": 5.82, "high": 128.1}}}
    assert words.lead(parse(sample)).startswith(
        "ONNX Runtime int8 is kept: at least 5.82× as fast as PyTorch eager, 15.2×"
    )


def test_of_random_weights_no_answers_are_judged(sample: dict) -> None:
    sample["artifact"]["random_weights"] = True
    assert "answers" not in words.lead(parse(sample))
