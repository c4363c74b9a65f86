"""A SentencePiece BPE model (`tokenizer.model`) as a fast tokenizer, for checkpoints that bring no tokenizer.json.

transformers reads such files only with the sentencepiece package and, for some, with the checkpoint's own code. The
format is a protocol buffer (google/sentencepiece, sentencepiece_model.proto), of which a few fields are wanted:
pieces are field 1 (text 1, type 3), and `add_dummy_prefix` is field 3 of the normaliser, which is field 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import VlmcError
from ..files import MAX_JSON_BYTES

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def fast_tokenizer(path: Path, added: Mapping[int, str], **tokens: str) -> Any:
    """transformers' tokenizer for the model at `path`. `added`: special tokens by id, behind the model's pieces or in
    the place of one. `tokens`: `unk_token`, `bos_token` and the like; the one that begins a text is put there.

    Each stretch between special tokens is encoded by itself, with a space before it if the model says so."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    pieces, prefix = _read(path)
    pieces += [("", _CONTROL)] * (max([*added, len(pieces) - 1]) + 1 - len(pieces))
    for id, token in added.items():
        pieces[id] = (token, _CONTROL)
    ids = {piece: id for id, (piece, _) in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise VlmcError(f"{path} and the tokens added to it do not make one vocabulary")
    if prefix and any(kind == _USER_DEFINED for _, kind in pieces):  # behind these there would be a space too many
        raise VlmcError(f"{path} has symbols of its own and puts spaces before a text, which vlmc does not follow")
    other = {piece for piece, kind in pieces if kind != _NORMAL}
    bpe = models.BPE(ids, generate_merges(ids, skip_tokens=other), unk_token=tokens["unk_token"], fuse_unk=True)
    bpe.byte_fallback = True
    tokenizer = Tokenizer(bpe)
    spaces = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tokenizer.add_special_tokens([AddedToken(p, normalized=False) for p, kind in pieces if kind == _CONTROL])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p, kind in pieces if kind == _USER_DEFINED])
    if bos := tokens.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, ids[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)


def _read(path: Path) -> tuple[list[tuple[str, int]], bool]:
    """The pieces as text and type, and whether a space is put before a text."""
    if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
        raise VlmcError(f"{path} is missing or too large", fix="download the checkpoint again")
    pieces, prefix = [], True
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, kind = piece[1], piece.get(3, _NORMAL)
                assert isinstance(text, bytes) and isinstance(kind, int)
                pieces.append((text.decode(), kind))
            elif field == 3 and isinstance(value, bytes):
                prefix = bool(dict(_fields(value)).get(3, True))
    except (IndexError, KeyError, ValueError, AssertionError):
        pieces = []
    if not pieces:
        raise VlmcError(f"{path} is no SentencePiece model", fix="download the checkpoint again")
    return pieces, prefix


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
