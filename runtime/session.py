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

from ..artifact import CROSSED, Artifact
from ..errors import VlmcError
from . import backends, preprocessing, prompt
from .runner import Array, Decoder, Runner, require_inputs


@dataclass(frozen=True)
class Inputs:
    """What the engines take: `vision` by name, empty without a picture; input_ids int64 (length,), in which one id
    stands for each row of image features; `rows`: which these are (`Prepared.rows`); `further`: what the decoder takes
    beside embeddings, by name; `question`: int64 (1, length), where the fusion reads it and the decoder only what its
    states are."""

    vision: Mapping[str, Array]
    input_ids: NDArray[np.int64]
    rows: NDArray[np.int64] | None = None
    further: Mapping[str, Array] = field(default_factory=dict)
    question: NDArray[np.int64] | None = None


@dataclass
class Timings:
    """Seconds of the last call. `first_token` is vision and prefill, which fusion and the prompt's embeddings count to;
    `decode` has one entry a token that was decoded after it, also behind the end of text (`Decoder.stride`)."""

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

    def __init__(
        self, artifact: Artifact, vision: Runner, embed: Runner, decoder: Decoder, fusion: Runner | None = None
    ) -> None:
        self.artifact, self.vision, self.embed, self.decoder = artifact, vision, embed, decoder
        self.fusion = fusion
        self.timings = Timings()
        self.tokenizer = prompt.Tokenizer(artifact.path_of("tokenizer.json"))
        self.preprocess = preprocessing.load(artifact.manifest.preprocessing)
        specs = artifact.manifest.components
        further = specs["decoder"].further_inputs() if "decoder" in specs else ()
        self._crossed = next((name for name in CROSSED if name in further), "")
        self._asks_fusion = "fusion" in specs and "question_ids" in [tensor.name for tensor in specs["fusion"].inputs]
        self._image_token_id = self.tokenizer.token_id(artifact.manifest.prompt.image_token)

    def prepare(self, images: Sequence[Image.Image], text: str) -> Inputs:
        """What the engines take for RGB pictures and a question; timed as `preprocess`."""
        start = perf_counter()
        prepared = self.preprocess(images) if images else None
        if prepared:
            require_inputs(self.artifact.manifest.components["vision_encoder"], prepared.vision)
        image_texts = prepared.image_texts if prepared else ()
        ids = self.tokenizer.encode(prompt.render(self.artifact.manifest.prompt, text, image_texts))
        prompt.require_known(ids, self.artifact.manifest.vocab_size)
        places, further = ids == self._image_token_id, dict[str, Array]()
        if isinstance(self.preprocess, preprocessing.Positions):
            further["position_ids"] = self.preprocess.positions(places, prepared)[:, None]
        if isinstance(self.preprocess, preprocessing.Prefix):
            further["prefix_length"] = np.array([self.preprocess.prefix_length(places, prepared)], np.int64)
        question = None
        if self._asks_fusion:  # the last token begins the answer
            question, ids = ids[None, :-1], ids[-1:]
        self.timings = Timings(preprocess=perf_counter() - start)
        return Inputs(prepared.vision if prepared else {}, ids, prepared.rows if prepared else None, further, question)

    def generate(self, inputs: Inputs, max_new_tokens: int = 128, ignore_eos: bool = False) -> Iterator[int]:
        """Greedy tokens up to the end of text (not given out), `max_new_tokens`, or a full KV cache."""
        if not max_new_tokens:
            return
        timings = self.timings = Timings(preprocess=self.timings.preprocess)
        self.check_length(inputs)
        start = perf_counter()
        features = self.vision.run(inputs.vision) if inputs.vision else {}
        timings.vision = perf_counter() - start
        start = perf_counter()
        read = self.embed_prompt(inputs, features.get("image_features"))
        token = self.decoder.prefill(read.pop("inputs_embeds"), **read)
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
        length = max(len(inputs.input_ids), 0 if inputs.question is None else inputs.question.shape[1])
        if length > self.decoder.capacity:
            raise VlmcError(
                "The prompt is longer than the KV cache",
                found=f"{length} tokens, pictures included",
                expected=f"at most {self.decoder.capacity}",
                fix="ask with fewer words or a smaller picture, or export with a larger --capacity",
            )

    def embed_prompt(self, inputs: Inputs, features: NDArray[np.float32] | None) -> dict[str, Array]:
        """What `Decoder.prefill` takes: inputs_embeds (1, length, hidden), with image features (…, hidden) in the
        places of the image token, and what further there is."""
        made = dict(self.embed.run({"input_ids": inputs.input_ids[None]}))
        if self._crossed:
            if features is None:
                raise VlmcError("This model only speaks of a picture", found="none", fix="give one")
            if self.fusion is not None:
                fused = self.fusion.run(self.fusion_inputs(inputs, made["inputs_embeds"], features))
                features = fused["fused_image_features"]
            return {**made, **inputs.further, self._crossed: features}
        embeds = made["inputs_embeds"]
        if features is not None:
            embeds = made["inputs_embeds"] = np.array(embeds)
            if self.fusion is not None:
                features = self._fuse(inputs, embeds, features)
        rows = np.empty((0, 0)) if features is None else features.reshape(-1, features.shape[-1])
        if inputs.rows is not None:
            rows = rows[inputs.rows]
        places = self.image_places(inputs)
        if (count := int(places.sum())) != len(rows):
            raise VlmcError(
                "The prompt holds another number of image tokens than the pictures have features",
                found=f"{count} image tokens, {len(rows)} features",
                fix=f"take {self.artifact.manifest.prompt.image_token!r} out of the question",
            )
        if features is not None:
            embeds[0, places] = rows
        return {**made, **inputs.further}

    def image_places(self, inputs: Inputs) -> NDArray[np.bool_]:
        """Where in the prompt (length,) the image tokens are."""
        return np.asarray(inputs.input_ids == self._image_token_id)

    def fusion_inputs(self, inputs: Inputs, embeds: Array, features: Array) -> dict[str, Array]:
        """What the fusion takes of image features and the prompt's embeddings (1, length, hidden)."""
        if inputs.question is not None:
            return {"image_features": features, "question_ids": inputs.question}
        return {"image_features": features, "text_embeds": embeds[:, ~self.image_places(inputs)]}

    def _fuse(self, inputs: Inputs, embeds: Array, features: Array) -> Array:
        """Pictures and text through the fusion: puts the text's new embeddings into their places and returns the new
        image features."""
        assert self.fusion is not None
        fused = self.fusion.run(self.fusion_inputs(inputs, embeds, features))
        embeds[:, ~self.image_places(inputs)] = fused["fused_text_embeds"]
        return fused["fused_image_features"]


def open_session(artifact: Artifact, device: str, engines: Mapping[str, str], threads: int = 0) -> Session:
    """Loads the named engine (BACKEND-PRECISION) of every component; `threads` 0 means as many as there are cores."""
    if "decoder" not in artifact.components:
        what = f"{artifact.manifest.name} matches pictures with texts and answers nothing"
        raise VlmcError(what, fix="give `vlmc run` pictures and several --prompt")
    embed = backends.load_runner(artifact, device, "embed_tokens", engines["embed_tokens"], threads=1)  # a look-up
    fusion = None
    if "fusion" in artifact.components:
        fusion = backends.load_runner(artifact, device, "fusion", engines["fusion"], threads)
    return Session(
        artifact,
        vision=backends.load_runner(artifact, device, "vision_encoder", engines["vision_encoder"], threads),
        embed=embed,
        decoder=backends.load_decoder(artifact, device, engines["decoder"], embed, threads),
        fusion=fusion,
    )
