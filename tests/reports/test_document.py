import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.console import output
from vlmc.errors import VlmcError
from vlmc.reports import document, markdown, spreadsheet, terminal

SAMPLE = json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8"))


def test_the_sample_says_that_it_is_made_up(sample: dict[str, Any]) -> None:
    assert "MADE UP" in sample["note"]


def test_variants_stand_in_one_order_whatever_the_files_order(sample: dict[str, Any]) -> None:
    sample["variants"].reverse()
    names = [variant.name for variant in document.parse(sample).variants]
    assert names == [
        "PyTorch eager",
        "PyTorch fake-quant int8",
        "ONNX Runtime float",
        "ONNX Runtime int8",
        "ONNX Runtime int8 + int4 decoder",
    ]


def test_the_kept_variant_is_the_one_that_runs_the_chosen_engines(sample: dict[str, Any]) -> None:
    kept = document.parse(sample).kept
    assert kept is not None
    assert kept.name == "ONNX Runtime int8"
    sample["verdict"]["choices"]["decoder"]["engine"] = "openvino-int8"
    assert document.parse(sample).kept is None


def test_headline_speedups_are_over_plain_pytorch_or_else_the_float_engine(sample: dict[str, Any]) -> None:
    assert document.parse(sample).reference.name == "PyTorch eager"
    sample["variants"] = [v for v in sample["variants"] if v["kind"] == "engine"]
    assert document.parse(sample).reference.name == "ONNX Runtime float"


def test_what_is_not_there_is_unavailable_and_never_0(bare: dict[str, Any]) -> None:
    variant = document.parse(bare).variants[0]
    assert document.look(variant.latency_ms, "vision") == document.ABSENT
    assert document.look({"watts": 3.0}, "joules_per_image") == document.ABSENT
    assert document.look("unavailable: no meter", "watts") == "unavailable: no meter"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.update(schema=2), "schema"),
        (lambda r: r.pop("artifact"), "artifact"),
        (lambda r: r.update(variants=[]), "no variant"),
        (lambda r: r.update(variants=r["variants"][:1] * 2), "two variants"),
        (lambda r: r["variants"][0].update(tokens_per_s={"mean": 1}), r"variants\[0\].tokens_per_s"),
        (lambda r: r["variants"][1]["memory"].update(disk_bytes=[]), r"variants\[1\].memory"),
        (lambda r: r["variants"][0]["answers"][0].update(right=1), r"variants\[0\].answers\[0\].right"),
        (lambda r: r["speedups"][0].update(vision=float("inf")), r"speedups\[0\].vision is no finite"),
        (lambda r: r.update(comparisons=[{}]), r"comparisons\[0\] lacks the field 'of'"),
        (lambda r: r["variants"][0]["memory"].update(disk_bytes=float("nan")), "disk_bytes is no finite"),
        (lambda r: r["variants"][0]["memory"].update(disk_bytes=10**400), "disk_bytes is no finite"),
        (lambda r: r["variants"][0]["accuracy"]["overall"].update(high=1e308), r"overall\.high is no finite"),
    ],
)
def test_a_malformed_report_is_refused_by_its_field(sample: dict[str, Any], change: Any, named: str) -> None:
    change(sample)
    with pytest.raises(VlmcError, match=named):
        document.parse(sample)


@pytest.mark.parametrize("data", [None, [], 3, "report", {}])
def test_what_is_no_report_is_refused(data: Any) -> None:
    with pytest.raises(VlmcError, match="schema"):
        document.parse(data)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1', "\udcff"])
def test_a_torn_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(VlmcError, match="not valid JSON"):
        document.read(tmp_path)


def test_unprintable_characters_do_not_reach_the_terminal_or_a_file(sample: dict[str, Any]) -> None:
    sample["variants"][0]["name"] = "red \x1b[31m\x00\ud800"
    name = document.parse(sample).variants[0].name
    assert name == "red \ufffd[31m\ufffd\ufffd"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


PLACES = places(SAMPLE)[1:]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["unavailable: odd", "", "| <b> \x1b", [], {}, [{}], {"a": 1}, 0, -1.0, 1e308]),
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PLACES), ODD)
def test_any_damaged_field_is_drawn_or_refused_but_never_crashes(place: tuple[Any, ...], odd: Any) -> None:
    damaged = copy.deepcopy(SAMPLE)
    target = damaged
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = odd
    try:
        report = document.parse(json.loads(json.dumps(damaged)))
    except VlmcError:
        return
    console = output()
    with console.capture():
        terminal.show(report, console)
    markdown.render(report).encode()
    spreadsheet.render(report).encode()
