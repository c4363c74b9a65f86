"""An artefact with random weights, without them, for machines that large files do not reach.

    python benchmarks/skeleton.py strip ARTEFACT FOLDER     on the machine that exported it
    python benchmarks/skeleton.py sketch PRESET FOLDER      where there is no memory to export it: its decoder's graphs
    python benchmarks/skeleton.py fill FOLDER               on the other, with PyTorch: draws the weights from the seed
    python benchmarks/skeleton.py simulate FOLDER         then, where there is memory: what its plans make of STEP

Small tensors travel as they are; large ones are the model's parameters, which the manifest's config and seed give
again. Checksums tell whether they are the very same: then golden outputs, scales and PyTorch's baselines fit them;
OTHER names the components of which they are not, for another PyTorch may draw otherwise. A sketch has no goldens, so
its weights may be any and a GPU draws them. STEP is what PyTorch makes with the filled weights of a decode step at the
cache's end, with nothing in the cache, which no golden has; a sketch's plan for int8 has the largest numbers of that
step for scales, and smooths nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

SMALL = 1 << 14  # bytes
RECORD, OTHER, STEP = "skeleton.json", "other-weights.json", "step.npz"
TOKEN = 1  # of the step
CAPACITY = 1024


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


def sketch(preset: Path, folder: Path) -> None:
    """An artefact of embed_tokens and the decoder, whose weights were never made. The vision encoder has no graph."""
    from transformers.initialization import no_init_weights
    from vlmc.artifact import GRAPH_FILES, ComponentSpec, Manifest
    from vlmc.exporter import checkpoint, graph
    from vlmc.exporter.export import Generating
    from vlmc.records import SCHEMA, describe_files, write_record

    model, kind = checkpoint.resolve(str(preset), random_weights=True), Generating()
    for name in ("onnx", "golden"):
        (folder / name).mkdir(parents=True)
    described = kind.describe(model, folder)  # in a child: later none could be started
    with no_init_weights():  # memory that nobody writes is never really taken
        whole = checkpoint.load_model(model)
        parts = model.family.split(whole)
    kv = model.family.kv(whole, CAPACITY)
    vision = graph.count_parameters(parts.vision_encoder)
    specs, files = {"vision_encoder": ComponentSpec(GRAPH_FILES["vision_encoder"], (), (), vision)}, {}
    for name in ("embed_tokens", "decoder"):
        component, path = getattr(parts, name), folder / GRAPH_FILES[name]
        exported = graph.export_component(name, component, kind.signature(name, parts, specs, kv))
        end = 0
        for value in exported.graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            # A small parameter was not drawn either; other constants that are small are what they have to be.
            if tensor.nbytes > SMALL or parameter(component, str(value.name), tensor) is not None:
                place = {"offset": end, "length": tensor.nbytes, "dtype": tensor.dtype, "base_dir": path.parent}
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(f"{path.name}.data", shape=shape, name=str(value.name), **place)
                end += tensor.nbytes
        ir.save(exported, path)
        given, made = (graph.tensor_specs(list(side)) for side in (exported.graph.inputs, exported.graph.outputs))
        specs[name] = ComponentSpec(GRAPH_FILES[name], given, made, graph.count_parameters(component))
        files[f"{path.name}.data"] = {"bytes": end, "tensors": []}
        path.with_name(f"{path.name}.data.kept").touch()
    (folder / RECORD).write_text(json.dumps(files))
    np.savez(folder / "golden" / "golden.npz")
    described = kind.complete(described, parts, specs)
    own = {"name": model.name, "family": str(model.config["model_type"]), "source": model.source, "created": ""}
    listed = {"parity": (), "files": describe_files(folder), "versions": {}}
    manifest = Manifest(schema=SCHEMA, components=specs, kv=kv, **own, **listed, **described)
    write_record(folder / "manifest.json", manifest)


def fill(folder: Path) -> None:
    """Writes the weights' files and STEP, and into the manifest the checksums of those that came out otherwise."""
    import torch
    from vlmc.artifact import Artifact
    from vlmc.exporter.checkpoint import load_components
    from vlmc.files import sha256_of, write_json

    described = folder / "manifest.json"
    manifest, record = json.loads(described.read_text()), json.loads((folder / RECORD).read_text())
    sketched = is_sketch(manifest)
    with torch.device(where(manifest)):
        loaded = load_components(Artifact(folder))
        parts = dict(loaded.items())
        if "decoder" in parts:
            peaks = watched(parts["decoder"])
            np.savez(folder / STEP, logits=step(parts, manifest))
            if sketched:
                plan(Artifact(folder), peaks)
    other = []
    for component, spec in manifest["components"].items():
        path = folder / spec["file"]
        if (data := record.get(f"{path.name}.data")) is None:
            continue  # what a sketch leaves out
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
        known = manifest["files"].get(file := f"{spec['file']}.data")
        if known is not None and (found := sha256_of(folder / file)) != known["sha256"]:
            print(f"{file}: not the weights that were exported", flush=True)
            known["sha256"] = found
            other.append(component)
    write_json(described, manifest)
    (folder / OTHER).write_text(json.dumps(other))


