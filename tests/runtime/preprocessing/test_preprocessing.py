"""A preprocessor is found by the kind that the manifest names."""

from __future__ import annotations

import subprocess
import sys

import pytest
from vlmc.errors import VlmcError
from vlmc.runtime import preprocessing


def test_every_file_is_a_kind() -> None:
    assert "idefics3" in preprocessing.kinds()


@pytest.mark.parametrize("kind", ["idefics2", "os", "..images", "", None, ["idefics3"]])
def test_an_unknown_kind_is_refused_with_the_nearest_names(kind: object) -> None:
    with pytest.raises(VlmcError, match="idefics3"):
        preprocessing.load({"kind": kind})


def test_a_config_without_a_kind_is_refused() -> None:
    with pytest.raises(VlmcError, match="no preprocessing of kind None"):
        preprocessing.load({})


def test_neither_torch_nor_transformers_is_loaded() -> None:
    code = (
        "import sys; import vlmc.runtime.prompt, vlmc.runtime.preprocessing.idefics3;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'onnx')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize(("factor", "mean", "std"), [(1e300, 0.5, 0.5), (0.1, 1e300, 0.5), (0.1, 0.5, 1e-300)])
@pytest.mark.filterwarnings("error")
def test_numbers_that_make_no_finite_pixels_are_refused(factor: float, mean: float, std: float) -> None:
    with pytest.raises(VlmcError, match="do not make finite numbers"):
        preprocessing.Normalise(factor, (mean,) * 3, (std,) * 3)
