import re
from typing import Any
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from vlmc.reports import plots
from vlmc.reports.document import parse


def drawn(report: dict[str, Any]) -> dict[str, plots.Plot]:
    return {plot.name: plot for plot in plots.draw(parse(report))}


def test_every_plot_shows_every_variant_with_its_value(sample: dict[str, Any]) -> None:
    found = drawn(sample)
    for name, value in {"latency": "68.7 ms", "rate": "231", "memory": "13.9 MB on disk", "limits": "21 %"}.items():
        assert value in found[name].svg
    for variant in sample["variants"]:
        for name in ("latency", "rate", "memory", "accuracy"):
            assert variant["name"] in found[name].svg


def test_what_is_drawn_is_also_told_in_words(sample: dict[str, Any]) -> None:
    found = drawn(sample)
    assert "ONNX Runtime int8: 231" in found["rate"].told
    assert "ONNX Runtime int8: 94.5 (92.2–96.2) % right, 68.7 ms" in found["accuracy"].told
    assert "ONNX Runtime int8, decoder, a step: 21 % of the limit" in found["limits"].told


def test_the_rest_of_an_answer_is_never_less_than_nothing(sample: dict[str, Any]) -> None:
    sample["variants"][3]["latency_ms"]["end_to_end"]["median"] = 20.0  # medians need not add up
    told = "ONNX Runtime int8: 21.1 ms (preprocessing 3.00, vision 10.4, prefill 7.70, decoding 0)"
    assert told in drawn(sample)["latency"].told


def test_without_a_meter_energy_is_not_drawn_but_explained(sample: dict[str, Any]) -> None:
    energy = drawn(sample)["energy"]
    assert energy.svg == ""
    (reason,) = energy.reasons
    assert reason.startswith("unavailable: this machine exposes no RAPL counter")
    assert len(energy.reasons[reason]) == len(sample["variants"])


def test_with_a_meter_energy_is_drawn_and_what_lacks_is_named(sample: dict[str, Any]) -> None:
    sample["variants"][3]["energy"]["joules_per_image"] = 0.42
    energy = drawn(sample)["energy"]
    assert "0.420 J" in energy.svg
    assert energy.svg.count("n/a") == 4


def test_a_bare_report_draws_nothing_and_says_why(bare: dict[str, Any]) -> None:
    for plot in drawn(bare).values():
        assert plot.svg == ""
        assert plot.reasons


def test_the_svgs_are_well_formed_and_share_no_ids(sample: dict[str, Any]) -> None:
    sample["variants"][0]["name"] = 'a <b> & "c"'
    ids: list[str] = []
    for plot in drawn(sample).values():
        if plot.svg:
            tree = ElementTree.fromstring(plot.svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
            ids += [found for node in tree.iter() if (found := node.get("id"))]
            referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg))
            assert referred <= set(ids)
    assert len(set(ids)) == len(ids)


def test_a_name_is_no_formula(sample: dict[str, Any]) -> None:
    sample["variants"][0]["name"] = "$x^2$ <b>"
    assert ">$x^2$ &lt;b&gt;</text>" in drawn(sample)["rate"].svg


def test_the_same_report_gives_the_same_drawing(sample: dict[str, Any]) -> None:
    assert drawn(sample) == drawn(sample)


def test_colours_follow_the_theme(sample: dict[str, Any]) -> None:
    svg = drawn(sample)["rate"].svg
    assert "var(--int8)" in svg
    assert "var(--ink)" in svg
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []


def test_text_stays_text(sample: dict[str, Any]) -> None:
    assert ">ONNX Runtime int8 (kept)</text>" in drawn(sample)["rate"].svg


POINTS = st.dictionaries(st.text(max_size=3), st.tuples(st.floats(1, 9), st.floats(0, 1)), min_size=1, max_size=8)


@given(POINTS)
def test_the_frontier_is_what_nothing_beats(points: dict[str, tuple[float, float]]) -> None:
    best = plots.frontier(points)
    assert best
    for name, (ms, right) in points.items():
        better = [other for other in points.values() if other[0] <= ms and other[1] >= right and other != (ms, right)]
        assert (name in best) == (not better)
    fastest = min(points.values(), key=lambda point: (point[0], -point[1]))
    assert fastest in [points[name] for name in best]
