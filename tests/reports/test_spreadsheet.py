import csv
import io
from typing import Any

import pytest
from vlmc.reports.document import parse
from vlmc.reports.spreadsheet import COLUMNS, render


def rows(report: dict[str, Any]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(render(parse(report)))))


def test_every_statistic_comes_back_as_it_was(sample: dict[str, Any]) -> None:
    back = {(r["variant"], r["metric"], r["statistic"]): r for r in rows(sample)}
    for variant in sample["variants"]:
        for time, statistics in variant["latency_ms"].items():
            for name, value in statistics.items():
                row = back[variant["name"], f"latency.{time}", name]
                assert float(row["value"]) == value
                assert row["unit"] == ("" if name == "count" else "ms")
        for key in ("value", "low", "high", "score", "total"):
            row = back[variant["name"], "accuracy.attributes", key]
            assert float(row["value"]) == variant["accuracy"]["tasks"]["attributes"][key]
        assert float(back[variant["name"], "memory.disk_bytes", "value"]["value"]) == variant["memory"]["disk_bytes"]


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t"])
def test_a_name_is_no_formula(first: str, sample: dict[str, Any]) -> None:
    name = f'{first}HYPERLINK("https://example.com")'
    sample["artifact"]["name"] = name
    assert {row["model"] for row in rows(sample)} == {f"'{name}"}


def test_each_line_is_whole_and_each_key_occurs_once(sample: dict[str, Any]) -> None:
    table = list(csv.reader(io.StringIO(render(parse(sample)))))
    assert tuple(table[0]) == COLUMNS
    assert {len(line) for line in table} == {len(COLUMNS)}
    keys = [tuple(line[3:8]) for line in table[1:]]
    assert len(set(keys)) == len(keys)


def test_a_missing_number_is_an_empty_value_with_its_reason(sample: dict[str, Any]) -> None:
    missing = [row for row in rows(sample) if row["metric"] == "energy.joules_per_image"]
    assert {(row["value"], row["unit"], row["note"][:12]) for row in missing} == {("", "J", "unavailable:")}


def test_every_reason_of_a_variant_is_kept(sample: dict[str, Any]) -> None:
    notes = {row["note"] for row in rows(sample)}
    for reason in ("no memory of its own", "nothing is built", "no RAPL counter", "no graph whose operations"):
        assert any(reason in note for note in notes)


def test_names_with_commas_quotes_and_newlines_survive(sample: dict[str, Any]) -> None:
    sample["variants"][0]["name"] = 'a,"b"\nc'
    assert rows(sample)[0]["variant"] == 'a,"b"\nc'


def test_random_weights_stand_on_every_line(sample: dict[str, Any]) -> None:
    assert {row["weights"] for row in rows(sample)} == {"trained"}
    sample["artifact"]["random_weights"] = True
    assert {row["weights"] for row in rows(sample)} == {"random"}


def test_a_bare_report_has_lines_with_reasons_only(bare: dict[str, Any]) -> None:
    assert {row["value"] for row in rows(bare)} == {""}
    assert {row["note"] for row in rows(bare)} == {"unavailable: not in the report"}
