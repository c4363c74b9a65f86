"""The tiny model in PyTorch, and a way to export it again in milliseconds."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.exporter import graph
from vlmc.exporter.family import Components


@pytest.fixture
def components(tiny_components: Components) -> Components:
    return tiny_components


@pytest.fixture
def traced_before(tiny: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds and gives for the tiny checkpoint what it gave before: the graphs of `tiny`."""
    monkeypatch.setattr(graph, "export_component", lambda name, *_: ir.load(tiny.graph(name)))


@pytest.fixture(scope="session")
def sentence_piece() -> Callable[[Sequence[tuple[Any, ...]], bool], bytes]:
    """sentence_piece(pieces, prefix): the file of a SentencePiece BPE with pieces of a text and a type (1 normal,
    2 unknown, 3 control, 4 user-defined, 6 byte) and with `add_dummy_prefix`. A piece's score is the third that it has,
    or falls with its place, as in those that are trained."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value >> 7 else bytes([value])

    def message(field: int, body: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(body)) + body

    def write(pieces: Sequence[tuple[Any, ...]], prefix: bool) -> bytes:
        data = b""
        for place, (text, kind, *score) in enumerate(pieces):
            scored = b"\x15" + struct.pack("<f", *(score or [-place]))
            data += message(1, message(1, text.encode()) + scored + (b"\x18" + varint(kind) if kind > 1 else b""))
        bpe_of_bytes, spaces_stay = b"\x18\x02" + varint(35 << 3) + b"\x01", b"\x20\x00"
        normaliser = message(1, b"identity") + b"\x18" + bytes([prefix]) + spaces_stay
        return data + message(2, bpe_of_bytes) + message(3, normaliser)

    return write
