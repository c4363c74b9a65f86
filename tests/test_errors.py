"""The one exception type: its sentence."""

from __future__ import annotations

import pickle

import pytest
from vlmc.errors import VlmcError, mended_by, reason


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (VlmcError("It cannot be read"), "It cannot be read."),
        (VlmcError("It cannot be read."), "It cannot be read."),
        (VlmcError("It is short", found="3 bytes", expected="4"), "It is short. Found: 3 bytes. Expected: 4."),
        (VlmcError("It is gone", fix="make it again"), "It is gone. To mend it: make it again."),
        (VlmcError("It failed", found="No file.", fix="look."), "It failed. Found: No file. To mend it: look."),
    ],
)
def test_it_says_what_was_found_and_expected_and_how_to_mend_it(error: VlmcError, sentence: str) -> None:
    assert str(error) == sentence


def test_it_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(VlmcError("a", found="b", expected="c", fix="d")))
    assert str(error) == "a. Found: b. Expected: c. To mend it: d."


def test_it_is_one_line_whatever_the_names_in_it_hold() -> None:
    error = VlmcError("a\nb\x1b[31m is no artefact", found="é\udce9")
    assert str(error) == r"a\nb\x1b[31m is no artefact. Found: é\udce9."


def test_the_caller_may_know_better_how_to_mend_it() -> None:
    with pytest.raises(VlmcError) as raised, mended_by("build it again"):
        raise VlmcError("It is damaged", fix="make it again")
    assert str(raised.value) == "It is damaged. To mend it: build it again."


def test_a_foreign_exception_is_told_in_one_line() -> None:
    assert reason(ValueError("\n first line\nsecond line")) == "first line"
    assert reason(RuntimeError("x" * 1000)) == "x" * 300
    assert reason(MemoryError()) == "MemoryError"
    assert reason(ValueError("Field 'a':\n  Value:\n is no number\nmore")) == "Field 'a': Value: is no number"
    assert reason(ValueError("nothing follows:")) == "nothing follows:"
    assert reason(KeyError(" ")) == "' '"
