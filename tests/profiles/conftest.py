"""A small artefact on disk, and sessions that answer without a model: nothing here needs an engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from PIL import Image
from vlmc.artifact import (
    COMPONENTS,
    Artifact,
    BuildReport,
    BuildSpec,
    Choice,
    ComponentSpec,
    EngineSpec,
    KvSpec,
    Manifest,
    PromptSpec,
    Source,
)
from vlmc.files import write_json
from vlmc.records import SCHEMA, describe_files, write_record

PREPROCESSING = {
    "kind": "clip",
    "shortest_edge": 4,
    "tile": 4,
    "pad": False,
    "resample": 2,
    "rescale_factor": 1.0,
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "image_seq_len": 1,
    "image_token": "<image>",
}

SESSIONS = '''
import os, signal
from types import SimpleNamespace


class Session:
    """Every part takes a fixed time on its clock; the answer to every question is "two dogs"."""

    def __init__(self, step, fault):
        self.step, self.fault = step, fault
        self.timings = SimpleNamespace(preprocess=0.001, vision=0.01, prefill=0.004, decode=[], tokens=0)

    def prepare(self, images, text):
        assert images[0].size == (4, 4)
        return SimpleNamespace(input_ids=[1, 2, 3])

    def generate(self, inputs, max_new_tokens=128, ignore_eos=False):
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "raises":
            raise RuntimeError("the engine fell over")
        count = max_new_tokens if ignore_eos else 2
        self.timings.decode = [self.step] * (count - 1)
        self.timings.tokens = count
        yield from range(7, 7 + count)

    def answer(self, images, text, max_new_tokens=128):
        self.timings.tokens = 2
        yield from ("two ", "dogs")


def open_session(artifact, step=0.002, fault="", threads=0):
    print("a library that prints to stdout")
    if fault == "refuses":
        from vlmc.errors import VlmcError

        raise VlmcError("The engine was altered")
    return Session(step, fault)
'''


@pytest.fixture
def sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module:function that opens a fake session, importable here and in workers."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_sessions.py").write_text(SESSIONS)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(folder))
    return "fake_sessions:open_session"


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """Two golden cases, whose tokens the fake session meets in the first and not in the second."""
    root = tmp_path / "artefact"
    (root / "golden").mkdir(parents=True)
    for name in ("00", "01"):
        Image.new("RGB", (4, 4), "red").save(root / f"golden/{name}.png")
    cases = [
        {"image": "golden/00.png", "prompt": "What?", "task": "scene_context", "tokens": [7, 8]},
        {"image": "golden/01.png", "prompt": "How many?", "task": "objects_and_counts", "tokens": [7, 9]},
    ]
    write_json(root / "golden/golden.json", {"cases": cases})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<image>": 0, "word": 1}, unk_token="word"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(root / "tokenizer.json"))
    manifest = Manifest(
        schema=SCHEMA,
        name="fake",
        family="fake",
        source=Source("folder", "/nowhere", "0" * 64),
        components={name: ComponentSpec(f"onnx/{name}.onnx", (), (), 10) for name in COMPONENTS},
        kv=KvSpec(1, 1, 1, 16),
        hidden_size=1,
        vocab_size=16,
        preprocessing=PREPROCESSING,
        prompt=PromptSpec("{image}{text}", "{text}", "<image>", (0,)),
        parity=(),
        files=describe_files(root),
        versions={},
        created="2026-11-21",
    )
    write_record(root / "manifest.json", manifest)
    return Artifact(root)


def add_engine(artifact: Artifact, component: str, backend: str, precision: str, device: str = "cpu") -> str:
    """An engine's record without an engine."""
    work = {"flops": 2e9, "weight_bytes": 1e6, "io_bytes": 0.0}
    if component == "decoder":
        work = {"prefill_flops": 1e9, "decode_flops": 1e7, "weight_bytes": 1e6, "decode_kv_bytes": 0.0}
    engine = f"{backend}-{precision}"
    report = BuildReport(1.0, 5_000_000, 1_000_000, {"int8" if precision == "int8" else "float32": 4}, work=work)
    spec = EngineSpec(
        schema=SCHEMA,
        component=component,
        backend=backend,
        precision=precision,
        device=device,
        file="model.onnx",
        key=f"{component} {engine}",
        source_sha256=artifact.manifest.source.sha256,
        inputs=(),
        outputs=(),
        files={},
        report=report,
        versions={},
    )
    folder = artifact.engine_folder(device, component, engine)
    folder.mkdir(parents=True)
    write_record(folder / "engine.json", spec)
    return engine


def add_build(
    artifact: Artifact, choices: dict[str, tuple[str, list[str]]], recipe: str = "int8", device: str = "cpu"
) -> BuildSpec:
    """A build with, for each component, the kept engine and all that were tried."""
    build = BuildSpec(
        schema=SCHEMA,
        device=device,
        recipe=recipe,
        choices={name: Choice(kept, "it won", {one: {} for one in tried}) for name, (kept, tried) in choices.items()},
        seconds=1.0,
        created=f"2026-11-21T00:00:0{len(artifact.builds())}",
    )
    write_record(artifact.root / "engines" / device / f"{recipe}.json", build)
    return build


@pytest.fixture
def build(artifact: Artifact) -> BuildSpec:
    """ONNX Runtime in float and int8, of which int8 was kept where there is any."""
    tried = {
        name: [add_engine(artifact, name, "onnxruntime", precision) for precision in precisions]
        for name, precisions in {
            "vision_encoder": ("fp32", "int8"),
            "embed_tokens": ("fp32",),
            "decoder": ("fp32", "int8"),
        }.items()
    }
    return add_build(artifact, {name: (engines[-1], engines) for name, engines in tried.items()})


@pytest.fixture
def question_set(tmp_path: Path) -> Path:
    """Two pictures, a short question and a caption about each."""
    rows = []
    for name, gold in (("a", "two dogs"), ("b", "a cat")):
        Image.new("RGB", (4, 4), "blue").save(tmp_path / f"{name}.png")
        rows.append({"image": f"{name}.png", "prompt": "What?", "answer": gold, "task": "attributes"})
        caption = {"answer": gold, "task": "caption_brief", "facts": ["two dogs", "grass"]}
        rows.append({"image": f"{name}.png", "prompt": "Describe.", **caption})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
