"""A SentencePiece model is read and encodes as the sentencepiece package does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from vlmc.errors import VlmcError
from vlmc.exporter.sentence_piece import fast_tokenizer

Model = Callable[[list[tuple[Any, ...]], bool], bytes]  # the fixture that makes the file

# Text and type, best score first but for the runs of spaces, which Llama has so; 6 are bytes.
PIECES: list[tuple[Any, ...]] = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
PIECES += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
PIECES += [("▁" * length, 1, -1e9) for length in (2, 4, 3, 1)]
PIECES += [(text, 1) for text in ("ab", "▁a", "▁ab", "abab", "bc", "a", "b", "c", "书", "\n")]
TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("prefix", [True, False])
def test_any_text_is_encoded_as_published(prefix: bool, sentence_piece: Model, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentence_piece(PIECES, prefix))
    tokenizer, published = fast_tokenizer(path, {}, **TOKENS), SentencePieceProcessor(str(path))

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.text(st.sampled_from("aabc   书\nx€😀"), min_size=1, max_size=20))
    def check(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == published.encode(text)
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
    published = SentencePieceProcessor(str(path))
    assert ids == [1, *published.encode("ab"), 0, *published.encode("\nab")]


def test_what_is_not_legacy_leaves_the_first_space_to_the_prompt(sentence_piece: Model, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentence_piece(PIECES, True))
    tokenizer, published = fast_tokenizer(path, {}, False, **TOKENS), SentencePieceProcessor(str(path))
    ids = tokenizer(" ab", add_special_tokens=False)["input_ids"]
    assert ids == published.encode("ab") and tokenizer.decode(ids) == "ab"


def test_added_tokens_stand_in_the_place_of_pieces_and_behind_them(sentence_piece: Model, tmp_path: Path) -> None:
    path, size = tmp_path / "tokenizer.model", len(PIECES)
    path.write_bytes(sentence_piece([*PIECES, ("[UNUSED_0]", 3), ("[U]", 4)], False))
    tokenizer = fast_tokenizer(path, {size: "<|im_end|>", size + 2: "<img>"}, **TOKENS)
    text = "a<|im_end|>b<img>c[U]"
    a, b, c = (PIECES.index((letter, 1)) for letter in "abc")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [a, size, b, size + 2, c, size + 1]
    assert tokenizer.decode([a, size, size + 2, b], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda _: None, "is missing"),
        (lambda _: b"", "is no SentencePiece model"),
        (lambda _: b"{}", "is no SentencePiece model"),
        (lambda model: model(PIECES, True)[:400], "is no SentencePiece model"),
        (lambda _: b"\x0a\x02\x18\x01", "is no SentencePiece model"),  # a piece without a text
        (lambda _: b"\x0a\x03\x0a\x01\xff", "is no SentencePiece model"),  # one that is no UTF-8
        (lambda _: b"\x0a\x05\x0a\x01a\x10\x01", "is no SentencePiece model"),  # one whose score is no float
        (lambda _: b"\xff" * 20_000_000 + b"\x01", "is no SentencePiece model"),  # a number of 17 MB
        (lambda model: model([*PIECES, ("a" * 2_000_000, 1)], True), "is no SentencePiece model"),
        (lambda model: model([*PIECES, ("ba", 1, math.nan)], True), "is no SentencePiece model"),
        (lambda model: model(PIECES, True) + b"\x12\x02\x18\x01", "is no BPE of the text as it is"),  # unigrams
        (lambda model: model(PIECES, True) + b"\x1a\x03\x12\x01x", "is no BPE of the text as it is"),  # NFKC
        (lambda model: model(PIECES, True) + b"\x1a\x02\x20\x01", "is no BPE of the text as it is"),  # spaces go
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


@pytest.mark.parametrize("id", [-1, 10**18])
def test_an_added_token_of_a_number_that_leaves_others_out_is_refused(
    id: int, sentence_piece: Model, tmp_path: Path
) -> None:
    """The numbers are those of tokenizer_config.json, which can say anything."""
    (tmp_path / "tokenizer.model").write_bytes(sentence_piece(PIECES, True))
    with pytest.raises(VlmcError, match=f"leave numbers out. Found: {id} to {id}"):
        fast_tokenizer(tmp_path / "tokenizer.model", {id: "<img>"}, **TOKENS)
