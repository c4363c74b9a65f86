"""The checkpoint in the repository loads with transformers' own classes, is small, and answers held-out questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Idefics3Processor, SmolVLMForConditionalGeneration
from vlmc.demo import atlas, checkpoint, evaluate, packing, train
from vlmc.demo.scenes import scene
from vlmc.demo.words import TASKS

FOLDER = Path(checkpoint.__file__).parent / "model"


@pytest.fixture(scope="module")
def answerer() -> evaluate.Answerer:
    return evaluate.Answerer(FOLDER, "float32")


def test_the_files_are_few_small_and_hold_no_code() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) <= 32_000_000
    assert max(sizes.values()) <= 16 * 2**20
    assert {Path(name).suffix for name in sizes} == {".safetensors", ".json", ".jinja"}


def test_it_is_transformers_smolvlm_in_float16_with_shared_key_heads(answerer: evaluate.Answerer) -> None:
    assert isinstance(answerer.model, SmolVLMForConditionalGeneration)
    assert isinstance(answerer.processor, Idefics3Processor)
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.dtype == torch.float16
    assert config.text_config.num_attention_heads == 3 * config.text_config.num_key_value_heads
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert {name.split(".")[0] for name in index["weight_map"]} == {"model"}  # the head is tied to the embedding


def test_it_answers_held_out_questions(answerer: evaluate.Answerer) -> None:
    scenes = [scene(seed, "test") for seed in range(5)]
    right = dict.fromkeys(TASKS, 0)
    for number, task in enumerate(TASKS):
        questions = [s.questions[number] for s in scenes]
        for question, said in zip(questions, answerer(scenes, [q.prompt for q in questions]), strict=True):
            hits, of = evaluate.score(question, said)
            right[task] += hits == of
    assert all(count >= 4 for count in right.values()), right


def test_a_training_row_teaches_what_the_processor_and_the_model_see(answerer: evaluate.Answerer) -> None:
    """Many questions in one row give the logits that each gives alone through transformers' forward."""
    words, model = answerer.processor.tokenizer, answerer.model
    pictures, rows = next(packing.chunks(words, iter([range(1)]), "train", atlas.bundled("train")))
    row = torch.from_numpy(rows[:, 0])
    with torch.no_grad():
        together = train.logits(model, train.pixels(torch.from_numpy(pictures), jitter=False), row)[0]
    for segment in (1, int(row[0, 2].max())):
        at = (row[0, 2] == segment).nonzero().flatten()
        ids = torch.cat((row[0, 0][row[0, 2] == 0], row[0, 0][at])).long()
        text = words.decode(ids).replace(checkpoint.BEFORE, f"{checkpoint.START}User:<image>")
        inputs: Any = answerer.processor(text=text, images=[Image.fromarray(pictures[0])], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids.tolist()
        with torch.no_grad():
            alone = model(**inputs).logits[0]
        torch.testing.assert_close(together[at[:-1]], alone[-len(at) : -1], atol=1e-3, rtol=1e-3)


def test_mirrored_rows_have_mirrored_answers() -> None:
    from vlmc.demo.scenes import layout_of

    layout = layout_of(0, "train", atlas.bundled("train"))
    flipped = packing.mirrored(layout)
    for group, other in zip(layout.groups, flipped.groups, strict=True):
        assert [(128 - t.x, t.y) for t in group.things] == [(t.x, t.y) for t in other.things]


def test_the_tokenizer_is_made_again_just_the_same(tmp_path: Path) -> None:
    checkpoint.tokenizer().save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "tokenizer.json").read_text())["model"]
        == (json.loads((FOLDER / "tokenizer.json").read_text())["model"])
    )


@pytest.mark.parametrize(("hits", "of", "low", "high"), [(9, 10, 0.596, 0.982), (0, 10, 0.0, 0.278), (0, 0, 0.0, 1.0)])
def test_wilson_intervals(hits: int, of: int, low: float, high: float) -> None:
    assert evaluate.wilson(hits, of) == pytest.approx((low, high), abs=1e-3)
