"""A family's PyTorch components behind the runtime's contract: what goldens are made with, and the baselines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifact import Artifact, KvSpec
from ..runtime.runner import Array, HostDecoder, Runner
from ..runtime.session import Session
from .family import Components


class TorchRunner:
    """A component with one input and one output."""

    def __init__(self, component: nn.Module, output: str) -> None:
        self._component, self._output = component, output

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        (value,) = inputs.values()
        return {self._output: self._component(torch.from_numpy(value)).numpy()}


class TorchDecoder(HostDecoder):
    """The decoder with its cache, which eager PyTorch updates in place."""

    def __init__(self, decoder: nn.Module, kv: KvSpec, embed: Runner) -> None:
        super().__init__(kv.capacity, embed)
        self._decoder = decoder
        shape = (1, kv.kv_heads, kv.capacity, kv.head_dim)
        self._past = [torch.zeros(shape) for _ in range(2 * kv.layers)]

    @torch.inference_mode()
    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        length = inputs_embeds.shape[1]
        logits, self._past = self._decoder(
            torch.from_numpy(np.ascontiguousarray(inputs_embeds)),
            torch.arange(start, start + length)[None],
            torch.tensor([start]),
            torch.tensor([length - 1]),
            self._past,
        )
        values: NDArray[np.float32] = logits[0].numpy()
        return values


def torch_session(artifact: Artifact, components: Components) -> Session:
    """A session that runs these components in eager PyTorch: the reference of everything."""
    embed = TorchRunner(components.embed_tokens, "inputs_embeds")
    return Session(
        artifact,
        vision=TorchRunner(components.vision_encoder, "image_features"),
        embed=embed,
        decoder=TorchDecoder(components.decoder, artifact.manifest.kv, embed),
    )
