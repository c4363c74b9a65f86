"""What the tests of every family share: small tokenizers and weights, and the comparison with a reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from vlmc.artifact import Artifact
from vlmc.calibration import cuda_baseline
from vlmc.engines import builders, tensorrt_profiles
from vlmc.engines.builders import tensorrt
from vlmc.engines.trial import cosine
from vlmc.exporter import checkpoint, golden, onnx_ops, parity
from vlmc.exporter.export import Options, export
from vlmc.profiles.device import load_device
from vlmc.runtime import tensorrt_engine
from vlmc.runtime.backends.tensorrt import TensorrtRunner
from vlmc.runtime.session import Session
from vlmc.runtime.tensorrt_engine import Engine

from ...runtime.backends.fake_tensorrt import FakeEngine, FakeGpu, Made, fake_trt, spec
from . import support

TEXT = "A chat between a user and an assistant. USER: How many red boats are on the water? ASSISTANT: two red boats"
QUESTION = "How many {red} boats are on the water? 42 €"


class Reference(Protocol):
    """A whole model without a cache, not vlmc's."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, height, width) → (tiles, tokens, hidden)."""

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """(1, length) → (length, vocabulary)."""


@pytest.fixture(scope="session")
def make_picture() -> Callable[[int, int], Image.Image]:
    """make_picture(width, height): noise, always the same for a size."""

    def make(width: int, height: int) -> Image.Image:
        noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    return make


@pytest.fixture(scope="session")
def vocabulary() -> Callable[..., tuple[dict[str, int], list[tuple[str, str]]]]:
    """vocabulary(special, text=""): a small BPE with ▁ for a space and <0x00> … <0xFF> for bytes, as SentencePiece
    makes them: its tokens and merges, the special tokens first."""

    def train(special: list[str], text: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
        bpe = Tokenizer(models.BPE(byte_fallback=True))
        bpe.pre_tokenizer = pre_tokenizers.Metaspace()
        first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        bpe.train_from_iterator(
            [TEXT, text] * 9,
            trainers.BpeTrainer(vocab_size=400 + 2 * len(text), special_tokens=first, show_progress=False),
        )
        model = json.loads(bpe.to_str())["model"]
        return model["vocab"], [tuple(merge) for merge in model["merges"]]

    return train


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module, int], None]:
    """randomise(model, seed): weights larger than fresh ones, so that attention is not flat and greedy choices are no
    ties; no bias is zero and no norm is one."""

    def fill(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (1.0 if "embed_tokens" in name else 0.2))
                if "norm" in name and name.endswith("weight"):
                    weight.add_(1)

    return fill


@pytest.fixture(scope="session")
def export_tiny(picture_set: Path) -> Callable[[Path], Artifact]:
    """export_tiny(folder): the checkpoint exported beside itself, with a KV cache of 512."""

    def run(folder: Path) -> Artifact:
        options = Options(capacity=512, cases=2, picture_set=picture_set, max_new_tokens=4)
        return export(checkpoint.resolve(str(folder)), folder.parent / "artefact", options, lambda *_: None)

    return run


@pytest.fixture(scope="session")
def assert_parity() -> Callable[[Artifact, Reference, list[list[Image.Image]]], None]:
    """assert_parity(artifact, reference, prompts): for each prompt's pictures the ONNX graphs in ONNX Runtime give the
    reference's features, logits of the prompt and greedy tokens. Tolerance: float32 sums in another order."""

    def check(artifact: Artifact, reference: Reference, prompts: list[list[Image.Image]]) -> None:
        session = parity.canonical_session(artifact)
        for pictures in prompts:
            inputs = session.prepare(pictures, QUESTION)
            ids, pixels = torch.from_numpy(inputs.input_ids)[None], None
            with torch.inference_mode():
                if inputs.vision:
                    pixels = torch.from_numpy(inputs.vision["pixel_values"])
                    found = session.vision.run(inputs.vision)["image_features"]
                    np.testing.assert_allclose(found, reference.features(pixels).numpy(), atol=2e-4, rtol=2e-4)
                tokens = list(session.generate(inputs, 1, ignore_eos=True))
                logits: Any = session.decoder.logits()
                expected = reference.logits(ids, pixels)[-1]
                np.testing.assert_allclose(logits, expected.numpy(), atol=5e-4, rtol=5e-4)
                tokens, wanted = list(session.generate(inputs, 5, ignore_eos=True)), []
                for _ in range(5):
                    wanted.append(int(reference.logits(ids, pixels)[-1].argmax()))
                    ids = torch.cat((ids, torch.tensor([wanted[-1:]])), dim=1)
            assert tokens == wanted

    return check


@pytest.fixture
def assert_supported(picture_set: Path, tmp_path: Path) -> Callable[[Artifact, str], None]:
    """assert_supported(artifact, family): what the README's table promises of the family is what can be done."""

    def check(artifact: Artifact, family: str) -> None:
        copy = Artifact(Path(shutil.copytree(artifact.root, tmp_path / "supported")))
        made = support.row(copy, picture_set)
        assert made == support.promised(family), f"README's row of {family} has to end: {' | '.join(made)}"

    return check


