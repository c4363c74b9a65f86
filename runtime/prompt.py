"""From a question to token ids, and from token ids to the pieces of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..artifact import PromptSpec
from ..errors import VlmcError
from ..files import MAX_JSON_BYTES
from ..records import REMAKE

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how bytes of a character that is not whole yet are decoded


def render(prompt: PromptSpec, text: str, image_texts: Sequence[str]) -> str:
    """The chat template filled in: the pictures' texts one after the other where `{image}` stands, and the question.

    The question is inserted as it is, whatever braces it has, or without the white space around it. One that contains
    the picture's own token is refused, for then there would be more image tokens than image features.
    """
    if prompt.image_token in text:
        raise VlmcError(
            "The question contains the token that stands for a picture",
            found=prompt.image_token,
            fix="leave it out; pictures are given apart from the question",
        )
    template = prompt.with_image if image_texts else prompt.text_only
    filled = {"{image}": "".join(image_texts), "{text}": text.strip() if prompt.trim else text}
    return "".join(filled.get(part, part) for part in re.split(r"(\{image\}|\{text\})", template))


def require_known(ids: NDArray[np.int64], vocabulary: int) -> None:
    """Raises where a tokenizer's id is none of the model's, whose table of embeddings would be read outside of it."""
    if (largest := int(ids.max(initial=0))) >= vocabulary:
        raise VlmcError(
            "The tokenizer is another model's",
            found=f"token {largest}",
            expected=f"ids below {vocabulary}",
            fix="put the checkpoint's own tokenizer beside its weights, and export it again",
        )


class Tokenizer:
    """The artefact's `tokenizer.json`. A missing, oversized or malformed file is a VlmcError."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise VlmcError(f"{path} is missing", fix=REMAKE)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise VlmcError(f"{path} is too large", expected=f"at most {MAX_JSON_BYTES} bytes")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self.decode(self.encode("Some parts fail only when they are used."))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the library's Rust code is no Exception
            raise VlmcError(f"{path} is no working tokenizer", found=str(error), fix=REMAKE) from None

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids (length,) of a rendered prompt, which has all special tokens already: none is added."""
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except TypeError:  # lone surrogates, as Python makes from a command line that is not UTF-8
            raise VlmcError("The prompt is not valid Unicode text", fix="give it as UTF-8") from None

    def token_id(self, token: str) -> int:
        """The id of one token of the vocabulary, for example the picture's."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise VlmcError(f"The tokenizer has no token {token!r}", fix=REMAKE)
        return int(found)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids without special tokens; ids beyond the vocabulary (padding of it) are left out."""
        return str(self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The pieces of `decode(ids)`, each as soon as its characters are whole; a character may span several ids.

        The ids of the piece before are decoded along, for some decoders treat the beginning of a text differently.
        (tokenizers' own DecodeStream raises where a model with byte tokens emits bytes that are no UTF-8.)
        """
        last: list[int] = []
        new: list[int] = []
        for id in ids:
            new.append(id)
            piece = self._continued(last, new)
            if piece and not piece.endswith(_INCOMPLETE):
                yield piece
                last, new = new, []
        if rest := self._continued(last, new):  # bytes of a character that never became whole
            yield rest

    def _continued(self, last: list[int], new: list[int]) -> str:
        return self.decode(last + new)[len(self.decode(last)) :]
