"""Gemma 3n: transformers' own model and processor are the judge. Its vision tower is vlmc's, which is judged apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    GemmaTokenizer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from vlmc.artifact import Artifact, KvSpec
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, mobilenet_v5
from vlmc.exporter.family import family_for
from vlmc.exporter.mobilenet_v5 import Attend, Bottleneck, Edge, Layout, MobileNetV5
from vlmc.exporter.processor import describe
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

CHAT = (  # the published one, for one question
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<image_soft_token>' }}"
    "{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
SPECIAL += ["<start_of_audio>"]
VISION = ["<end_of_image>", "<image_soft_token>"]
AUDIO = ["<end_of_audio>", "<audio_soft_token>"]
TINY = Layout(
    stem=16,
    stages=(
        (Edge(16, stride=2),),
        (Bottleneck(16, 2, start=3, stride=2),),
        (Bottleneck(16, 1, middle=3, stride=2), Attend(16, heads=2, width=16, stride=2)),
        (Bottleneck(16, 2, start=5, stride=2), Attend(16, heads=2, width=16)),
    ),
    features=24,
    side=2,
    image_size=64,
)
Whole = tuple[Path, Artifact, Gemma3nForConditionalGeneration, Gemma3nProcessor]


class TimmModel(nn.Module):
    """What transformers wraps timm's models in, around vlmc's tower."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = MobileNetV5(TINY)

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.timm_model(pixel_values))


@pytest.fixture(scope="module", autouse=True)
def tiny_tower() -> Iterator[None]:
    with mock.patch.dict(mobilenet_v5.LAYOUTS, {"tiny": TINY}):
        yield


def processor_for(vocabulary: Any) -> Gemma3nProcessor:
    vocab, merges = vocabulary(SPECIAL)
    vocab |= {token: len(vocab) + index for index, token in enumerate((*VISION, *AUDIO))}  # the last ones
    names = ("image", "audio", "boi", "eoi", "boa", "eoa")
    tokens = ("<image_soft_token>", "<audio_soft_token>", SPECIAL[-2], VISION[0], SPECIAL[-1], AUDIO[0])
    special = {f"{name}_token": token for name, token in zip(names, tokens, strict=True)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>", *VISION, *AUDIO]})
    pictures = SiglipImageProcessorPil(size={"height": 64, "width": 64}, do_normalize=False, resample=2)
    return Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), pictures, tokenizer, chat_template=CHAT, audio_seq_length=3, image_seq_length=4
    )


def config_for(processor: Gemma3nProcessor) -> Gemma3nConfig:
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, *VISION, *AUDIO)}
    assert [ids[token] - ids[VISION[0]] for token in (*VISION, *AUDIO)] == [0, 1, 2, 3]
    embedded = {"vocab_size": 2, "vocab_offset": ids[VISION[0]]}
    return Gemma3nConfig(
        text_config={
            "vocab_size": ids[VISION[0]] + 4,
            "vocab_size_per_layer_input": ids[VISION[0]],
            "hidden_size": 32,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": [48, 64, 48, 64],
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 6,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.95, 0.0, 0.6, 0.0],
            "altup_num_inputs": 4,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "final_logit_softcapping": 3.0,
        },
        vision_config={"architecture": "tiny", "hidden_size": 24, "label_names": ["a", "b"]} | embedded,
        audio_config={
            "hidden_size": 16,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
            "sscp_conv_channel_size": [8, 4],
            "vocab_size": 2,
            "vocab_offset": ids[AUDIO[0]],
        },
        vision_soft_tokens_per_image=4,
        image_token_id=ids["<image_soft_token>"],
        audio_token_id=ids["<audio_soft_token>"],
        boi_token_id=ids["<start_of_image>"],
        eoi_token_id=ids["<end_of_image>"],
    )


