"""LLaVA 1.5: transformers' own model and processor are the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter.checkpoint import load_components, resolve
from vlmc.exporter.families.llava import Llava
from vlmc.exporter.family import family_for
from vlmc.exporter.onnx_ops import canonical_operators
from vlmc.exporter.processor import describe
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

from .conftest import assert_published_names_are_read

CHAT = (  # llava-hf/llava-1.5-7b-hf's: the pictures of a message before its words
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
NEWER_CHAT = (  # of a later revision (github.com/tung2kg1/AI-Stock-Chart-Analysis@61f63b5, llava-1.5-7b-hf/)
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PUBLISHED: dict[str, Any] = {  # its config.json, there too
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
Whole = tuple[Path, Artifact, LlavaForConditionalGeneration, LlavaProcessor]


def processor_for(vocabulary: Any, legacy: bool = False, pad: bool = False) -> LlavaProcessor:
    vocab, merges = vocabulary(["<unk>", "<s>", "</s>", "<image>", "<pad>"])
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    kind, more = (LlavaImageProcessorPil, {"do_pad": True}) if pad else (CLIPImageProcessorPil, {})
    pictures = kind(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **more)
    return LlavaProcessor(
        pictures, tokenizer, 7, "default", chat_template=CHAT, image_token="<image>", num_additional_image_tokens=1
    )


@pytest.fixture(scope="module")
def whole(
    vocabulary: Any, randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    folder = tmp_path_factory.mktemp("llava") / "checkpoint"
    processor = processor_for(vocabulary)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=28, patch_size=7),
        text_config=LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=448, eos_token_id=2),
        image_token_index=processor.image_token_id,
    )
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, 2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, export_tiny(folder), model, processor


class Reference:
    """transformers' whole model."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.model.get_image_features(pixel_values).pooler_output)

    def logits(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits[0]


def test_the_onnx_graphs_compute_what_transformers_does(whole: Whole, assert_parity: Any, make_picture: Any) -> None:
    _, artifact, model, _ = whole
    one, wide, tall = make_picture(28, 28), make_picture(90, 31), make_picture(17, 60)
    assert_parity(artifact, Reference(model), [[], [one], [wide], [tall, wide]])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_and_question_become_transformers_arrays(
    count: int, pad: bool, legacy: bool, vocabulary: Any, make_picture: Any, tmp_path: Path
) -> None:
    processor = processor_for(vocabulary, legacy, pad)
    processor.save_pretrained(tmp_path)
    pictures: list[Image.Image] = [make_picture(90, 31), make_picture(17, 60), make_picture(28, 28)][:count]
    question = "How many {red} boats are on the water? 42 €"
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    reference = processor(text=text, images=pictures or None, return_tensors="np")

    config, prompt = describe(tmp_path)
    prepared = preprocessing.load(config)(pictures)
    ids = Tokenizer(tmp_path / "tokenizer.json").encode(render(prompt, question, prepared.image_texts))
    assert ids.tolist() == reference["input_ids"][0].tolist()
    if count:
        assert np.array_equal(prepared.vision["pixel_values"], reference["pixel_values"])


def test_a_later_chat_template_writes_the_same(vocabulary: Any, tmp_path: Path) -> None:
    processor = processor_for(vocabulary)
    found = []
    for template in (CHAT, NEWER_CHAT):
        processor.chat_template = template
        processor.save_pretrained(tmp_path)
        found.append(describe(tmp_path))
    assert found[0] == found[1]


def test_what_the_published_config_leaves_out_is_as_in_the_preset() -> None:
    preset = resolve("llava-7b", random_weights=True)
    assert preset.preset is not None
    with torch.device("meta"):
        found, known = (preset.family.randomise(config, 0) for config in (PUBLISHED, preset.config))
    assert sum(weight.numel() for weight in found.parameters()) == preset.preset["published_parameters"]
    assert {name: weight.shape for name, weight in found.named_parameters()} == {
        name: weight.shape for name, weight in known.named_parameters()
    }
    assert {weight.dtype for weight in found.parameters()} == {torch.float32}
    for part, fields in (
        ("text_config", ("rms_norm_eps", "rope_parameters", "hidden_act", "num_key_value_heads", "attention_bias")),
        ("vision_config", ("layer_norm_eps", "hidden_act", "num_attention_heads", "patch_size", "image_size")),
    ):
        for field in fields:
            assert getattr(getattr(found.config, part), field) == getattr(getattr(known.config, part), field)
    assert found.config.vision_feature_layer == known.config.vision_feature_layer == -2


def with_decoder(model_type: str, **more: Any) -> LlavaForConditionalGeneration:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"num_key_value_heads": 1, "vocab_size": 99, "pad_token_id": 0, "sliding_window": None}
    if model_type in ("mistral", "qwen3"):
        text["head_dim"] = 16
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=7),
        text_config=AutoConfig.for_model(model_type, **sizes | text | more),
        image_token_index=3,
    )
    config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(config).eval()


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 10.0, "short_factor": [1.5] * 8, "long_factor": [9.0] * 8}
ROTATIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_type": "linear", "rope_theta": 10.0, "factor": 3.0}),
    ("llama", LLAMA3 | {"original_max_position_embeddings": 8}),
    ("llama", {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0, "original_max_position_embeddings": 8}),
    ("llama", {"rope_type": "dynamic", "rope_theta": 10.0, "factor": 2.0}),
    ("phi3", LONG),
]
MOST = {"max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("model_type", "rotation"),
    [*((name, None) for name in Llava.decoders), *ROTATIONS],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else value or "plain",
)
def test_every_decoder_that_is_taken_computes_what_transformers_does(
    model_type: str, rotation: dict[str, Any] | None, randomise: Any
) -> None:
    """bakLlava's is Mistral, xtuner/llava-phi-3-mini-hf's Phi-3, and Qwen's are in many. Without a cache on one side;
    on the other a prompt and three steps, through the operators that the graphs have."""
    model = with_decoder(model_type, **{"rope_parameters": rotation} | MOST if rotation else {})
    randomise(model, 7)
    ids = torch.randint(4, 99, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0, 8:]
    family = family_for("llava", "here")
    kv = family.kv(model, 16)
    family.use_canonical_attention(model)
    parts, found = family.split(model), []
    past = [torch.zeros(1, kv.kv_heads, kv.capacity, kv.head_dim) for _ in range(2 * kv.layers)]
    with torch.inference_mode(), canonical_operators(parts.decoder):
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
            positions, last = torch.arange(start, end)[None], torch.tensor([end - start - 1])
            embeds = parts.embed_tokens(ids[:, start:end])
            logits, seen = parts.decoder(embeds, positions, torch.tensor([start]), last, past)
            for whole, part in zip(past, seen, strict=True):
                whole[:, :, :end] = part[:, :, :end]
            found.append(logits[0])
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm"])
@pytest.mark.parametrize("model_type", ["granite_swa", "gemma", "cohere", "gpt_neox"])
def test_another_decoder_is_refused_before_its_weights_are_read(model_type: str, family: str) -> None:
    """Granite's with windows would be wrong, and the parity ladder would not see it; Gemma's norms and Cohere's
    rotation it would see, late; GPT-NeoX says the heads of its keys under no name that is read here."""
    model = with_decoder("llama")
    model.config.text_config = AutoConfig.for_model(model_type)
    with pytest.raises(VlmcError, match=rf"not compared with.*{model_type}.*llama or mistral or phi3"):
        family_for(family, "here").kv(model, 8)


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_cache_ends_where_a_rotation_would_change(kind: str, family: str) -> None:
    ((decoder, rotation),) = ((decoder, one) for decoder, one in ROTATIONS if one["rope_type"] == kind)
    ends = {"max_position_embeddings": 99, "original_max_position_embeddings": 16}
    model = with_decoder(decoder, rope_parameters=rotation, **ends if kind == "longrope" else MOST)
    assert family_for(family, "here").kv(model, 16).capacity == 16
    with pytest.raises(VlmcError, match=rf"{kind} RoPE, a KV cache of 17 positions.*--capacity 16 or less"):
        family_for(family, "here").kv(model, 17)


def test_only_clips_last_layer_and_the_norm_behind_it_are_left_out(whole: Whole) -> None:
    _, artifact, model, _ = whole
    unused = [*model.model.vision_tower.encoder.layers[-1].parameters()]
    unused += [*model.model.vision_tower.post_layernorm.parameters()]
    components = load_components(artifact)
    count = sum(weight.numel() for _, component in components.items() for weight in component.parameters())
    assert count == sum(weight.numel() for weight in model.parameters()) - sum(weight.numel() for weight in unused)


@pytest.mark.parametrize(("layer", "layers"), [(-1, 3), (-2, 2), (-4, 0), (2, 2)])
def test_the_layer_of_the_features_is_counted_as_transformers_does(layer: int, layers: int, whole: Whole) -> None:
    _, _, model, _ = whole
    config, pixels = model.config, torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    before = config.vision_feature_layer
    try:
        config.vision_feature_layer = layer
        vision = family_for("llava", "here").split(model).vision_encoder
        assert len(vision.layers) == layers
        with torch.inference_mode():
            torch.testing.assert_close(vision(pixels), Reference(model).features(pixels))
    finally:
        config.vision_feature_layer = before


@pytest.mark.parametrize("layer", [-5, 4])
def test_features_of_a_layer_that_there_is_not_are_refused(
    layer: int, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, model, _ = whole
    monkeypatch.setattr(model.config, "vision_feature_layer", layer)
    with pytest.raises(IndexError), torch.inference_mode():
        Reference(model).features(torch.zeros(1, 3, 28, 28))
    with pytest.raises(VlmcError, match=rf"{layer} of a vision encoder of 3 layers.*from -4 to 3"):
        family_for("llava", "here").split(model)


def test_the_published_names_of_weights_are_read(whole: Whole, tmp_path: Path) -> None:
    """Those of llava-hf/llava-1.5-7b-hf (transformers' convert_llava_weights_to_hf.py)."""
    published = ("vision_tower.vision_model.", "multi_modal_projector.linear_", "language_model.model.")
    assert_published_names_are_read(whole[0], tmp_path / "published", *published, "language_model.lm_head.")


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_the_authors_layout_is_refused_and_the_converted_one_named(model_type: str, tmp_path: Path) -> None:
    """liuhaotian/llava-v1.5-7b's config.json; its weights are pickled, which is not what has to be mended."""
    config = {"model_type": model_type, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(VlmcError, match=r"authors' layout.*clip-vit-large-patch14-336.*llava-hf/llava-1\.5-7b-hf"):
        resolve(str(tmp_path))


def test_another_vision_encoder_is_refused(whole: Whole) -> None:
    _, _, model, _ = whole
    before = model.config.vision_config
    try:
        model.config.vision_config = AutoConfig.for_model("siglip_vision_model")
        with pytest.raises(VlmcError, match="siglip_vision_model"):
            family_for("llava", "here").split(model)
    finally:
        model.config.vision_config = before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"crop_size": {"height": 28, "width": 21}}, "does not cut a square"),
        ({"size": {"height": 28, "width": 28}}, "does not cut a square"),
        ({"do_center_crop": False}, "does not cut a square"),
        ({"do_rescale": False}, "do_rescale off"),
    ],
)
def test_a_picture_processor_that_does_otherwise_is_refused(
    change: dict[str, Any], reason: str, vocabulary: Any, tmp_path: Path
) -> None:
    processor = processor_for(vocabulary)
    for name, value in change.items():
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(tmp_path)
    with pytest.raises(VlmcError, match=reason):
        describe(tmp_path)


def test_a_processor_without_a_patch_size_is_refused(vocabulary: Any, tmp_path: Path) -> None:
    processor = processor_for(vocabulary)
    processor.patch_size = None
    processor.save_pretrained(tmp_path)
    with pytest.raises(VlmcError, match="patch_size"):
        describe(tmp_path)


def test_the_readme_says_what_it_can_be_made_into(whole: Any, assert_supported: Any) -> None:
    assert_supported(whole[1], "llava")
