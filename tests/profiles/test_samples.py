from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.profiles import samples

ROWS = [{"kind": "run", "index": index, "turn": 0, "decode_s": [0.1, 0.25]} for index in range(3)]


def written(path: Path) -> bytes:
    for row in ROWS:
        samples.append(path, row)
    return path.read_bytes()


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    written(tmp_path / "x.jsonl")
    assert samples.read(tmp_path / "x.jsonl") == ROWS
    assert samples.read(tmp_path / "absent.jsonl") == []


@given(st.integers(0, 300))
def test_cut_anywhere_the_whole_rows_are_left_and_writing_can_go_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    data = written(path)
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert samples.read(path) == ROWS[:whole]
    samples.append(path, ROWS[0])
    assert samples.read(path) == [*ROWS[:whole], ROWS[0]]


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"[1]", b'{"index": 1}', b'{"kind": 3}', b"\xff\xfe", b"[" * 100_000),
        b'{"kind": "run", "index": 1}',
        b'{"kind": "turn", "turn": []}',
        b'{"kind": "agreement", "case": "1"}',
        b'{"kind": "answer", "row": {}}',
        b'{"kind": "answer", "row": 1, "cosines": [NaN]}',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"kind": "open"}\n' + line + b"\n")
    with pytest.raises(VlmcError, match=r"Line 2 of .*x\.jsonl is no sample"):
        samples.read(path)


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        samples.append(tmp_path / "x.jsonl", {"kind": "run", "vision_s": float("nan")})
