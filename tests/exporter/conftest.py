"""The tiny model in PyTorch, and a way to export it again in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

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
def sentence_piece() -> Callable[[list[tuple[str, int]], bool], bytes]:
    """sentence_piece(pieces, prefix): the file of a SentencePiece model with pieces of a text and a type (1 normal,
    2 unknown, 3 control, 4 user-defined, 6 byte) and with `add_dummy_prefix`. The scores in it are all the same."""

    def varint(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7) if value >> 7 else bytes([value])

    def message(field: int, body: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(body)) + body

    def write(pieces: list[tuple[str, int]], prefix: bool) -> bytes:
        data = b""
        for text, kind in pieces:
            score, type_ = b"\x15\x00\x00\x80\xbf", b"\x18" + varint(kind)
            data += message(1, message(1, text.encode()) + score + (type_ if kind > 1 else b""))
        return data + message(2, b"\x18\x02") + message(3, message(1, b"identity") + b"\x18" + bytes([prefix]))

    return write
