"""An artefact with random weights, without them, for machines that large files do not reach.

    python benchmarks/skeleton.py strip ARTEFACT FOLDER     on the machine that exported it
    python benchmarks/skeleton.py fill FOLDER               on the other, with PyTorch: draws the weights from the seed

Small tensors travel as they are; large ones are the model's parameters, which the manifest's config and seed give
again. Checksums tell whether they are the very same: then golden outputs, scales and PyTorch's baselines fit them.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

SMALL = 1 << 14  # bytes
RECORD = "skeleton.json"


def strip(source: Path, target: Path) -> None:
    """Copies all but engines, profiles and the weights' files; records each tensor's place."""
    ignore = shutil.ignore_patterns("*.data", "engines", "profile")
    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)
    files = {}
    for path in sorted((source / "onnx").glob("*.onnx")):
        data = path.with_name(path.name + ".data")
        tensors, kept = [], bytearray()
        for value in ir.load(path).graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            place = {"offset": tensor.offset, "bytes": tensor.nbytes}
            if tensor.nbytes <= SMALL:
                place["kept"] = len(kept)
                kept += tensor.numpy().tobytes()
            tensors.append(place)
        (target / "onnx" / f"{data.name}.kept").write_bytes(kept)
        files[data.name] = {"bytes": data.stat().st_size, "tensors": tensors}
    (target / RECORD).write_text(json.dumps(files))


def fill(folder: Path) -> None:
    """Writes the weights' files, and into the manifest the checksums of those that came out otherwise."""
    from vlmc.artifact import Artifact
    from vlmc.exporter.checkpoint import load_components
    from vlmc.files import sha256_of, write_json

    described = folder / "manifest.json"
    manifest = json.loads(described.read_text())
    parts = dict(load_components(Artifact(folder)).items())
    record = json.loads((folder / RECORD).read_text())
    for component, spec in manifest["components"].items():
        path = folder / spec["file"]
        data = record[f"{path.name}.data"]
        kept = path.with_name(f"{path.name}.data.kept").read_bytes()
        small = {place["offset"]: place["kept"] for place in data["tensors"] if "kept" in place}
        content = np.memmap(path.with_name(f"{path.name}.data"), np.uint8, "w+", shape=(data["bytes"],))
        for name, value in ir.load(path).graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                start, size = tensor.offset or 0, tensor.nbytes
                if start in small:
                    content[start : start + size] = np.frombuffer(kept, np.uint8, size, small[start])
                else:
                    content[start : start + size] = drawn(parts[component], name, tensor).reshape(-1).view(np.uint8)
        content.flush()
        file = f"{spec['file']}.data"
        if (found := sha256_of(folder / file)) != manifest["files"][file]["sha256"]:
            print(f"{file}: not the weights that were exported", flush=True)
            manifest["files"][file]["sha256"] = found
    write_json(described, manifest)


def drawn(component: Any, name: str, tensor: ir.ExternalTensor) -> Any:
    """The module's parameter of that name as the graph has it, of a linear layer turned. What is none of its parameters
    (a table that export computed) is noise of usual size."""
    shape = tuple(tensor.shape.numpy())
    name = re.sub(r"#\d+", "", name)  # of a layer that is called several times
    try:
        owner = component.get_submodule(name.rpartition(".")[0])
        weight = getattr(owner, name.rpartition(".")[2]).detach()
    except AttributeError:
        weight = None
    if weight is not None:
        weight = weight.t() if type(owner).__name__ == "Linear" and weight.ndim == 2 else weight
        if tuple(weight.shape) == shape:
            return weight.contiguous().numpy()
    print(f"{name}: no parameter of shape {shape}; noise", flush=True)
    return (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(tensor.dtype.numpy())


if __name__ == "__main__":
    {"strip": strip, "fill": fill}[sys.argv[1]](*map(Path, sys.argv[2:]))
