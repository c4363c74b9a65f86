"""An artefact with random weights, without them, for machines that large files do not reach.

    python benchmarks/skeleton.py strip ARTEFACT FOLDER     on the machine that exported it
    python benchmarks/skeleton.py fill FOLDER               on the other, with PyTorch: draws the weights from the seed

Small tensors travel as they are; large ones are the model's parameters, which the manifest's config and seed give
again. Checksums tell whether they are the very same: then golden outputs, scales and PyTorch's baselines fit them;
OTHER names the components of which they are not, for another PyTorch may draw otherwise. STEP is what the
canonical graph makes of a decode step at the cache's end, with nothing in the cache, which no golden has.
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
RECORD, OTHER, STEP = "skeleton.json", "other-weights.json", "step.npz"
TOKEN = 1  # of the step


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
    if (source / "onnx" / "embed_tokens.onnx").is_file():
        np.savez(target / STEP, logits=step(source))


def step(source: Path) -> Any:
    """The logits (1, vocabulary) of TOKEN as the last of a full cache of zeros, float32, by ONNX Runtime."""
    from vlmc.artifact import Artifact

    artifact = Artifact(source)
    end = artifact.manifest.kv.capacity - 1
    made = opened(artifact.graph("embed_tokens"))
    names = [value.name for value in made.get_outputs()]
    known = dict(zip(names, made.run(None, {"input_ids": np.array([[TOKEN]])}), strict=True))
    known |= {"position_ids": np.array(end), "write_index": np.array([end])}
    decoder = opened(artifact.graph("decoder"))
    feeds = {}
    for value in decoder.get_inputs():
        shape = [end + 1 if size == "capacity" else 1 if isinstance(size, str) else size for size in value.shape]
        kind = np.float32 if value.type == "tensor(float)" else np.int64
        feeds[value.name] = np.broadcast_to(known.get(value.name, np.zeros(1)), shape).astype(kind)
    return decoder.run(["logits"], feeds)[0]


def opened(path: Path) -> Any:
    """A session that holds no second copy of the weights."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of a cache that is copied
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fill(folder: Path) -> None:
    """Writes the weights' files, and into the manifest the checksums of those that came out otherwise."""
    from vlmc.artifact import Artifact
    from vlmc.exporter.checkpoint import load_components
    from vlmc.files import sha256_of, write_json

    described = folder / "manifest.json"
    manifest = json.loads(described.read_text())
    parts = dict(load_components(Artifact(folder)).items())
    other = []
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
            other.append(component)
    write_json(described, manifest)
    (folder / OTHER).write_text(json.dumps(other))


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
