"""LLaVA-Mini for the tests: a small checkpoint's config and tensors, and a plain rendering of the published code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from .reference import Equations, Weights, turned

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ENDS = ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", *ENDS]
SPECIAL += ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
WIDTH, HEADS, KV_HEADS, INNER, LAYERS, FUSION_LAYERS, SIDE = 32, 2, 1, 48, 2, 2, 2
VISION, VISION_HEADS, VISION_LAYERS, IMAGE, PATCH = 128, 8, 3, 24, 4
TOWER = {"hidden_size": VISION, "intermediate_size": INNER, "num_hidden_layers": VISION_LAYERS}
TOWER |= {"num_attention_heads": VISION_HEADS, "image_size": IMAGE, "patch_size": PATCH}
PREFIX = "model.vision_tower.vision_tower.vision_model"


def config(vocabulary_size: int) -> dict[str, Any]:
    """config.json as training saves it, and besides the sizes of a smaller vision encoder."""
    return {
        "architectures": ["LlavaMiniLlamaForCausalLM"],
        "model_type": "llava_mini_llama",
        "bos_token_id": 128000,
        "compressor_size": SIDE,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_aspect_ratio": "square",
        "intermediate_size": INNER,
        "max_position_embeddings": 131072,
        "mm_hidden_size": VISION,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "prefusion_layer_num": FUSION_LAYERS,
        "resolution_ratio": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vision_config": TOWER,
        "vocab_size": vocabulary_size,
    }


def tensors(vocabulary_size: int) -> dict[str, Tensor]:
    """Random weights under the original names."""
    random = Weights(11)
    add, linear, norm = random.add, random.linear, random.norm

    random.clip(PREFIX, VISION, INNER, VISION_LAYERS, 1 + (IMAGE // PATCH) ** 2, PATCH)
    linear("model.mm_projector.0", WIDTH, VISION)
    linear("model.mm_projector.2", WIDTH, WIDTH)
    add("model.compressor.query", SIDE**2, VISION, scale=1.0)
    add("model.compressor.pos_embed", SIDE**2, VISION, scale=1.0)
    add("model.compressor.attn.in_proj_weight", 3 * VISION, VISION, scale=0.5)
    add("model.compressor.attn.in_proj_bias", 3 * VISION)
    linear("model.compressor.attn.out_proj", VISION, VISION)
    norm("model.compressor.ln_q", VISION)
    norm("model.compressor.ln_kv", VISION)
    add("model.embed_tokens.weight", vocabulary_size, WIDTH, scale=1.0)
    layers = [f"model.prefusion_layers.{index}" for index in range(FUSION_LAYERS)]
    for layer in layers + [f"model.layers.{index}" for index in range(LAYERS)]:
        rows = {"q_proj": WIDTH, "k_proj": WIDTH * KV_HEADS // HEADS, "v_proj": WIDTH * KV_HEADS // HEADS}
        for name, outputs in (rows | {"o_proj": WIDTH}).items():
            linear(f"{layer}.self_attn.{name}", outputs, WIDTH, bias=False)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            linear(f"{layer}.mlp.{name}_proj", *shape, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{name}.weight", WIDTH, around=1.0)
    add("model.norm.weight", WIDTH, around=1.0)
    linear("lm_head", vocabulary_size, WIDTH, bias=False)
    return random.found


class Published(Equations):
    """llavamini_arch.py's encode_images_mini and prepare_inputs_labels_for_multimodal for one question, on the
    equations of CLIP (arXiv:2103.00020) and Llama 3.1 (arXiv:2407.21783)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_file(folder / "model.safetensors"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """CLIP's last layer but one, without the class token: (tiles, patches, VISION)."""
        return self.clip(PREFIX, pixel_values, VISION_HEADS, VISION_LAYERS - 1)

    def compressed(self, patches: Tensor) -> Tensor:
        """Resampler: (tiles, patches, VISION) → (tiles, SIDE², VISION)."""
        own = {name: self.weights[f"model.compressor.{name}"] for name in ("query", "pos_embed")}
        attention = torch.nn.MultiheadAttention(VISION, 8, batch_first=True)
        prefix = "model.compressor.attn."
        attention.load_state_dict({n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)})
        grid = own["pos_embed"].reshape(1, SIDE, SIDE, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(IMAGE // PATCH,) * 2, mode="bicubic", align_corners=False)
        values = self.layer_norm("model.compressor.ln_kv", patches)
        queries = self.layer_norm("model.compressor.ln_q", own["query"]) + own["pos_embed"]
        keys = values + grid.permute(0, 2, 3, 1).flatten(1, 2)
        return attention(queries.expand(len(patches), -1, -1), keys, values)[0]

    def projected(self, x: Tensor) -> Tensor:
        return self.linear("model.mm_projector.2", functional.gelu(self.linear("model.mm_projector.0", x)))

    def features(self, pixel_values: Tensor) -> Tensor:
        """(tiles, patches + SIDE², WIDTH)."""
        patches = self.patches(pixel_values)
        return torch.cat((self.projected(patches), self.projected(self.compressed(patches))), dim=1)

    @staticmethod
    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        """(length, heads, dim): the pairs (i, i + dim/2) turned, slow ones eight times slower than they were, with a
        passage between wavelengths of 2048 and 8192."""
        half = x.shape[-1] // 2
        speed = 5e5 ** -(torch.arange(half) / half)
        smooth = ((8192 / (2 * math.pi / speed) - 1) / (4 - 1)).clamp(0, 1)
        assert {0.0, 1.0} < set(smooth.tolist())  # all three kinds are there
        angle = positions[:, None, None] * (smooth * speed + (1 - smooth) * speed / 8)
        return turned(x, angle)

    def layer(self, name: str, x: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        normed = self.rms_norm(f"{name}.input_layernorm", x)
        q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", normed) for part in "qkv")
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)) for part in (q, k, v))
        q, k = self.rotated(q, positions), self.rotated(k, positions)
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, torch.finfo(torch.float32).min)
        x = x + self.linear(f"{name}.self_attn.o_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        normed = self.rms_norm(f"{name}.post_attention_layernorm", x)
        gate, up = (self.linear(f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        return x + self.linear(f"{name}.mlp.down_proj", functional.silu(gate) * up)

    def ids(self, pictures: int, question: str) -> Tensor:
        """-200 stands for the pictures, as in tokenizer_image_token. train.py leaves out white space around words."""
        header = "<|start_header_id|>{}<|end_header_id|>\n\n"
        content = ("<image>\n" if pictures else "") + question.strip()
        text = SPECIAL[0] + header.format("system") + SYSTEM + "<|eot_id|>" + header.format("user") + content
        text += "<|eot_id|>" + header.format("assistant")
        pieces = [self.tokenizer.encode(piece, add_special_tokens=False).ids for piece in text.split("<image>")]
        return torch.tensor([id for piece in pieces for id in [-200, *piece]][1:])

    def embed(self, ids: Tensor) -> Tensor:
        return self.weights["model.embed_tokens.weight"][ids.clamp(min=0)]

    def fused(self, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One picture's features (patches + SIDE², WIDTH) and the ids with -200 among them."""
        own, padded = self.embed(ids), ids <= 0
        x, padding = torch.cat((features, own)), torch.cat((torch.zeros(len(features), dtype=torch.bool), padded))
        positions = ((~padding).long().cumsum(0) - 1).masked_fill(padding, 1)
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril() & ~padding
        for index in range(FUSION_LAYERS):
            x = self.layer(f"model.prefusion_layers.{index}", x, positions, seen)
        text = x[-len(ids) :]
        return x[-len(ids) - SIDE**2 : -len(ids)], torch.where(padded[:, None], own, text)

    def prompt(self, pixel_values: Tensor | None, question: str) -> Tensor:
        """(length, WIDTH). Several pictures are a video's frames: each meets the text alone, whose mean goes on."""
        if pixel_values is None:
            return self.embed(self.ids(0, question))
        ids = self.ids(len(pixel_values), question)
        pairs = [self.fused(features, ids) for features in self.features(pixel_values)]
        text = sum(text for _, text in pairs) / len(pairs)
        place = ids.tolist().index(-200)
        return torch.cat((text[:place], *(image for image, _ in pairs), text[place + 1 :]))

    def logits(self, x: Tensor) -> Tensor:
        """(length, WIDTH) → (length, vocabulary)."""
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        for index in range(LAYERS):
            x = self.layer(f"model.layers.{index}", x, torch.arange(len(x)), seen)
        return self.linear("lm_head", self.rms_norm("model.norm", x))
