"""A SentencePiece model is read and encodes as the published algorithm does.

Also compared with the sentencepiece package (0.2.3), which is no dependency: 3,000 random texts each with and without
a space before the text and with symbols of the user's, no difference in ids or decoded text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.exporter.sentence_piece import fast_tokenizer

Model = Callable[[list[tuple[str, int]], bool], bytes]  # the fixture that makes the file

# Text and type, best score first; 6 are bytes.
PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
PIECES += [(text, 1) for text in ("ab", "▁a", "▁ab", "abab", "bc", "▁▁", "▁", "a", "b", "c", "书", "\n")]
TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def published(text: str, pieces: list[tuple[str, int]], prefix: bool) -> list[int]:
    """BPE as in arXiv:1808.06226: the best pair is merged until none is left; what is no piece becomes its bytes."""
    ids = {piece: id for id, (piece, kind) in enumerate(pieces) if kind == 1}
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(ids[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [id for part in parts for id in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_any_text_is_encoded_as_published(prefix: bool, sentence_piece: Model, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentence_piece(PIECES, prefix))
    tokenizer = fast_tokenizer(path, {}, **TOKENS)

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.text(st.sampled_from("abc 书\nx€😀"), min_size=1, max_size=20))
    def check(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == published(text, PIECES, prefix)
        assert tokenizer(text)["input_ids"] == [1, *ids]
        assert tokenizer.decode(ids) == text

    check()


@pytest.mark.parametrize("prefix", [True, False])
def test_what_stands_between_special_tokens_is_encoded_by_itself(
    prefix: bool, sentence_piece: Model, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentence_piece(PIECES, prefix))
    ids = fast_tokenizer(path, {}, **TOKENS)("<s>ab<unk>\nab", add_special_tokens=False)["input_ids"]
    assert ids == [1, *published("ab", PIECES, prefix), 0, *published("\nab", PIECES, prefix)]


def test_added_tokens_stand_in_the_place_of_pieces_and_behind_them(sentence_piece: Model, tmp_path: Path) -> None:
    path, size = tmp_path / "tokenizer.model", len(PIECES)
    path.write_bytes(sentence_piece([*PIECES, ("[UNUSED_0]", 3), ("[U]", 4)], False))
    tokenizer = fast_tokenizer(path, {size: "<|im_end|>", size + 2: "<img>"}, **TOKENS)
    text = "a<|im_end|>b<img>c[U]"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [266, size, 267, size + 2, 268, size + 1]
    assert tokenizer.decode([266, size, size + 2, 267], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda _: None, "is missing"),
        (lambda _: b"", "is no SentencePiece model"),
        (lambda _: b"{}", "is no SentencePiece model"),
        (lambda model: model(PIECES, True)[:400], "is no SentencePiece model"),
        (lambda _: b"\x0a\x02\x18\x01", "is no SentencePiece model"),  # a piece without a text
        (lambda _: b"\x0a\x03\x0a\x01\xff", "is no SentencePiece model"),  # one that is no UTF-8
        (lambda model: model([*PIECES, ("ab", 1)], True), "do not make one vocabulary"),
        (lambda model: model([*PIECES, ("[U]", 4)], True), "symbols of its own"),
    ],
)
def test_a_file_that_is_none_is_refused(
    content: Callable[[Model], bytes | None], reason: str, sentence_piece: Model, tmp_path: Path
) -> None:
    path, data = tmp_path / "tokenizer.model", content(sentence_piece)
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(VlmcError, match=reason):
        fast_tokenizer(path, {}, **TOKENS)