@pytest.fixture(scope="module")
def whole(
    vocabulary: Any, randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    folder = tmp_path_factory.mktemp("gemma3n") / "checkpoint"
    processor = processor_for(vocabulary)
    config, made = config_for(processor), AutoModel.from_config

    def from_config(part: Any) -> Any:
        return TimmModel() if part.model_type == "gemma3n_vision" else made(part)

    with mock.patch.object(AutoModel, "from_config", from_config):
        model = Gemma3nForConditionalGeneration(config).eval()
    randomise(model, 5)
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if ".bn" in name:  # its norms over channels
                weight.add_(1)
    model.save_pretrained(folder)
    published = load_file(folder / "model.safetensors")
    for name in ("k_proj", "v_proj"):  # which the published checkpoints hold and nothing uses
        published[f"model.language_model.layers.2.self_attn.{name}.weight"] = torch.zeros(32, 32)
    save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)
    return folder, export_tiny(folder), model, processor


class Reference:
    """transformers' whole model."""

    def __init__(self, model: Gemma3nForConditionalGeneration) -> None:
        self.model = model

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def logits(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).logits[0]


def test_the_onnx_graphs_compute_what_transformers_does(whole: Whole, assert_parity: Any, make_picture: Any) -> None:
    _, artifact, model, _ = whole
    one, wide = make_picture(64, 64), make_picture(90, 31)
    assert_parity(artifact, Reference(model), [[], [one], [wide, one]])


def test_every_token_of_the_vocabulary_is_embedded_as_in_transformers(whole: Whole) -> None:
    _, artifact, model, _ = whole
    inner, text = model.model, model.config.text_config
    ids = torch.arange(text.vocab_size)[None]
    with torch.inference_mode():
        embeds, per_layer = checkpoint.load_components(artifact).embed_tokens(ids)
        with mock.patch.object(inner.language_model, "forward", side_effect=KeyError) as decoder:
            with pytest.raises(KeyError):
                inner(input_ids=ids)
            expected = decoder.call_args.kwargs
    torch.testing.assert_close(embeds, expected["inputs_embeds"])
    torch.testing.assert_close(per_layer, expected["per_layer_inputs"])


