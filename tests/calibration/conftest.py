"""A SmolVLM of transformers' own classes, small enough to answer in milliseconds, with the demo's processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from PIL import Image
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
from vlmc import demo
from vlmc.artifact import Artifact, ComponentSpec, Manifest, Source, TensorSpec
from vlmc.exporter import processor
from vlmc.exporter.families.smolvlm import SmolVlm
from vlmc.exporter.family import Components
from vlmc.exporter.onnx_ops import IMPLEMENTATION
from vlmc.exporter.torch_runner import torch_session
from vlmc.records import SCHEMA, describe_files, write_record
from vlmc.runtime.session import Session

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # the model is so small that threads only wait for each other

DEMO = Path(demo.__file__).parent / "model"


@pytest.fixture(scope="session")
def model() -> SmolVLMForConditionalGeneration:
    """Two layers each; some channels are far larger than the rest, as in trained models (arXiv:2208.07339)."""
    config = json.loads((DEMO / "config.json").read_text())
    vision = config["vision_config"] | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = config["text_config"] | {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    small = SmolVLMConfig(
        image_token_id=config["image_token_id"],
        scale_factor=2,
        vision_config=vision | {"num_hidden_layers": 2},
        text_config=text | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8},
    )
    torch.manual_seed(0)
    made = SmolVLMForConditionalGeneration(small).eval().requires_grad_(False)
    made.set_attn_implementation(IMPLEMENTATION)
    for name, module in made.named_modules():
        if "norm" in name:
            module.weight.mul_(torch.rand_like(module.weight) + 0.5)
            module.weight[::7] *= 40
    return made


@pytest.fixture(scope="session")
def components(model: SmolVLMForConditionalGeneration) -> Components:
    return SmolVlm().split(model)


@pytest.fixture(scope="session")
def artifact(model: SmolVLMForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What the runtime and the plan read of an artefact; there are no graphs in it."""
    root = tmp_path_factory.mktemp("artefact")
    processor.save_tokenizer(DEMO, root / "tokenizer.json")
    preprocessing, prompt = processor.describe(DEMO)
    manifest = Manifest(
        schema=SCHEMA,
        name="tiny",
        family="smolvlm",
        source=Source("folder", "tiny", "1" * 64),
        components={
            "vision_encoder": _spec("pixel_values", "image_features", "float32", "tiles", 3, 128, 128),
            "embed_tokens": _spec("input_ids", "inputs_embeds", "int64", 1, "length"),
            "decoder": _spec("inputs_embeds", "logits", "float32", 1, "length", 32),
        },
        kv=SmolVlm().kv(model, 128),
        hidden_size=32,
        vocab_size=model.config.text_config.vocab_size,
        preprocessing=preprocessing,
        prompt=prompt,
        parity=(),
        files=describe_files(root),
        versions={},
        created="",
    )
    write_record(root / "manifest.json", manifest)
    return Artifact(root)


def _spec(taken: str, made: str, dtype: str, *shape: int | str) -> ComponentSpec:
    return ComponentSpec("none", (TensorSpec(taken, dtype, shape),), (TensorSpec(made, "", ()),), 0)


@pytest.fixture
def session(artifact: Artifact, components: Components) -> Session:
    return torch_session(artifact, components)


@pytest.fixture(scope="session")
def set_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows about two pictures; the last has no answer."""
    folder = tmp_path_factory.mktemp("set")
    for name, shade in (("a.png", 40), ("b.png", 200)):
        picture = Image.linear_gradient("L").resize((96, 64)).point(lambda value, s=shade: (value + s) % 256)
        picture.convert("RGB").save(folder / name)
    rows = [
        {"image": "a.png", "prompt": "How many objects are there?", "answer": "two red cats"},
        {"image": "b.png", "prompt": "Is it night?", "answer": "yes", "task": "scene_context", "facts": ["night"]},
        {"image": "b.png", "prompt": "Describe the picture briefly."},
    ]
    path = folder / "three.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path
