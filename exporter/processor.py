"""What a checkpoint's processor does, written down as data, so that the runtime can do it without transformers.

Read apart are the picture processor (its Pillow class), the tokenizer and the chat template: the processor class that
joins them may need packages that vlmc has no use for (SmolVLM's wants torchvision, for videos).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artifact import PromptSpec
from ..errors import VlmcError, mended_by, reason
from ..files import read_json, write_text
from ..runtime import preprocessing
from .bounded import bounded
from .family import Family, OwnProcessor, all_families
from .inspection import AGAIN, quiet, read_settings

MOST_TOKENS = 10_000_000
_QUESTION = "vlmc-question"  # stands for the question while the chat template is rendered


def describe(folder: Path) -> tuple[dict[str, Any], PromptSpec]:
    """The manifest's `preprocessing` and `prompt` for the checkpoint in `folder`.

    What is missing, broken or not supported is a VlmcError. Only local files are read and no remote code is run.
    """
    own = _own(folder)
    if own is not None:
        tokenizer, template, described = own.tokenizer, own.chat_template, dict(own.preprocessing)
    else:
        tokenizer = read_tokenizer(folder)
        template, described = _read(folder, tokenizer)
    with reading("processor", folder):
        prompt, around = _prompt(folder, tokenizer, template, described["image_token"])
        for where, text in around.items():
            if text and where not in described:
                raise VlmcError(f"The chat template in {folder} does not write several pictures one after the other")
            described |= {where: text} if text else {}
        with mended_by(AGAIN):
            preprocessing.load(described)  # what the runtime would refuse is refused now
        eos = _known(folder, tokenizer, own.eos_tokens) if own else _eos_token_ids(folder, tokenizer)
        return described, replace(prompt, eos_token_ids=eos)


def _read(folder: Path, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The chat template and the `preprocessing` of a checkpoint with transformers' own processor."""
    from transformers import AutoImageProcessor
    from transformers.processing_utils import ProcessorMixin

    with reading("picture processor", folder):
        pictures = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    with reading("processor", folder):
        settings, _ = ProcessorMixin.get_processor_dict(folder, local_files_only=True)
    kind = type(pictures).__name__.removesuffix("Pil")
    if kind not in _KINDS:
        raise VlmcError(
            f"vlmc cannot prepare pictures as {folder} wants it",
            found=kind,
            expected="one of " + ", ".join(difflib.get_close_matches(kind, _KINDS, n=len(_KINDS), cutoff=0.0)),
        )
    describe_pictures, processors = _KINDS[kind]
    if (named := _processor_class(folder)) not in (None, *processors):
        raise VlmcError(
            f"The processor in {folder} may write another text around a picture than vlmc knows of {kind}",
            found=str(named),
            expected=" or ".join(processors),
            fix="the model's family can say it itself (`own_processor`, docs/add-a-model.md)",
        )
    with reading("processor", folder):
        described = describe_pictures(pictures.to_dict(), settings, tokenizer)
        family, config = _family(folder)
        return settings.get("chat_template"), described | (family.picture_settings(config) if family else {})


def _processor_class(folder: Path) -> Any:
    """The name of transformers' class that joins pictures and text, from the first file that says it."""
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    said = (read_settings(folder / name).get("processor_class") for name in files if (folder / name).is_file())
    return next(filter(None, said), None)


def save_tokenizer(folder: Path, target: Path) -> None:
    """Writes the checkpoint's tokenizer, as transformers sets it up, to the file `target` (`tokenizer.json`)."""
    own = _own(folder)
    tokenizer = own.tokenizer if own is not None else read_tokenizer(folder)
    write_text(target, tokenizer.backend_tokenizer.to_str())


def _own(folder: Path) -> OwnProcessor | None:
    """What the checkpoint's family says in the place of a processor, where the checkpoint brings none."""
    family, _ = _family(folder)
    if family is None:
        return None
    with reading("config or tokenizer", folder):
        own = family.own_processor(folder)
        if own is not None:
            _require_usable(own.tokenizer, folder)
        return own


def _family(folder: Path) -> tuple[Family | None, dict[str, Any]]:
    """The checkpoint's family and its config.json, where both are known."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    family = all_families().get(str(config.get("model_type"))) if isinstance(config, dict) else None
    return family, config


def read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise VlmcError(f"There is no checkpoint folder {folder}", fix="check the path")
    with reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    _require_usable(tokenizer, folder)
    return tokenizer


def _require_usable(tokenizer: Any, folder: Path) -> None:
    """Raises where the checkpoint's tokenizer cannot be written as tokenizer.json."""
    if not tokenizer.is_fast:
        raise VlmcError(
            f"The tokenizer of {folder} has no tokenizer.json",
            found=type(tokenizer).__name__,
            fix="convert it with transformers and save it beside the weights",
        )
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # so does transformers make one of no file
        raise VlmcError(
            f"The tokenizer in {folder} has special tokens alone", fix=f"{AGAIN}, tokenizer.json among them"
        )
    if (largest := max(tokenizer.get_vocab().values(), default=0)) > MOST_TOKENS:  # what writes it counts up to there
        raise VlmcError(f"The tokenizer in {folder} numbers a token {largest}", expected=f"at most {MOST_TOKENS}")