def test_the_decoder_is_written_in_standard_operators(whole: Whole) -> None:
    _, artifact, model, _ = whole
    graph = onnx.load(artifact.graph("decoder"), load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert not {"Erf", "ReduceMax", "Softmax"} & set(kinds)
    text = model.config.text_config
    assert kinds.count("Attention") == text.num_hidden_layers
    assert kinds.count("TensorScatter") == 2 * (text.num_hidden_layers - text.num_kv_shared_layers)
    assert kinds.count("RotaryEmbedding") == 2 * text.num_hidden_layers - text.num_kv_shared_layers
    assert artifact.manifest.kv.layers == text.num_hidden_layers - text.num_kv_shared_layers
    assert list(artifact.manifest.components["decoder"].further_inputs()) == ["per_layer_inputs"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_and_question_become_transformers_arrays(count: int, whole: Whole, make_picture: Any) -> None:
    folder, _, _, processor = whole
    pictures: list[Image.Image] = [make_picture(90, 31), make_picture(17, 60), make_picture(64, 64)][:count]
    question = "\n How many {red} boats are on the water? 42 € "  # without the white space around it in the template
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    reference = processor(text=text, images=pictures or None, return_tensors="np", add_special_tokens=False)

    config, prompt = describe(folder)
    prepared = preprocessing.load(config)(pictures)
    ids = Tokenizer(folder / "tokenizer.json").encode(render(prompt, question, prepared.image_texts))
    assert ids.tolist() == reference["input_ids"][0].tolist()
    assert prompt.eos_token_ids == tuple(processor.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"]))
    if count:
        assert np.array_equal(prepared.vision["pixel_values"], reference["pixel_values"])


def test_only_the_weights_that_hear_are_left_out(whole: Whole) -> None:
    _, artifact, model, _ = whole
    components = checkpoint.load_components(artifact)
    count = sum(weight.numel() for _, component in components.items() for weight in component.parameters())
    inner = model.model
    unused = [*inner.audio_tower.parameters(), *inner.embed_audio.parameters()]  # its tokens are looked up all the same
    expected = sum(weight.numel() for weight in model.parameters()) - sum(weight.numel() for weight in unused)
    assert count == expected + model.lm_head.weight.numel()  # which embed_tokens and the decoder share


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("model.vision_tower.timm_model.", "msfa.norm.weight"),
        ("model.embed_vision.", "embedding.weight"),
        ("model.embed_audio.", "embedding_projection.weight"),
        ("model.language_model.", "layers.1.altup.correct_output_scale"),
    ],
)
def test_a_weight_that_is_missing_is_named(start: str, name: str, whole: Whole, tmp_path: Path) -> None:
    folder, _, _, _ = whole
    weights = load_file(folder / "model.safetensors")
    del weights[start + name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(VlmcError, match=f"lacks 1 weights.*{start + name}"):
        family_for("gemma3n", "here").load(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("vision_config", {"architecture": "resnet50"}, "unknown vision tower.*resnet50.*mobilenetv5_300m_enc"),
        ("vision_config", {"model_args": {"depth": 3}}, "unknown vision tower.*tiny with.*depth"),
        ("audio_config", {"vocab_offset": 1}, "tokens of sounds do not follow.*begin at 1"),
    ],
)
def test_another_architecture_is_refused(part: str, change: dict[str, Any], reason: str, whole: Whole) -> None:
    folder, _, _, _ = whole
    config = json.loads((folder / "config.json").read_text())
    config[part] |= change
    with pytest.raises(VlmcError, match=reason):
        family_for("gemma3n", "here").randomise(config, 0)


def published(folder: Path, target: Path, **changes: Any) -> None:
    """The checkpoint's files but its weights as they were published: the picture processor in a file of its own."""
    for path in [*folder.glob("*.json"), *folder.glob("*.jinja")]:
        (target / path.name).write_bytes(path.read_bytes())
    pictures = json.loads((target / "processor_config.json").read_text())["image_processor"]
    pictures |= {"image_processor_type": "SiglipImageProcessorFast"} | changes
    (target / "preprocessor_config.json").write_text(json.dumps(pictures))
    (target / "processor_config.json").unlink()


def test_a_checkpoint_in_the_published_layout_is_described_alike(whole: Whole, tmp_path: Path) -> None:
    folder, _, _, _ = whole
    published(folder, tmp_path)
    assert describe(tmp_path) == describe(folder)


@pytest.mark.parametrize(
    "change", [{"do_normalize": True}, {"do_rescale": False}, {"do_resize": False}, {"size": {"height": 4, "width": 5}}]
)
def test_a_picture_processor_that_does_otherwise_is_refused(
    change: dict[str, Any], whole: Whole, tmp_path: Path
) -> None:
    folder, _, _, _ = whole
    published(folder, tmp_path, **change)
    with pytest.raises(VlmcError, match="prepares pictures otherwise"):
        describe(tmp_path)


def test_a_config_as_published_names_the_same_angles_and_windows() -> None:
    """Of google/gemma-3n-E2B-it: rotation by its old names, and fields that decide nothing."""
    old = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
    found = checkpoint.resolve("gemma3n-e2b", random_weights=True)
    config = found.config | {"text_config": found.config["text_config"] | old | {"query_pre_attn_scalar": 256}}
    with torch.device("meta"):
        text = found.family.randomise(config, 0).text
    assert text.config.rope_parameters["full_attention"]["rope_theta"] == 1000000.0
    assert text.config.rope_parameters["sliding_attention"]["rope_theta"] == 10000.0
    assert found.family.kv(SimpleNamespace(text=text), 1024) == KvSpec(20, 2, 256, 1024)
    assert [layer.self_attn.sliding_window for layer in text.model.layers] == 6 * [512, 512, 512, 512, None]


def test_loading_says_nothing_of_weights_that_are_not_wanted(whole: Whole, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _, _, _ = whole
    family_for("gemma3n", "here").load(folder)
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_a_step_on_a_gpu_needs_no_host(whole: Any, assert_steps_need_no_host: Any) -> None:
    assert_steps_need_no_host(whole[1])


def test_the_readme_says_what_it_can_be_made_into(whole: Any, assert_supported: Any) -> None:
    assert_supported(whole[1], "gemma3n")
