from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from vlmc.artifact import Artifact, BuildSpec
from vlmc.files import write_json
from vlmc.profiles import variants as room
from vlmc.profiles.variants import variants
from vlmc.runtime import backends

from .conftest import add_build, add_engine


@pytest.fixture(autouse=True)
def everything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda name: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def names(artifact: Artifact, build: BuildSpec, **options: bool) -> list[str]:
    return [variant.name for variant in variants(artifact, build, **options).measured]


def test_float_and_quantised_engines_stand_beside_both_baselines(artifact: Artifact, build: BuildSpec) -> None:
    write_json(artifact.root / "plans" / "int8.json", {})
    assert names(artifact, build) == [
        "ONNX Runtime float",
        "ONNX Runtime int8",
        "PyTorch eager",
        "PyTorch fake-quant int8",
    ]
    assert names(artifact, build, baselines=False) == ["ONNX Runtime float", "ONNX Runtime int8"]


def test_what_a_recipe_leaves_alone_stays_float(artifact: Artifact, build: BuildSpec) -> None:
    quantised = variants(artifact, build).measured[1]
    assert quantised.engines == {
        "vision_encoder": "onnxruntime-int8",
        "embed_tokens": "onnxruntime-fp32",
        "decoder": "onnxruntime-int8",
    }
    assert quantised.arguments == {"device": "cpu", "engines": quantised.engines, "threads": 0}


def test_a_kept_mix_that_is_neither_is_measured_too(artifact: Artifact, build: BuildSpec) -> None:
    add_engine(artifact, "vision_encoder", "openvino", "int8")
    tried = {name: [*choice.candidates] for name, choice in build.choices.items()}
    tried["vision_encoder"].append("openvino-int8")
    kept = {"vision_encoder": "openvino-int8", "embed_tokens": "onnxruntime-fp32", "decoder": "onnxruntime-int8"}
    mixed = add_build(artifact, {name: (kept[name], tried[name]) for name in kept})
    found = {variant.name: variant.engines for variant in variants(artifact, mixed, baselines=False).measured}
    assert list(found) == [
        "ONNX Runtime float",
        "ONNX Runtime int8",
        "Mixed backends (int8)",
    ]  # OpenVINO has no decoder
    assert found["Mixed backends (int8)"] == kept


def test_a_float_build_has_no_quantised_variants(artifact: Artifact, build: BuildSpec) -> None:
    single = add_build(artifact, {name: ("onnxruntime-fp32", []) for name in build.choices}, recipe="fp32")
    assert names(artifact, single) == ["ONNX Runtime float", "PyTorch eager"]


def test_a_backend_that_cannot_run_here_is_skipped_with_its_reason(
    artifact: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda name: f"{name} is not installed")
    found = variants(artifact, build, baselines=False)
    assert found.measured == []
    assert found.skipped["ONNX Runtime int8"] == "onnxruntime is not installed"


