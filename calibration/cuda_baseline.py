"""The PyTorch baselines on an NVIDIA GPU in float16: eager, in a CUDA graph, through torch.compile, and fake-quant.

A decode step keeps token, position and KV cache on the GPU, as the TensorRT runtime does, so that engines are compared
with the best that PyTorch does and not with its waiting for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..artifact import CROSSED, Artifact, ComponentSpec, KvSpec
from ..exporter import golden
from ..exporter.checkpoint import load_components
from ..exporter.family import Components
from ..exporter.matching import Encoders
from ..runtime.matching import Matcher
from ..runtime.runner import Array
from ..runtime.session import Session
from ..runtime.tensorrt_decoder import STRIDE
from .fake_quant import apply_plan
from .plan import read_plan

T = TypeVar("T")
Made = Tensor | tuple[Tensor, ...]  # of a component with one output, or with several


def open_session(
    artifact: Artifact, recipe: str, mode: str, threads: int = 0, where: str = "cuda"
) -> Session | Matcher:
    """The artefact's model in float16 on GPU 0; `mode` is `eager`, `graph` or `compile`, `recipe` is `fp32` for float
    or a plan's."""
    plan = None if recipe == "fp32" else read_plan(artifact, recipe)
    if threads:
        torch.set_num_threads(threads)
    components = load_components(artifact)
    if plan is not None:
        components = components.map(lambda name, module: apply_plan(module, plan, name))
    specs = artifact.manifest.components
    halves = components.map(lambda name, module: halved(module).to(where))
    if isinstance(halves, Encoders):
        vision = GpuRunner(halves.vision_encoder, specs["vision_encoder"], mode, where)
        text = GpuRunner(halves.text_encoder, specs["text_encoder"], mode, where, dynamic=None)
        matcher = Matcher(artifact, vision, text)
        for case in golden.read(artifact)[0] if mode != "eager" else ():
            matcher.text_features([case["prompt"]])  # texts of that length are captured before anything is timed
        return matcher
    return Session(
        artifact,
        vision=GpuRunner(halves.vision_encoder, specs["vision_encoder"], mode, where),
        embed=GpuRunner(halves.embed_tokens, specs["embed_tokens"], "eager", where),
        decoder=GpuDecoder(halves, specs, artifact.manifest.kv, mode, where),
        fusion=None if halves.fusion is None else GpuRunner(halves.fusion, specs["fusion"], mode, where),
    )


def halved(module: nn.Module) -> nn.Module:
    """The module in float16 as transformers loads one: a rotation's frequencies stay float32, for their angles at
    positions far on are too large for float16."""
    exact = {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    module.half()
    for name, buffer in exact.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer)
    return module


class GpuRunner:
    """A component without state, float32 on the host and float16 on the GPU. `dynamic` is torch.compile's: False
    compiles for every shape, of which it takes eight and runs further ones uncompiled; None soon compiles for all."""

    def __init__(
        self, component: nn.Module, spec: ComponentSpec, mode: str, where: str, dynamic: bool | None = False
    ) -> None:
        self._component = torch.compile(component, dynamic=dynamic) if mode == "compile" else component
        self._spec, self._mode, self._where = spec, mode, where
        self._graphs: dict[tuple[torch.Size, ...], tuple[list[Tensor], Made, Callable[[], None]]] = {}

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arrays = [np.ascontiguousarray(inputs[tensor.name]) for tensor in self._spec.inputs]
        values = [torch.from_numpy(array).to(self._where) for array in arrays]
        values = [value.half() if value.is_floating_point() else value for value in values]
        if self._mode == "eager":
            made = self._component(*values)
        else:
            shapes = tuple(value.shape for value in values)
            if shapes not in self._graphs:
                copies = [value.clone() for value in values]
                self._graphs[shapes] = (copies, *_captured(lambda: self._component(*copies)))
            fixed, made, launch = self._graphs[shapes]
            for target, value in zip(fixed, values, strict=True):
                target.copy_(value)
            launch()
        made = (made,) if isinstance(made, Tensor) else made
        return {tensor.name: x.float().cpu().numpy() for tensor, x in zip(self._spec.outputs, made, strict=True)}


