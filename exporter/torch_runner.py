"""A family's PyTorch components behind the runtime's contract: what goldens are made with, and the baselines."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..artifact import Artifact, ComponentSpec, KvSpec
from ..runtime.runner import Array, HostDecoder, Runner
from ..runtime.session import Session
from .family import Components


class TorchRunner:
    """A component without state; `spec` names its inputs and outputs in order."""

    def __init__(self, component: nn.Module, spec: ComponentSpec) -> None:
        self._component, self._spec = component, spec

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = [torch.from_numpy(np.ascontiguousarray(inputs[tensor.name])) for tensor in self._spec.inputs]
        made = self._component(*values)
        made = (made,) if isinstance(made, Tensor) else made
        return {tensor.name: value.numpy() for tensor, value in zip(self._spec.outputs, made, strict=True)}


class TorchDecoder(HostDecoder):
    """The decoder with its cache, which eager PyTorch updates in place."""

    def __init__(self, decoder: nn.Module, kv: KvSpec, embed: Runner) -> None:
        super().__init__(kv.capacity, embed)
        self._decoder = decoder
        shape = (1, kv.kv_heads, kv.capacity, kv.head_dim)
        self._past = [torch.zeros(shape) for _ in range(2 * kv.layers)]

    @torch.inference_mode()
    def forward(self, inputs_embeds: NDArray[np.float32], start: int, **further: Array) -> NDArray[np.float32]:
        length = inputs_embeds.shape[1]
        given = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in further.items()}
        positions = given.pop("position_ids", torch.arange(start, start + length)[None])
        logits, self._past = self._decoder(
            torch.from_numpy(np.ascontiguousarray(inputs_embeds)),
            positions,
            torch.tensor([start]),
            torch.tensor([length - 1]),
            self._past,
            **given,
        )
        values: NDArray[np.float32] = logits[0].numpy()
        return values


def torch_session(artifact: Artifact, components: Components) -> Session:
    """A session that runs these components in eager PyTorch: the reference of everything."""
    specs = artifact.manifest.components
    runners = {name: TorchRunner(part, specs[name]) for name, part in components.items() if name != "decoder"}
    return Session(
        artifact,
        vision=runners["vision_encoder"],
        embed=runners["embed_tokens"],
        decoder=TorchDecoder(components.decoder, artifact.manifest.kv, runners["embed_tokens"]),
        fusion=runners.get("fusion"),
    )
