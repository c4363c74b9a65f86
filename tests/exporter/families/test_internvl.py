"""InternVL: transformers' own model and processor are the judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter.checkpoint import load_components
from vlmc.exporter.family import family_for
from vlmc.exporter.processor import describe
from vlmc.runtime import preprocessing
from vlmc.runtime.prompt import Tokenizer, render

CHAT = (  # OpenGVLab/InternVL3-1B-hf's, less the branch for video
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]


class WithoutVideo(InternVLProcessor):
    """transformers' processor without its part for videos, which needs torchvision; saved as the hub has it."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)

    def save(self, folder: Path) -> None:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = {"image_seq_length": self.image_seq_length, "processor_class": "InternVLProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(settings))
        (folder / "chat_template.jinja").write_text(CHAT)


def processor() -> WithoutVideo:
    vocab = {token: id for id, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        eos_token="<|im_end|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]}, replace_extra_special_tokens=False)
    pictures = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6)
    return WithoutVideo(pictures, tokenizer, image_seq_length=4, chat_template=CHAT)


SIZES: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: Any = SIZES | {"num_key_value_heads": 1, "vocab_size": 272, "eos_token_id": 2}


@pytest.fixture(scope="module")
def whole(
    randomise: Any, export_tiny: Callable[[Path], Artifact], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Artifact, InternVLForConditionalGeneration]:
    folder = tmp_path_factory.mktemp("internvl") / "checkpoint"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**SIZES, image_size=28, patch_size=7, attention_bias=True),
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=True, rope_parameters=rope),
        image_token_id=5,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config).eval()
    randomise(model, 4)
    model.save_pretrained(folder)
    processor().save(folder)
    return folder, export_tiny(folder), model


