from typing import Any

import pytest
from vlmc.artifact import ASKED_MEANS
from vlmc.profiles.verdict import PASSED
from vlmc.reports import plots, tables
from vlmc.reports.document import parse


def column(table: tables.Table, title: str) -> list[str]:
    return [row[table.columns.index(title)] for row in table.rows]


def test_every_row_has_a_cell_for_every_column(sample: dict[str, Any]) -> None:
    report = parse(sample)
    made = [tables.headline(report), tables.speedups(report), tables.accuracy(report), tables.times(report)]
    made += [tables.footprint(report), tables.rooflines(report)]
    made += [tables.candidates(report, name) for name in ("vision_encoder", "decoder")]
    for table in made:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_the_headlines_speedup_is_the_ratio_of_end_to_end_medians(sample: dict[str, Any]) -> None:
    assert column(tables.headline(parse(sample)), "speed-up") == ["1", "0.23×", "2.12×", "3.48×", "3.79×"]
    sample["variants"][2]["latency_ms"]["end_to_end"] = "unavailable: it was interrupted"
    table = tables.headline(parse(sample))
    assert column(table, "speed-up")[2] == "n/a [2]"
    assert table.notes[1] == "unavailable: it was interrupted"


@pytest.mark.parametrize(("share", "passed"), [(2.97, True), (0.97, False)])
def test_a_share_above_the_limit_is_explained_whosever_it_is(
    sample: dict[str, Any], share: float, passed: bool
) -> None:
    sample["variants"][2]["roofline"]["vision_encoder"]["share"] = share
    report = parse(sample)
    assert (PASSED in tables.rooflines(report).title) == passed
    assert (PASSED in plots.limits(report).caption) == passed


def test_a_reason_is_noted_once_and_a_true_0_is_a_number(sample: dict[str, Any]) -> None:
    for variant in sample["variants"][:2]:
        variant["energy"]["joules_per_image"] = 0.0
    table = tables.headline(parse(sample))
    assert column(table, "J/picture") == ["0", "0", "n/a [1]", "n/a [1]", "n/a [1]"]
    assert len(table.notes) == 1


def test_products_that_were_only_asked_for_are_marked_and_the_note_stands_once(sample: dict[str, Any]) -> None:
    for variant in sample["variants"][2:]:
        variant["products"] = {"decoder": {"int8 (asked)": 9, "float16": 1, "float16 attention (asked)": 2}}
    table = tables.footprint(parse(sample))
    mark = f"[{table.notes.index(ASKED_MEANS) + 1}]"
    assert column(table, "matrix products")[-1] == f"decoder: 9 int8 {mark}, 1 float16, 2 float16 attention {mark}"
    assert table.notes.count(ASKED_MEANS) == 1


def test_only_the_kept_variants_rows_are_marked(sample: dict[str, Any]) -> None:
    for table in (tables.headline(parse(sample)), tables.rooflines(parse(sample)), tables.times(parse(sample))):
        assert {table.rows[row][0] for row in table.kept} == {"ONNX Runtime int8"}


def test_a_candidate_that_was_not_tried_gives_its_reason(sample: dict[str, Any]) -> None:
    table = tables.candidates(parse(sample), "vision_encoder")
    assert column(table, "ms") == ["22.8", "10.4", "n/a [1]"]
    assert column(table, "cosine with PyTorch") == ["1.00000", "0.99910", "n/a [1]"]
    assert table.notes == ["unavailable: openvino is not installed"]
    assert [table.rows[row][0] for row in table.kept] == ["onnxruntime-int8"]


def test_a_candidate_without_numbers_was_not_tried(sample: dict[str, Any]) -> None:
    sample["verdict"]["choices"]["vision_encoder"]["candidates"]["openvino-int8"] = {}
    assert tables.candidates(parse(sample), "vision_encoder").notes == [
        "unavailable: not tried on this machine, as said above"
    ]


def test_memory_is_the_gpus_where_every_variant_used_one(sample: dict[str, Any]) -> None:
    for variant in sample["variants"]:
        variant["memory"]["peak_device_bytes"] = 7e8
    table = tables.headline(parse(sample))
    assert set(column(table, "GPU memory")) == {"700 MB"} and "peak memory of the GPU" in table.title
    sample["variants"][0]["memory"]["peak_device_bytes"] = "unavailable: it runs on the CPU"
    assert "memory" in tables.headline(parse(sample)).columns


def test_a_task_that_one_variant_lacks_is_not_scored_0(sample: dict[str, Any]) -> None:
    del sample["variants"][0]["accuracy"]["tasks"]["attributes"]
    sample["variants"][1]["accuracy"] = "unavailable: random weights"
    assert column(tables.accuracy(parse(sample)), "Attributes")[:3] == ["n/a [1]", "n/a [2]", "96.0 (90.2–98.4)"]


def test_a_component_without_a_choice_has_no_candidates(sample: dict[str, Any]) -> None:
    assert tables.candidates(parse(sample), "embed_tokens").rows == []


@pytest.mark.parametrize(
    ("bound", "in_cache", "text"),
    [
        ("compute", False, "arithmetic"),
        ("memory", True, "cache bandwidth"),
        ("memory", False, "memory bandwidth"),
    ],
)
def test_what_bounds_a_component_is_said(sample: dict[str, Any], bound: str, in_cache: bool, text: str) -> None:
    sample["variants"][2]["roofline"]["decoder_step"].update(bound=bound, in_cache=in_cache)
    rows = tables.rooflines(parse(sample)).rows
    assert next(row for row in rows if row[:2] == ["ONNX Runtime float", "decoder, a step"])[5] == text
