"""A question becomes an answer: the same one on every backend, no longer than the cache, and timed part by part."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.exporter.parity import canonical_session
from vlmc.exporter.torch_runner import torch_session
from vlmc.runtime.images import open_image
from vlmc.runtime.session import Inputs, Session, open_session

FLOAT = dict.fromkeys(("vision_encoder", "embed_tokens", "decoder"), "onnxruntime-fp32")
INT8 = FLOAT | {"vision_encoder": "onnxruntime-int8", "decoder": "onnxruntime-int8"}
OPENVINO = FLOAT | {"vision_encoder": "openvino-fp32"}


@pytest.fixture
def session(built: Artifact) -> Session:
    return open_session(Artifact(built.root), "cpu", FLOAT, threads=1)


@pytest.fixture
def inputs(session: Session, built: Artifact) -> Inputs:
    case = golden.read(built)[0][0]
    return session.prepare([open_image(built.root / case["image"])], case["prompt"])


def never_ends(session: Session) -> Session:
    manifest = session.artifact.manifest
    session.artifact.manifest = replace(manifest, prompt=replace(manifest.prompt, eos_token_ids=()))
    return session


# One answer on every backend


@pytest.mark.parametrize("engines", [FLOAT, OPENVINO, None])
def test_every_float_engine_gives_pytorchs_tokens(engines: dict[str, str] | None, built: Artifact) -> None:
    session = open_session(built, "cpu", engines, threads=1) if engines else canonical_session(built)
    for case in golden.read(built)[0]:
        inputs = session.prepare([open_image(built.root / case["image"])], case["prompt"])
        assert list(session.generate(inputs, len(case["tokens"]))) == case["tokens"]


def test_integer_engines_answer_with_nearly_the_same_logits(built: Artifact) -> None:
    """Of random weights nothing more can be asked."""
    session, arrays = open_session(built, "cpu", INT8), golden.read(built)[1]
    inputs = Inputs({"pixel_values": arrays["0.pixel_values"]}, arrays["0.input_ids"])
    next(session.generate(inputs))
    found, exact = session.decoder.logits(), arrays["0.prefill_logits"]
    assert found @ exact / np.linalg.norm(found) / np.linalg.norm(exact) > 0.9


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_question_about_no_picture_or_two(pictures: int, built: Artifact, tiny_components: Any) -> None:
    shown = [open_image(built.root / "golden" / f"{index:02}.png") for index in range(pictures)]
    answers = []
    for session in (torch_session(built, tiny_components), open_session(built, "cpu", FLOAT)):
        inputs = session.prepare(shown, "Which boats?")
        assert bool(inputs.vision) == (pictures > 0)
        answers.append(list(session.generate(inputs, 6, ignore_eos=True)))
        assert (session.timings.vision > 1e-4) == (pictures > 0)
    assert answers[0] == answers[1]


def test_features_take_the_places_of_the_image_token(session: Session, inputs: Inputs) -> None:
    features = np.arange(5 * 4 * 64, dtype=np.float32).reshape(5, 4, 64)
    embeds = session.embed_prompt(inputs, features)["inputs_embeds"]
    places = np.flatnonzero(inputs.input_ids == session.tokenizer.token_id("<image>"))
    np.testing.assert_array_equal(embeds[0, places], features.reshape(20, 64))
    plain = session.embed.run({"input_ids": inputs.input_ids[None]})["inputs_embeds"]
    others = np.setdiff1d(np.arange(embeds.shape[1]), places)
    np.testing.assert_array_equal(embeds[0, others], plain[0, others])


@pytest.mark.parametrize("tiles", [4, 6])
def test_features_that_do_not_fit_the_prompt_are_refused(tiles: int, session: Session, inputs: Inputs) -> None:
    with pytest.raises(VlmcError, match=rf"Found: 20 image tokens, {tiles * 4} features"):
        session.embed_prompt(inputs, np.zeros((tiles, 4, 64), np.float32))
    with pytest.raises(VlmcError, match="20 image tokens, 0 features"):
        session.embed_prompt(inputs, None)


# Where it ends


def test_it_ends_at_the_end_of_text_which_is_not_given_out(session: Session, inputs: Inputs) -> None:
    tokens = list(never_ends(session).generate(inputs, 8))
    manifest = session.artifact.manifest
    end = next(index for index, token in enumerate(tokens) if index and token not in tokens[:index])
    prompt = replace(manifest.prompt, eos_token_ids=(335, tokens[end]))
    session.artifact.manifest = replace(manifest, prompt=prompt)
    assert list(session.generate(inputs, 8)) == tokens[:end]
    assert session.timings.tokens == end
    assert list(session.generate(inputs, 8, ignore_eos=True)) == tokens
    session.artifact.manifest = replace(manifest, prompt=replace(prompt, eos_token_ids=(tokens[0],)))
    assert list(session.generate(inputs, 8)) == []


@pytest.mark.parametrize("count", [0, 1, 5])
def test_it_ends_after_so_many_tokens(count: int, session: Session, inputs: Inputs) -> None:
    assert len(list(session.generate(inputs, count, ignore_eos=True))) == count
    if count:
        assert session.timings.tokens == count
        assert len(session.timings.decode) == count - 1


@pytest.mark.parametrize("room", [0, 1, 3])
@pytest.mark.parametrize("engines", [FLOAT, INT8])
def test_it_ends_where_the_cache_is_full_and_uses_its_last_place(
    room: int, engines: dict[str, str], built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(built, "cpu", engines)
    capacity = built.manifest.kv.capacity
    ids = np.random.default_rng(0).integers(30, 300, capacity - room)
    steps: list[tuple[int, int]] = []
    forward = session.decoder.forward

    def recorded(embeds: Any, start: int) -> Any:
        steps.append((start, embeds.shape[1]))
        return forward(embeds, start)

    monkeypatch.setattr(session.decoder, "forward", recorded)
    tokens = list(session.generate(Inputs({}, ids), 100, ignore_eos=True))
    assert len(tokens) == room + 1
    assert sum(length for _, length in steps) == capacity
    assert steps[-1][0] + steps[-1][1] == capacity


def test_the_last_place_holds_what_pytorch_puts_there(built: Artifact, tiny_components: Any) -> None:
    ids = np.random.default_rng(1).integers(30, 300, built.manifest.kv.capacity - 3)
    sessions = [torch_session(built, tiny_components), open_session(built, "cpu", FLOAT), canonical_session(built)]
    for session in sessions:
        assert len(list(session.generate(Inputs({}, ids), 100, ignore_eos=True))) == 4
    for session in sessions[1:]:
        np.testing.assert_allclose(session.decoder.logits(), sessions[0].decoder.logits(), atol=1e-4)


def test_a_prompt_that_is_longer_than_the_cache_is_one_sentence(session: Session) -> None:
    capacity = session.decoder.capacity
    assert list(session.generate(Inputs({}, np.full(capacity, 40)), 1))
    with pytest.raises(
        VlmcError, match=r"Found: 129 tokens, pictures included. Expected: at most 128.*larger --capacity"
    ):
        next(session.generate(Inputs({}, np.full(capacity + 1, 40)), 1))
    with pytest.raises(VlmcError, match="longer than the KV cache"):
        next(session.answer([Image.new("RGB", (128, 128))], "A square has sixteen tiles.", 1))


# Streaming and time


def test_an_answer_is_streamed_in_pieces_that_join_to_its_text(session: Session, built: Artifact) -> None:
    case = golden.read(built)[0][1]
    picture = open_image(built.root / case["image"])
    pieces = list(session.answer([picture], case["prompt"], len(case["tokens"])))
    assert "".join(pieces) == session.tokenizer.decode(case["tokens"]) == case["text"]


def test_a_token_is_given_out_before_the_next_is_computed(
    session: Session, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> list[int]:
        raise AssertionError("computed ahead")

    monkeypatch.setattr(session.decoder, "decode", fail)
    assert isinstance(next(session.generate(inputs, 5, ignore_eos=True)), int)


def test_a_second_question_starts_afresh(session: Session, inputs: Inputs) -> None:
    first = list(session.generate(inputs, 6, ignore_eos=True))
    list(session.generate(Inputs({}, np.full(100, 41)), 9, ignore_eos=True))
    assert list(session.generate(inputs, 6, ignore_eos=True)) == first
    abandoned = session.generate(inputs, 6, ignore_eos=True)
    next(abandoned)
    assert list(session.generate(inputs, 6, ignore_eos=True)) == first


def test_each_part_is_timed_by_itself(session: Session, built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that each part moves by a known time."""
    now = [0.0]
    monkeypatch.setattr("vlmc.runtime.session.perf_counter", lambda: now[0])

    def takes(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            now[0] += seconds
            return function(*arguments)

        return run

    for part, name, seconds in (
        (session, "preprocess", 1.0),
        (session.vision, "run", 2.0),
        (session.decoder, "prefill", 4.0),
        (session.decoder, "decode", 8.0),
    ):
        monkeypatch.setattr(part, name, takes(seconds, getattr(part, name)))
    inputs = session.prepare([open_image(built.root / "golden" / "00.png")], "How many?")
    for token in session.generate(inputs, 3, ignore_eos=True):
        now[0] += 100.0 + token  # what the caller does with a token is not counted
    times = session.timings
    assert (times.preprocess, times.vision, times.prefill, times.decode) == (1.0, 2.0, 4.0, [8.0, 8.0])
    assert (times.first_token, times.tokens) == (6.0, 3)


def test_several_steps_at_once_share_their_time(
    session: Session, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, decode = [0.0], session.decoder.decode
    monkeypatch.setattr("vlmc.runtime.session.perf_counter", lambda: now[0])
    monkeypatch.setattr(session.decoder, "stride", 4)

    def four_seconds_each(count: int) -> list[int]:
        now[0] += 4.0 * count
        return decode(count)

    monkeypatch.setattr(session.decoder, "decode", four_seconds_each)
    assert len(list(session.generate(inputs, 7, ignore_eos=True))) == 7
    assert session.timings.decode == [4.0] * 6


# Engines that are not there


def test_an_altered_engine_is_refused(built_copy: Path) -> None:
    path = built_copy / "engines" / "cpu" / "decoder" / "onnxruntime-fp32" / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    with pytest.raises(VlmcError, match=r"model\.onnx\.data was altered"):
        open_session(Artifact(built_copy), "cpu", FLOAT)


def test_an_engine_that_was_never_built_says_how_to_build_it(built: Artifact) -> None:
    with pytest.raises(VlmcError, match=r"no engine onnxruntime-w4 of decoder for device 'cpu'.*vlmc build"):
        open_session(built, "cpu", FLOAT | {"decoder": "onnxruntime-w4"})


def test_an_artefact_whose_tokenizer_lacks_the_image_token_is_refused(session: Session, built: Artifact) -> None:
    other = Artifact(built.root)
    other.manifest = replace(other.manifest, prompt=replace(other.manifest.prompt, image_token="<picture>"))
    with pytest.raises(VlmcError, match="no token '<picture>'"):
        Session(other, session.vision, session.embed, session.decoder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv": None}, "another model's or was altered.*vlmc build"),
        ({"kv": {"layers": 0}}, "another model's or was altered"),
        ({"kv": {"capacity": 10**15}}, "another model's or was altered"),
        ({"kv": {"form": "ring"}}, "another model's or was altered"),
        ({"kv": {"dtype": "object"}}, "another model's or was altered"),
        ({"kv": {"dtype": "float16"}}, "cache is not of float16"),
        ({"component": "vision_encoder"}, "another model's or was altered"),
        ({"inputs": []}, "another model's or was altered"),
        ({"source_sha256": "1" * 64}, "another model's or was altered"),
    ],
)
def test_an_altered_record_of_an_engine_is_refused(changes: dict[str, Any], says: str, built_copy: Path) -> None:
    path = built_copy / "engines" / "cpu" / "decoder" / "onnxruntime-fp32" / "engine.json"
    record = json.loads(path.read_text())
    for name, value in changes.items():
        record[name] = record[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(record))
    with pytest.raises(VlmcError, match=says):
        open_session(Artifact(built_copy), "cpu", FLOAT)


def test_a_picture_that_is_prepared_for_another_model_is_refused(session: Session, built: Artifact) -> None:
    other = Artifact(built.root)
    other.manifest = replace(other.manifest, preprocessing=other.manifest.preprocessing | {"tile": 64})
    asked = Session(other, session.vision, session.embed, session.decoder)
    with pytest.raises(VlmcError, match=r"pixel_values is not what the model takes.*64, 64\)\. Expected: .*32, 32\)"):
        asked.prepare([Image.new("RGB", (32, 32))], "What is it?")


def test_a_tokenizer_of_another_model_is_refused(session: Session, built: Artifact) -> None:
    other = Artifact(built.root)
    other.manifest = replace(other.manifest, vocab_size=20)
    asked = Session(other, session.vision, session.embed, session.decoder)
    with pytest.raises(VlmcError, match=r"The tokenizer is another model's. Found: token .* Expected: ids below 20"):
        asked.prepare([], "What is it?")
