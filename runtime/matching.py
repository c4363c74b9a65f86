"""A loaded pair of encoders: pictures and texts in, how near each is to each out (CLIP).

The counterpart of `session.py` for models that write nothing. Choosing the text that fits a picture best is zero-shot
classification; choosing the picture that fits a text best is retrieval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..artifact import Artifact
from ..errors import VlmcError
from . import backends, preprocessing, prompt
from .runner import Runner, require_inputs

TEXTS = 32  # that are read at once: enough for a long list to be fast, few enough to fit a small board


@dataclass(frozen=True)
class Matches:
    """`cosines`: float32 (pictures, texts), between -1 and 1."""

    cosines: NDArray[np.float32]
    logit_scale: float

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(pictures, texts): how likely each text is for the picture, were one of them right. Rows add up to 1."""
        logits = self.logit_scale * self.cosines.astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def ranking(self, text: int) -> list[int]:
        """The pictures by how near they are to the text, the nearest first."""
        return [int(picture) for picture in np.argsort(-self.cosines[:, text], kind="stable")]


@dataclass
class Timings:
    """Seconds of the last call of `Matcher.match`."""

    preprocess: float = 0.0
    vision: float = 0.0
    text: float = 0.0


class Matcher:
    """The two encoders of one artefact, each on its backend."""

    def __init__(self, artifact: Artifact, vision: Runner, text: Runner) -> None:
        spec = artifact.manifest.matching
        if spec is None:
            raise VlmcError(f"{artifact.manifest.name} answers questions and matches nothing", fix="ask it a question")
        self.artifact, self.spec, self.vision, self.text = artifact, spec, vision, text
        self.timings = Timings()
        self.tokenizer = prompt.Tokenizer(artifact.path_of("tokenizer.json"))
        self.preprocess = preprocessing.load(artifact.manifest.preprocessing)

    def match(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Matches:
        """Every picture with every text. Without a picture or without a text there is nothing to match: a VlmcError."""
        if not images or not texts:
            raise VlmcError(
                "Matching needs pictures and texts",
                found=f"{len(images)} pictures, {len(texts)} texts",
                fix="give at least one of each; a text with --prompt",
            )
        self.timings = Timings()
        return Matches(self.image_features(images) @ self.text_features(texts).T, self.spec.logit_scale)

    def image_features(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(pictures, dim), each of length 1. One picture at a time: an engine may hold no more."""
        features = []
        for image in images:
            start = perf_counter()
            inputs = self.preprocess([image]).vision
            require_inputs(self.artifact.manifest.components["vision_encoder"], inputs)
            between = perf_counter()
            features.append(self.vision.run(inputs)["image_features"])
            self.timings.preprocess += between - start
            self.timings.vision += perf_counter() - between
        return np.concatenate(features)

    def text_features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, dim), each of length 1."""
        features = []
        for first in range(0, len(texts), TEXTS):
            start = perf_counter()
            ids = self.encode(texts[first : first + TEXTS])
            between = perf_counter()
            features.append(self.text.run({"input_ids": ids})["text_features"])
            self.timings.preprocess += between - start
            self.timings.text += perf_counter() - between
        return np.concatenate(features)

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids (texts, length) with the special ones; what is too long for the model is cut off, and the shorter
        ones are filled up to the longest, as CLIPTokenizer does both."""
        spec = self.spec
        room = spec.text_length - len(spec.begin_token_ids) - len(spec.end_token_ids)
        rows = [
            [*spec.begin_token_ids, *self.tokenizer.encode(text)[:room].tolist(), *spec.end_token_ids] for text in texts
        ]
        ids = np.full((len(rows), max(1, *(len(row) for row in rows))), spec.pad_token_id, np.int64)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = row
        prompt.require_known(ids, self.artifact.manifest.vocab_size)
        return ids


def open_matcher(artifact: Artifact, device: str, engines: Mapping[str, str], threads: int = 0) -> Matcher:
    """Loads the named engine (BACKEND-PRECISION) of both encoders; `threads` 0 means as many as there are cores."""
    vision, text = (
        backends.load_runner(artifact, device, component, engines[component], threads)
        for component in ("vision_encoder", "text_encoder")
    )
    return Matcher(artifact, vision, text)


def rows(pictures: Sequence[str], texts: Sequence[str], matches: Matches) -> Iterator[dict[str, Any]]:
    """What `vlmc run` prints, row by row: for each picture its texts, the likeliest first. For a single text, which
    would always be 100 % likely, the pictures, the nearest first, by their cosine alone."""
    if len(texts) == 1:
        for picture in matches.ranking(0):
            yield {"picture": pictures[picture], "text": texts[0], "cosine": float(matches.cosines[picture, 0])}
        return
    for picture, (chances, cosines) in enumerate(zip(matches.probabilities, matches.cosines, strict=True)):
        for text in np.argsort(-chances, kind="stable"):
            yield {
                "picture": pictures[picture],
                "text": texts[text],
                "cosine": float(cosines[text]),
                "probability": float(chances[text]),
            }
