"""The parity ladder notices what differs from PyTorch, says where and by how much, and stops the export there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from vlmc.artifact import GRAPH_FILES, Artifact, ParityLevel
from vlmc.errors import VlmcError
from vlmc.exporter import checkpoint, graph, parity
from vlmc.exporter.export import Options, export
from vlmc.files import sha256_of
from vlmc.records import FileSpec

LEVELS = [
    *(
        f"{array} of case {case}"
        for case in (0, 1)
        for array in ("image_features", "inputs_embeds", "prefill_logits", "step_logits")
    ),
    "greedy tokens",
]


def change_weight(model: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Edits one initializer in the graph's `.onnx.data`, in place."""
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    (tensor,) = (tensor for tensor in tensors if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    array = np.memmap(
        model.parent / place["location"], np.float32, "r+", offset=int(place["offset"]), shape=tuple(tensor.dims)
    )
    change(array)
    array.flush()


def add(amount: float) -> Callable[[np.ndarray], object]:
    return lambda array: array.__iadd__(np.float32(amount))


@pytest.fixture
def broken(tiny_copy: Path) -> Callable[[str, str, Callable[[np.ndarray], object]], Artifact]:
    """The artefact with one weight changed, as if it had been exported so."""

    def build(component: str, weight: str, change: Callable[[np.ndarray], object]) -> Artifact:
        change_weight(tiny_copy / GRAPH_FILES[component], weight, change)
        artifact = Artifact(tiny_copy)
        name = f"{GRAPH_FILES[component]}.data"
        artifact.manifest.files[name] = FileSpec(sha256_of(tiny_copy / name), (tiny_copy / name).stat().st_size)
        return artifact

    return build


def test_a_right_export_passes_every_level_and_keeps_them(tiny: Artifact) -> None:
    assert [level.level for level in tiny.manifest.parity] == LEVELS
    assert all(level.passed for level in tiny.manifest.parity)
    assert max(level.max_abs for level in tiny.manifest.parity) < 1e-4  # about 1e-5: float32 sums in another order
    assert min(level.cosine for level in tiny.manifest.parity) > 0.999999
    assert parity.height(tiny, 3) == len(LEVELS)
    assert parity.height(tiny, 1) == (len(LEVELS) + 1) / 2
    assert tiny.manifest.parity[-1].detail == "3 of 3 cases equal, 0 split at a tie"


@pytest.mark.parametrize(
    ("component", "weight", "level"),
    [
        ("vision_encoder", "vision_model.encoder.layers.1.mlp.fc1.bias", "image_features of case 0"),
        ("embed_tokens", "weight", "inputs_embeds of case 0"),
        ("decoder", "model.layers.0.self_attn.v_proj.weight", "prefill_logits of case 0"),
    ],
)
def test_a_wrong_weight_fails_the_level_of_its_component(
    component: str, weight: str, level: str, broken: Callable[..., Artifact]
) -> None:
    levels = {one.level: one for one in parity.climb(broken(component, weight, add(0.05)))}
    before = LEVELS[: LEVELS.index(level)]
    assert [levels[name].passed for name in before] == [True] * len(before)
    assert not levels[level].passed
    assert levels[level].component == component
    assert levels[level].max_abs > levels[level].tolerance
    with pytest.raises(VlmcError, match=rf"graph of {component} does not compute .*{level}.*Found: max abs .*cosine"):
        parity.require(levels[level])


def test_a_cache_that_is_only_wrong_after_the_prompt_fails_the_steps(
    tiny: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = parity.backend.OnnxDecoder.forward

    def one_behind(self: Any, embeds: Any, start: int) -> Any:
        return step(self, embeds, start - (start > 0))

    monkeypatch.setattr(parity.backend.OnnxDecoder, "forward", one_behind)
    levels = {level.level: level.passed for level in parity.climb(tiny)}
    assert [name for name, passed in levels.items() if not passed] == [
        "step_logits of case 0",
        "step_logits of case 1",
        "greedy tokens",
    ]


def test_a_broken_graph_stops_the_export_and_nothing_is_written(
    tiny_checkpoint: Path, picture_set: Path, tmp_path: Path, traced_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = graph.save

    def save_wrong(model: Any, path: Path, report: Any) -> None:
        save(model, path, report)
        if path.name == "vision_encoder.onnx":
            change_weight(path, "connector.modality_projection.proj.weight", add(0.1))

    monkeypatch.setattr(graph, "save", save_wrong)
    options = Options(capacity=128, cases=2, picture_set=picture_set, max_new_tokens=2)
    with pytest.raises(
        VlmcError, match=r"vision_encoder does not compute what PyTorch does \(image_features of case 0\)"
    ):
        export(checkpoint.resolve(str(tiny_checkpoint)), tmp_path / "out", options, lambda *_: None)
    assert list(tmp_path.iterdir()) == []


# The pieces


def test_arrays_are_compared_by_their_largest_difference_and_their_direction() -> None:
    reference = np.array([[100.0, -1.0]], np.float32)
    level = parity.compare("l", "c", reference, reference + np.float32(0.0625))
    assert (level.max_abs, level.tolerance, level.passed) == (0.0625, 0.1, True)
    assert not parity.compare("l", "c", reference, reference + np.float32(0.2)).passed
    assert not parity.compare("l", "c", np.array([0.0, 1e-4]), np.array([1e-4, 0.0])).passed
    assert parity.compare("l", "c", np.zeros(3), np.zeros(3)).passed


def test_small_differences_everywhere_turn_the_direction() -> None:
    reference = np.ones(1_000_000)
    reference[0] = 1000.0  # 0.9 is below a thousandth of it
    level = parity.compare("l", "c", reference, reference + np.tile([0.9, -0.9], 500_000))
    assert level.max_abs < level.tolerance
    assert level.cosine < 0.9
    assert not level.passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_passes(bad: float) -> None:
    for left, right in ((1.0, bad), (bad, 1.0), (bad, bad)):
        assert not parity.compare("l", "c", np.array([left, 2.0]), np.array([right, 2.0])).passed


def test_another_shape_is_said() -> None:
    level = parity.compare("l", "c", np.zeros((2, 3)), np.zeros((3, 2)))
    assert not level.passed
    with pytest.raises(VlmcError, match=r"Found: shape \(3, 2\) instead of \(2, 3\).*of your own see docs/add-a-"):
        parity.require(level)


@pytest.mark.parametrize(
    ("expected", "found", "where"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0), ([1], [1, 2], 1)],
)
def test_the_first_divergence(expected: list[int], found: list[int], where: int | None) -> None:
    assert parity.first_divergence(expected, found) == where


def tokens_level(margin: float, found: list[int], monkeypatch: pytest.MonkeyPatch) -> ParityLevel:
    monkeypatch.setattr(parity, "open_image", lambda path: None)
    session: Any = SimpleNamespace(prepare=lambda *_: None, generate=lambda *_: iter(found))
    artifact: Any = SimpleNamespace(root=Path())
    cases = [{"image": "a", "prompt": "", "tokens": [5, 6], "margins": [1.0, margin]}]
    return parity.tokens_level(session, artifact, cases)


def test_a_tie_may_fall_either_way_and_nothing_else_may(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokens_level(1.0, [5, 6], monkeypatch).detail == "1 of 1 cases equal, 0 split at a tie"
    tie = tokens_level(parity.TIE / 2, [5, 7], monkeypatch)
    assert tie.passed
    assert tie.detail == "0 of 1 cases equal, 1 split at a tie"
    wrong = tokens_level(0.002, [5, 7], monkeypatch)
    assert not wrong.passed
    with pytest.raises(
        VlmcError, match=r"case 0 diverges at token 1: \[7\] instead of \[6\]. Expected: PyTorch's tokens"
    ):
        parity.require(wrong)
    assert "at token 1: [] instead of [6]" in tokens_level(1.0, [5], monkeypatch).detail
