"""`vlmc profile` of a model that matches, with encoders that need no engine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from vlmc.artifact import COMPONENTS, Artifact, BuildSpec
from vlmc.errors import VlmcError
from vlmc.profiles import experiment, limits, samples
from vlmc.profiles.command import profile
from vlmc.profiles.matching import labels_of, read_labels
from vlmc.profiles.variants import Variant, Variants
from vlmc.profiles.worker import MatchWorker, Worker, open_worker
from vlmc.records import describe_files
from vlmc.reports import document, page, spreadsheet, tables

from .conftest import add_build, add_engine
from .test_command import RATES

MATCHERS = '''
from types import SimpleNamespace
import numpy as np
from vlmc.runtime.matching import Matches

AXES = ("red", "green", "blue")


class Matcher:
    """A picture's features are its colour, a text's the colour that it names; every part takes a fixed time."""

    def __init__(self, artifact, step):
        self.artifact = artifact
        self.timings = SimpleNamespace(preprocess=0.001, vision=step, text=0.004)

    def match(self, images, texts):
        return Matches(self.image_features(images) @ self.text_features(texts).T, 1.0)

    def image_features(self, images):
        return np.array([np.asarray(image.convert("RGB"))[0, 0] / 255 for image in images], np.float32)

    def text_features(self, texts):
        return np.array([[axis in text for axis in AXES] for text in texts], np.float32)


def open_matcher(artifact, step=0.002, threads=0):
    return Matcher(artifact, step)
'''


@pytest.fixture
def matchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "modules"
    folder.mkdir(exist_ok=True)
    (folder / "fake_matchers.py").write_text(MATCHERS)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(folder))
    return "fake_matchers:open_matcher"


@pytest.fixture
def matching(artifact: Artifact) -> Artifact:
    """Two golden pictures, red ones; PyTorch found the first prompt nearest to the first, the second to the second."""
    root = artifact.root
    golden = json.loads((root / "golden/golden.json").read_text())
    for case, prompt in zip(golden["cases"], ("a red one", "a green one"), strict=True):
        case["prompt"] = prompt
    (root / "golden/golden.json").write_text(json.dumps(golden))
    np.savez(root / "golden/golden.npz", cosines=np.eye(2, dtype=np.float32))
    manifest = json.loads((root / "manifest.json").read_text())
    spec = manifest["components"].pop("vision_encoder")
    manifest["components"] = {"vision_encoder": spec, "text_encoder": spec}
    manifest["matching"] = {"logit_scale": 1.0, "text_length": 9}
    manifest["matching"] |= {"begin_token_ids": [], "end_token_ids": [], "pad_token_id": 0}
    manifest["files"] = {name: vars(spec) for name, spec in describe_files(root).items()}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return Artifact(root)


@pytest.fixture
def label_set(tmp_path: Path) -> Path:
    """Four pictures; the third is not of the colour that it is said to have."""
    rows = []
    for name, colour, label in (
        ("a", "red", "something red"),
        ("b", (0, 255, 0), "something green"),
        ("c", "red", "something blue"),
    ):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
        rows.append({"image": f"{name}.png", "label": label})
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "d.png")
    rows.append({"image": "d.png", "labels": ["something nice", "something blue"]})
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def job(matching: Artifact, matchers: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "artifact": str(matching.root),
        "python": "",
        "opener": matchers,
        "arguments": {},
        "samples": str(tmp_path / "samples.jsonl"),
        "tokens": 4,
        "answer_tokens": 8,
        "labels": ["something red", "something blue"],
        "power_source": "unavailable: none",
        "power_rails": [],
        "device_memory": "none",
    }


def test_the_worker_is_chosen_by_what_the_model_does(job: dict[str, Any]) -> None:
    assert isinstance(open_worker(job), MatchWorker)


def test_the_other_worker_is_for_models_that_answer(artifact: Artifact, sessions: str, job: dict[str, Any]) -> None:
    manifest = json.loads((artifact.root / "manifest.json").read_text()) | {"matching": None}
    manifest["components"] |= dict.fromkeys(COMPONENTS, manifest["components"]["vision_encoder"])
    (artifact.root / "manifest.json").write_text(json.dumps(manifest))
    assert type(open_worker(job | {"opener": sessions})) is Worker


def test_a_run_is_one_picture_with_its_prompt(job: dict[str, Any]) -> None:
    worker = open_worker(job)
    found = worker.run(3)
    assert (found["case"], found["vision_s"], found["text_s"]) == (1, 0.002, 0.004)
    assert found["wall_s"] > 0


def test_agreement_is_the_choice_among_the_golden_prompts(job: dict[str, Any]) -> None:
    assert list(open_worker(job).agree([0, 1])) == ["agreement"] * 2
    rows = samples.of_kind(samples.read(Path(job["samples"])), "agreement")
    assert [(row["tokens"], row["golden"]) for row in rows] == [([0], [0]), ([0], [1])]


def test_a_picture_of_the_set_is_matched_with_all_labels(job: dict[str, Any], label_set: Path) -> None:
    row = {"row": 0, "file": str(label_set.parent / "d.png"), "facts": ["something blue"]}
    assert list(open_worker(job).evaluate([row])) == ["answer"]
    (found,) = samples.of_kind(samples.read(Path(job["samples"])), "answer")
    assert (found["answer"], found["cosines"]) == ("something blue", [0.0, 1.0])


def test_a_set_of_labels_is_read(label_set: Path) -> None:
    found = read_labels(label_set, 9)
    assert [question.facts for question in found][2:] == [("something blue",), ("something nice", "something blue")]
    assert labels_of(found) == ("something red", "something green", "something blue", "something nice")
    assert len(read_labels(label_set, 2)) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"bad\.jsonl, line 1 is not valid JSON"),
        ('{"image": "a.png"}', "line 1 lacks 'label'"),
        ('{"image": "a.png", "label": 1}', "line 1 has no text in 'label'"),
        ('{"image": "a.png", "labels": []}', "line 1 has no list of texts in 'labels'"),
        ('{"image": "a.png", "labels": "xy"}', "line 1 has no list of texts in 'labels'"),
        ('{"image": "gone.png", "label": "x"}', "picture that is not there"),
        ('{"image": "a.png", "label": "x"}', "fewer than 2 labels"),
        ("", "fewer than 2 labels"),
    ],
)
def test_a_bad_set_is_one_sentence(text: str, says: str, label_set: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(VlmcError, match=says):
        read_labels(tmp_path / "bad.jsonl", 9)


def test_a_set_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="There is no evaluation set"):
        read_labels(tmp_path / "none.jsonl", 9)


@pytest.fixture
def built(matching: Artifact) -> BuildSpec:
    """ONNX Runtime in float and int8, int8 kept."""
    tried = {
        name: [add_engine(matching, name, "onnxruntime", precision) for precision in ("fp32", "int8")]
        for name in ("vision_encoder", "text_encoder")
    }
    return add_build(matching, {name: (engines[-1], engines) for name, engines in tried.items()})


@pytest.fixture
def measurable(matching: Artifact, built: BuildSpec, matchers: str, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    engines = {name: choice.engine for name, choice in built.choices.items()}
    plain = dict.fromkeys(engines, "onnxruntime-fp32")
    found = [
        Variant("Float", "engine", matchers, {"step": 0.004}, plain, "fp32"),
        Variant("Int8", "engine", matchers, {"step": 0.002}, engines, "int8"),
    ]
    monkeypatch.setattr(experiment, "variants", lambda *_: Variants(found, {"PyTorch eager": "no torch"}))
    monkeypatch.setattr(limits, "measure", lambda threads: RATES)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return matching


def test_profile_measures_reports_and_judges(measurable: Artifact, label_set: Path) -> None:
    done = CliRunner().invoke(
        profile, [str(measurable.root), "--runs", "4", "--set", str(label_set)], catch_exceptions=False
    )
    assert done.exit_code == 0
    told = " ".join(done.stdout.split())
    assert "Int8 matches a picture with a text in" in told
    assert "2 ms of them for the picture and 4 ms for the text" in told
    assert "times as fast: vision 2.00, text 1.00." in told
    assert "PyTorch eager was not measured: no torch." in told
    report = document.read(measurable.root / "profile" / "cpu")
    assert report.kept is not None and report.kept.name == "Int8"
    assert report.kept.agreement == document.Agreement(2, 1, (None, 0))
    accuracy = report.kept.accuracy
    assert not isinstance(accuracy, str)
    assert {name: (entry.score, entry.total) for name, entry in accuracy.tasks.items()} == {
        "zero_shot": (3, 4),
        "recall_at_1": (3, 4),  # nothing is known of "something nice", and the first picture is as near as any
    }
    assert [answer.right for answer in report.kept.answers] == [True, True, False, True]


def test_a_label_that_cannot_be_read_is_named_before_anything_is_measured(
    measurable: Artifact, label_set: Path
) -> None:
    with label_set.open("a") as file:
        file.write('{"image": "a.png", "label": "\\ud800"}\n')
    command = [str(measurable.root), "--set", str(label_set)]
    with pytest.raises(VlmcError, match=r"labels\.jsonl, line 5: The prompt is not valid Unicode text"):
        CliRunner().invoke(profile, command, catch_exceptions=False, standalone_mode=False)
    assert not (measurable.root / "profile").exists()


def test_what_it_does_not_do_is_in_no_table(measurable: Artifact) -> None:
    done = CliRunner().invoke(profile, [str(measurable.root), "--runs", "2", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["variants"][0]["accuracy"].startswith("unavailable: no evaluation set")
    report = document.read(measurable.root / "profile" / "cpu")
    drawn = [tables.headline(report), tables.speedups(report), tables.times(report), tables.footprint(report)]
    words = " ".join(cell for table in drawn for row in [table.columns, *table.rows] for cell in row)
    assert "pairs/s" in words and "J/pair" in words
    assert not [word for word in ("token", "prefill", "decode", "J/picture") if word in words]
    csv = spreadsheet.render(report)
    assert "pairs_per_s,median," in csv and "latency.text,median,4.0,ms" in csv and "speedup.text," in csv
    assert "token" not in csv and "prefill" not in csv
    html = page.render(report)
    assert "How many pairs in a second?" in html and "first token" not in html
