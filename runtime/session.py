"""A loaded VLM: picture and question in, tokens out, with the seconds that each part took.

The same `generate()` drives every backend and every PyTorch baseline, so all are measured by the same clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact import Artifact
from ..errors import VlmcError
from . import backends, preprocessing, prompt
from .runner import Decoder, Runner


@dataclass(frozen=True)
class Inputs:
    """What the engines take: pixel_values float32 (tiles, 3, height, width), or None without a picture, and
    input_ids int64 (length,), in which one id stands for each row of image features."""

    pixel_values: NDArray[np.float32] | None
    input_ids: NDArray[np.int64]


@dataclass
class Timings:
    """Seconds of the last call. `first_token` is vision and prefill; `decode` has one entry a further token."""

    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first_token(self) -> float:
        return self.vision + self.prefill


class Session:
    """The components of one artefact, each on its backend."""

    def __init__(self, artifact: Artifact, vision: Runner, embed: Runner, decoder: Decoder) -> None:
        self.artifact, self.vision, self.embed, self.decoder = artifact, vision, embed, decoder
        self.timings = Timings()
        self.tokenizer = prompt.Tokenizer(artifact.path_of("tokenizer.json"))
        self.preprocess = preprocessing.load(artifact.manifest.preprocessing)
        self._image_token_id = self.tokenizer.token_id(artifact.manifest.prompt.image_token)

    def prepare(self, images: Sequence[Image.Image], text: str) -> Inputs:
        """Pixels and token ids for RGB pictures and a question; timed as `preprocess`."""
        start = perf_counter()
        prepared = self.preprocess(images) if images else None
        image_texts = prepared.image_texts if prepared else ()
        ids = self.tokenizer.encode(prompt.render(self.artifact.manifest.prompt, text, image_texts))
        self.timings = Timings(preprocess=perf_counter() - start)
        return Inputs(prepared.pixel_values if prepared else None, ids)

    def generate(self, inputs: Inputs, max_new_tokens: int = 128, ignore_eos: bool = False) -> Iterator[int]:
        """Greedy tokens up to the end of text (not given out), `max_new_tokens`, or a full KV cache."""
        if not max_new_tokens:
            return
        timings = self.timings = Timings(preprocess=self.timings.preprocess)
        self.check_length(inputs)
        start = perf_counter()
        features = self.vision.run({"pixel_values": inputs.pixel_values}) if inputs.pixel_values is not None else {}
        timings.vision = perf_counter() - start
        start = perf_counter()
        embeds = self.embed_prompt(inputs.input_ids, features.get("image_features"))
        token = self.decoder.prefill(embeds)
        timings.prefill = perf_counter() - start
        room = self.decoder.capacity - len(inputs.input_ids)
        end = () if ignore_eos else self.artifact.manifest.prompt.eos_token_ids
        produced, last = 0, min(max_new_tokens, room + 1)
        tokens = [token]
        while True:
            for token in tokens:
                if token in end:
                    return
                produced += 1
                timings.tokens = produced
                yield token
            count = min(self.decoder.stride, last - produced)
            if not count:
                return
            start = perf_counter()
            tokens = self.decoder.decode(count)
            timings.decode += [(perf_counter() - start) / count] * count

    def answer(self, images: Sequence[Image.Image], text: str, max_new_tokens: int = 128) -> Iterator[str]:
        """The answer, streamed in printable pieces."""
        yield from self.tokenizer.stream(self.generate(self.prepare(images, text), max_new_tokens))

    def check_length(self, inputs: Inputs) -> None:
        """Raises where the prompt does not fit the KV cache."""
        if len(inputs.input_ids) > self.decoder.capacity:
            raise VlmcError(
                "The prompt is longer than the KV cache",
                found=f"{len(inputs.input_ids)} tokens, pictures included",
                expected=f"at most {self.decoder.capacity}",
                fix="ask with fewer words or a smaller picture, or export with a larger --capacity",
            )

    def embed_prompt(self, ids: NDArray[np.int64], features: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Embeddings (1, length, hidden), with image features in the places of the image token."""
        embeds = self.embed.run({"input_ids": ids[None]})["inputs_embeds"]
        places = np.flatnonzero(ids == self._image_token_id)
        rows = 0 if features is None else features.shape[0] * features.shape[1]
        if len(places) != rows:
            raise VlmcError(
                "The prompt holds another number of image tokens than the pictures have features",
                found=f"{len(places)} image tokens, {rows} features",
                fix=f"take {self.artifact.manifest.prompt.image_token!r} out of the question",
            )
        if features is not None:
            embeds = np.array(embeds)
            embeds[0, places] = features.reshape(rows, -1)
        return embeds


def open_session(artifact: Artifact, device: str, engines: Mapping[str, str], threads: int = 0) -> Session:
    """Loads the named engine (BACKEND-PRECISION) of every component; `threads` 0 means as many as there are cores."""
    embed = backends.load_runner(artifact, device, "embed_tokens", engines["embed_tokens"], threads=1)  # a look-up
    return Session(
        artifact,
        vision=backends.load_runner(artifact, device, "vision_encoder", engines["vision_encoder"], threads),
        embed=embed,
        decoder=backends.load_decoder(artifact, device, engines["decoder"], embed, threads),
    )
