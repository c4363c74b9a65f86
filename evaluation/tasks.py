"""The five tasks of the SAGE edge benchmark, and how one answer is scored.

Answers and gold are normalised as the VQA challenge does (Agrawal et al. 2015, arXiv:1505.00468; the rules of its
official vqaEval.py): lower case, no articles, no punctuation, number words as digits. The four short tasks then ask
for an exact match. A caption has no single right wording, so it gets the share of the picture's facts that it states.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

CAPTION = "caption_brief"
TASKS = {
    CAPTION: "Brief caption",
    "objects_and_counts": "Objects and counts",
    "spatial_relationships": "Spatial relationships",
    "scene_context": "Scene context",
    "attributes": "Attributes",
}

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_APOSTROPHES = re.compile("['’‘`´]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_")


def normalize(text: str) -> str:
    """The words of `text` that count, parted by one blank: "The Two dogs!" → "2 dogs"."""
    return " ".join(word for word in _words(text) if word not in ("a", "an", "the"))


def score(task: str, answer: str, gold: str, facts: Iterable[str] = ()) -> float:
    """How right an answer is, from 0 to 1.

    A caption with known `facts` gets the share of them that it states; every other answer is right (1) or wrong (0)
    by exact match with `gold` after normalisation.
    """
    facts = tuple(facts)
    if task == CAPTION and facts:
        return sum(states(answer, fact) for fact in facts) / len(facts)
    return float(normalize(answer) == normalize(gold))


def states(caption: str, fact: str) -> bool:
    """Whether the words of the fact stand together in the caption; "a dog" in a caption also states "one dog"."""
    return _contains(normalize(caption), normalize(fact)) or _contains(_counted(caption), _counted(fact))


def _contains(text: str, phrase: str) -> bool:
    return bool(phrase) and f" {phrase} " in f" {text} "


def _counted(text: str) -> str:
    return " ".join("1" if word in ("a", "an") else word for word in _words(text) if word != "the")


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _THOUSANDS.sub("", _APOSTROPHES.sub("", text))
    return [_DIGITS.get(word, word) for word in _PUNCTUATION.sub(" ", text).split()]
