"""A model that has all that a plain one has not: a further output of embed_tokens, a prefix that sees itself, several
positions a token, image features chosen by row, and a fusion. It goes the whole way, export to engines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vlmc.artifact import Artifact
from vlmc.calibration import recipes
from vlmc.calibration.calibrate import plan_for
from vlmc.calibration.plan import write_plan
from vlmc.calibration.sets import load_set
from vlmc.engines import build, child
from vlmc.exporter import checkpoint, family, golden, onnx_ops
from vlmc.exporter.export import Options, export
from vlmc.exporter.families.smolvlm import SmolVlm
from vlmc.exporter.family import Components, Decoder, Family
from vlmc.exporter.torch_runner import torch_session
from vlmc.profiles.device import load_device
from vlmc.runtime.images import open_image
from vlmc.runtime.preprocessing import Prepared, idefics3
from vlmc.runtime.preprocessing.idefics3 import Idefics3
from vlmc.runtime.session import open_session


class Vision(nn.Module):
    """All tiles' tokens in one row."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.plain(pixel_values).flatten(0, 1)[None]
        return features


class Embed(nn.Module):
    outputs = ("inputs_embeds", "per_token")

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        embeds = self.table(input_ids)
        return embeds, embeds[..., :6].unflatten(2, (2, 3)) * 3.0


