"""Goldens are read as they were written, or refused in one sentence: also where the manifest was made to match them."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vlmc.artifact import Artifact
from vlmc.errors import VlmcError
from vlmc.evaluation import goldens
from vlmc.files import sha256_of
from vlmc.records import FileSpec


@pytest.fixture
def with_file(tiny: Artifact, tmp_path: Path) -> Callable[[str, bytes], Artifact]:
    """with_file(name, content): the artefact with that file, which its manifest knows."""

    def put(name: str, content: bytes) -> Artifact:
        made = Artifact(Path(shutil.copytree(tiny.root, tmp_path / "tiny")))
        (made.root / name).write_bytes(content)
        made.manifest.files[name] = FileSpec(sha256_of(made.root / name), len(content))
        return made

    return put


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    """Of these arrays; `first_` in a name stands for the first case."""
    content = io.BytesIO()
    save(content, **{name.replace("first_", "0."): array for name, array in arrays.items()})
    return content.getvalue()


def member(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(name, content)
    return packed.getvalue()


def test_whole_goldens_are_read(tiny: Artifact) -> None:
    assert len(goldens.cases(tiny)) == 3
    arrays = goldens.arrays(tiny)
    assert arrays["0.pixel_values"].dtype == np.float32
    with pytest.raises(VlmcError, match=r"lacks the array '9\.pixel_values'.*vlmc export"):
        arrays["9.pixel_values"]


@pytest.mark.parametrize(
    "content",
    [
        *([], {}, {"cases": {}}, {"cases": []}, {"cases": None}, {"cases": 3}, {"cases": [1]}),
        *({"cases": [{"image": 3, "prompt": "", "tokens": []}]}, {"cases": [{"image": "a.png", "prompt": "What?"}]}),
        {"cases": [{"image": "a.png", "prompt": "What?", "tokens": "12"}]},
    ],
)
def test_cases_of_another_form_are_refused(content: Any, with_file: Callable[..., Artifact]) -> None:
    with pytest.raises(VlmcError, match=r"golden\.json.*vlmc export"):
        goldens.cases(with_file("golden/golden.json", json.dumps(content).encode()))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a zip file"),
        (b"\x80\x04N.", "not a zip file"),
        (npz(first_pixel_values=np.array([{}], object)), "Object arrays cannot be loaded"),
        (npz(np.savez_compressed, first_pixel_values=np.zeros((1, 3, 999, 999), np.float32)), "compressed"),
        (member("0.pixel_values.txt", b"pixels"), "is no array"),
        (member("0.pixel_values.npy", npz(x=np.zeros(3))[:70]), "holds no arrays"),
        (npz(first_pixel_values=np.zeros((1, 3, 8, 8), np.float32)), r"float32 \(1, 3, 8, 8\)\. Expected: .*32, 32"),
        (npz(first_pixel_values=np.zeros((1, 3, 32, 32))), "float64"),
        (npz(first_pixel_values=np.zeros((0, 3, 32, 32), np.float32)), r"\(0, 3, 32, 32\)"),
        (npz(first_pixel_values=np.array("pixels")), "pixel_values is not what the model takes"),
        (npz(first_pixel_values=np.full((1, 3, 32, 32), np.nan, np.float32)), "NaN"),
        (npz(first_step_logits=np.zeros((2, 5), np.float32)), "step_logits is not what"),
    ],
)
def test_arrays_of_another_form_are_refused(content: bytes, says: str, with_file: Callable[..., Artifact]) -> None:
    with pytest.raises(VlmcError, match=rf"{says}.*vlmc export"):
        goldens.arrays(with_file("golden/golden.npz", content))
