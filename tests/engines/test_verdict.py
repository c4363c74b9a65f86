"""What is kept is the fastest that computes the right thing, and the reason names the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.artifact import AnswerTrial, BuildReport, Choice
from vlmc.engines.trial import ANSWER
from vlmc.engines.verdict import MIX_GAIN, choose, cost, mixes, title, together, unmeasured
from vlmc.errors import VlmcError


def vision(ms: float, agreement: float | None = 0.999) -> BuildReport:
    return BuildReport(1.0, 1, 1, {}, {"run": ms}, agreement)


def test_the_fastest_is_kept_and_by_how_much_is_said() -> None:
    reports = {"a-fp32": vision(100), "b-fp32": vision(80), "a-int8": vision(50), "b-int8": vision(40)}
    choice = choose("vision_encoder", reports, random_weights=False)
    assert choice.engine == "b-int8"
    assert choice.reason == "fastest here: 40.00 ms, 2.00× b-fp32 (a-int8 50.00, b-fp32 80.00, a-fp32 100.00)"
    assert choice.candidates["a-int8"] == {"run": 50, "judged_by": 50, "agreement": 0.999}


def test_the_reason_names_the_machine_that_the_times_are_from() -> None:
    report = replace(vision(100), timed_on="NVIDIA H200")
    choice = choose("vision_encoder", {"a-fp32": report, "a-int8": replace(report, latency_ms={"run": 50})}, False)
    assert choice.reason.endswith("(a-fp32 100.00); timed on NVIDIA H200")


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


# Whole answers


def tried(**ms: float | tuple[float, float]) -> Choice:
    """What `choose` makes of trials; a_int8=(2.0, 0.5) has agreement 0.5."""
    reports = {
        e.replace("_", "-"): vision(*found) if isinstance(found, tuple) else vision(found) for e, found in ms.items()
    }
    return choose("vision_encoder", reports, random_weights=False)


LOOK_UP = Choice("numpy-fp32", "nothing else is offered for it", {})
A_DECODES = tried(a_fp32=50, a_int8=20)


def mix_of(vision: Choice, decoder: Choice = A_DECODES) -> list[dict[str, str]]:
    found = mixes({"vision_encoder": vision, "embed_tokens": LOOK_UP, "decoder": decoder}, random_weights=False)
    assert all(engines.pop("embed_tokens") == "numpy-fp32" for engines in found)
    return found


def test_of_one_backend_there_is_no_mix() -> None:
    assert mix_of(tried(a_fp32=50, b_fp32=60)) == []


def test_a_mix_is_compared_with_every_backend_that_can_do_all_parts() -> None:
    both = tried(a_fp32=50, b_fp32=60, a_int8=12, b_int8=10)
    kept = {"vision_encoder": "b-int8", "decoder": "a-int8"}
    only_a = {"vision_encoder": "a-int8", "decoder": "a-int8"}
    assert mix_of(both) == [kept, only_a]
    assert mix_of(both, tried(a_fp32=50, b_fp32=60, a_int8=20)) == [
        kept,
        only_a,
        {"vision_encoder": "b-int8", "decoder": "b-fp32"},
    ]
    assert mix_of(tried(b_fp32=60, b_int8=10)) == []  # neither can do all
    only = Choice("b-fp32", "nothing else is offered for it; c-fp32 was not tried here: no GPU", {"c-fp32": {}})
    assert mix_of(only, tried(a_fp32=1, b_fp32=2)) == [
        {"vision_encoder": "b-fp32", "decoder": "a-fp32"},
        {"vision_encoder": "b-fp32", "decoder": "b-fp32"},
    ]


def test_alone_a_backend_gets_what_the_verdict_would_have_kept() -> None:
    """Float unless something is faster by GAIN, and nothing that is wrong."""
    assert mix_of(tried(b_fp32=5, a_fp32=12, a_int8=11.9))[1]["vision_encoder"] == "a-fp32"
    assert mix_of(tried(b_fp32=5, a_fp32=12, a_int8=(6, 0.5)))[1]["vision_encoder"] == "a-fp32"
    assert mix_of(tried(b_fp32=5, a_fp32=(12, 0.5), a_int8=(6, 0.5))) == []


def test_alone_a_backend_of_random_weights_keeps_what_is_fastest() -> None:
    vision = tried(b_fp32=5, a_fp32=12, a_int8=(6, 0.5))
    found = mixes({"vision_encoder": vision, "decoder": A_DECODES}, random_weights=True)
    assert found[1] == {"vision_encoder": "a-int8", "decoder": "a-int8"}


@given(st.lists(st.integers(1, 100), min_size=6, max_size=6))
def test_where_a_backend_was_chosen_it_keeps_that_engine_alone(ms: list[float]) -> None:
    names = [f"{backend}_{precision}" for precision in ("fp32", "int8") for backend in "abc"]
    choice = tried(**dict(zip(names, ms, strict=True)))
    backend = choice.engine[0]
    other = "b" if backend == "a" else "a"
    found = mix_of(choice, tried(**{f"{other}_fp32": 1, f"{backend}_fp32": 2}))
    alone = next(engines for engines in found if engines["decoder"] == f"{backend}-fp32")
    assert alone["vision_encoder"] == choice.engine


def decided(mix: float, *single: float) -> dict[str, Choice]:
    """Of a mix of b and a, and of a, c, d, … alone."""
    both = tried(a_fp32=50, b_fp32=60, a_int8=12, b_int8=10)
    choices = {"vision_encoder": both, "embed_tokens": LOOK_UP, "decoder": A_DECODES}
    answers = [AnswerTrial({name: choice.engine for name, choice in choices.items()}, mix, 1.0, "")]
    for name, ms in zip("acd", single, strict=False):
        engines = {"vision_encoder": f"{name}-int8", "embed_tokens": "numpy-fp32", "decoder": f"{name}-int8"}
        answers.append(AnswerTrial(engines, ms, 1.0, ""))
    return together(choices, answers)


def test_one_backend_that_answers_faster_than_the_mix_is_kept_and_the_reason_has_both_numbers() -> None:
    choices = decided(66.04, 62.0)
    vision = choices["vision_encoder"]
    assert vision.engine == "a-int8"
    assert vision.reason == (
        "a for all parts answers in 62.0 ms, the mix in 66.0; by itself b-int8, "
        "fastest here: 10.00 ms, 5.00× a-fp32 (a-int8 12.00, a-fp32 50.00, b-fp32 60.00)"
    )
    assert len(vision.candidates) == 4
    assert (choices["decoder"], choices["embed_tokens"]) == (A_DECODES, LOOK_UP)


def test_the_mix_has_to_be_faster_in_every_turn() -> None:
    def answers(*mix: float) -> list[AnswerTrial]:
        both = [AnswerTrial({"vision_encoder": "b-int8"}, 14.0, 1.0, "", mix)]
        return [*both, AnswerTrial({"vision_encoder": "a-int8"}, 16.0, 1.0, "", (15.5, 16.0, 16.5))]

    choices = {"vision_encoder": Choice("b-int8", "fastest here", {})}
    assert together(choices, answers(13.5, 14.0, 15.4))["vision_encoder"].engine == "b-int8"
    overlapping = together(choices, answers(13.5, 14.0, 15.6))["vision_encoder"]
    assert overlapping.engine == "a-int8"
    assert "within noise, and one backend is simpler" in overlapping.reason


def test_the_mix_has_to_be_faster_by_more_than_noise() -> None:
    for single in (62.0 / MIX_GAIN + 0.1, 62.0, 62.0 * MIX_GAIN - 0.1):
        as_fast = decided(62.0, single)["vision_encoder"]
        assert as_fast.engine == "a-int8"
        assert "the mix in 62.0: within noise, and one backend is simpler; " in as_fast.reason
    stays = decided(62.0, 62.0 * MIX_GAIN + 0.1)
    assert stays["vision_encoder"].engine == "b-int8"
    assert stays["vision_encoder"].reason.endswith("; a for all parts answers in 65.2 ms, the mix in 62.0")
    assert stays["decoder"] == A_DECODES


def test_the_fastest_of_several_single_backends_is_kept() -> None:
    assert decided(66.0, 65.0, 60.0, 64.0)["decoder"].engine == "c-int8"


def test_backends_are_called_by_their_names() -> None:
    engines = {"vision_encoder": "openvino-int8", "embed_tokens": "numpy-fp32", "decoder": "onnxruntime-int8-minmax"}
    assert title(engines) == "OpenVINO + ONNX Runtime"
    assert title({"vision_encoder": "new-fp32", "decoder": "new-fp32"}) == "new"


def test_elsewhere_nothing_is_claimed() -> None:
    choice = unmeasured("a-int8", "this machine is x86_64", ["a-fp32", "a-int8"])
    assert (choice.engine, choice.reason) == ("a-int8", "not measured here: this machine is x86_64")
    assert choice.candidates == {"a-fp32": {}, "a-int8": {}}
