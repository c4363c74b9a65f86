"""What a checkpoint's processor does, written down as data, so that the runtime can do it without transformers.

Read apart are the picture processor (its Pillow class), the tokenizer and the chat template: the processor class that
joins them may need packages that vlmc has no use for (SmolVLM's wants torchvision, for videos).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..artifact import PromptSpec
from ..errors import VlmcError
from ..files import write_text
from ..runtime import preprocessing

_QUESTION = "vlmc-question"  # stands for the question while the chat template is rendered


def describe(folder: Path) -> tuple[dict[str, Any], PromptSpec]:
    """The manifest's `preprocessing` and `prompt` for the checkpoint in `folder`.

    What is missing, broken or not supported is a VlmcError. Only local files are read and no remote code is run.
    """
    from transformers import AutoImageProcessor
    from transformers.processing_utils import ProcessorMixin

    tokenizer = _tokenizer(folder)
    with _reading("picture processor", folder):
        pictures = AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    with _reading("processor", folder):
        settings, _ = ProcessorMixin.get_processor_dict(folder, local_files_only=True)
    kind = type(pictures).__name__.removesuffix("Pil")
    if kind not in _KINDS:
        raise VlmcError(
            f"vlmc cannot prepare pictures as {folder} wants it",
            found=kind,
            expected="one of " + ", ".join(difflib.get_close_matches(kind, _KINDS, n=len(_KINDS), cutoff=0.0)),
        )
    with _reading("processor", folder):
        described = _KINDS[kind](pictures.to_dict(), settings, tokenizer)
        preprocessing.load(described)  # what the runtime would refuse is refused now
        return described, _prompt(folder, tokenizer, settings.get("chat_template"), described["image_token"])


def save_tokenizer(folder: Path, target: Path) -> None:
    """Writes the checkpoint's tokenizer, as transformers sets it up, to the file `target` (`tokenizer.json`)."""
    tokenizer = _tokenizer(folder)
    write_text(target, tokenizer.backend_tokenizer.to_str())


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise VlmcError(f"There is no checkpoint folder {folder}", fix="check the path")
    with _reading("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise VlmcError(
            f"The tokenizer of {folder} has no tokenizer.json",
            found=type(tokenizer).__name__,
            fix="convert it with transformers and save it beside the weights",
        )
    return tokenizer


@contextlib.contextmanager
def _reading(what: str, folder: Path) -> Iterator[None]:
    """Any failure of transformers in one sentence: a broken file makes it raise nearly everything."""
    try:
        yield
    except (VlmcError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the tokenizer library's Rust code is no Exception
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise VlmcError(
            f"The {what} in {folder} cannot be used",
            found=reason,
            fix="fetch the checkpoint's files again, all of them",
        ) from None


def _idefics3(pictures: dict[str, Any], settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`runtime/preprocessing/idefics3.py`'s config. Idefics3's and SmolVLM's processors follow the same rules."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not pictures[step]:
            raise VlmcError(f"The picture processor has {step} off, which vlmc does not support")
    return {
        "kind": "idefics3",
        "longest_edge": pictures["size"]["longest_edge"],
        "tile": pictures["max_image_size"]["longest_edge"],
        "split": bool(pictures["do_image_splitting"]),
        "resample": int(pictures["resample"]),
        "rescale_factor": float(pictures["rescale_factor"]),
        "mean": [float(value) for value in pictures["image_mean"]],
        "std": [float(value) for value in pictures["image_std"]],
        "image_seq_len": settings.get("image_seq_len", 169),  # the default of both processor classes
        "image_token": getattr(tokenizer, "image_token", None) or "<image>",
        "around_token": getattr(tokenizer, "fake_image_token", None) or "<fake_token_around_image>",
        "global_token": getattr(tokenizer, "global_image_token", None) or "<global-img>",
    }


_KINDS: dict[str, Callable[[dict[str, Any], dict[str, Any], Any], dict[str, Any]]] = {
    "Idefics3ImageProcessor": _idefics3,
    "SmolVLMImageProcessor": _idefics3,
}


def _prompt(folder: Path, tokenizer: Any, template: Any, image_token: str) -> PromptSpec:
    """The chat template rendered for no picture, for one, and for two: a second one must only repeat the first."""
    if not template and not tokenizer.chat_template:
        raise VlmcError(f"{folder} has no chat template", fix="put a chat_template.jinja beside the weights")
    if tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id):
        raise VlmcError(f"The tokenizer in {folder} does not know the picture's token {image_token!r}")
    text_only, with_image, with_two = (_render(tokenizer, template, image_token, count) for count in range(3))
    if with_two != with_image.replace("{image}", "{image}{image}"):
        raise VlmcError(f"The chat template in {folder} does not write several pictures one after the other")
    holes = [(rendered.count("{image}"), rendered.count("{text}")) for rendered in (text_only, with_image)]
    if holes != [(0, 1), (1, 1)]:
        raise VlmcError(
            f"The chat template in {folder} does not place the picture and the question once", found=repr(with_image)
        )
    return PromptSpec(with_image, text_only, image_token, _eos_token_ids(folder, tokenizer))


def _render(tokenizer: Any, template: Any, image_token: str, pictures: int) -> str:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": _QUESTION}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return _bos(tokenizer, rendered) + str(rendered).replace(image_token, "{image}").replace(_QUESTION, "{text}")


def _bos(tokenizer: Any, rendered: str) -> str:
    """What transformers' processor puts before a prompt that lacks it: the token that begins a text, if any."""
    added = tokenizer("")["input_ids"]
    if not added or (tokenizer.bos_token and rendered.startswith(tokenizer.bos_token)):
        return ""
    if added != [tokenizer.bos_token_id]:
        raise VlmcError("The tokenizer adds special tokens that vlmc does not know", found=str(added))
    return str(tokenizer.bos_token)


def _eos_token_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: of generation_config.json, else the tokenizer's."""
    from transformers import GenerationConfig

    found = None
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise VlmcError(f"{folder} does not say which token ends an answer", fix="give eos_token_id in its config")
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
