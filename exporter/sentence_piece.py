"""A SentencePiece BPE model (`tokenizer.model`) as a fast tokenizer, for checkpoints that bring no tokenizer.json.

transformers reads such files only with the sentencepiece package and, for some, with the checkpoint's own code. The
format is a protocol buffer (google/sentencepiece, sentencepiece_model.proto), of which a few fields are wanted:
pieces are field 1 (text 1, score 2, type 3), `model_type` is field 3 of the trainer, which is field 2, and of the
normaliser, which is field 3, `precompiled_charsmap` is 2, `add_dummy_prefix` 3, `remove_extra_whitespaces` 4.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import VlmcError
from ..files import MAX_JSON_BYTES

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BPE = 2
_LONGEST = 1_000  # characters of a piece; SentencePiece's own limit is 16, and what makes merges takes their square


class _Piece(NamedTuple):
    text: str
    kind: int
    score: float = 0.0


def fast_tokenizer(path: Path, added: Mapping[int, str], legacy: bool = True, **tokens: str) -> Any:
    """transformers' tokenizer for the model at `path`. `added`: special tokens by id, behind the model's pieces or in
    the place of one. `tokens`: `unk_token`, `bos_token` and the like; the one that begins a text is put there.

    Each stretch between special tokens is encoded by itself, with a space before it if the model says so. Llama's
    tokenizers that are not `legacy` put one before a text's first word alone, which is left to the prompt's template:
    what is written around pictures are several texts. The name of a piece that an added token replaces is plain text
    here, and in transformers another name of the token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    pieces, prefix = _read(path)
    if not all(0 <= id < len(pieces) + len(added) for id in added):
        raise VlmcError(f"{path} and the tokens added to it leave numbers out", found=f"{min(added)} to {max(added)}")
    pieces += [_Piece("", _CONTROL)] * (max([*added, len(pieces) - 1]) + 1 - len(pieces))
    for id, token in added.items():
        pieces[id] = _Piece(token, _CONTROL)
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise VlmcError(f"{path} and the tokens added to it do not make one vocabulary")
    if prefix and any(piece.kind == _USER_DEFINED for piece in pieces):  # behind these there would be a space too many
        raise VlmcError(f"{path} has symbols of its own and puts spaces before a text, which vlmc does not follow")
    other = {piece.text for piece in pieces if piece.kind != _NORMAL}
    # The best score is merged first. That is mostly the lowest id, but not of Llama's runs of spaces.
    merges = generate_merges(ids, {piece.text: piece.score for piece in pieces}, skip_tokens=other)
    bpe = models.BPE(ids, merges, unk_token=tokens["unk_token"], fuse_unk=True)
    bpe.byte_fallback = True
    tokenizer = Tokenizer(bpe)
    spaces = [normalizers.Prepend("▁")] if prefix and legacy else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.kind == _USER_DEFINED])
    if bos := tokens.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


def _read(path: Path) -> tuple[list[_Piece], bool]:
    """The pieces, and whether a space is put before a text."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        raise VlmcError(f"{path} is missing or too large", fix="download the checkpoint again")
    pieces, trainer, normaliser = list[_Piece](), dict[int, int | bytes](), dict[int, int | bytes]()
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, kind, score = piece[1], piece.get(3, _NORMAL), piece.get(2, bytes(4))
                assert isinstance(text, bytes) and isinstance(kind, int) and isinstance(score, bytes)
                pieces.append(_Piece(text.decode(), kind, *struct.unpack("<f", score)))
                assert len(pieces[-1].text) <= _LONGEST and math.isfinite(pieces[-1].score)
            elif field in (2, 3) and isinstance(value, bytes):
                (trainer if field == 2 else normaliser).update(_fields(value))
    except (IndexError, KeyError, ValueError, AssertionError, struct.error):
        pieces = []
    if not pieces:
        raise VlmcError(f"{path} is no SentencePiece model", fix="download the checkpoint again")
    if trainer.get(3) != _BPE or normaliser.get(2) or normaliser.get(4, True):
        raise VlmcError(f"{path} is no BPE of the text as it is, the only SentencePiece model that vlmc follows")
    return pieces, bool(normaliser.get(3, True))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffer message by number: varints as int, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(data, at)
        elif key & 7 in (1, 5):
            size = 8 if key & 7 == 1 else 4
        else:
            raise ValueError(key)
        if at + size > len(data):
            raise IndexError(size)
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at that place and the place behind it."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 128:
            return value, at
        if shift >= 70:  # longer than any, and read in the square of its length
            raise ValueError(shift)