def test_fake_quant_without_a_plan_and_baselines_without_torch_are_skipped_with_what_to_do(
    artifact: Artifact, build: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "vlmc calibrate" in variants(artifact, build).skipped["PyTorch fake-quant int8"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    skipped = variants(artifact, build).skipped
    assert "pip install vlm-compile[export]" in skipped[room.EAGER]


def test_another_build_of_an_engine_is_another_identity(artifact: Artifact, build: BuildSpec) -> None:
    before = variants(artifact, build, baselines=False).measured
    record = artifact.engine_folder("cpu", "decoder", "onnxruntime-int8") / "engine.json"
    record.write_text(record.read_text().replace("decoder onnxruntime-int8", "another key"))
    after = variants(artifact, build, baselines=False).measured
    assert before[0] == after[0]
    assert before[1].identity != after[1].identity


def test_another_plan_is_another_identity_of_what_computes_by_it(artifact: Artifact, build: BuildSpec) -> None:
    found = []
    for hashes in (["a"], ["b"]):
        write_json(artifact.root / "plans" / "int8.json", {"calibrated_on": {"pictures": hashes}})
        found.append({variant.name: variant.identity for variant in variants(artifact, build).measured})
    before, after = found
    assert [name for name in before if before[name] != after[name]] == ["PyTorch fake-quant int8"]


def test_engines_that_were_deleted_are_no_variant(artifact: Artifact, build: BuildSpec) -> None:
    shutil.rmtree(artifact.engine_folder("cpu", "decoder", "onnxruntime-int8"))
    assert names(artifact, build, baselines=False) == ["ONNX Runtime float", "ONNX Runtime int8"]
    shutil.rmtree(artifact.engine_folder("cpu", "decoder", "onnxruntime-fp32"))
    assert names(artifact, build, baselines=False) == []


@pytest.fixture
def on_gpu(artifact: Artifact) -> BuildSpec:
    """A build for the H100: TensorRT in float16 and int8, with the look-up of embeddings on NumPy."""
    for component in ("vision_encoder", "decoder"):
        for precision in ("fp16", "int8"):
            add_engine(artifact, component, "tensorrt", precision, "h100")
    add_engine(artifact, "embed_tokens", "numpy", "fp32", "h100")
    tried = ["tensorrt-fp16", "tensorrt-int8"]
    write_json(artifact.root / "plans" / "int8.json", {})
    choices = {"vision_encoder": (tried[0], tried), "embed_tokens": ("numpy-fp32", []), "decoder": (tried[1], tried)}
    return add_build(artifact, choices, device="h100")


def test_on_a_gpu_the_baselines_are_the_best_that_pytorch_does_there(artifact: Artifact, on_gpu: BuildSpec) -> None:
    found = {variant.name: variant for variant in variants(artifact, on_gpu, torch_python="/opt/torch/python").measured}
    assert list(found) == [
        "TensorRT float",
        "TensorRT int8",
        "TensorRT mixed (int8)",
        "PyTorch eager FP16",
        "PyTorch CUDA graph FP16",
        "torch.compile FP16",
        "PyTorch fake-quant int8",
    ]
    assert found["TensorRT int8"].engines["embed_tokens"] == "numpy-fp32"
    graph = found["PyTorch CUDA graph FP16"]
    assert graph.opener == "vlmc.calibration.cuda_baseline:open_session"
    assert graph.arguments == {"recipe": "fp32", "threads": 0, "mode": "graph"}
    assert {found[name].python for name in list(found)[:3]} == {""}
    assert {found[name].python for name in list(found)[3:]} == {"/opt/torch/python"}


def test_scales_that_tensorrt_found_itself_have_no_fake_quant_baseline(artifact: Artifact, build: BuildSpec) -> None:
    write_json(artifact.root / "plans" / "int8.json", {"samples": {"vision_encoder": {}}})
    assert "TensorRT found them" in variants(artifact, build).skipped["PyTorch fake-quant int8"]


def test_another_python_with_torch_needs_none_here(
    artifact: Artifact, on_gpu: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not variants(artifact, on_gpu, torch_python="/opt/torch/python").skipped
    assert len(variants(artifact, on_gpu).skipped) == 4


@pytest.fixture
def with_onnx_runtime(artifact: Artifact, on_gpu: BuildSpec) -> BuildSpec:
    """`on_gpu` with engines for ONNX Runtime's CUDA provider, which is not there under our own interpreter."""
    for component in ("vision_encoder", "decoder"):
        add_engine(artifact, component, "onnxruntime_gpu", "fp16", "h100")
    tried = ["tensorrt-fp16", "tensorrt-int8", "onnxruntime_gpu-fp16"]
    choices = {"vision_encoder": (tried[0], tried), "embed_tokens": ("numpy-fp32", []), "decoder": (tried[1], tried)}
    return add_build(artifact, choices, device="h100")


@pytest.fixture
def no_cuda_here(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"onnxruntime_gpu": "no CUDA provider"}
    monkeypatch.setattr(backends, "unavailable", lambda name: reasons.get(name, ""))


def interpreter(folder: Path, answer: str) -> str:
    """An interpreter whose onnxruntime has that to say of itself; it notes every time that it is asked."""
    patch = f"backends.unavailable = lambda name: {answer!r} if name == 'onnxruntime_gpu' else ''"
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(folder / 'asked')!r}, 'a').write('x')\n"
        f"from vlmc.runtime import backends\n{patch}\ncode = sys.argv[2]\nsys.argv[1:3] = []\nexec(code)\n"
    )
    path.chmod(0o755)
    return str(path)


def test_engines_whose_backend_another_python_has_run_under_that(
    artifact: Artifact, with_onnx_runtime: BuildSpec, no_cuda_here: None, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, "")
    found = variants(artifact, with_onnx_runtime, torch_python=python, baselines=False)
    assert {variant.name: variant.python for variant in found.measured} == {
        "TensorRT float": "",
        "TensorRT int8": "",
        "ONNX Runtime CUDA float": python,
        "TensorRT mixed (int8)": "",
    }
    assert found.skipped == {}
    variants(artifact, with_onnx_runtime, torch_python=python, baselines=False)
    assert (tmp_path / "asked").read_text() == "x"


def test_where_neither_python_has_the_backend_both_reasons_are_given(
    artifact: Artifact, with_onnx_runtime: BuildSpec, no_cuda_here: None, tmp_path: Path
) -> None:
    skipped = variants(artifact, with_onnx_runtime, baselines=False).skipped
    assert skipped == {"ONNX Runtime CUDA float": "no CUDA provider"}
    python = interpreter(tmp_path, "no driver")
    skipped = variants(artifact, with_onnx_runtime, torch_python=python, baselines=False).skipped
    assert skipped == {"ONNX Runtime CUDA float": f"no CUDA provider; under {python}: no driver"}


@pytest.mark.parametrize(("python", "says"), [("/no/such/python", "does not start"), ("/bin/false", "no message")])
def test_an_interpreter_that_cannot_be_asked_is_a_reason(
    python: str, says: str, artifact: Artifact, with_onnx_runtime: BuildSpec, no_cuda_here: None
) -> None:
    skipped = variants(artifact, with_onnx_runtime, torch_python=python, baselines=False).skipped
    assert says in skipped["ONNX Runtime CUDA float"]
