"""The one exception type of vlmc: a sentence that says what failed, what was there, and how to mend it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class VlmcError(Exception):
    """A failure that the user can understand and mend; `cli.py` prints it and exits with code 1.

    what: what could not be done, with the file or name concerned. found / expected: the two things that do not
    agree, where that helps. fix: what to do about it.
    """

    def __init__(self, what: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.found, self.expected, self.fix = what, found, expected, fix

    def __str__(self) -> str:
        labelled = (("", self.what), ("Found: ", self.found), ("Expected: ", self.expected), ("To mend it: ", self.fix))
        said = " ".join(f"{label}{text.rstrip('.')}." for label, text in labelled if text)
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in said)  # a name may hold line ends


@contextlib.contextmanager
def mended_by(fix: str) -> Iterator[None]:
    """What fails inside is mended so: its caller knows which command writes a file, the function that reads it not."""
    try:
        yield
    except VlmcError as error:
        error.fix = fix
        raise


def reason(error: BaseException) -> str:
    """What a foreign exception says, in one line of at most 300 characters and with what its first line announces by a
    colon; its type's name where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    end = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return " ".join(lines[: end + 1])[:300] or type(error).__name__
