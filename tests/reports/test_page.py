import copy
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.errors import VlmcError
from vlmc.reports import page
from vlmc.reports.document import parse
from vlmc.reports.style import DARK, LIGHT

SAMPLE = json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8"))
EVIL = '<script>alert(1)</script><img src=x onerror="y">'


def render(report: dict[str, Any]) -> str:
    return page.render(parse(report))


class Outline(HTMLParser):
    """Tags with their attributes, the text that is shown, and whether every element is closed."""

    VOID = ("meta", "link", "img", "br", "wbr", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.shown = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.shown += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_well_formed(sample: dict[str, Any]) -> None:
    assert Outline(render(sample)).open == []


def test_nothing_is_loaded_from_anywhere(sample: dict[str, Any]) -> None:
    text = render(sample)
    assert re.findall(r"https?:|//[a-z]|@import|<script|<iframe|<base", text) == []
    outline = Outline(text)
    links = [
        v for _, attributes in outline.tags for key, v in attributes.items() if key in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert re.findall(r"url\((?!#)", text) == []
    assert any("default-src 'none'" in str(meta.get("content")) for meta in outline.all("meta"))


@pytest.mark.parametrize(
    "address", ["https://tracker.example/p.png", "javascript:alert(1)", 'data:image/png;base64,AA" onload="x', "x.png"]
)
def test_a_picture_that_is_not_embedded_is_not_shown(sample: dict[str, Any], address: str) -> None:
    for variant in sample["variants"]:
        for answer in variant["answers"]:
            answer["image_data"] = address
    outline = Outline(render(sample))
    assert outline.all("img") == []
    assert "unavailable: the report holds no picture of pictures/000.png" in outline.shown


def test_text_of_the_report_is_inert(sample: dict[str, Any]) -> None:
    before = {tag for tag, _ in Outline(render(sample)).tags}
    first, answers = sample["variants"][0], sample["variants"][0]["answers"]
    answers[0] |= {key: f"{EVIL} {key}" for key in ("answer", "gold", "prompt", "task")}
    first |= {"name": f"{EVIL} name", "tokens_per_s": f"{EVIL} reason"}
    sample["artifact"]["name"] = f"{EVIL} model"
    sample["machine"][f"{EVIL} key"] = f"{EVIL} value"
    sample["verdict"]["sentences"] = [f"{EVIL} sentence"]
    sample["verdict"]["choices"]["decoder"]["reason"] = f"{EVIL} choice"
    outline = Outline(render(sample))
    assert {tag for tag, _ in outline.tags} == before
    assert not any(key.startswith("on") for _, attributes in outline.tags for key in attributes)
    words = ["answer", "gold", "prompt", "task", "name", "reason", "model", "key", "value", "sentence", "choice"]
    assert [word for word in words if f"{EVIL} {word}" not in outline.shown] == []


def test_every_reason_in_the_report_is_there_in_words(sample: dict[str, Any], reasons: list[str]) -> None:
    shown = Outline(render(sample)).shown
    assert [reason for reason in reasons if reason not in shown] == []


def test_wherever_a_number_can_be_missing_its_reason_is_shown(sample: dict[str, Any]) -> None:
    count = 0

    def reason() -> str:
        nonlocal count
        count += 1
        return f"unavailable: reason {count}."

    for variant in sample["variants"]:
        for group in ("latency_ms", "memory", "energy"):
            variant[group] = {key: reason() for key in variant[group]}
        variant |= {key: reason() for key in ("tokens_per_s", "accuracy", "agreement", "products", "roofline")}
    for entry in sample["speedups"]:
        entry |= {key: reason() for key in ("vision", "prefill", "decode", "end_to_end")}
    sample["limits"], sample["power"] = reason(), reason()
    shown = Outline(render(sample)).shown
    assert [i for i in range(1, count + 1) if f"unavailable: reason {i}." not in shown] == []
    assert count > 90


def test_a_plot_that_cannot_be_drawn_says_why(sample: dict[str, Any]) -> None:
    shown = Outline(render(sample)).shown
    card = shown[shown.index("What energy does a picture cost?") : shown.index("What does speed cost in accuracy?")]
    assert "All variants: unavailable: this machine exposes no RAPL counter" in card


def test_right_and_wrong_are_told_in_words_too(sample: dict[str, Any]) -> None:
    text = render(sample)
    for kind, mark in {"wrong": "✗", "right": "✓"}.items():
        assert re.search(
            rf'class="{kind}">\s*<span class="mark" aria-hidden="true">{mark}</span>[^✗✓]* {kind}</span>', text
        )
    assert "80 % of the facts" in text


def test_answers_that_differ_stand_side_by_side_with_their_variants(sample: dict[str, Any]) -> None:
    shown = " ".join(Outline(render(sample)).shown.split())
    assert "gold clear ✓ clear right PyTorch eager ONNX Runtime float ✗ It is <b>snowy</b> & dark wrong" in shown


def test_the_page_can_be_read_without_seeing_it(sample: dict[str, Any]) -> None:
    outline = Outline(render(sample))
    assert outline.all("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in outline.all("img"))
    assert all(head.get("scope") in ("col", "row") for head in outline.all("th"))
    labels = [attributes.get("aria-label") for _, attributes in outline.tags if attributes.get("role") == "img"]
    assert any("ONNX Runtime int8: 231" in str(label) for label in labels)
    assert [tag for tag, _ in outline.tags if tag == "h1"] == ["h1"]


def test_beside_the_first_token_stands_within_what_99_of_100_come(sample: dict[str, Any]) -> None:
    kept = next(variant for variant in sample["variants"] if variant["name"] == "ONNX Runtime int8")
    kept["latency_ms"]["time_to_first_token"] |= {"median": 18.1, "p90": 18.6, "p99": 42.5, "max": 50.0}
    assert ("first token", "18.1 ms", "99 % within 42.5 ms") in page.key_figures(parse(sample))


def test_a_key_figure_claims_no_more_than_every_turn_shows(sample: dict[str, Any]) -> None:
    pair = ("ONNX Runtime int8", "PyTorch eager")
    entry = next(one for one in sample["speedups"] if (one["of"], one["over"]) == pair)
    apart, level = {"low": 3.2, "high": 128.1}, {"low": 0.9, "high": 1.3}
    entry |= {"vision": 90.0, "decode": 1.1, "ranges": {"vision": apart, "decode": level}}
    notes = {figure.name: figure.note for figure in page.key_figures(parse(sample))}
    assert (notes["vision"], notes["tokens/s"]) == ("at least 3.20× as fast", "no clear difference")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrasts_meet_wcag_aa(palette: dict[str, str]) -> None:
    texts = [("ink", "paper"), ("ink", "ground"), ("ink", "wash"), ("muted", "paper"), ("muted", "ground")]
    texts += [("paper", "accent"), ("accent", "paper"), ("wrong", "paper"), ("dark_text", "part1")]
    texts += [("dark_text", "part2"), ("light_text", "part3"), ("light_text", "part4")]
    assert {pair: c for pair in texts if (c := contrast(palette[pair[0]], palette[pair[1]])) < 4.5} == {}
    drawn = ["baseline", "float", "int8", "other1", "other2", "other3", "other4"]
    assert {name: c for name in drawn if (c := contrast(palette[name], palette["paper"])) < 3} == {}


def test_the_palettes_have_the_same_names_and_no_colour_twice() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_random_weights_stand_above_all(sample: dict[str, Any]) -> None:
    sample["artifact"]["random_weights"] = True
    shown = Outline(render(sample)).shown
    assert shown.index("Random weights") < shown.index("is kept")


def test_many_pictures_with_one_question_each_are_folded(sample: dict[str, Any]) -> None:
    answer = sample["variants"][0]["answers"][0]
    for variant in sample["variants"]:
        variant["answers"] = [answer | {"image": f"{i}.png"} for i in range(20)]
    text = render(sample)
    assert text.count('class="picture"') == 20
    assert "8 more pictures" in text


def test_a_very_long_answer_is_cut_and_says_so(sample: dict[str, Any]) -> None:
    sample["variants"][0]["answers"][0]["answer"] = "sho " * 200
    shown = Outline(render(sample)).shown
    assert "… (800 characters)" in shown
    assert shown.count("sho ") <= 60


def test_a_bare_report_has_a_page_too(bare: dict[str, Any]) -> None:
    shown = Outline(render(bare)).shown
    assert "unavailable: not in the report" in shown
    assert "unavailable: the report holds no answers" in shown


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


NUMBERS = [
    place
    for place in places({key: SAMPLE[key] for key in ("speedups", "limits")})
    + [("variants", i, *place) for i in (0, 3) for place in places({**SAMPLE["variants"][i], "answers": []})]
    if len(place) > 1
]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(NUMBERS), st.sampled_from([0, 0.0, -1, -2.5, 1e-300, 1e300, 10**15, "", "odd", {}, [], None]))
def test_any_odd_number_is_drawn_or_refused_but_never_crashes(place: tuple[Any, ...], odd: Any) -> None:
    report = copy.deepcopy(SAMPLE)
    target = report
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = odd
    try:
        text = render(report)
    except VlmcError:
        return
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", html.unescape(Outline(text).shown).lower())
