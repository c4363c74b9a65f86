"""What is found wrong in a checkpoint before anything is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlmc.errors import VlmcError
from vlmc.exporter import inspection
from vlmc.exporter.checkpoint import preset_names, resolve
from vlmc.exporter.inspection import check_config, sketch


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# config.json


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": 10**9}, r"text_config\.num_hidden_layers. Found: 1000000000. Expected: .* 1 to 1,000"),
        ({"num_hidden_layers": 0}, r"text_config\.num_hidden_layers. Found: 0"),
        ({"hidden_size": 10**7}, r"text_config\.hidden_size. Found: 10000000. Expected: .* 1 to 1,000,000"),
        ({"hidden_size": "a"}, r"text_config\.hidden_size. Found: 'a'"),
        ({"hidden_size": True}, r"text_config\.hidden_size. Found: True"),
        ({"num_attention_heads": 0}, r"text_config\.num_attention_heads. Found: 0"),
        ({"vocab_size": -5}, r"text_config\.vocab_size. Found: -5"),
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_a_size_that_no_model_has_is_named(change: dict[str, Any], says: str, random: bool, folder: Path) -> None:
    edit(folder, lambda config: config["text_config"].update(change))
    with pytest.raises(VlmcError, match=r"config\.json has a wrong " + says):
        resolve(str(folder), random)


@pytest.mark.parametrize("value", [None, 5, [1], "clip"])
def test_a_part_of_the_config_is_an_object(value: Any, folder: Path) -> None:
    for part in ("text_config", "vision_config"):
        edit(folder, lambda config, part=part: config.update({part: value}))
    with pytest.raises(
        VlmcError, match=r"config\.json has a wrong (text|vision)_config. Found: .* Expected: an object"
    ):
        resolve(str(folder))


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize(
    "part",
    [
        {"model_type": "timm_wrapper", "architecture": "hf-hub:some/model", "model_args": {"checkpoint_path": "x.pth"}},
        {"model_type": "detr", "use_timm_backbone": True},
        {"model_type": "detr", "backbone_config": {"model_type": "timm_backbone"}},
    ],
)
def test_nothing_of_timms_is_made(part: dict[str, Any], random: bool, folder: Path) -> None:
    edit(folder, lambda config: config.update(vision_config=part))
    with pytest.raises(VlmcError, match=r"wrong vision_config\..*not one of timm's"):
        resolve(str(folder), random)


def test_sizes_are_looked_at_wherever_they_stand() -> None:
    nested: dict[str, Any] = {"config": {"text": {"n_layers": 10**6}}}
    with pytest.raises(VlmcError, match=r"wrong config\.text\.n_layers"):
        check_config(nested, Path("config.json"))
    with pytest.raises(VlmcError, match="wrong prefusion_layer_num"):
        check_config({"prefusion_layer_num": 10**9}, Path("config.json"))
    check_config({"head_dim": None, "intermediate_size": [16384, 8192], "num_kv_shared_layers": 0}, Path("config.json"))


@pytest.mark.parametrize("name", preset_names())
def test_published_sizes_are_plausible(name: str) -> None:
    check_config(resolve(name, random_weights=True).config, Path("config.json"))


# The model of the config


def test_a_sketch_is_the_model_without_its_weights(folder: Path) -> None:
    weights = list(sketch(resolve(str(folder))).parameters())
    assert {weight.device.type for weight in weights} == {"meta"}
    assert sum(weight.numel() for weight in weights) == sum(
        w.numel() for w in load_file(folder / "model.safetensors").values()
    )


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_model_much_larger_than_its_weights_is_refused(part: str, folder: Path) -> None:
    """Without its part of the config, transformers would make one of its own size."""
    edit(folder, lambda config: config.pop(part))
    with pytest.raises(VlmcError, match=r"config\.json is not of the weights beside it. Found: .* Expected: the "):
        sketch(resolve(str(folder)))


def test_shards_hold_at_least_half_of_what_the_config_asks_for(folder: Path) -> None:
    """What may lack, as weights that are tied to others do, is for loading to find out."""
    half = -(-sum(weight.numel() for weight in sketch(resolve(str(folder))).parameters()) // 2)
    for held in (half, half - 1):
        save_file({"weights": torch.zeros(held)}, folder / "model.safetensors")
        if held == half:
            sketch(resolve(str(folder)))
    with pytest.raises(VlmcError, match=rf"config\.json is not of the weights beside it. Found: {half - 1:,} values"):
        sketch(resolve(str(folder)))


def test_random_weights_have_to_fit_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve(str(folder), random_weights=True)
    size = 4 * sum(weight.numel() for weight in sketch(model).parameters())
    monkeypatch.setattr(inspection.memory, "obtainable_bytes", lambda: size)
    sketch(model)
    monkeypatch.setattr(inspection.memory, "obtainable_bytes", lambda: size - 1)
    with pytest.raises(VlmcError, match=r"Random weights, .* would not fit into this machine's memory"):
        sketch(model)
    monkeypatch.setattr(inspection.memory, "obtainable_bytes", lambda: None)  # the system does not tell
    sketch(model)


def test_a_config_that_makes_no_model_is_to_blame(folder: Path) -> None:
    edit(folder, lambda config: config["text_config"].update(model_type="nothing"))
    with pytest.raises(VlmcError, match=r"No model can be made of the config\.json in .*copy"):
        sketch(resolve(str(folder)))


# The shards


@pytest.mark.parametrize(
    ("dtype", "said"), [(torch.int16, "I16"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_weights_are_floating_point_numbers(dtype: torch.dtype, said: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VlmcError, match=rf"lm_head\.weight in .*model\.safetensors is not of .* Found: {said}\. "):
        sketch(resolve(str(folder)))


def test_a_conversion_for_mlx_is_called_so(folder: Path) -> None:
    """What mlx-vlm saves, in 16 bits, too: transformers would say that every weight is lacking."""
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "mlx"})
    with pytest.raises(VlmcError, match=r"model\.safetensors is of MLX.*take the checkpoint that it was made from"):
        sketch(resolve(str(folder)))


def test_published_buffers_may_be_integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(
        {k: w.bfloat16() if w.is_floating_point() else w for k, w in weights.items()}, folder / "model.safetensors"
    )
    sketch(resolve(str(folder)))


@pytest.mark.parametrize("content", ["null", "[]", "{", "{}", '{"weight_map": null}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(content: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(VlmcError, match=r"index\.json is (no|not) .* To mend it: fetch the checkpoint's files again"):
        sketch(resolve(str(folder)))


@pytest.mark.parametrize("shard", ["../../../etc/passwd", "model-2.safetensors", 5, None, []])
def test_an_index_names_files_beside_it(shard: Any, folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": shard, "other": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VlmcError, match=r"finds lm_head\.weight in a file that is not beside it"):
        sketch(resolve(str(folder)))