class Fusion(nn.Module):
    """Two rows out of all tokens, and what they say added to the text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.query, self.told = nn.Linear(64, 2), nn.Linear(64, 64)

    def forward(self, image_features: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        few = self.query(image_features).softmax(1).mT @ image_features
        return few, text_embeds + self.told(few.mean(1, keepdim=True))


class Further(Decoder):
    positions: ClassVar[int] = 2

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_index: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
        per_token: Tensor,
        prefix_length: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        mask = onnx_ops.causal_mask(write_index, inputs_embeds.shape[1], past[0], prefix_length)
        embeds = inputs_embeds + per_token.flatten(2).repeat(1, 1, 11)[..., :64]
        return self.attend(embeds, position_ids.sum(0), write_index, logits_index, past, mask)


class Odd(SmolVlm):
    model_types: ClassVar[tuple[str, ...]] = ("odd",)

    def split(self, model: Any) -> Components:
        plain = super().split(model)
        return Components(
            vision_encoder=Vision(plain.vision_encoder),
            embed_tokens=Embed(plain.embed_tokens),  # type: ignore[arg-type]
            decoder=Further(plain.decoder.model, plain.decoder.lm_head),  # type: ignore[arg-type]
            fusion=Fusion(),
        )


class OddPictures(Idefics3):
    """A class of its own: a protocol remembers of a class what it once had."""

    def __call__(self, images: Any) -> Prepared:
        found = super().__call__(images)
        tokens = sum(text.count(self.config.image_token) for text in found.image_texts)
        return dataclasses.replace(found, rows=np.arange(tokens) % 2)

    def positions(self, places: Any, prepared: Prepared | None) -> Any:
        """A picture's tokens all stand in one place, in the second row."""
        ahead = np.cumsum(~places)
        return np.stack((np.arange(len(places)) // 2, ahead)).astype(np.int64)

    def prefix_length(self, places: Any, prepared: Prepared | None) -> int:
        return int(places.sum())


@pytest.fixture(scope="module")
def odd(tiny_checkpoint: Path, picture_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        found: dict[str, Family] = family.all_families()
        patch.setitem(found, "smolvlm", Odd())
        patch.setattr(idefics3, "Idefics3", OddPictures)
        options = Options(capacity=128, cases=2, picture_set=picture_set, max_new_tokens=6)
        folder = tmp_path_factory.mktemp("odd") / "artefact"
        yield export(checkpoint.resolve(str(tiny_checkpoint)), folder, options, lambda *_: None)


def test_the_manifest_names_components_inputs_and_outputs(odd: Artifact) -> None:
    assert odd.components == ("vision_encoder", "embed_tokens", "fusion", "decoder")
    specs = odd.manifest.components
    assert specs["decoder"].further_inputs() == ("position_ids", "per_token", "prefix_length")
    shapes = {tensor.name: tensor.shape for tensor in (*specs["decoder"].inputs, *specs["fusion"].inputs)}
    assert shapes["position_ids"] == (2, 1, "length")
    assert shapes["per_token"] == (1, "length", 2, 3)
    assert shapes["prefix_length"] == (1,)
    assert shapes["text_embeds"] == (1, "text_length", 64)
    assert [tensor.shape for tensor in specs["fusion"].outputs] == [(1, 2, 64), (1, "text_length", 64)]


def test_every_output_is_held_to_pytorch(odd: Artifact) -> None:
    levels = {(level.component, level.level) for level in odd.manifest.parity}
    for component, name in (
        ("embed_tokens", "per_token"),
        ("fusion", "fused_image_features"),
        ("fusion", "fused_text_embeds"),
        ("decoder", "step_logits"),
    ):
        assert (component, f"{name} of case 1") in levels


def test_rows_and_fused_texts_take_their_places(odd: Artifact) -> None:
    arrays = golden.read(odd)[1]
    ids, embeds = arrays["0.input_ids"], arrays["0.inputs_embeds"][0]
    session = torch_session(odd, checkpoint.load_components(odd))
    places = ids == session.tokenizer.token_id("<image>")
    few = arrays["0.fused_image_features"][0]
    np.testing.assert_array_equal(embeds[places], few[np.arange(places.sum()) % 2])
    np.testing.assert_array_equal(embeds[~places], arrays["0.fused_text_embeds"][0])


@pytest.mark.parametrize("pictures", [0, 1])
def test_a_step_gives_what_a_longer_prompt_does(pictures: int, odd: Artifact) -> None:
    """Positions go on behind the prompt's greatest, and a new token sees all before it."""
    session = torch_session(odd, checkpoint.load_components(odd))
    image = open_image(odd.root / "golden" / "00.png")
    inputs = session.prepare([image] * pictures, "Which boats?")
    tokens = list(session.generate(inputs, 4, ignore_eos=True))
    assert inputs.further["prefix_length"].tolist() == [(inputs.input_ids == session._image_token_id).sum()]
    stepped = session.decoder.logits()
    ahead = inputs.further["position_ids"]
    behind = np.tile(ahead.max() + 1 + np.arange(3), (2, 1, 1))
    longer = dataclasses.replace(
        inputs,
        input_ids=np.concatenate((inputs.input_ids, tokens[:3])),
        further={**inputs.further, "position_ids": np.concatenate((ahead, behind), axis=2)},
    )
    if pictures:  # the fusion would change the text
        session.fusion = Kept(session.fusion, 3)
    next(session.generate(longer, 1, ignore_eos=True))
    np.testing.assert_allclose(session.decoder.logits(), stepped, atol=1e-4)


class Kept:
    """A fusion that leaves the last tokens as they are."""

    def __init__(self, fusion: Any, last: int) -> None:
        self.fusion, self.last = fusion, last

    def run(self, inputs: Any) -> Any:
        text = inputs["text_embeds"]
        made = self.fusion.run({**inputs, "text_embeds": text[:, : -self.last]})
        made["fused_text_embeds"] = np.concatenate((made["fused_text_embeds"], text[:, -self.last :]), axis=1)
        return made


def test_it_is_calibrated_and_built(
    odd: Artifact, picture_set: Path, step_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = checkpoint.load_components(odd)
    session, data = torch_session(odd, components), load_set(picture_set)
    int8 = recipes.load("int8")
    recipe = dataclasses.replace(int8, rules={**int8.rules, "fusion/*": int8.precision("decoder/any")})
    plan = plan_for(session, components, recipe, data, lambda *_: None)
    assert any(path.startswith("fusion/") for path in plan.modules)
    assert "decode" in plan.modules["decoder/model.layers.0.mlp.down_proj"].peaks
    write_plan(odd, plan)
    monkeypatch.setattr(child, "run", step_here)
    record, _ = build.build(odd, load_device("cpu"), "int8", lambda *_: None)
    assert tuple(record.choices) == odd.components
    for component, least in (("vision_encoder", 0.99), ("fusion", 0.99), ("decoder", 0.9)):
        for engine, tried in record.choices[component].candidates.items():
            exact = engine.endswith("fp32")
            spec, _ = odd.engine("cpu", component, engine)
            assert spec.report.agreement is not None and spec.report.agreement > (0.9999 if exact else least), engine
            assert tried
    engines = {component: choice.engine for component, choice in record.choices.items()}
    session = open_session(odd, "cpu", engines)
    case = json.loads((odd.root / "golden" / "golden.json").read_text())["cases"][0]
    inputs = session.prepare([open_image(odd.root / case["image"])], case["prompt"])
    assert len(list(session.generate(inputs, 5, ignore_eos=True))) == 5