class Reference:
    """transformers' whole model."""

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        self.model = model

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def logits(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        return self.model(input_ids=input_ids, pixel_values=pixel_values).logits[0]


def test_the_onnx_graphs_compute_what_transformers_does(whole: Any, assert_parity: Any, make_picture: Any) -> None:
    _, artifact, model = whole
    one, wide, tall = make_picture(28, 28), make_picture(90, 31), make_picture(17, 60)
    assert_parity(artifact, Reference(model), [[], [one], [wide], [tall, one]])


def test_a_llama_and_rms_norms_in_the_vision_encoder(randomise: Any) -> None:
    """InternVL 3 9B's decoder, and the vision encoder of the 6B ones; in PyTorch alone."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **SIZES, image_size=28, patch_size=7, use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False
        ),
        text_config=LlamaConfig(**TEXT),
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).eval()
    randomise(model, 5)
    components = family_for("internvl", "here").split(model)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[7, 9, 11, 8, 7]])
    past = [torch.zeros(1, 1, 8, 16) for _ in range(4)]
    with torch.inference_mode():
        torch.testing.assert_close(components.vision_encoder(pixels), Reference(model).features(pixels))
        embeds = components.embed_tokens(ids)
        logits, _ = components.decoder(embeds, torch.arange(5)[None], torch.tensor([0]), torch.tensor([4]), past)
        torch.testing.assert_close(logits[0], Reference(model).logits(ids, None)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_and_question_become_transformers_arrays(count: int, make_picture: Any, tmp_path: Path) -> None:
    whole = processor()
    whole.save(tmp_path)
    pictures: list[Image.Image] = [make_picture(90, 31), make_picture(17, 60), make_picture(28, 28)][:count]
    question = "How many {red} boats are on the water? 42 €"
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    text = whole.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    reference = whole(text=text, images=pictures or None, return_tensors="np")

    config, prompt = describe(tmp_path)
    prepared = preprocessing.load(config)(pictures)
    ids = Tokenizer(tmp_path / "tokenizer.json").encode(render(prompt, question, prepared.image_texts))
    assert ids.tolist() == np.asarray(reference["input_ids"])[0].tolist()
    if count:
        assert np.array_equal(prepared.vision["pixel_values"], reference["pixel_values"])


def test_the_parts_miss_no_weight(whole: Any) -> None:
    _, artifact, model = whole
    components = load_components(artifact)
    weights = {id(weight): weight for _, component in components.items() for weight in component.parameters()}
    assert sum(weight.numel() for weight in weights.values()) == sum(weight.numel() for weight in model.parameters())


@pytest.fixture
def model(whole: Any) -> Iterator[InternVLForConditionalGeneration]:
    """The model, whose config a test may change."""
    _, _, found = whole
    before = {name: getattr(found.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    rope = dict(found.config.text_config.rope_parameters)
    yield found
    found.config.text_config.rope_parameters = rope
    for name, value in before.items():
        setattr(found.config, name, value)


@pytest.mark.parametrize(("layer", "layers"), [(-1, 2), (-2, 1), (1, 1)])
def test_the_layer_of_the_features_is_counted_as_transformers_does(
    layer: int, layers: int, model: InternVLForConditionalGeneration
) -> None:
    model.config.vision_feature_layer = layer
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    vision = family_for("internvl", "here").split(model).vision_encoder
    assert len(vision.layers) == layers
    with torch.inference_mode():
        torch.testing.assert_close(vision(pixels), Reference(model).features(pixels))


def test_what_the_family_does_not_cover_is_refused(model: InternVLForConditionalGeneration) -> None:
    family = family_for("internvl", "here")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(VlmcError, match="without the class token"):
        family.split(model)


def as_published(**text: Any) -> dict[str, Any]:
    """config.json of a small InternVL3-1B-hf. Its `text_config` is the first layout's `llm_config`, whose values
    shivangjhalani/multicoco prints (InternVL3-1B_data.md); transformers 4 wrote no `tie_word_embeddings` beside it."""
    rope = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    decoder = {"_name_or_path": "./pretrained/Qwen2.5-32B-Instruct", "architectures": ["Qwen2ForCausalLM"]}
    decoder |= {"model_type": "qwen2", "max_window_layers": 70, "moe_config": None, "rope_scaling": rope}
    decoder |= {"rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "use_bfloat16": True}
    vision = SIZES | {"image_size": [28, 28], "patch_size": [7, 7], "attention_bias": True, "initializer_range": 1e-10}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "image_token_id": 5,
        "text_config": decoder | TEXT | text,
        "vision_config": vision | {"model_type": "internvl_vision", "torch_dtype": "bfloat16"},
        "transformers_version": "4.53.0.dev0",
    }


@pytest.mark.parametrize(("said", "tied"), [({}, False), ({"tie_word_embeddings": True}, True)])
def test_a_config_of_transformers_4_says_of_the_decoder_alone_whether_its_head_is_the_table(
    said: dict[str, Any], tied: bool
) -> None:
    model: Any = family_for("internvl", "here").randomise(as_published(**said), 0)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("dynamic", 2.0, 1e6)


def test_the_tensors_of_the_first_revision_are_read_by_their_names(randomise: Any, tmp_path: Path) -> None:
    """Before transformers 4.52 the whole of the decoder, its head included, was `language_model`."""
    family, config = family_for("internvl", "here"), as_published()
    model = family.randomise(config, 0)
    randomise(model, 6)
    older = {}
    for name, weight in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        older[name.removeprefix("model.")] = weight
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = family.load(tmp_path).state_dict()
    assert [name for name, weight in model.state_dict().items() if not torch.equal(weight, found[name])] == []


def test_tiles_that_are_not_square_are_refused(tmp_path: Path) -> None:
    whole = processor()
    whole.image_processor.size = {"height": 28, "width": 14}
    whole.save(tmp_path)
    with pytest.raises(VlmcError, match="not square"):
        describe(tmp_path)


def test_the_readme_says_what_it_can_be_made_into(whole: Any, assert_supported: Any) -> None:
    assert_supported(whole[1], "internvl")
