"""A prompt and a decode step of presets in PyTorch float16 at whole size, where no machine exports or builds them.

    python benchmarks/torch_whole.py FOLDER PRESET…     on the GPU: FOLDER/data/PRESET/torch.json, as torch_times.py's

The weights are drawn on the GPU, in float32 and then halved, so they are others than those of an export. The loop is
torch_times.py's; the vision encoder, which an export of fewer decoder layers has whole, is left out.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch_times
from vlmc.artifact import ComponentSpec, TensorSpec
from vlmc.calibration.cuda_baseline import GpuDecoder, halved
from vlmc.exporter import checkpoint, graph

CAPACITY, PROMPT, MODES = 1024, 160, ("eager", "graph")


def measure(preset: str, folder: Path) -> None:
    model = checkpoint.resolve(preset, random_weights=True)
    with torch.device("cuda"):
        whole = checkpoint.load_model(model)
        parts = model.family.split(whole).map(lambda _, module: halved(module))
    kv = model.family.kv(whole, CAPACITY)
    with torch.inference_mode():
        made = parts.embed_tokens(torch.arange(PROMPT, device="cuda")[None])
    arrays = [made] if isinstance(made, torch.Tensor) else list(made)
    names = graph.embed_signature(parts.embed_tokens).outputs
    outputs = tuple(
        TensorSpec(name, "float32", (1, "length", *map(int, array.shape[2:])))
        for name, array in zip(names, arrays, strict=True)
    )
    embed = ComponentSpec("", (), outputs, graph.count_parameters(parts.embed_tokens))
    signature = graph.decoder_signature(parts.decoder, embed, kv)
    known = {tensor.name: tensor for tensor in outputs}
    inputs = tuple(
        known.get(name) or TensorSpec(name, "", tuple(getattr(example, "shape", ())))
        for name, example in zip(signature.inputs[:4], signature.example[:4], strict=True)
    )
    inputs += tuple(known[name] for name in signature.inputs if name in known and name != "inputs_embeds")
    decoder = ComponentSpec("", inputs, (), graph.count_parameters(parts.decoder))
    specs = {"embed_tokens": embed, "decoder": decoder}
    golden = {f"0.{name}": array.float().cpu().numpy() for name, array in zip(names, arrays, strict=True)}
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(components=specs))
    folder.mkdir(parents=True)
    described = {
        "components": {name: {"parameters": spec.parameters} for name, spec in specs.items()},
        "kv": vars(kv),
        "source": {"kind": "random"},
    }
    (folder / "manifest.json").write_text(json.dumps(described))
    found: dict[str, Any] = {}
    for mode in MODES:
        try:
            runner = GpuDecoder(parts, specs, kv, mode, "cuda")
            found[mode] = torch_times.times(artifact, {}, runner, golden)
        except Exception as error:  # PyTorch captures no graph of Gemma 3n's step by transformers 5.17
            found[mode] = f"{type(error).__name__}: {str(error)[:300]}"
        print(preset, mode, found[mode], flush=True)
        (folder / "torch.json").write_text(json.dumps(found, indent=1))


for name in sys.argv[2:]:
    measure(name, Path(sys.argv[1]) / "data" / name)
    gc.collect()
    torch.cuda.empty_cache()
