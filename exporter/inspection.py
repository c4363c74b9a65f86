"""What is known of a checkpoint before its weights are loaded: the sizes in config.json, and the headers of its shards.

Both can say anything, so that nothing large is made of them and nothing wrong is loaded before they are compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import VlmcError, mended_by, reason
from ..files import read_json
from ..profiles import memory

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

AGAIN = "fetch the checkpoint's files again, all of them"
# The largest that each may be: what is made of a wrong one would take hours or all memory. Nested ones count too.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "enc_n_layers", "depth", "prefusion_layer_num")
_LAYERS = dict.fromkeys(_DEPTHS, 1_000)
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads")
_LARGEST = _LAYERS | dict.fromkeys((*_WIDTHS, "image_size", "patch_size"), 1_000_000)
_PARTS = ("text_config", "vision_config", "llm_config")
_FLOATS = ("F64", "F32", "F16", "BF16")
_INTEGER_BUFFERS = ("position_ids", "token_type_ids", "num_batches_tracked", "relative_position_index")
_INDEX = "model.safetensors.index.json"


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raises where config.json, at `path`, has a size that no model can have, or a part that timm would make: of what
    that is given, one option names a file of weights to load, and another a model to fetch."""
    parts = [("", config)]
    for where, part in parts:  # grows
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append((f"{where}{name}.", value))
            elif (name == "model_type" and str(value).startswith("timm_")) or (name == "use_timm_backbone" and value):
                _refuse(path, where + name, value, "a part that vlmc's families know, not one of timm's")
            elif name in _PARTS:
                _refuse(path, where + name, value, "an object")
            elif name in _LARGEST and value is not None and not isinstance(value, list):
                largest = _LARGEST[name]
                if type(value) is not int or not 1 <= value <= largest:
                    _refuse(path, where + name, value, f"a whole number from 1 to {largest:,}")


def _refuse(path: Path, name: str, value: Any, expected: str) -> None:
    raise VlmcError(f"{path} has a wrong {name}", found=repr(value)[:99], expected=expected, fix=AGAIN)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object among the checkpoint's files."""
    with mended_by(AGAIN):
        found = read_json(path)
        if not isinstance(found, dict):
            raise VlmcError(f"{path} is no JSON object", found=repr(found)[:99])
    return found


def sketch(checkpoint: Checkpoint) -> nn.Module:
    """The model without its weights (on PyTorch's meta device): refused where the shards hold far fewer values than its
    config asks for, or, of random weights, where they do not fit into memory."""
    with making("config.json", checkpoint.folder), torch.device("meta"):
        model = checkpoint.family.randomise(checkpoint.config, 0)
    count = sum(weight.numel() for weight in model.parameters())
    if checkpoint.source.random_weights:
        require_memory(f"Random weights, {count:,} of them,", 4 * count, "take a smaller config, or add swap")
    elif count > 2 * (held := _count_values(checkpoint.folder)):  # what precisely is lacking, loading finds out
        raise VlmcError(
            f"{checkpoint.folder / 'config.json'} is not of the weights beside it",
            found=f"{held:,} values in *.safetensors",
            expected=f"the {count:,} of a model of this config",
            fix=AGAIN,
        )
    return model


def require_memory(what: str, size: int, fix: str) -> None:
    """Raises where `what` is larger, in bytes, than the memory and swap that are free here, if that is known."""
    free = memory.obtainable_bytes()
    if free is not None and size > free:
        found, expected = f"{size / 1e9:,.1f} GB", f"at most {free / 1e9:,.1f} GB with swap"
        raise VlmcError(f"{what} would not fit into this machine's memory", found=found, expected=expected, fix=fix)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Of transformers nothing but errors on the terminal: it warns of layouts of config.json that it reads well, and
    prints a table of all weights for a bad checkpoint."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def making(what: str, folder: Path) -> Iterator[None]:
    """Any failure to make a model in one sentence, and nothing else on the terminal: safetensors, transformers and the
    disk each raise their own."""
    try:
        with quiet():
            yield
    except VlmcError:
        raise
    except Exception as error:  # of any library, as said above
        raise VlmcError(
            f"No model can be made of the {what} in {folder}",
            found=reason(error),
            fix="download the checkpoint again; it may be truncated or of another model",
        ) from None


def _count_values(folder: Path) -> int:
    """In all shards, each of whose tensors has to be of floating-point numbers if it can be a weight."""
    from safetensors import safe_open

    _check_index(folder)
    count = 0
    with making("weights", folder):
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") == "mlx":
                    raise VlmcError(
                        f"{path} is of MLX, which names and lays out its weights otherwise",
                        found="format mlx in its header",
                        fix="take the checkpoint that it was made from",
                    )
                for name in file.keys():  # noqa: SIM118  # it is no dictionary
                    tensor = file.get_slice(name)
                    count += math.prod(tensor.get_shape())
                    if tensor.get_dtype() not in _FLOATS and name.rpartition(".")[2] not in _INTEGER_BUFFERS:
                        raise VlmcError(
                            f"The weight {name} in {path} is not of floating-point numbers",
                            found=tensor.get_dtype(),
                            expected=" or ".join(_FLOATS),
                            fix="take the float checkpoint if this one is quantised; otherwise " + AGAIN,
                        )
    return count


def _check_index(folder: Path) -> None:
    """Raises where the index of the shards, if there is one, does not name files beside it."""
    if not (folder / _INDEX).is_file():
        return
    shards = read_settings(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise VlmcError(f"{folder / _INDEX} is no index of weights", found="no weight_map in it", fix=AGAIN)
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    for name, shard in shards.items():
        if shard not in there:
            expected = ", ".join(there[:3])
            raise VlmcError(
                f"{folder / _INDEX} finds {name} in a file that is not beside it",
                found=repr(shard)[:99],
                expected=expected,
                fix=AGAIN,
            )
