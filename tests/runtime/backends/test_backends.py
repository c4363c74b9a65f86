"""Backends are found by their files; one that cannot run says why, and one that can runs what was built for it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from vlmc.artifact import Artifact, EngineSpec
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.records import read_record, write_record
from vlmc.runtime import backends
from vlmc.runtime.backends import onnxruntime, openvino
from vlmc.runtime.backends.onnxruntime import OnnxRunner


def change_record(root: Path, component: str, engine: str, **changes: object) -> None:
    path = root / "engines" / "cpu" / component / engine / "engine.json"
    write_record(path, replace(read_record(EngineSpec, path), **changes))


def test_a_backend_is_found_by_its_file_and_can_tell_whether_it_runs() -> None:
    assert {"handover", "onnxruntime", "openvino"} <= set(backends.names())
    for name in backends.names():
        assert isinstance(backends.unavailable(name), str)
    assert backends.unavailable("onnxruntime") == ""
    with pytest.raises(VlmcError, match=r"no backend 'tensorflow'. Expected: one of handover, numpy, onnxruntime"):
        backends.unavailable("tensorflow")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_backend_that_is_not_installed_says_how_to_get_it(
    name: str, built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert backends.unavailable(name).endswith(f"; pip install {name}")  # vlmc itself is not on PyPI
    with pytest.raises(VlmcError, match=rf"needs the backend {name}, which cannot run here. Found: {name} is not inst"):
        backends.load_runner(built, "cpu", "vision_encoder", f"{name}-fp32", 1)


def test_a_graph_that_waits_for_its_device_is_run_by_none(built_copy: Path) -> None:
    change_record(built_copy, "decoder", "onnxruntime-fp32", backend="handover")
    with pytest.raises(VlmcError, match="a graph that has to be built on its device first"):
        backends.load_decoder(Artifact(built_copy), "cpu", "onnxruntime-fp32", None, 1)  # type: ignore[arg-type]


def test_an_engine_of_an_unknown_backend_is_refused(built_copy: Path) -> None:
    change_record(built_copy, "vision_encoder", "onnxruntime-fp32", backend="../../os")
    with pytest.raises(VlmcError, match=r"no backend '\.\./\.\./os'"):
        backends.load_runner(Artifact(built_copy), "cpu", "vision_encoder", "onnxruntime-fp32", 1)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a" * 100])
def test_a_file_that_is_no_graph_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(
        VlmcError, match=r"ONNX Runtime [\d.]+ cannot load .*model\.onnx. Found: .*build the engine again"
    ):
        onnxruntime.session(path, {})
    with pytest.raises(VlmcError, match=r"OpenVINO .* cannot compile .*model\.onnx"):
        openvino.compile_model(path)


def test_a_graph_that_cannot_take_what_it_should_is_one_sentence(built: Artifact) -> None:
    """Here ids beyond its table, as positions of a text are where the manifest promises longer ones."""
    embed = backends.load_runner(built, "cpu", "embed_tokens", "onnxruntime-fp32", 1)
    with pytest.raises(VlmcError, match=r"ONNX Runtime cannot run a graph of this artefact. Found: .*Gather"):
        embed.run({"input_ids": np.array([[10**6]])})


def test_threads_are_those_that_were_asked_for(built: Artifact) -> None:
    _, path = built.engine("cpu", "embed_tokens", "onnxruntime-fp32")
    for asked, given in ((1, 1), (3, 3), (0, len(os.sched_getaffinity(0)))):
        assert onnxruntime.session(path, {}, asked).get_session_options().intra_op_num_threads == given


def test_a_session_is_started_with_its_callers_settings(built: Artifact) -> None:
    _, path = built.engine("cpu", "embed_tokens", "onnxruntime-fp32")
    settings = {"session_config": {"session.disable_prepacking": "1"}, "providers": ["CPUExecutionProvider"]}
    options = onnxruntime.session(path, settings).get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == "1"


@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_an_engines_record_cannot_have_a_file_written(
    component: str, built: Artifact, built_copy: Path, tmp_path: Path
) -> None:
    written = {"session.collect_node_memory_stats_to_file": str(tmp_path / "stats.csv")}
    change_record(built_copy, component, "onnxruntime-fp32", settings={"session_config": written})
    artifact, arrays = Artifact(built_copy), golden.read(built)[1]
    if component == "decoder":
        embed = backends.load_runner(artifact, "cpu", "embed_tokens", "onnxruntime-fp32", 1)
        backends.load_decoder(artifact, "cpu", "onnxruntime-fp32", embed, 1).prefill(arrays["0.inputs_embeds"])
    else:
        pixels = {"pixel_values": arrays["0.pixel_values"]}
        backends.load_runner(artifact, "cpu", component, "onnxruntime-fp32", 1).run(pixels)
    assert not (tmp_path / "stats.csv").exists()


def test_a_decoders_states_are_read_and_written_in_place(built: Artifact) -> None:
    embed = backends.load_runner(built, "cpu", "embed_tokens", "onnxruntime-fp32", 1)
    decoder = backends.load_decoder(built, "cpu", "onnxruntime-fp32", embed, 1)
    before = [state.data_ptr() for state in decoder._states]
    prompt = golden.read(built)[1]["0.inputs_embeds"]
    decoder.prefill(prompt)
    decoder.decode(2)
    filled = prompt.shape[1] + 2
    for state in decoder._states:
        assert np.abs(state.numpy()[0, :, :filled]).min() > 0
        assert not state.numpy()[0, :, filled:].any()
    assert [state.data_ptr() for state in decoder._states] == before


def test_two_decoders_of_one_engine_do_not_share_a_cache(built: Artifact) -> None:
    embed = backends.load_runner(built, "cpu", "embed_tokens", "onnxruntime-fp32", 1)
    first, second = (backends.load_decoder(built, "cpu", "onnxruntime-fp32", embed, 1) for _ in range(2))
    arrays = golden.read(built)[1]
    first.prefill(arrays["0.inputs_embeds"])
    alone = first.decode(4)
    first.prefill(arrays["0.inputs_embeds"])
    second.prefill(arrays["1.inputs_embeds"])
    assert [token for _ in range(4) for token in (first.decode(1), second.decode(1))[0]] == alone


def test_logits_that_were_given_out_stay_as_they_are(built: Artifact) -> None:
    embed = backends.load_runner(built, "cpu", "embed_tokens", "onnxruntime-fp32", 1)
    decoder = backends.load_decoder(built, "cpu", "onnxruntime-fp32", embed, 1)
    decoder.prefill(golden.read(built)[1]["0.inputs_embeds"])
    logits = decoder.logits()
    copy = logits.copy()
    decoder.decode(3)
    np.testing.assert_array_equal(logits, copy)


def test_openvino_gives_out_arrays_of_its_own(built: Artifact) -> None:
    runner = backends.load_runner(built, "cpu", "vision_encoder", "openvino-fp32", 1)
    arrays = golden.read(built)[1]
    first = runner.run({"pixel_values": arrays["0.pixel_values"]})["image_features"]
    copy = np.array(first)
    runner.run({"pixel_values": -arrays["0.pixel_values"]})
    np.testing.assert_array_equal(first, copy)


def test_openvino_has_no_decoder() -> None:
    with pytest.raises(VlmcError, match="no decoder"):
        openvino.load_decoder(None, Path(), None, 1)  # type: ignore[arg-type]


def test_opened_engines_are_closed_again(built: Artifact) -> None:
    _, path = built.engine("cpu", "vision_encoder", "onnxruntime-fp32")

    def opened() -> int:
        session = OnnxRunner(onnxruntime.session(path, {}, 1))
        count = len(os.listdir("/proc/self/fd"))
        del session
        return count

    opened()
    assert opened() == opened() == opened()