def step(parts: Mapping[str, Any], manifest: dict[str, Any]) -> Any:
    """The logits (1, vocabulary) of TOKEN as the last of a full cache of zeros, float32, on PyTorch's device."""
    import torch

    end, specs = manifest["kv"]["capacity"] - 1, manifest["components"]
    with torch.inference_mode():
        made = parts["embed_tokens"](torch.tensor([[TOKEN]]))
        made = [made] if isinstance(made, torch.Tensor) else made
        known = dict(zip([output["name"] for output in specs["embed_tokens"]["outputs"]], made, strict=True))
        known |= {"position_ids": torch.tensor(end), "write_index": torch.tensor([end])}
        given: list[Any] = []
        past: list[Any] = []
        for tensor in specs["decoder"]["inputs"]:
            shape = [end + 1 if d == "capacity" else 1 if isinstance(d, str) else d for d in tensor["shape"]]
            value = known.get(tensor["name"], torch.zeros(1, dtype=getattr(torch, tensor["dtype"]))).expand(shape)
            if tensor["name"].startswith("past_key_values."):
                past.append(value.contiguous())
            else:
                given.append(value)
        logits, _ = parts["decoder"](*given[:4], past, *given[4:])
    return logits.float().cpu().numpy()


def simulate(folder: Path) -> None:
    """Prints the cosine of each plan's fake-quant model with STEP, what the engine of that plan is to be held to, and
    of the float model, which tells whether the weights are those of STEP."""
    import torch
    from vlmc.artifact import Artifact
    from vlmc.calibration.fake_quant import apply_plan
    from vlmc.calibration.plan import read_plan
    from vlmc.evaluation.agreement import cosine
    from vlmc.exporter.checkpoint import load_components

    artifact = Artifact(folder)
    manifest, expected = json.loads((folder / "manifest.json").read_text()), np.load(folder / STEP)["logits"].ravel()
    with torch.device(where(manifest)):
        parts = dict(load_components(artifact).items())
        again = cosine(expected, step(parts, manifest).ravel())
        for name in sorted(path.stem for path in (folder / "plans").glob("*.json")):
            planned = parts | {"decoder": apply_plan(parts["decoder"], read_plan(artifact, name), "decoder")}
            found = cosine(expected, step(planned, manifest).ravel())
            print(f"{name} fake-quant: cosine {found:.5f}, float {again:.5f}", flush=True)


def is_sketch(manifest: dict[str, Any]) -> bool:
    return not any(name.endswith(".data") for name in manifest["files"])


def where(manifest: dict[str, Any]) -> str:
    """Where the weights are drawn: a sketch's on the GPU, if there is one."""
    import torch

    return "cuda" if is_sketch(manifest) and torch.cuda.is_available() else "cpu"


def watched(decoder: Any) -> dict[str, float]:
    """The largest magnitude that each linear layer has been given since, by PART/MODULE.PATH."""
    from torch import nn

    peaks: dict[str, float] = {}

    def watch(path: str, layer: Any) -> None:
        def see(_: Any, given: tuple[Any, ...]) -> None:
            peaks[path] = max(peaks.get(path, 0.0), float(given[0].abs().max()))

        layer.register_forward_pre_hook(see)

    for path, layer in decoder.named_modules():
        if isinstance(layer, nn.Linear):
            watch(f"decoder/{path}", layer)
    return peaks


def plan(artifact: Any, peaks: Mapping[str, float]) -> None:
    """A sketch's plan of the recipe int8."""
    from vlmc.calibration import recipes
    from vlmc.calibration.observers import LEVELS
    from vlmc.calibration.plan import ModulePlan, Plan, write_plan
    from vlmc.records import SCHEMA

    recipe, modules = recipes.load("int8"), {}
    for path, peak in peaks.items():
        rule, seen = recipe.precision(path), {"decode": peak}
        if rule.weight_bits:
            scale = peak / LEVELS or 1.0 if rule.activation_bits else None
            modules[path] = ModulePlan(rule.weight_bits, rule.block, scale, peaks=seen, ranges=seen)
    write_plan(artifact, Plan(SCHEMA, recipe, artifact.manifest.source.sha256, None, modules, {}))


def drawn(component: Any, name: str, tensor: ir.ExternalTensor) -> Any:
    """The module's parameter of that name. What is none of its parameters (a table that export computed) is noise of
    usual size."""
    if (weight := parameter(component, name, tensor)) is not None:
        return weight.contiguous().cpu().numpy()
    shape = tuple(tensor.shape.numpy())
    print(f"{name}: no parameter of shape {shape}; noise", flush=True)
    return (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(tensor.dtype.numpy())


def parameter(component: Any, name: str, tensor: ir.TensorProtocol) -> Any:
    """The module's parameter of that name and shape as the graph has it, of a linear layer turned, or None."""
    name = re.sub(r"#\d+", "", name)  # of a layer that is called several times
    try:
        owner = component.get_submodule(name.rpartition(".")[0])
        weight = getattr(owner, name.rpartition(".")[2]).detach()
    except AttributeError:
        weight = None
    if weight is not None and type(owner).__name__ == "Linear" and weight.ndim == 2:
        weight = weight.t()
    return weight if weight is not None and tuple(weight.shape) == tuple(tensor.shape.numpy()) else None


if __name__ == "__main__":
    {"strip": strip, "sketch": sketch, "fill": fill, "simulate": simulate}[sys.argv[1]](*map(Path, sys.argv[2:]))
