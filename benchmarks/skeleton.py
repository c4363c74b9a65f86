"""An artefact, or a folder with onnx/*.onnx, without its weights, for machines that large files do not reach.

    python benchmarks/skeleton.py strip ARTEFACT FOLDER     on the machine that exported it
    python benchmarks/skeleton.py fill FOLDER               on the other: writes weights of the same size and spread

Small tensors travel as they are. Large ones are drawn anew with the old one's mean and deviation, so engines built from
them do the same work on numbers of the same size; the outputs are others, and none is compared with a golden one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir

SMALL = 1 << 14  # bytes
RECORD = "skeleton.json"


def strip(source: Path, target: Path) -> None:
    """Copies all but engines, profiles and the weights' files; records each large tensor's place and spread."""
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
            array = tensor.numpy()
            place = {"offset": tensor.offset, "bytes": array.nbytes, "dtype": array.dtype.name}
            if array.nbytes <= SMALL:
                place["kept"] = len(kept)
                kept += array.tobytes()
            else:
                place |= {"mean": float(array.mean()), "std": float(array.std())}
            tensors.append(place)
        (target / "onnx" / f"{data.name}.kept").write_bytes(kept)
        files[data.name] = {"bytes": data.stat().st_size, "tensors": tensors}
    (target / RECORD).write_text(json.dumps(files))


def fill(folder: Path) -> None:
    """Writes the weights' files, and their checksums into the manifest."""
    from vlmc.files import sha256_of, write_json

    described = folder / "manifest.json"
    manifest = json.loads(described.read_text()) if described.is_file() else None
    noise = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)
    for name, record in json.loads((folder / RECORD).read_text()).items():
        path = folder / "onnx" / name
        kept = (folder / "onnx" / f"{name}.kept").read_bytes()
        content = np.zeros(record["bytes"], np.uint8)
        for place in record["tensors"]:
            start, size = place["offset"], place["bytes"]
            if "kept" in place:
                content[start : start + size] = np.frombuffer(kept, np.uint8, size, place["kept"])
            else:
                count = size // np.dtype(place["dtype"]).itemsize
                values = np.resize(noise, count) * np.float32(place["std"]) + np.float32(place["mean"])
                content[start : start + size] = values.astype(place["dtype"]).view(np.uint8)
        content.tofile(path)
        if manifest:
            manifest["files"][f"onnx/{name}"] |= {"sha256": sha256_of(path)}
    if manifest:
        write_json(described, manifest)


if __name__ == "__main__":
    {"strip": strip, "fill": fill}[sys.argv[1]](*map(Path, sys.argv[2:]))