@pytest.fixture
def assert_steps_need_no_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Artifact], None]:
    """assert_steps_need_no_host(artifact): the loops that keep a step on a GPU, with all that the decoder takes beside
    embeddings, say what PyTorch does: TensorRT's, in pieces, to the token, the float16 baseline's within float16."""

    def check(artifact: Artifact) -> None:
        monkeypatch.setattr(tensorrt_engine, "architecture", lambda: 90)
        monkeypatch.setattr(onnx_ops, "fixed_shapes", lambda past: True)
        lowered = Made(artifact, "decoder", "fp16", tmp_path, count=3).decoder()
        baseline = cuda_baseline.open_session(artifact, "fp32", "eager", where="cpu").decoder
        cases, arrays = golden.read(artifact)
        further = artifact.manifest.components["decoder"].further_inputs()
        assert further
        for index, case in enumerate(cases[:2]):  # those whose inputs are kept
            given = {name: arrays[f"{index}.{name}"] for name in ("inputs_embeds", *further)}
            assert [lowered.prefill(**given), *lowered.decode(len(case["tokens"]) - 1)] == case["tokens"]
            for decoder, near in ((lowered, 0.99999), (baseline, 0.999)):
                decoder.prefill(**given)
                found = [decoder.logits()]
                for token in arrays[f"{index}.step_tokens"]:
                    decoder.feed(int(token))
                    found.append(decoder.logits())
                wanted = [arrays[f"{index}.prefill_logits"], *arrays[f"{index}.step_logits"]]
                assert min(map(cosine, found, wanted)) > near

    return check


@pytest.fixture
def as_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Artifact, str], TensorrtRunner]:
    """as_tensorrt(artifact, component): the component as lowered in float for TensorRT 8.6, behind its API, with the
    profiles that an engine of it has. ONNX Runtime computes; that these are the golden outputs was compared."""

    def load(artifact: Artifact, component: str) -> TensorrtRunner:
        model, gpu, path = ir.load(artifact.graph(component)), FakeGpu(), tmp_path / f"{component}.onnx"
        sizes, device, kv = tensorrt_profiles.ranges(artifact, component), load_device("h100"), artifact.manifest.kv
        job = builders.Job(component, "fp16", device, kv, tmp_path, lambda: pytest.fail("no decoder"), sizes, path)
        tensorrt.lower(model, job)
        profiles = tensorrt_profiles.one_and_more(model, sizes, tensorrt.MOST)
        ir.save(model, path, external_data=f"{path.name}.data")
        monkeypatch.setattr(tensorrt_engine, "architecture", lambda: spec().settings["sm"])
        trt, known = fake_trt(lambda data: FakeEngine(gpu, path, profiles)), artifact.manifest.components[component]
        runner, arrays = TensorrtRunner(Engine(trt, gpu, spec(), path), known), golden.read(artifact)[1]
        for case in range(golden.DETAILED):
            found = runner.run({tensor.name: arrays[f"{case}.{tensor.name}"] for tensor in known.inputs})
            for name, array in found.items():
                np.testing.assert_allclose(array, arrays[f"{case}.{name}"], atol=1e-3, rtol=1e-3)
        return runner

    return load


def assert_answers(
    session: Session,
    inputs: Any,
    prompt: Tensor,
    logits: Callable[[Tensor], Tensor],
    embed: Callable[[Tensor], Tensor],
) -> None:
    """The session's logits of the prompt and its five greedy tokens are the reference's, which has no cache: `prompt`
    are its embeddings of the whole prompt (length, hidden), `logits` gives (length, vocabulary) of such, `embed` the
    embeddings of ids."""
    list(session.generate(inputs, 1, ignore_eos=True))
    np.testing.assert_allclose(session.decoder.logits(), logits(prompt)[-1].numpy(), atol=5e-4, rtol=5e-4)
    tokens, wanted = list(session.generate(inputs, 5, ignore_eos=True)), []
    for _ in range(5):
        wanted.append(int(logits(prompt)[-1].argmax()))
        prompt = torch.cat((prompt, embed(torch.tensor(wanted[-1:]))))
    assert tokens == wanted


def change(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the checkpoint without weights, with another config.json: a group's fields are changed one by one, and
    None takes a field away."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    found = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        found[name] = found[name] | value if isinstance(value, dict) and isinstance(found.get(name), dict) else value
    (target / "config.json").write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    return target


def assert_published_names_are_read(folder: Path, target: Path, *published: str) -> None:
    """The checkpoint of this transformers with its tensors named as an older one saved those on the hub, which begin
    as `published` says and had one module more around the vision encoder, is the same model."""
    shutil.copytree(folder, target)
    saved = load_file(folder / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): value for name, value in saved.items()}
    assert older.keys() != saved.keys()
    assert {next((start for start in published if name.startswith(start)), name) for name in older} == set(published)
    save_file(older, target / "model.safetensors", {"format": "pt"})
    expected, found = (checkpoint.load_model(checkpoint.resolve(str(each))).state_dict() for each in (folder, target))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