class GpuDecoder:
    """The decoder over a cache on the GPU; a step looks the token up, runs, and chooses the next one there. What a
    decoder takes further is there as well, by the rules of `runner.HostDecoder`."""

    stride = STRIDE

    def __init__(
        self, parts: Components, specs: Mapping[str, ComponentSpec], kv: KvSpec, mode: str, where: str
    ) -> None:
        self.capacity, self._where = kv.capacity, where
        self._embed, self._decoder = parts.embed_tokens, parts.decoder
        self._embeds = [tensor.name for tensor in specs["embed_tokens"].outputs]
        named = {tensor.name: tensor for tensor in specs["decoder"].inputs}
        self._rows = [int(size) for size in named["position_ids"].shape[:-1]]  # of the positions that a token has
        self._kept: dict[str, Tensor] = {}  # what every step takes as it is
        shape = (1, kv.kv_heads, kv.capacity, kv.head_dim)
        self._past = [torch.zeros(shape, dtype=torch.float16, device=where) for _ in range(2 * kv.layers)]
        self._token, self._position = (torch.zeros(1, dtype=torch.long, device=where) for _ in range(2))
        self._zero, self._ahead = (torch.zeros(1, dtype=torch.long, device=where) for _ in range(2))
        if "prefix_length" in named:
            self._kept["prefix_length"] = self._zero  # a new token sees all before it anyway
        self._logits: Tensor = torch.empty(0)
        self._step_logits: Tensor | None = None
        self._forward = torch.compile(self._one, dynamic=False) if mode == "compile" else self._one
        self._mode, self._launch = mode, self._step

    @torch.inference_mode()
    def prefill(self, inputs_embeds: NDArray[np.float32], **further: Array) -> int:
        length = inputs_embeds.shape[1]
        given = {name: self._there(array) for name, array in further.items()}
        positions = given.pop("position_ids", torch.arange(length, device=self._where)[None])
        self._ahead.copy_(positions.max() + 1 - length)
        for name in given.keys() & set(CROSSED):
            if name in self._kept and self._kept[name].shape == given[name].shape:
                self._kept[name].copy_(given[name])
            else:
                self._kept[name], self._step_logits = given[name], None  # what was captured has another's address
        embeds, last = self._there(inputs_embeds), self._zero + (length - 1)
        self._logits, _ = self._decoder(embeds, positions, self._zero, last, self._past, **given)
        if self._mode != "eager" and self._step_logits is None:
            self._capture()
        self._token.copy_(self._logits.argmax(-1))
        self._position.fill_(length)
        return int(self._token)

    @torch.inference_mode()
    def decode(self, count: int) -> list[int]:
        tokens = []
        for _ in range(count):
            self._launch()
            tokens.append(self._token.clone())
        self._logits = self._step_logits if self._step_logits is not None else self._logits
        return [int(token) for token in torch.cat(tokens).cpu()]

    def feed(self, token: int) -> int:
        self._token.fill_(token)
        return self.decode(1)[0]

    def logits(self) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._logits[0].float().cpu().numpy()
        return values

    def _there(self, array: Array) -> Tensor:
        """On the GPU, a float as float16."""
        value = torch.from_numpy(np.ascontiguousarray(array)).to(self._where)
        return value.half() if value.is_floating_point() else value

    def _one(self, token: Tensor, position: Tensor) -> Tensor:
        made: Made = self._embed(token[None])
        further = dict(zip(self._embeds, (made,) if isinstance(made, Tensor) else made, strict=True)) | self._kept
        embeds, positions = further.pop("inputs_embeds"), (position + self._ahead).expand(*self._rows, 1)
        logits: Tensor = self._decoder(embeds, positions, position, self._zero, self._past, **further)[0]
        return logits

    def _step(self) -> None:
        self._logits = self._forward(self._token, self._position)
        self._token.copy_(self._logits.argmax(-1))
        self._position.add_(1)

    def _capture(self) -> None:
        """The step as a graph; warming up writes at the cache's end, which is written again before it is read."""
        logits = self._logits

        def step() -> Tensor:
            self._step()
            return self._logits

        self._step_logits, self._launch = _captured(step, before=lambda: self._position.fill_(self.capacity - 1))
        self._logits = logits


def _captured(run: Callable[[], T], before: Callable[[], object] = lambda: None) -> tuple[T, Callable[[], None]]:
    """What `run` does as a CUDA graph, after three runs beside it (PyTorch's own recipe, "CUDA semantics"); its output
    and what launches it. `before` is called ahead of each of the runs."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay
