"""Where weights come from, and the sentences for all that can be wrong with them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, inspection
from vlmc.exporter.checkpoint import load_components, load_model, preset_names, resolve, watched


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# What resolves


def test_a_folder_is_known_by_its_content(folder: Path, tiny_checkpoint: Path) -> None:
    found, same = resolve(str(folder)), resolve(str(tiny_checkpoint))
    assert (found.name, found.source.kind, found.source.location) == ("copy", "folder", str(folder))
    assert found.source.sha256 == same.source.sha256
    edit(folder / "config.json", lambda config: config.update(pad_token_id=2))
    assert resolve(str(folder)).source.sha256 != same.source.sha256


def test_other_weights_are_another_source(folder: Path) -> None:
    before = resolve(str(folder)).source.sha256
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert resolve(str(folder)).source.sha256 != before


def test_the_location_does_not_depend_on_where_one_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for random in (False, True):
        source = resolve("copy", random).source
        assert source.location == str(folder)
        monkeypatch.chdir("/")
        assert resolve(source.location, random).source == source
        monkeypatch.chdir(folder.parent)


def test_the_demo_is_bundled() -> None:
    found = resolve("demo")
    assert (found.name, found.source.kind, found.config["model_type"]) == ("demo", "demo", "smolvlm")


def test_random_weights_depend_on_the_seed_alone(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    first, again, other = (resolve(str(folder), True, seed) for seed in (1, 1, 2))
    assert first.source == again.source
    assert first.source.sha256 != other.source.sha256
    assert first.source.random_weights
    weights = [load_model(one).lm_head.weight for one in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", preset_names())
def test_a_presets_size_is_the_published_one_within_a_percent(name: str) -> None:
    found = resolve(name, random_weights=True)
    assert found.preset is not None
    with torch.device("meta"):
        model = found.family.randomise(found.config, 0)
    count = sum(weight.numel() for weight in model.parameters())
    assert count == pytest.approx(found.preset["published_parameters"], rel=0.01)


def test_there_are_presets_of_three_true_sizes() -> None:
    assert {"smolvlm-2.2b", "smolvlm-256m", "smolvlm-500m"} < set(preset_names())


# What does not


@pytest.mark.parametrize(
    ("model", "random", "says"),
    [
        ("dmeo", False, "There is no model 'dmeo'.*did you mean demo"),
        ("./nowhere/at/all", False, r"no such folder.*vlmc models"),
        ("smolvlm-256m", False, "is a preset: a config without weights.*--random-weights"),
        ("smolvlm-265m", True, "There is no preset 'smolvlm-265m'.*did you mean smolvlm-256m"),
        ("xyz", True, "vlmc models"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(model: str, random: bool, says: str) -> None:
    with pytest.raises(VlmcError, match=says):
        resolve(model, random)


def test_an_unknown_model_type_is_refused_before_any_weight_is_read(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(model_type="smolvlmm"))
    with pytest.raises(VlmcError, match=r"copy is of the model type 'smolvlmm'.*did you mean smolvlm"):
        resolve(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 5}', '"smolvlm"'])
@pytest.mark.parametrize("random", [False, True])
def test_a_config_that_is_none_is_refused(content: str, random: bool, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(VlmcError, match=r"config\.json (is not valid JSON|names no model_type)"):
        resolve(str(folder), random)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(VlmcError, match=r"is no checkpoint\. Found: no config\.json"):
        resolve(str(folder))


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(VlmcError, match=r"holds no safetensors. Found: pytorch_model\.bin.*can run code"):
        resolve(str(folder))
    (folder / "pytorch_model.bin").rename(folder / "q4.gguf")
    with pytest.raises(VlmcError, match=r"Found: q4\.gguf"):
        resolve(str(folder))
    (folder / "q4.gguf").unlink()
    with pytest.raises(VlmcError, match="Found: no weights"):
        resolve(str(folder))


def test_loading_is_followed_weight_by_weight(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    with watched(lambda *step: told.append(step)):
        load_model(resolve(str(folder)))
    count = len(load_file(folder / "model.safetensors"))
    assert told == [(done, count) for done in range(count + 1)]
    load_model(resolve(str(folder)))
    assert len(told) == count + 1
    assert capfd.readouterr().err == ""


def test_an_adapter_is_not_left_out_silently(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    for _ in range(2):
        with pytest.raises(VlmcError, match=r"holds an adapter.*merge_and_unload"):
            resolve(str(folder))
        (folder / "config.json").unlink(missing_ok=True)  # and then an adapter alone, as they are published


def test_weights_that_are_no_file_are_one_sentence(folder: Path) -> None:
    os.mkfifo(folder / "more.safetensors")  # which would be waited for
    with pytest.raises(VlmcError, match=r"more\.safetensors is no file"):
        resolve(str(folder))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors_are_one_sentence(keep: float, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(VlmcError, match=r"No model can be made of the weights in .*copy.*download"):
        load_model(resolve(str(folder)))


def test_missing_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = ["lm_head.weight", "model.text_model.norm.weight"]
    save_file({k: v for k, v in weights.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VlmcError, match=r"lacks 2 weights. Found: no lm_head\.weight, model\.text_model\.norm\.weight"):
        load_model(resolve(str(folder)))


@pytest.mark.parametrize("part", ["text", "vision"])
def test_layers_that_the_config_leaves_out_are_not_left_out_silently(part: str, folder: Path) -> None:
    edit(folder / "config.json", lambda config: config[f"{part}_config"].update(num_hidden_layers=1))
    with pytest.raises(VlmcError, match=r"more layers than its config.json says: model.\S+layers.1. Found: model.\S+"):
        load_model(resolve(str(folder)))


def test_weights_of_another_shape_are_one_sentence(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["text_config"].update(vocab_size=200))
    says = r"weight \S+weight has another shape .* Found: \(336, 64\). Expected: \(200, 64\)"
    with pytest.raises(VlmcError, match=says):
        load_model(resolve(str(folder)))


@pytest.mark.parametrize("random", [False, True])
def test_a_config_that_makes_no_model_is_one_sentence(random: bool, folder: Path) -> None:
    edit(folder / "config.json", lambda config: config["text_config"].update(model_type="nothing"))
    with pytest.raises(VlmcError, match="No model can be made of the"):
        load_model(resolve(str(folder), random))


def test_transformers_prints_no_table_of_weights(folder: Path) -> None:
    heard = QueueHandler(SimpleQueue())
    logging.getLogger("transformers").addHandler(heard)
    weights = load_file(folder / "model.safetensors")
    weights["renamed"] = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VlmcError, match=r"lacks 1 weights. Found: no lm_head\.weight"):
        load_model(resolve(str(folder)))
    logging.getLogger("transformers").removeHandler(heard)
    assert heard.queue.empty()


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoModelForImageTextToText": "evil.Evil"}))
    load_model(resolve(str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
@pytest.mark.parametrize("named", ["kernels-community/flash-attn2", "flash_attention_2"])
def test_what_computes_attention_is_not_the_checkpoints_to_say(
    named: str, part: str, random: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would fetch a kernel of the hub, which is compiled code, and run it."""
    asked: list[Any] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda *found, **_: asked.append(found)
    )
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda: True)
    edit(folder / "config.json", lambda config: (config[part] if part else config).update(attn_implementation=named))
    found = resolve(str(folder), random)
    inspection.sketch(found)
    load_model(found)
    assert asked == []


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    real = huggingface_hub.snapshot_download
    nobody = {"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path, "etag_timeout": 1}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, **k, **nobody))
    with pytest.raises(VlmcError, match=r"somebody/something cannot be had from the Hugging Face hub.*network"):
        resolve("somebody/something")


# What an artefact was exported from


def test_the_components_come_from_the_very_checkpoint(tiny: Artifact) -> None:
    components = load_components(tiny)
    assert [name for name, _ in components.items()] == ["vision_encoder", "embed_tokens", "decoder"]
    for _, component in components.items():
        assert not component.training
        assert not any(weight.requires_grad for weight in component.parameters())
        assert {weight.dtype for weight in component.parameters()} == {torch.float32}


def test_a_checkpoint_that_changed_is_refused(tiny_copy: Path, folder: Path) -> None:
    artifact = Artifact(tiny_copy)
    source = replace(artifact.manifest.source, location=str(folder))
    artifact.manifest = replace(artifact.manifest, source=source)
    assert load_components(artifact)
    edit(folder / "config.json", lambda config: config.update(pad_token_id=2))
    with pytest.raises(VlmcError, match=r"copy is not the one that .*tiny was exported from. Found: sha256"):
        load_components(artifact)
    shutil.rmtree(folder)
    with pytest.raises(VlmcError, match="There is no model"):
        load_components(artifact)


def test_random_weights_are_made_again_from_the_seed(tiny_copy: Path, folder: Path) -> None:
    artifact = Artifact(tiny_copy)
    found = resolve(str(folder), random_weights=True, seed=7)
    artifact.manifest = replace(artifact.manifest, source=found.source)
    expected = load_model(found).lm_head.weight
    assert torch.equal(load_components(artifact).decoder.lm_head.weight, expected)


def test_a_hub_checkpoint_is_asked_for_at_its_revision(tiny: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(identifier: str, revision: str) -> checkpoint.Checkpoint:
        asked.append((identifier, revision))
        return resolve(tiny.manifest.source.location)

    monkeypatch.setattr(checkpoint, "_hub", hub)
    source = replace(tiny.manifest.source, kind="hub", location="org/name", revision="abc")
    other = Artifact(tiny.root)
    other.manifest = replace(tiny.manifest, source=source)
    load_components(other)
    assert asked == [("org/name", "abc")]