@contextlib.contextmanager
def reading(what: str, folder: Path) -> Iterator[None]:
    """Any failure of transformers in one sentence: a broken file makes it raise nearly everything."""
    try:
        with quiet():
            yield
    except (VlmcError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the tokenizer library's Rust code is no Exception
        raise VlmcError(f"The {what} in {folder} cannot be used", found=reason(error), fix=AGAIN) from None


def _idefics3(pictures: dict[str, Any], settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`runtime/preprocessing/idefics3.py`'s config. Idefics3's and SmolVLM's processors follow the same rules."""
    return describe_values(pictures) | {
        "kind": "idefics3",
        "longest_edge": pictures["size"]["longest_edge"],
        "tile": pictures["max_image_size"]["longest_edge"],
        "split": bool(pictures["do_image_splitting"]),
        "image_seq_len": settings.get("image_seq_len", 169),  # the default of both processor classes
        "image_token": getattr(tokenizer, "image_token", None) or "<image>",
        "around_token": getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>",
        "global_token": getattr(tokenizer, "global_image_token", None) or "<global-img>",
    }


def describe_clip(pictures: dict[str, Any], settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`runtime/preprocessing/clip.py`'s config, with the tokens that LlavaProcessor counts for a picture."""
    size, crop = dict(pictures["size"]), dict(pictures["crop_size"] or {})
    square = crop.get("height") == crop.get("width") and pictures["do_center_crop"]
    if set(size) != {"shortest_edge"} or not square:
        found = f"size {size}, crop {crop}"
        raise VlmcError("The picture processor does not cut a square out of the resized picture", found=found)
    if not settings.get("patch_size"):
        raise VlmcError("processor_config.json does not say patch_size", fix="take the checkpoint's newest revision")
    tokens = (crop["height"] // settings["patch_size"]) ** 2 + settings.get("num_additional_image_tokens", 0)
    return describe_values(pictures) | {
        "kind": "clip",
        "shortest_edge": size["shortest_edge"],
        "tile": crop["height"],
        "pad": bool(pictures.get("do_pad")),
        "image_seq_len": tokens - (settings.get("vision_feature_select_strategy") == "default"),
        "image_token": getattr(tokenizer, "image_token", None) or settings.get("image_token", "<image>"),
        "after_image": "",
    }


def _internvl(pictures: dict[str, Any], settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`runtime/preprocessing/internvl.py`'s config. InternVLProcessor always cuts pictures into tiles, whatever the
    picture processor says."""
    size = dict(pictures["size"])
    if size.get("height") != size.get("width") or not size.get("height"):
        raise VlmcError("The picture processor's tiles are not square", found=str(size))
    return describe_values(pictures) | {
        "kind": "internvl",
        "tile": size["height"],
        "min_tiles": pictures["min_patches"],
        "max_tiles": pictures["max_patches"],
        "thumbnail": True,
        "image_seq_len": settings.get("image_seq_length", 256),
        "image_token": tokenizer.context_image_token,
        "start_token": tokenizer.start_image_token,
        "end_token": tokenizer.end_image_token,
        "after_image": "",
    }


def _qwen2_5_vl(pictures: dict[str, Any], settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`runtime/preprocessing/qwen2_5_vl.py`'s config but for its `window`."""
    size = dict(pictures["size"])
    if not {"shortest_edge", "longest_edge"} <= size.keys():  # a size in older words, which those beside it overruled
        raise VlmcError(
            "The picture processor does not say how many pixels a picture may have",
            found=f"size {size}",
            fix="give min_pixels and max_pixels in preprocessor_config.json, outside of size",
        )
    return describe_values(pictures) | {
        "kind": "qwen2_5_vl",
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "patch": pictures["patch_size"],
        "frames": pictures["temporal_patch_size"],
        "merge": pictures["merge_size"],
        "image_token": getattr(tokenizer, "image_token", None) or "<|image_pad|>",
        "before_image": "",
        "after_image": "",
    }


def describe_values(pictures: dict[str, Any]) -> dict[str, Any]:
    """What every kind says of filter and values; a step that is left out is refused."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not pictures[step]:
            raise VlmcError(f"The picture processor has {step} off, which vlmc does not support")
    return {
        "resample": int(pictures["resample"]),
        "rescale_factor": float(pictures["rescale_factor"]),
        "mean": [float(value) for value in pictures["image_mean"]],
        "std": [float(value) for value in pictures["image_std"]],
    }


_Describe = Callable[[dict[str, Any], dict[str, Any], Any], dict[str, Any]]
_IDEFICS3 = ("Idefics3Processor", "SmolVLMProcessor")
# By transformers' picture processor: what describes it, with the text around a picture that these processors write.
_KINDS: dict[str, tuple[_Describe, tuple[str, ...]]] = {
    "Idefics3ImageProcessor": (_idefics3, _IDEFICS3),
    "SmolVLMImageProcessor": (_idefics3, _IDEFICS3),
    "CLIPImageProcessor": (describe_clip, ("LlavaProcessor",)),
    "LlavaImageProcessor": (describe_clip, ("LlavaProcessor",)),
    "GotOcr2ImageProcessor": (_internvl, ("InternVLProcessor",)),
    "Qwen2VLImageProcessor": (_qwen2_5_vl, ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")),
}


def _prompt(folder: Path, tokenizer: Any, template: Any, image_token: str) -> tuple[PromptSpec, dict[str, str]]:
    """The chat template rendered for no picture, for one, and for two, and what it writes before and after each
    picture: a second one must only repeat the first."""
    if not template and not tokenizer.chat_template:
        raise VlmcError(f"{folder} has no chat template", fix="put a chat_template.jinja beside the weights")
    if image_token not in tokenizer.get_vocab():
        raise VlmcError(f"The tokenizer in {folder} does not know the picture's token {image_token!r}")
    text_only, with_image, with_two = (_render(tokenizer, template, image_token, count) for count in range(3))
    holes = [(rendered.count("{image}"), rendered.count("{text}")) for rendered in (text_only, with_image)]
    if holes != [(0, 1), (1, 1)]:
        raise VlmcError(
            f"The chat template in {folder} does not place the picture and the question once", found=repr(with_image)
        )
    length = len(with_two) - len(with_image)
    for start in range(with_image.index("{image}"), -1, -1):
        unit, rest = with_image[start : start + length], with_image[start + length :]
        before, hole, after = unit.partition("{image}")
        if hole and with_two == with_image[:start] + 2 * unit + rest:
            trim = _trims(tokenizer, template, folder)
            spec = PromptSpec(with_image[:start] + "{image}" + rest, text_only, image_token, (), trim)
            return spec, {"before_image": before, "after_image": after}
    raise VlmcError(f"The chat template in {folder} does not write several pictures one after the other")


def _trims(tokenizer: Any, template: Any, folder: Path) -> bool:
    """Whether the chat template leaves out the white space around a question."""
    padded, found = f"\n {_QUESTION} \n", set()
    for pictures in range(2):
        plain, rendered = (_filled(tokenizer, template, pictures, text) for text in (_QUESTION, padded))
        found.add({plain: True, plain.replace(_QUESTION, padded): False}.get(rendered))
    trims = found.pop()
    if found or trims is None:
        raise VlmcError(f"The chat template in {folder} changes the question", found=repr(rendered))
    return trims


def _render(tokenizer: Any, template: Any, image_token: str, pictures: int) -> str:
    rendered = _filled(tokenizer, template, pictures, _QUESTION)
    return _bos(tokenizer, rendered) + rendered.replace(image_token, "{image}").replace(_QUESTION, "{text}")


def _filled(tokenizer: Any, template: Any, pictures: int, question: str) -> str:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return bounded(
        lambda: tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def _bos(tokenizer: Any, rendered: str) -> str:
    """What has to be written before a prompt so that it becomes the ids that transformers' processor makes of it: the
    token that begins a text, if any, and the space that some tokenizers put before a text's first word."""
    if tokenizer.bos_token and rendered.startswith(tokenizer.bos_token):
        return ""
    wanted = tokenizer(rendered)["input_ids"]
    bos = str(tokenizer.bos_token or "")
    for before in ("", bos, bos + " "):
        if tokenizer(before + rendered, add_special_tokens=False)["input_ids"] == wanted:
            return before
    raise VlmcError("The tokenizer adds special tokens that vlmc does not know", found=str(tokenizer("")["input_ids"]))


def _known(folder: Path, tokenizer: Any, ends: tuple[str, ...]) -> tuple[int, ...]:
    """The ids of those tokens that the tokenizer has: a model trained further may have dropped some."""
    vocabulary = tokenizer.get_vocab()
    if not (known := tuple(vocabulary[token] for token in ends if token in vocabulary)):
        raise VlmcError(f"The tokenizer in {folder} has no token that ends an answer", expected=" or ".join(ends))
    return known


def _eos_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: of generation_config.json, else the tokenizer's."""
    from transformers import GenerationConfig

    found = None
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    ids = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    whole = all(type(id) is int and id >= 0 for id in ids)
    if not whole or not any(id < len(tokenizer) for id in ids):
        fix = "give eos_token_id in its generation_config.json"
        raise VlmcError(f"{folder} does not say which token ends an answer", found=str(found)[:99], fix=fix)
    return ids
