"""What tests in more than one folder use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from vlmc.artifact import Artifact

if TYPE_CHECKING:  # torch is imported by the tests that need it
    from vlmc.exporter.family import Components

CHAT = (  # SmolVLM's own, less the branch for video
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder without weights: SmolVLM's processor with tiles of 32 pixels, splitting up to 128 (4 × 4
    tiles), 4 image tokens a tile, and a small byte-level BPE. Read it only; tests that change it take a copy."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    grid = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    special = ["<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>", "<global-img>", *grid]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, "<end_of_utterance>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["User: How many red boats are on the water?\n\nAssistant: two red boats"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    folder = tmp_path_factory.mktemp("processor")
    Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=CHAT).save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tiny(processor_folder: Path) -> Callable[..., Path]:
    """save(folder, model_type="smolvlm", seed=0): a whole checkpoint of transformers' own class with random weights.

    Two layers of 64 channels each way, grouped queries, tiles of 32 pixels with 4 image tokens. The weights are larger
    than fresh ones, so that attention is not flat and greedy choices are not ties; no bias is zero."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 336, "max_position_embeddings": 512}
    ids = {
        token["content"]: token["id"]
        for token in json.loads((processor_folder / "tokenizer.json").read_text())["added_tokens"]
    }
    text |= {"model_type": "llama", "bos_token_id": 0, "eos_token_id": ids["<end_of_utterance>"], "pad_token_id": 1}

    def save(folder: Path, model_type: str = "smolvlm", seed: int = 0) -> Path:
        config = AutoConfig.for_model(
            model_type,
            image_token_id=ids["<image>"],
            pad_token_id=1,
            scale_factor=2,
            tie_word_embeddings=False,
            vision_config=vision | {"image_size": 32, "patch_size": 8},
            text_config=text | {"tie_word_embeddings": False},
        )
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(torch.randn_like(weight) * (1.0 if "embed_tokens" in name else 0.2))
                if "norm" in name and name.endswith("weight"):
                    weight.add_(1)
        shutil.copytree(processor_folder, folder, dirs_exist_ok=True)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_checkpoint(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that `tiny` was exported from. Read it only."""
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows about three pictures, narrow ones, so that they make few tiles."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index, size in enumerate([(128, 30), (32, 120), (100, 40)]):
        picture = Image.radial_gradient("L").resize(size).rotate(40 * index).convert("RGB")
        picture.putpixel((3, 5), (255, 0, 40 * index))
        picture.save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "prompt": f"How many red boats, {index} or 2?", "answer": "two boats"})
    path = folder / "three.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path, picture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`tiny_checkpoint` exported by the exporter itself, with a KV cache of 128. Read it only; tests that change it
    take a copy (`tiny_copy`)."""
    from vlmc.exporter import checkpoint
    from vlmc.exporter.export import Options, export

    options = Options(capacity=128, cases=3, picture_set=picture_set, max_new_tokens=8)
    target = tmp_path_factory.mktemp("artefact") / "tiny"
    return export(checkpoint.resolve(str(tiny_checkpoint)), target, options, lambda *_: None)


@pytest.fixture
def tiny_copy(tiny: Artifact, tmp_path: Path) -> Path:
    """A copy of the artefact `tiny` to change."""
    return Path(shutil.copytree(tiny.root, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def tiny_components(tiny: Artifact) -> Components:
    """The PyTorch components that `tiny` was exported from."""
    from vlmc.exporter.checkpoint import load_components

    return load_components(tiny)


@pytest.fixture(scope="session")
def planned(
    tiny: Artifact, tiny_components: Components, picture_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """`tiny` with a plan for every recipe. Read it only."""
    from vlmc.calibration import recipes
    from vlmc.calibration.calibrate import plan_for
    from vlmc.calibration.plan import write_plan
    from vlmc.calibration.sets import load_set
    from vlmc.exporter.torch_runner import torch_session

    artifact = Artifact(Path(shutil.copytree(tiny.root, tmp_path_factory.mktemp("planned") / "tiny")))
    session, data = torch_session(artifact, tiny_components), load_set(picture_set)
    for name in recipes.names():
        write_plan(artifact, plan_for(session, tiny_components, recipes.load(name), data, lambda *_: None))
    return artifact


@pytest.fixture(scope="session")
def step_here() -> Callable[..., str]:
    """Does in this process, and fast, what `engines.child.run` does in one of its own: trials take one round."""
    from vlmc.engines import candidate, trial

    def step(module: str, what: str, root: str, *arguments: str, **_: Any) -> str:
        if module == "candidate":
            candidate.main(root, *arguments)
            return ""
        device, component, embed, *engines = arguments
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial, "ROUNDS", 1)
            patch.setattr(trial, "SECONDS", 0.0)
            return json.dumps(trial.try_component(Artifact(Path(root)), device, component, engines, embed))

    return step


@pytest.fixture(scope="session")
def built(planned: Artifact, step_here: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """`planned`, built for `cpu` with the recipe int8. Read it only."""
    from vlmc.engines import build, child
    from vlmc.profiles.device import load_device

    artifact = Artifact(Path(shutil.copytree(planned.root, tmp_path_factory.mktemp("built") / "tiny")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run", step_here)
        build.build(artifact, load_device("cpu"), "int8", lambda *_: None)
    return artifact


@pytest.fixture
def built_copy(built: Artifact, tmp_path: Path) -> Path:
    """A copy of the artefact `built` to change."""
    return Path(shutil.copytree(built.root, tmp_path / "tiny"))
