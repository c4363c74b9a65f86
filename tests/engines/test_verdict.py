"""What is kept is the fastest that computes the right thing, and the reason names the numbers."""

from __future__ import annotations

import pytest
from vlmc.artifact import BuildReport
from vlmc.engines.trial import ANSWER
from vlmc.engines.verdict import choose, cost, unmeasured
from vlmc.errors import VlmcError


def vision(ms: float, agreement: float | None = 0.999) -> BuildReport:
    return BuildReport(1.0, 1, 1, {}, {"run": ms}, agreement)


def test_the_fastest_is_kept_and_by_how_much_is_said() -> None:
    reports = {"a-fp32": vision(100), "b-fp32": vision(80), "a-int8": vision(50), "b-int8": vision(40)}
    choice = choose("vision_encoder", reports, random_weights=False)
    assert choice.engine == "b-int8"
    assert choice.reason == "fastest here: 40.00 ms, 2.00× b-fp32 (a-int8 50.00, b-fp32 80.00, a-fp32 100.00)"
    assert choice.candidates["a-int8"] == {"run": 50, "judged_by": 50, "agreement": 0.999}


@pytest.mark.parametrize("int8", [99.0, 100.0, 130.0])
def test_float_is_kept_where_nothing_is_faster_by_more_than_noise(int8: float) -> None:
    choice = choose("vision_encoder", {"a-fp32": vision(100), "a-int8": vision(int8)}, random_weights=False)
    assert choice.engine == "a-fp32"
    assert choice.reason == f"float is as fast or faster: 100.00 ms against a-int8 {int8:.2f}"


def test_a_decoder_is_judged_by_a_prompt_and_an_answer() -> None:
    slow = BuildReport(1.0, 1, 1, {}, {"prefill": 10.0, "decode": 2.0}, 0.999)
    fast = BuildReport(1.0, 1, 1, {}, {"prefill": 14.0, "decode": 1.0}, 0.999)
    assert cost(slow) == 10.0 + ANSWER * 2.0
    choice = choose("decoder", {"a-fp32": slow, "a-w4": fast}, random_weights=False)
    assert choice.engine == "a-w4"
    assert f"{14.0 + ANSWER:.2f} ms for prompt and {ANSWER} tokens" in choice.reason


@pytest.mark.parametrize("agreement", [0.94, 0.0, None])
def test_an_engine_that_computes_something_else_is_left_out(agreement: float | None) -> None:
    reports = {"a-fp32": vision(100), "a-int8": vision(40, agreement), "a-w8": vision(60)}
    choice = choose("vision_encoder", reports, random_weights=False)
    assert choice.engine == "a-w8"
    assert f"a-int8 was left out: cosine {agreement or 0:.3f}" in choice.reason
    assert "40.00" not in choice.reason


def test_the_only_right_one_is_kept_for_that() -> None:
    choice = choose("vision_encoder", {"a-fp32": vision(100), "a-int8": vision(40, 0.5)}, random_weights=False)
    why = "the only one that computes what PyTorch does: 100.00 ms; a-int8 was left out: cosine 0.500"
    assert (choice.engine, choice.reason) == ("a-fp32", why)


def test_with_random_weights_agreement_does_not_decide() -> None:
    reports = {"a-fp32": vision(100), "a-int8": vision(40, 0.5)}
    assert choose("vision_encoder", reports, random_weights=True).engine == "a-int8"
    assert choose("vision_encoder", reports, random_weights=False).engine == "a-fp32"


def test_where_no_float_engine_is_right_nothing_is_chosen() -> None:
    with pytest.raises(VlmcError, match=r"No float engine of decoder .*a-fp32 was left out: cosine 0\.100"):
        choose("decoder", {"a-fp32": vision(1, 0.1), "a-int8": vision(1)}, random_weights=False)


def test_elsewhere_nothing_is_claimed() -> None:
    choice = unmeasured("a-int8", "this machine is x86_64", ["a-fp32", "a-int8"])
    assert (choice.engine, choice.reason) == ("a-int8", "not measured here: this machine is x86_64")
    assert choice.candidates == {"a-fp32": {}, "a-int8": {}}
