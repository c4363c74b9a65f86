"""Running the whole VLM in float over a calibration set, and seeing what its layers get and, where asked, make.

Phases are observed apart: `vision`; `prefill`, the prompt with the picture's features in it; `decode`, what follows;
of a model that matches `vision` and `text`.
A row with an answer is decoded along it: all its tokens are read in one call behind the prompt, where the causal mask
gives each the activations that it would have had in a step of its own. Without an answer the model's own greedy answer
is followed, GREEDY tokens at most. So what decoding shows depends on the set, not on how well the model answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..console import Report
from ..errors import VlmcError
from ..exporter.family import Components
from ..exporter.matching import Encoders
from ..runtime.images import open_image
from ..runtime.matching import Matcher
from ..runtime.runner import HostDecoder
from ..runtime.session import Session
from .observers import ChannelPeaks, Histogram
from .sets import CalibrationSet, Row
from .smoothing import Group, Trace

GREEDY = 32
PHASES = {"vision_encoder": "vision", "fusion": "prefill", "text_encoder": "text"}  # a decoder's depends on its place
Layer = nn.Linear | nn.Conv2d
Place = tuple[str, Literal["input", "output"]]  # a layer, and which side of it
Observe = Callable[[Place, str, NDArray[np.float32]], None]  # where, phase, what is there (rows, channels)


def layers_of(components: Components | Encoders) -> dict[str, Layer]:
    """Every layer that can be quantised, by COMPONENT/MODULE.PATH."""
    return {
        f"{name}/{path}": module
        for name, component in components.items()
        for path, module in component.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


class Observation:
    """A session that runs `components` in PyTorch, and the set that it is asked. Each method is one pass over it;
    what they return is by place and phase, and lacks the layers that never ran. `outputs`: the layers of which the
    output is observed too, not the input alone."""

    def __init__(
        self,
        session: Session | Matcher,
        components: Components | Encoders,
        data: CalibrationSet,
        report: Report,
        outputs: Collection[str] = (),
    ) -> None:
        self._session, self._components, self._data, self._report = session, components, data, report
        self._outputs = outputs

    def groups(self) -> list[Group]:
        """Which module makes the input of which layers. The first row's prompt is enough to see it."""
        trace = Trace(dict(self._components.items()))
        row = self._data.rows[0]
        with trace.watching():
            self._answer(row, first=True)
        return trace.groups()

    def peaks(self) -> dict[Place, dict[str, NDArray[np.float32]]]:
        """The largest magnitude of every channel, (channels,); of all that a convolution takes or makes, (1,)."""
        seen: dict[Place, dict[str, ChannelPeaks]] = {}

        def observe(place: Place, phase: str, values: NDArray[np.float32]) -> None:
            seen.setdefault(place, {}).setdefault(phase, ChannelPeaks(values.shape[-1])).add(values)

        self._pass("observing channels", observe)
        return {place: {phase: one.peaks for phase, one in phases.items()} for place, phases in seen.items()}

    def histograms(self, smoothing: Mapping[Place, NDArray[np.float32]]) -> dict[Place, dict[str, Histogram]]:
        """Of every place, each channel divided by the place's `smoothing` where it has one."""
        seen: dict[Place, dict[str, Histogram]] = {}

        def observe(place: Place, phase: str, values: NDArray[np.float32]) -> None:
            smoothed = values / smoothing[place] if place in smoothing else values
            seen.setdefault(place, {}).setdefault(phase, Histogram()).add(smoothed)

        self._pass("observing ranges", observe)
        return seen

    def _pass(self, what: str, observe: Observe) -> None:
        rows = self._data.rows
        with _watching(self._components, self._outputs, observe):
            for index, row in enumerate(rows):
                self._report(what, index, len(rows))
                self._answer(row)
        self._report(what, len(rows), len(rows))

    def _answer(self, row: Row, first: bool = False) -> None:
        """The row's question, and its answer unless only the first token is wanted."""
        session = self._session
        if isinstance(session, Matcher):
            session.match([open_image(row.image)], [row.prompt])
            return
        inputs = session.prepare([open_image(row.image)], row.prompt)
        tokens = session.generate(inputs, max_new_tokens=GREEDY)
        if first:
            next(tokens, None)
            return
        decoder = session.decoder
        if not row.answer:
            for _ in tokens:
                pass
            return
        next(tokens, None)
        start = len(inputs.input_ids)
        ids = session.tokenizer.encode(" " + row.answer)[: decoder.capacity - start]
        assert isinstance(decoder, HostDecoder)
        if len(ids):
            decoder.read(ids, start)


@contextmanager
def _watching(components: Components | Encoders, outputs: Collection[str], observe: Observe) -> Iterator[None]:
    """While open, `observe` gets every layer's input, and the output of those in `outputs`. A decoder that writes
    behind position 0 is decoding."""
    phase, parts, layers = "", components.items(), layers_of(components)

    def enter(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal phase
            phase = PHASES.get(name) or ("decode" if int(args[2]) else "prefill")  # args[2]: write_index

        return hook

    def see(place: Place, module: nn.Module, tensor: Tensor) -> None:
        channels = tensor.shape[-1] if isinstance(module, nn.Linear) else 1
        try:
            observe(place, phase, tensor.numpy().reshape(-1, channels))
        except VlmcError as error:
            raise VlmcError(f"{place[0]}, {phase}: {error.what}", fix=error.fix) from None

    def before(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: see((path, "input"), module, args[0])

    def behind(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: see((path, "output"), module, output)

    hooks = [
        *(part.register_forward_pre_hook(enter(name)) for name, part in parts if name in (*PHASES, "decoder")),
        *(layer.register_forward_pre_hook(before(path)) for path, layer in layers.items()),
        *(layers[path].register_forward_hook(behind(path)) for path in outputs),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
