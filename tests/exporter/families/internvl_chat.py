"""InternVL in OpenGVLab's layout for the tests: a small checkpoint's config and tensors, and a plain rendering of the
published equations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .reference import Equations, Weights, turned

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, TILE, PATCH = 32, 2, 1, 48, 2, 28, 7
# The two vision encoders that were published, but for the activation and the smaller one's epsilon: with the usual ones
# a family that does not read them would pass.
VIT_300M = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
VIT_300M |= {"layer_norm_eps": 0.01, "hidden_act": "silu"}
VIT_6B = {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}
VIT_6B |= {"layer_norm_eps": 1e-6, "hidden_act": "silu"}


def config(vocabulary_size: int, vision: dict[str, Any] = VIT_300M, **changes: Any) -> dict[str, Any]:
    """config.json as OpenGVLab/InternVL2-2B has it, but for what vlmc does not read."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": HEADS}
    tiles = {"image_size": TILE, "patch_size": PATCH, "model_type": "intern_vit_6b"}
    text = {"num_key_value_heads": KV_HEADS, "vocab_size": vocabulary_size, "rms_norm_eps": 1e-05, "bias": False}
    text |= {"rope_theta": 1000000, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "model_type": "internlm2"}
    text |= {"max_position_embeddings": 32768, "architectures": ["InternLM2ForCausalLM"], "eos_token_id": 2}
    found = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "llm_config": text | sizes,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internlm2-chat",
        "use_thumbnail": True,
        "vision_config": tiles | vision | sizes,
    }
    return found | changes


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the original names."""
    random, vision, vocabulary_size = Weights(3), config["vision_config"], config["llm_config"]["vocab_size"]
    add, linear, norm = random.add, random.linear, random.norm

    add("vision_model.embeddings.class_embedding", 1, 1, WIDTH)
    add("vision_model.embeddings.position_embedding", 1, 1 + (TILE // PATCH) ** 2, WIDTH)
    add("vision_model.embeddings.patch_embedding.weight", WIDTH, 3, PATCH, PATCH)
    add("vision_model.embeddings.patch_embedding.bias", WIDTH)
    head = WIDTH // HEADS
    for index in range(LAYERS):
        layer = f"vision_model.encoder.layers.{index}"
        linear(f"{layer}.attn.qkv", 3 * WIDTH, WIDTH, bias=vision["qkv_bias"])
        for name in ("q_norm", "k_norm") if vision["qk_normalization"] else ():
            norm(f"{layer}.attn.{name}", WIDTH, bias=False)
        linear(f"{layer}.attn.proj", WIDTH, WIDTH)
        linear(f"{layer}.mlp.fc1", INNER, WIDTH)
        linear(f"{layer}.mlp.fc2", WIDTH, INNER)
        for name in ("norm1", "norm2"):
            norm(f"{layer}.{name}", WIDTH, bias=vision["norm_type"] == "layer_norm")
        for name in ("ls1", "ls2"):
            add(f"{layer}.{name}", WIDTH, around=1.0)
        layer = f"language_model.model.layers.{index}"
        linear(f"{layer}.attention.wqkv", (HEADS + 2 * KV_HEADS) * head, WIDTH, bias=False)
        linear(f"{layer}.attention.wo", WIDTH, WIDTH, bias=False)
        for name, shape in (("w1", (INNER, WIDTH)), ("w2", (WIDTH, INNER)), ("w3", (INNER, WIDTH))):
            linear(f"{layer}.feed_forward.{name}", *shape, bias=False)
        for name in ("attention_norm", "ffn_norm"):
            norm(f"{layer}.{name}", WIDTH, bias=False)
    block = round(1 / config["downsample_ratio"]) ** 2 * WIDTH
    norm("mlp1.0", block)
    linear("mlp1.1", WIDTH, block)
    linear("mlp1.3", WIDTH, WIDTH)
    add("language_model.model.tok_embeddings.weight", vocabulary_size, WIDTH, scale=1.0)
    norm("language_model.model.norm", WIDTH, bias=False)
    linear("language_model.output", vocabulary_size, WIDTH, bias=False)
    return random.found


class Published(Equations):
    """The equations of InternViT (arXiv:2312.14238) and InternLM2 (arXiv:2403.17297), one after the other."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any], context_id: int) -> None:
        super().__init__(weights)
        self.config, self.vision, self.context_id = config, config["vision_config"], context_id

    def features(self, pixel_values: Tensor) -> Tensor:
        prefix = "vision_model.embeddings"
        kernel, bias = (self.weights[f"{prefix}.patch_embedding.{name}"] for name in ("weight", "bias"))
        patches = functional.conv2d(pixel_values, kernel, bias, stride=PATCH).flatten(2).mT
        first = self.weights[f"{prefix}.class_embedding"].expand(len(patches), 1, -1)
        x = torch.cat((first, patches), dim=1) + self.weights[f"{prefix}.position_embedding"]
        activation = getattr(functional, self.vision["hidden_act"])
        for index in range(LAYERS + 1 + self.config["select_layer"]):
            layer = f"vision_model.encoder.layers.{index}"
            q, k, v = self.linear(f"{layer}.attn.qkv", self.vision_norm(f"{layer}.norm1", x)).chunk(3, dim=-1)
            if self.vision["qk_normalization"]:
                eps = self.vision["layer_norm_eps"]
                q, k = self.rms_norm(f"{layer}.attn.q_norm", q, eps), self.rms_norm(f"{layer}.attn.k_norm", k, eps)
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
            attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
            attention = self.linear(f"{layer}.attn.proj", attention.transpose(1, 2).flatten(2))
            x = x + attention * self.weights[f"{layer}.ls1"]
            inner = self.linear(f"{layer}.mlp.fc1", self.vision_norm(f"{layer}.norm2", x))
            x = x + self.linear(f"{layer}.mlp.fc2", activation(inner)) * self.weights[f"{layer}.ls2"]
        side, block = TILE // PATCH, round(1 / self.config["downsample_ratio"])
        grid = x[:, 1:].unflatten(1, (side, side))
        joined = [grid[:, row::block, column::block] for row in range(block) for column in range(block)]
        tokens = self.layer_norm("mlp1.0", torch.cat(joined, dim=-1).flatten(1, 2), 1e-5)
        return self.linear("mlp1.3", functional.gelu(self.linear("mlp1.1", tokens)))

    def vision_norm(self, name: str, x: Tensor) -> Tensor:
        norm = {"layer_norm": self.layer_norm, "rms_norm": self.rms_norm}[self.vision["norm_type"]]
        return norm(name, x, self.vision["layer_norm_eps"])

    def rotated(self, x: Tensor) -> Tensor:
        """(length, heads, dim): the pairs (i, i + dim/2) turned by position · θ^(−2i/dim)."""
        half = x.shape[-1] // 2
        angle = torch.arange(len(x))[:, None, None] * 1e6 ** -(torch.arange(half) / half)
        return turned(x, angle)

    def logits(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        x = self.weights["language_model.model.tok_embeddings.weight"][input_ids[0]].clone()
        if pixel_values is not None:
            x[input_ids[0] == self.context_id] = self.features(pixel_values).flatten(0, 1)
        group, dim = HEADS // KV_HEADS, WIDTH // HEADS
        for index in range(LAYERS):
            layer = f"language_model.model.layers.{index}"
            fused = self.linear(f"{layer}.attention.wqkv", self.rms_norm(f"{layer}.attention_norm", x))
            fused = fused.unflatten(-1, (KV_HEADS, group + 2, dim))
            q = self.rotated(fused[:, :, :group].flatten(1, 2)).transpose(0, 1)
            k = self.rotated(fused[:, :, -2]).transpose(0, 1).repeat_interleave(group, dim=0)
            v = fused[:, :, -1].transpose(0, 1).repeat_interleave(group, dim=0)
            unseen = torch.full((len(x), len(x)), -math.inf).triu(1)
            attention = (q @ k.mT / math.sqrt(dim) + unseen).softmax(-1) @ v
            x = x + self.linear(f"{layer}.attention.wo", attention.transpose(0, 1).flatten(1))
            inner = self.rms_norm(f"{layer}.ffn_norm", x)
            gate = functional.silu(self.linear(f"{layer}.feed_forward.w1", inner))
            x = x + self.linear(f"{layer}.feed_forward.w2", gate * self.linear(f"{layer}.feed_forward.w3", inner))
        return self.linear("language_model.output", self.rms_norm("language_model.model.norm", x))
