"""A checkpoint's processor, written down as data."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoProcessor, AutoTokenizer
from vlmc.errors import VlmcError
from vlmc.exporter import bounded
from vlmc.exporter.processor import describe, save_tokenizer
from vlmc.runtime.prompt import Tokenizer, render


@pytest.fixture
def folder(processor_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(processor_folder, tmp_path / "checkpoint"))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_the_preprocessing_is_plain_json(processor_folder: Path) -> None:
    preprocessing, _ = describe(processor_folder)
    assert json.loads(json.dumps(preprocessing)) == preprocessing
    assert preprocessing == {
        "kind": "idefics3",
        "longest_edge": 128,
        "tile": 32,
        "split": True,
        "resample": 1,
        "rescale_factor": 1 / 255,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "image_seq_len": 4,
        "image_token": "<image>",
        "around_token": "<fake_token_around_image>",
        "global_token": "<global-img>",
    }


def test_the_prompt_is_the_chat_template_with_holes(processor_folder: Path) -> None:
    _, prompt = describe(processor_folder)
    assert prompt.with_image == "<|im_start|>User:{image}{text}<end_of_utterance>\nAssistant:"
    assert prompt.text_only == "<|im_start|>User: {text}<end_of_utterance>\nAssistant:"
    assert prompt.image_token == "<image>"
    tokenizer = AutoTokenizer.from_pretrained(processor_folder, local_files_only=True)
    assert prompt.eos_token_ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("trims", [True, False])
def test_white_space_around_a_question_is_left_out_where_the_template_does_so(trims: bool, folder: Path) -> None:
    template, question = folder / "chat_template.jinja", " \n\u3000Why?\t\n"
    template.write_text(template.read_text().replace("line['text']", f"line['text']{' | trim' * trims}"))
    _, prompt = describe(folder)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": question}]}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.trim is trims
    assert render(prompt, question, ()) == reference


def test_smolvlms_own_processor_is_read_without_its_video_part(folder: Path) -> None:
    def smolvlm(data: dict[str, Any]) -> None:
        data["processor_class"] = "SmolVLMProcessor"
        data["image_processor"]["image_processor_type"] = "SmolVLMImageProcessor"

    change(folder / "processor_config.json", smolvlm)
    assert describe(folder)[0]["kind"] == "idefics3"


def test_a_tile_has_as_many_tokens_as_transformers_gives_it_where_no_file_says_how_many(folder: Path) -> None:
    change(folder / "processor_config.json", lambda data: data.pop("image_seq_len"))
    found = describe(folder)[0]["image_seq_len"]
    for kind in (transformers.Idefics3Processor, transformers.SmolVLMProcessor):
        assert found == inspect.signature(kind).parameters["image_seq_len"].default


def test_the_older_layout_of_the_files_is_read_too(folder: Path, processor_folder: Path) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())
    pictures = processor.pop("image_processor") | {"image_processor_type": "Idefics3ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    assert describe(folder) == describe(processor_folder)


@pytest.mark.parametrize("ends", [[], ["a"], [None], [[2]], -1, 2.5, True, "abc", 10**30, 99_999])
def test_ends_of_an_answer_that_are_no_tokens_are_refused(ends: Any, folder: Path) -> None:
    change(folder / "generation_config.json", lambda data: data.update(eos_token_id=ends))
    with pytest.raises(VlmcError, match=r"which token ends an answer.*generation_config\.json"):
        describe(folder)


def test_a_token_of_a_huge_number_is_refused(folder: Path, tmp_path: Path) -> None:
    change(folder / "tokenizer.json", lambda data: data["model"]["vocab"].update(zebra=4_000_000_000))
    with pytest.raises(VlmcError, match="numbers a token 4000000000"):
        save_tokenizer(folder, tmp_path / "tokenizer.json")


def test_a_chat_template_without_end_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    endless = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    (folder / "chat_template.jinja").write_text(endless)
    with pytest.raises(VlmcError, match="takes too much time, memory or text"):
        describe(folder)


def test_several_ends_of_an_answer_and_none(folder: Path) -> None:
    change(folder / "generation_config.json", lambda data: data.update(eos_token_id=[3, 5]))
    assert describe(folder)[1].eos_token_ids == (3, 5)
    (folder / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert describe(folder)[1].eos_token_ids == (tokenizer.eos_token_id,)
    change(folder / "tokenizer_config.json", lambda data: data.pop("eos_token"))
    with pytest.raises(VlmcError, match="which token ends an answer"):
        describe(folder)


@pytest.mark.parametrize("begins", [True, False])
def test_a_token_that_the_tokenizer_puts_first_is_there_once(begins: bool, folder: Path) -> None:
    first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    processing = {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}},
    }
    change(folder / "tokenizer.json", lambda data: data.update(post_processor=processing))
    template = folder / "chat_template.jinja"
    if not begins:
        template.write_text(template.read_text().removeprefix("<|im_start|>"))
    reference = AutoProcessor.from_pretrained(folder, local_files_only=True).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    save_tokenizer(folder, folder / "saved.json")
    ids = Tokenizer(folder / "saved.json").encode(describe(folder)[1].text_only.replace("{text}", "hi"))
    assert ids.tolist() == reference["input_ids"][0]
    assert ids.tolist().count(0) == 1


def test_the_saved_tokenizer_encodes_as_transformers(processor_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "artefact" / "tokenizer.json"
    save_tokenizer(processor_folder, target)
    reference = AutoTokenizer.from_pretrained(processor_folder, local_files_only=True)
    text = "<|im_start|>User:<row_1_col_1><image> two red boats €\n\n<end_of_utterance>"
    assert Tokenizer(target).encode(text).tolist() == reference(text, add_special_tokens=False)["input_ids"]


def test_what_is_missing_or_broken_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="no checkpoint folder"):
        describe(tmp_path / "nowhere")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) // 2])
        with pytest.raises(VlmcError, match="cannot be used"):
            describe(folder)
        (folder / name).write_text(whole)
    for name in ("processor_config.json", "tokenizer.json"):
        (folder / name).rename(folder / "away")
        with pytest.raises(VlmcError, match=str(folder)):
            describe(folder)
        (folder / "away").rename(folder / name)
    assert describe(folder)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "no chat template"),
        ("{{ nonsense( }}", "cannot be used"),
        ("{{ raise_exception('no user') }}", "no user"),
        ("no place for anything", "place the picture and the question once"),
        (
            "{% for line in messages[0]['content'] %}{% if line['type'] == 'image' %}<image>"
            "{% else %}{{line['text']}}{text}{% endif %}{% endfor %}",
            "place the picture",
        ),
        (
            "{% for line in messages[0]['content'] %}{% if line['type'] == 'image' %}{{loop.index}}<image>"
            "{% else %}{{line['text']}}{% endif %}{% endfor %}",
            "several pictures",
        ),
        (
            "{% for line in messages[0]['content'] %}{% if line['type'] == 'image' %}<image>"
            "{% else %}{{line['text'].lstrip()}}{% endif %}{% endfor %}",
            "changes the question",
        ),
        (
            "{% for line in messages[0]['content'] %}{% if line['type'] == 'image' %}<image>"
            "{% else %}{{line['text'] | trim if loop.first else line['text']}}{% endif %}{% endfor %}",
            "changes the question",
        ),
    ],
)
def test_a_chat_template_that_vlmc_cannot_follow_is_refused(template: str, reason: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(VlmcError, match=reason):
        describe(folder)


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_that_leaves_a_step_out_is_refused(step: str, folder: Path) -> None:
    change(folder / "processor_config.json", lambda data: data["image_processor"].update({step: False}))
    with pytest.raises(VlmcError, match=f"{step} off"):
        describe(folder)


def test_a_processor_that_vlmc_cannot_follow_is_refused(folder: Path) -> None:
    config = folder / "processor_config.json"
    whole = config.read_text()
    change(config, lambda data: data.update(image_seq_len=-1))
    with pytest.raises(
        VlmcError, match=r"image_seq_len is out of range.*To mend it: fetch the checkpoint's files again"
    ):
        describe(folder)
    config.write_text(whole)
    change(config, lambda data: data["image_processor"].update(image_processor_type="ViTImageProcessor"))
    with pytest.raises(VlmcError, match="Idefics3ImageProcessor"):
        describe(folder)


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    remote = {"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    change(folder / "processor_config.json", lambda data: data.update(auto_map=remote))
    change(folder / "tokenizer_config.json", lambda data: data.update(auto_map=remote, tokenizer_class="Evil"))
    with pytest.raises(VlmcError):
        describe(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_processor_that_writes_what_is_not_known_is_refused(file: str, folder: Path) -> None:
    change(folder / "processor_config.json", lambda data: data.pop("processor_class"))
    change(folder / "tokenizer_config.json", lambda data: data.pop("processor_class", None))
    describe(folder)  # one that says nothing is taken for the usual one
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    change(folder / file, lambda data: data.update(processor_class="AyaVisionProcessor"))
    says = r"another text around a picture .* Idefics3ImageProcessor. Found: AyaVisionProcessor.*`own_processor`"
    with pytest.raises(VlmcError, match=says):
        describe(folder)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer_config.json"])
def test_a_file_of_the_checkpoint_that_is_missing_is_to_be_fetched(file: str, folder: Path) -> None:
    sizes = {"image_size": 336, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3_v", "vision_config": sizes}))
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / file).unlink()
    with pytest.raises(VlmcError, match=rf"{file} is missing\. To mend it: fetch the checkpoint's files again"):
        describe(folder)
    (folder / file).write_text("[]")
    with pytest.raises(VlmcError, match=rf"{file} is no JSON object\. Found: \[\]\. To mend it: fetch"):
        describe(folder)
