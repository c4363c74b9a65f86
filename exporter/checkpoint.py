"""Where a model's weights come from: the bundled demo, a folder, the Hugging Face hub, or a config and a seed.

Only safetensors are read, and no remote code is ever run.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..artifact import Artifact, Source
from ..errors import VlmcError, mended_by, reason
from ..files import read_json, sha256_of
from .family import Family, family_for
from .inspection import AGAIN, check_config, making
from .nearest import PRESETS

DEMO = Path(__file__).parent.parent / "demo" / "model"
# What a checkpoint may hold that is worth downloading; pickled weights and code are not.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model: its config.json, and the folder with its weights and processor (the demo's processor for
    presets, whose own is not bundled)."""

    name: str
    source: Source
    config: dict[str, Any]
    folder: Path
    preset: dict[str, Any] | None = None

    @property
    def family(self) -> Family:
        return family_for(str(self.config.get("model_type")), self.source.location).of(self.config)


def preset_names() -> list[str]:
    """Names of the true-size configs that are bundled as data."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def resolve(model: str, random_weights: bool = False, seed: int = 0) -> Checkpoint:
    """`model`: `demo`, a folder, a preset's name (random weights only) or a hub id ORG/NAME."""
    if random_weights:
        return _random(model, seed)
    if model == "demo":
        return _local("demo", "demo", DEMO)
    if Path(model).is_dir():
        return _local("folder", str(Path(model).resolve()), Path(model))
    if model in preset_names():
        raise VlmcError(
            f"{model} is a preset: a config without weights", fix=f"add --random-weights, or name the hub id of {model}"
        )
    if model.count("/") == 1 and not model.startswith((".", "/")):
        return _hub(model, "main")
    near = difflib.get_close_matches(model, ["demo", *preset_names()], n=2, cutoff=0.5)
    raise VlmcError(
        f"There is no model {model!r}",
        found="no such folder, and it is no hub id",
        expected="`demo`, a folder with config.json and safetensors, or ORG/NAME",
        fix=f"did you mean {' or '.join(near)}" if near else "run `vlmc models` to see what there is",
    )


@contextlib.contextmanager
def watched(report: Callable[[int, int], None]) -> Iterator[None]:
    """While open, `report` hears how many of a checkpoint's weights transformers has put in their places, and of how
    many. Random weights make none of these calls."""
    from transformers.utils import logging

    def counted(weights: Collection[Any]) -> Iterator[Any]:
        for done, weight in enumerate(weights):
            report(done, len(weights))
            yield weight
        report(len(weights), len(weights))

    def bar(usual: Callable[..., Any], given: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        return counted(*given) if settings.get("desc") == "Loading weights" else usual(*given, **settings)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """The model in float32, in evaluation mode, with vlmc's attention."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # vlmc shows its own
    family, random = checkpoint.family, checkpoint.source.random_weights
    with making("config.json" if random else "weights", checkpoint.folder):
        model = (
            family.randomise(checkpoint.config, checkpoint.source.seed) if random else family.load(checkpoint.folder)
        )
    model.eval().requires_grad_(False)
    family.use_canonical_attention(model)
    return model


def load_components(artifact: Artifact) -> Any:
    """The PyTorch parts of the checkpoint that the artefact was exported from, refused where it changed: `Components`,
    or `matching.Encoders` of a model that matches."""
    source = artifact.manifest.source
    if source.kind == "hub":
        checkpoint = _hub(source.location, source.revision)
    else:
        checkpoint = resolve(source.location, source.random_weights, source.seed)
    if checkpoint.source.sha256 != source.sha256:
        raise VlmcError(
            f"The checkpoint {source.location} is not the one that {artifact.root} was exported from",
            found=f"sha256 {checkpoint.source.sha256[:12]}…",
            expected=f"{source.sha256[:12]}…",
            fix="export it again, or bring the old checkpoint back",
        )
    return checkpoint.family.split(load_model(checkpoint))


def _local(kind: str, location: str, folder: Path, revision: str = "") -> Checkpoint:
    if (folder / "adapter_config.json").exists():  # which transformers would put in, but only where peft is installed
        raise VlmcError(
            f"{folder} holds an adapter",
            found="adapter_config.json",
            expected="one model",
            fix="merge the adapter with peft's merge_and_unload and save that model, or take the adapter's files away",
        )
    config = _read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        other = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf")
        )
        raise VlmcError(
            f"{folder} holds no safetensors",
            found=", ".join(other[:3]) or "no weights",
            expected="*.safetensors (pickled weights are not read, for they can run code)",
            fix="convert the checkpoint with transformers' save_pretrained(safe_serialization=True)",
        )
    if strange := next((path for path in weights if not path.is_file()), None):
        raise VlmcError(f"{strange} is no file", found="a folder, a pipe or a link to nothing", fix=AGAIN)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    name = folder.resolve().name if kind == "folder" else location.split("/")[-1].lower()
    return Checkpoint(name, Source(kind, location, digest.hexdigest(), revision), config, folder)


def _hub(identifier: str, revision: str) -> Checkpoint:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(identifier, revision=revision, allow_patterns=HUB_PATTERNS))
    except Exception as error:  # the hub's client raises a dozen kinds, from DNS to permissions
        raise VlmcError(
            f"The model {identifier} cannot be had from the Hugging Face hub",
            found=reason(error),
            fix="check the name and the network, or download it elsewhere and give its folder",
        ) from None
    return _local("hub", identifier, folder, revision=folder.name)


def _random(model: str, seed: int) -> Checkpoint:
    preset, location = None, model
    if model in preset_names():
        preset = read_json(PRESETS / f"{model}.json")
        config, folder, name = preset["config"], DEMO, model
    elif model == "demo":
        config, folder, name = _read_config(DEMO), DEMO, "demo"
    elif (Path(model) / "config.json").is_file():
        folder = Path(model).resolve()
        config, name, location = _read_config(folder), folder.name, str(folder)
    else:
        near = difflib.get_close_matches(model, preset_names(), n=2, cutoff=0.4)
        raise VlmcError(
            f"There is no preset {model!r}",
            expected="one of " + ", ".join(preset_names()) + ", or a folder with config.json",
            fix=f"did you mean {' or '.join(near)}" if near else "run `vlmc models`",
        )
    digest = hashlib.sha256(f"{json.dumps(config, sort_keys=True)} seed {seed}".encode()).hexdigest()
    return Checkpoint(name, Source("random", location, digest, seed=seed), config, folder, preset)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise VlmcError(
            f"{folder} is no checkpoint",
            found="no config.json in it",
            expected="a folder with config.json and safetensors",
            fix="name that folder; the bundled model is `demo`, without a path",
        )
    with mended_by(AGAIN):
        config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise VlmcError(f"{folder / 'config.json'} names no model_type", fix="use a transformers checkpoint")
    family_for(config["model_type"], str(folder), config).of(config)  # a layout that is not read is refused first
    check_config(config, folder / "config.json")
    return config
