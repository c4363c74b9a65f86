"""MobileNet-V5's encoder against what timm 1.0.31 gives, which is not installed: its names, and numbers of a small one.

TIMM's values are those of timm's MobileNetV5Encoder with the architecture of `small()`, `pad_type="same"`, and the
weights and pictures below.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vlmc.exporter.mobilenet_v5 import LAYOUTS, Attend, Bottleneck, Edge, Layout, MobileNetV5

TIMM = {  # by picture's and features' side; every 500th of 2048 features in a corner, of two pictures
    (64, 2): [-2.304282, 1.423009, 0.394443, 0.699552, -1.991854, -1.838828, 0.600019, 0.061432, 0.837994, -0.499908],
    (72, 5): [-1.624830, 1.824723, 0.405164, 0.598134, -3.217993, -1.251651, 0.614528, 0.391328, 0.521614, -0.851491],
}


def small(image_size: int, side: int) -> Layout:
    """In timm's notation: er_r1_k3_s2_e4_c16, er_r1_k3_s1_e4_c16; uir_r1_a3_k5_s2_e6_c24, uir_r1_a5_k0_s1_e4_c24;
    uir_r1_a5_k5_s2_e6_c32, uir_r1_a0_k0_s1_e1_c32, mqa_r1_k3_h3_v2_s1_d16_c32, uir_r1_a0_k0_s1_e2_c32;
    uir_r1_a5_k5_s2_e6_c40, mqa_r1_k3_h2_s1_d24_c40, uir_r1_a0_k0_s1_e2_c40; with a stem of 8."""
    stages = (
        (Edge(16, stride=2), Edge(16)),
        (Bottleneck(24, 6, start=3, middle=5, stride=2), Bottleneck(24, 4, start=5)),
        (
            Bottleneck(32, 6, start=5, middle=5, stride=2),
            Bottleneck(32, 1),
            Attend(32, heads=3, width=16, stride=2),
            Bottleneck(32, 2),
        ),
        (Bottleneck(40, 6, start=5, middle=5, stride=2), Attend(40, heads=2, width=24), Bottleneck(40, 2)),
    )
    return Layout(stem=8, stages=stages, features=2048, side=side, image_size=image_size)


def wave(shape: tuple[int, ...], seed: int) -> Tensor:
    """Values in -1 … 1, the same everywhere."""
    places = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(places * places * 0.7 + places * 1.3 + seed).astype(np.float32)).reshape(shape)


def fill(model: nn.Module) -> None:
    """Vectors (norms, scales, a bias) around 1, kernels so large that nothing vanishes."""
    with torch.no_grad():
        for seed, (_, weight) in enumerate(sorted(model.named_parameters())):
            noise = wave(tuple(weight.shape), seed)
            weight.copy_(1 + noise / 2 if weight.ndim == 1 else noise * 2 / weight[0].numel() ** 0.5)


def test_the_tensors_are_named_and_shaped_as_timms() -> None:
    with torch.device("meta"):
        model = MobileNetV5(LAYOUTS["mobilenetv5_300m_enc"])
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items())
    assert len(lines) == 548
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "4a724e591a0cd00160206e8bd2b99e8447c3b9dc56d72fff7dc54f13a1ca5753"
    assert sum(weight.numel() for weight in model.parameters()) == 294_126_912


def test_a_picture_becomes_as_many_features_as_gemma_3n_has_tokens() -> None:
    layout = LAYOUTS["mobilenetv5_300m_enc"]
    with torch.device("meta"):
        features = MobileNetV5(layout)(torch.zeros(2, 3, layout.image_size, layout.image_size))
    assert features.shape == (2, 2048, 16, 16)


@pytest.mark.parametrize(("image_size", "side"), TIMM)
def test_the_features_are_timms(image_size: int, side: int) -> None:
    """72 pixels become 36, 18, 9, 5 and 3 places a side: the padding is odd, and nothing is pooled."""
    model = MobileNetV5(small(image_size, side)).eval()
    fill(model)
    pictures = wave((2, 3, image_size, image_size), 0) / 2 + 0.5
    with torch.inference_mode():
        features = model(pictures)
    assert features.shape == (2, 2048, side, side)
    found = features[:, ::500, 0, -1].flatten()
    torch.testing.assert_close(found, torch.tensor(TIMM[image_size, side]), atol=2e-5, rtol=1e-4)
    expected = torch.stack([model(picture[None])[0] for picture in pictures])
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
