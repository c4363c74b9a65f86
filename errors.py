"""The one exception type of vlmc: a sentence that says what failed, what was there, and how to mend it."""

from __future__ import annotations


class VlmcError(Exception):
    """A failure that the user can understand and mend; `cli.py` prints it and exits with code 1.

    what: what could not be done, with the file or name concerned. found / expected: the two things that do not
    agree, where that helps. fix: what to do about it.
    """

    def __init__(self, what: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.found, self.expected, self.fix = what, found, expected, fix

    def __str__(self) -> str:
        parts = [self.what.rstrip(".") + "."]
        if self.found:
            parts.append(f"Found: {self.found}.")
        if self.expected:
            parts.append(f"Expected: {self.expected}.")
        if self.fix:
            parts.append(f"To mend it: {self.fix}.")
        return " ".join(parts)
