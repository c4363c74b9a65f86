import io
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from vlmc.console import WIDTH, output
from vlmc.reports import tables
from vlmc.reports.document import parse
from vlmc.reports.terminal import show


def shown(report: dict[str, Any]) -> str:
    console = output()
    with console.capture() as capture:
        show(parse(report), console)
    return capture.get()


def test_the_table_shows_each_variant_with_its_numbers(sample: dict[str, Any]) -> None:
    line = next(line for line in shown(sample).splitlines() if line.startswith("ONNX Runtime float"))
    assert " ".join(line.split()) == "ONNX Runtime float 22.8 35.7 148 214 MB n/a [1] 94.9 (92.6–96.5) 2.12×"


def test_the_kept_variant_is_named_in_words(sample: dict[str, Any]) -> None:
    assert "(kept)" in shown(sample)


def test_the_verdict_stands_under_the_table(sample: dict[str, Any]) -> None:
    text = " ".join(shown(sample).split())
    assert all(sentence in text for sentence in sample["verdict"]["sentences"])
    assert "no significant difference" in text


def test_a_missing_number_leads_to_its_reason(sample: dict[str, Any]) -> None:
    text = shown(sample)
    assert "n/a [1]" in text
    assert "[1] unavailable: this machine exposes no RAPL counter" in text


def test_random_weights_are_said(sample: dict[str, Any]) -> None:
    sample["artifact"]["random_weights"] = True
    assert "Random weights" in shown(sample)


def test_names_are_no_markup(sample: dict[str, Any]) -> None:
    sample["variants"][1]["name"] = "[bold]x[/] [red]z"
    assert "\n[bold]x[/] [red]z " in shown(sample)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=150), sentence=st.text(max_size=300))
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_wider_than_the_console(sample: dict[str, Any], name: str, sentence: str) -> None:
    from rich.cells import cell_len

    sample["variants"][3]["name"] = name
    sample["artifact"]["name"] = name
    sample["verdict"]["sentences"] = [sentence]
    assert max(cell_len(line) for line in shown(sample).splitlines()) <= WIDTH


def test_large_numbers_fit_too(sample: dict[str, Any]) -> None:
    for variant in sample["variants"]:
        variant["name"] = "A very long name of a variant: " + variant["name"]
        variant["latency_ms"]["vision"]["median"] = 1234567.8
        variant["latency_ms"]["time_to_first_token"]["median"] = 1234567.8
        variant["memory"]["peak_rss_bytes"] = 123456e9
        variant["energy"]["joules_per_image"] = 123456.7
    lines = shown(sample).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum("1,234,568" in line for line in lines) == 5


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_a_narrow_terminal_shows_names_and_whole_numbers_and_says_what_it_leaves_out(
    sample: dict[str, Any], width: int
) -> None:
    written = io.StringIO()
    show(parse(sample), Console(width=width, file=written))
    said, content = written.getvalue(), tables.headline(parse(sample))
    first = next(line for line in said.splitlines() if line.startswith("PyTorch"))
    row = next(row for row in content.rows if row[0].startswith("PyTorch"))
    left = sum(title in " ".join(said.partition("too narrow for")[2].split()) for title in content.columns)
    assert all(cell in first for cell in row[1 : len(row) - left])
    assert (left > 0) == (width < 100)
