import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlmc.reports.document import parse
from vlmc.reports.markdown import escape, render


def unescaped(text: str) -> str:
    return re.sub(r"\\([\\`*_{}\[\]<>#|~])", r"\1", text).replace("&amp;", "&")


def test_every_reason_in_the_report_is_there_in_words(sample: dict[str, Any], reasons: list[str]) -> None:
    text = unescaped(render(parse(sample)))
    assert [reason for reason in reasons if reason not in text] == []


def test_the_verdict_and_the_kept_engines_are_there(sample: dict[str, Any]) -> None:
    text = unescaped(render(parse(sample)))
    assert all(sentence in text for sentence in sample["verdict"]["sentences"])
    assert all(choice["reason"] in text for choice in sample["verdict"]["choices"].values())


def test_every_line_of_a_table_has_as_many_cells_as_its_head(sample: dict[str, Any]) -> None:
    sample["variants"][0]["name"] = "a | b\nc"
    blocks = re.findall(r"(?:^\|.*\n)+", render(parse(sample)), flags=re.MULTILINE)
    assert len(blocks) >= 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "[x](http://y)", "**b**", "`c`", "&lt;d&gt;"])
def test_names_are_neither_html_nor_markdown(sample: dict[str, Any], name: str) -> None:
    sample["artifact"]["name"] = name
    assert name not in render(parse(sample))
    assert name in unescaped(render(parse(sample)))


@given(st.text())
def test_escaped_text_is_one_line_and_can_be_read_back(text: str) -> None:
    assert len(escape(text).splitlines()) <= 1
    assert unescaped(escape(text)) == " ".join(text.split())


def test_random_weights_are_said(sample: dict[str, Any]) -> None:
    sample["artifact"]["random_weights"] = True
    assert "Random weights" in render(parse(sample))


def test_a_bare_report_can_be_drawn(bare: dict[str, Any]) -> None:
    assert "unavailable: not in the report" in render(parse(bare))
