"""Prompts hold the question as it was typed; token ids and text are transformers'."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models
from transformers import AutoTokenizer
from vlmc.artifact import PromptSpec
from vlmc.errors import VlmcError
from vlmc.runtime import prompt as module
from vlmc.runtime.prompt import Tokenizer, render

SPEC = PromptSpec("<s>User:{image}{text}</s>", "<s>User: {text}</s>", "<image>", (2,))


def test_the_template_is_filled_with_pictures_and_question() -> None:
    assert render(SPEC, "hi", ["A"]) == "<s>User:Ahi</s>"
    assert render(SPEC, "hi", ["A", "B"]) == "<s>User:ABhi</s>"
    assert render(SPEC, "hi", []) == "<s>User: hi</s>"
    after = PromptSpec("{text} {image}", "{text}", "<image>", (2,))
    assert render(after, "hi", ["A"]) == "hi A"


@pytest.mark.parametrize("text", ["{image}", "{text}", "{", "}{0}", "{text!r:>{image}}", "%s \\1 $text", ""])
def test_a_question_is_inserted_as_it_is(text: str) -> None:
    assert render(SPEC, text, ["A"]) == "<s>User:A" + text + "</s>"
    assert render(SPEC, "q", ["{text}"]) == "<s>User:{text}q</s>"


def test_white_space_around_a_question_is_left_out_where_the_template_does_so() -> None:
    trimming = replace(SPEC, trim=True)
    assert render(trimming, "\n\u3000 what  is\nit? \t", ["A\n"]) == "<s>User:A\nwhat  is\nit?</s>"
    assert render(trimming, " \n", []) == "<s>User: </s>"


@pytest.mark.parametrize("pictures", [[], ["A"]])
def test_a_question_with_the_pictures_token_is_refused(pictures: list[str]) -> None:
    with pytest.raises(VlmcError, match="token that stands for a picture"):
        render(SPEC, "what is <image>?", pictures)


@pytest.fixture(scope="module")
def tokenizer(processor_folder: Path) -> Tokenizer:
    return Tokenizer(processor_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(processor_folder: Path) -> AutoTokenizer:
    return AutoTokenizer.from_pretrained(processor_folder, local_files_only=True)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.lists(
    st.sampled_from(["<image>", "<|im_start|>", "<end_of_utterance>", " red boats", "\n\n", "ß€😀", "\ufffd", "  "])
).map("".join)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_ids_and_text_are_transformers(text: str, tokenizer: Tokenizer, reference: AutoTokenizer) -> None:
    ids = tokenizer.encode(text)
    assert (ids.dtype, ids.ndim) == (np.int64, 1)
    assert ids.tolist() == reference(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_pieces_join_to_the_whole_text(data: st.DataObject, tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode(data.draw(TEXTS)).tolist()
    ids = data.draw(st.just(encoded) | st.lists(st.integers(0, 450), max_size=12))  # ids that are no text, or no token
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)


def test_a_character_is_streamed_once_all_its_bytes_are_there(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a€b😀").tolist()
    assert len(ids) == 9
    assert list(tokenizer.stream(ids)) == ["a", "€", "b", "😀"]
    assert list(tokenizer.stream(ids[:-1])) == ["a", "€", "b", "\ufffd"]


def test_streaming_does_not_wait_for_later_ids(tokenizer: Tokenizer) -> None:
    ids = iter(tokenizer.encode("ab").tolist())
    pieces = tokenizer.stream(ids)
    assert next(pieces) == "a"
    assert len(list(ids)) == 1


def test_words_keep_their_spaces_and_broken_bytes_do_no_harm_with_a_llama_like_decoder(tmp_path: Path) -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁two": 256, "▁boats": 257}
    library = Library(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert list(tokenizer.stream([256, 257, *"é".encode(), 257])) == ["two", " boats", "é", " boats"]
    assert "boats" in "".join(tokenizer.stream([*b"3\xa1", 257, 0xE2, 0x82, 256]))


def test_a_token_is_found_by_its_text(tokenizer: Tokenizer, reference: AutoTokenizer) -> None:
    assert tokenizer.token_id("<image>") == reference.convert_tokens_to_ids("<image>")
    with pytest.raises(VlmcError, match="no token '<picture>'"):
        tokenizer.token_id("<picture>")


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(VlmcError, match="Unicode"):
        tokenizer.encode("caf\udce9")


def test_truncation_and_padding_of_the_file_are_off(processor_folder: Path, tmp_path: Path) -> None:
    library = Library.from_file(str(processor_folder / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path / "tokenizer.json").encode("a€b")) == 5


def test_a_file_that_is_no_tokenizer_is_refused(
    processor_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = (processor_folder / "tokenizer.json").read_text()
    path = tmp_path / "tokenizer.json"
    with pytest.raises(VlmcError, match="is missing"):
        Tokenizer(path)
    panics = json.loads(whole) | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////AAA="}}
    for content in ("", "{}", "[1]", whole[:-100], json.dumps(panics)):
        path.write_text(content)
        with pytest.raises(VlmcError, match="no working tokenizer"):
            Tokenizer(path)
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 10)
    path.write_text(whole)
    with pytest.raises(VlmcError, match="too large"):
        Tokenizer(path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(32, 126)), min_size=1, max_size=3))
def test_a_damaged_file_still_works_or_is_refused(
    changes: list[tuple[float, int]], processor_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((processor_folder / "tokenizer.json").read_bytes())
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(content)
    try:
        tokenizer = Tokenizer(path)
    except VlmcError:
        return
    ids = tokenizer.encode("two red boats")
    assert "".join(tokenizer.stream(ids)) == tokenizer.decode(ids)
