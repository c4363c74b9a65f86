"""Which form of a ViT's graph TensorRT runs fastest: two layers, many forms, float16 and INT8.

    python benchmarks/tensorrt_variants.py make FOLDER            with PyTorch: lowered graphs, one a form (see `FORMS`)
    python benchmarks/tensorrt_variants.py build FOLDER NAME      on the GPU, one process a form
    python benchmarks/tensorrt_variants.py time FOLDER            there: milliseconds of each, in rounds, as JSON
    ncu … python benchmarks/tensorrt_variants.py launch FOLDER NAME   there: one run, for the names of its kernels

SigLIP-base as SmolVLM-256M has it (768 wide, 512×512 pixels, 1,024 tokens), cut to LAYERS layers, random weights.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LAYERS = 2
ATTENTION = (".scores", ".values", ".weights", ".query", ".key")
FORMS: dict[str, dict[str, Any]] = {  # name: what differs from a float16 graph as `vlmc build` lowers it
    "fp16-convolution": {"patches": False},
    "fp16": {},
    "fp16-merged-qkv": {"merge": True},
    "fp16-typed": {"half": True},
    "fp16-scaled-scores": {"scores": True},
    "int8": {"int8": "*"},
    "int8-merged-qkv": {"int8": "*", "merge": True},
    "int8-mlp": {"int8": "*.fc?"},
    "int8-attention": {"int8": "*", "products": True},
    "int8-attention-merged-qkv": {"int8": "*", "products": True, "merge": True},
    "int8-level-5": {"int8": "*", "level": 5},
    "int8-erf": {"int8": "*", "gelu": "none"},
    "int8-typed": {"int8": "*", "half": True},
    "fp16-static": {"static": True},
    "fp16-layers": {"layers": "all"},
    "int8-layers": {"int8": "*", "layers": "all"},
    "int8-attention-layers": {"int8": "*", "layers": "attention"},
    "int8-mlp-attention-layers": {"int8": "*.fc?", "layers": "attention"},
    "fp16-convolutions": {"convolutions": "*"},
    "int8-convolutions": {"int8": "*", "convolutions": "*"},
    "int8-mlp-convolutions": {"int8": "*.fc?", "convolutions": "*.fc?"},
}


def make(folder: Path) -> None:
    """Writes every form's lowered graph."""
    import onnx_ir as ir
    from vlmc.exporter.checkpoint import PRESETS
    from vlmc.exporter.family import family_for
    from vlmc.exporter.graph import export_component, vision_signature
    from vlmc.exporter.onnx_ops import IMPLEMENTATION
    from vlmc.files import read_json

    config = read_json(PRESETS / "smolvlm-256m.json")["config"]
    config["vision_config"]["num_hidden_layers"] = LAYERS
    config["text_config"]["num_hidden_layers"] = 1
    family = family_for(config["model_type"], "preset")
    model = family.randomise(config, seed=0).eval()
    model.set_attn_implementation(IMPLEMENTATION)
    signature = vision_signature(family.vision_inputs(model))
    graph = export_component("vision_encoder", family.split(model).vision_encoder, signature)
    (folder / "onnx").mkdir(parents=True)
    ir.save(graph, folder / "canonical", external_data="canonical.data")
    for name, form in FORMS.items():
        lowered = ir.load(folder / "canonical")
        lower(lowered, **form)
        ir.save(lowered, folder / "onnx" / f"{name}.onnx", external_data=f"{name}.onnx.data")
    for path in folder.glob("canonical*"):
        path.unlink()


def lower(
    model: Any,
    int8: str = "",
    merge: bool = False,
    patches: bool = True,
    half: bool = False,
    gelu: str = "",
    scores: bool = False,
    products: bool = False,
    convolutions: str = "",
    static: bool = False,
    layers: str = "",
    level: int = 3,
) -> None:
    """The canonical graph in one of the forms; `int8` names the layers (fnmatch), with scales that do not matter;
    `convolutions` those that become convolutions of 1×1, which Myelin does not take."""
    from fnmatch import fnmatch

    import onnx_ir as ir
    from vlmc.calibration.plan import ModulePlan
    from vlmc.engines import tensorrt_network
    from vlmc.engines.passes import float_weights, half_precision, opset17, patches_as_matmul, quantize, weight_of

    if gelu:
        for node in model.graph:
            if node.op_type == "Gelu":
                node.attributes["approximate"] = ir.AttrString("approximate", gelu)
    if convolutions:
        as_convolutions(model, convolutions)
    if int8:
        names = [str(n.name) for n in model.graph if n.op_type in ("MatMul", "Conv") and weight_of(n) is not None]
        names = [name for name in names if "patch" not in name and fnmatch(name, int8)]
        chosen = {f"vision_encoder/{name}": ModulePlan(8, 0, 0.05) for name in names}
        plan: Any = SimpleNamespace(absorbers={}, modules=chosen, recipe=SimpleNamespace(name="int8"))
        quantize.apply(model, plan, "vision_encoder")
    if merge:
        merge_products(model)
    if patches:
        patches_as_matmul.apply(model)
    opset17.apply(model)
    float_weights.apply(model)
    if scores:
        scale_scores(model)
    if products:
        quantize_attention(model)
    if half:
        half_precision.apply(model)
    if static:
        tensorrt_network.fix_dimension(model, "tiles", 1)


def as_convolutions(model: Any, names: str) -> None:
    """The named linear layers, bias included, as convolutions over (1, in, tokens, 1)."""
    from fnmatch import fnmatch

    import numpy as np
    import onnx_ir as ir
    from vlmc.engines.passes import constant, insert, only_user, prune, replace, weight_of

    graph = model.graph
    last = constant(graph, "convolutions.last", np.array([-1], np.int64))
    for node in [n for n in graph if n.op_type == "MatMul" and fnmatch(str(n.name), names)]:
        weight = weight_of(node)
        if weight is None:
            continue
        name, added = str(node.name), only_user(node.outputs[0], "Add")
        turned = insert(node, "Transpose", [node.inputs[0]], f"{name}.turned", perm=[0, 2, 1]).outputs[0]
        image = insert(node, "Unsqueeze", [turned, last], f"{name}.image").outputs[0]
        inputs = [image, constant(graph, f"{name}.kernel", np.ascontiguousarray(weight.T)[..., None, None])]
        if added is not None:
            inputs.append(next(value for value in added.inputs if value.const_value is not None))
        node.name = f"{name}.matmul"
        made = insert(node, "Conv", inputs, name, kernel_shape=[1, 1]).outputs[0]
        made.dtype = ir.DataType.FLOAT
        flat = insert(node, "Squeeze", [made, last], f"{name}.flat").outputs[0]
        back = insert(node, "Transpose", [flat], f"{name}.back", perm=[0, 2, 1]).outputs[0]
        for value in (turned, image, flat, back):
            value.dtype = ir.DataType.FLOAT
        replace(added if added is not None else node, back)
    prune(model)


def scale_scores(model: Any) -> None:
    """The scale of attention behind its first product and not before it."""
    from vlmc.engines.passes import insert, prune

    for product in [node for node in model.graph if str(node.name).endswith(".scores")]:
        scaled = product.inputs[0].producer()
        users = list(product.outputs[0].uses())
        product.replace_input_with(0, scaled.inputs[0])
        behind = insert(users[0].node, "Mul", [product.outputs[0], scaled.inputs[1]], f"{product.name}.scaled").outputs[
            0
        ]
        behind.dtype = product.outputs[0].dtype
        for user in users:
            user.node.replace_input_with(user.idx, behind)
    prune(model)


def quantize_attention(model: Any) -> None:
    """Q/DQ on both operands of attention's two products, with scales that do not matter."""
    import numpy as np
    import onnx_ir as ir
    from vlmc.engines.passes import constant, insert

    for product in [node for node in model.graph if str(node.name).endswith((".scores", ".values"))]:
        for index, value in enumerate(product.inputs):
            name = f"{product.name}.{index}"
            scale = constant(model.graph, f"{name}.scale", np.array(0.05, np.float32))
            zero = constant(model.graph, f"{name}.zero", np.array(0, np.int8))
            quantised = insert(product, "QuantizeLinear", [value, scale, zero], f"{name}.quantised").outputs[0]
            quantised.dtype = ir.DataType.INT8
            again = insert(product, "DequantizeLinear", [quantised, scale, zero], f"{name}.dequantised").outputs[0]
            again.dtype = value.dtype
            product.replace_input_with(index, again)


def merge_products(model: Any) -> int:
    """Products of one input with several weights (queries, keys and values; gate and up) as one, split behind it.
    Weights are constants, or int8 a channel behind a DequantizeLinear. Returns how many products went."""
    import numpy as np
    import onnx_ir as ir
    from vlmc.engines.passes import array_of, constant, insert, producer, prune, replace, weight_of

    graph, groups = model.graph, {}
    for node in graph:
        if node.op_type == "MatMul" and (weight_of(node) is not None or producer(node.inputs[1], "DequantizeLinear")):
            groups.setdefault(node.inputs[0], []).append(node)
    merged = 0
    for source, nodes in groups.items():
        if len(nodes) < 2:
            continue
        first, name = nodes[0], f"{nodes[0].name}.merged"
        scaled = [producer(node.inputs[1], "DequantizeLinear") for node in nodes]
        constants = [(dq or node).inputs[0 if dq else 1] for dq, node in zip(scaled, nodes, strict=True)]
        widths = [value.shape[1] for value in constants]

        def joined(values: list[Any], what: str, name: str = name) -> Any:
            return constant(graph, f"{name}.{what}", np.concatenate([array_of(value) for value in values], axis=-1))

        if all(scaled):
            parts = [joined([node.inputs[i] for node in scaled], what) for i, what in enumerate(("weight", "scale"))]
            weight = insert(first, "DequantizeLinear", parts, f"{name}.dequantize", axis=1).outputs[0]
        else:
            weight = joined(constants, "weight")
        weight.shape, weight.dtype = ir.Shape([constants[0].shape[0], sum(widths)]), ir.DataType.FLOAT
        product = insert(first, "MatMul", [source, weight], name).outputs[0]
        product.dtype = ir.DataType.FLOAT
        sizes = constant(graph, f"{name}.sizes", np.array(widths, np.int64))
        for node, part in zip(
            nodes,
            insert(first, "Split", [product, sizes], f"{name}.parts", outputs=len(nodes), axis=-1).outputs,
            strict=True,
        ):
            part.dtype = ir.DataType.FLOAT
            replace(node, part)
        merged += len(nodes) - 1
    prune(model)
    return merged


def build(folder: Path, name: str) -> None:
    """Builds NAME.trt and writes NAME.json: seconds, and what the inspector shows."""
    import tensorrt as trt
    from vlmc.engines import tensorrt_network
    from vlmc.runtime.tensorrt_engine import logger

    start, form = time.perf_counter(), FORMS[name]
    parsed = tensorrt_network.parse(trt, folder / "onnx" / f"{name}.onnx", name, ("EXPLICIT_BATCH",))

    if form.get("layers"):
        from graph_forms import tell

        tell(trt, parsed.network, endings=ATTENTION if form["layers"] == "attention" else ("",))

    def configure(config: Any) -> None:
        if form.get("layers"):
            config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.builder_optimization_level = form.get("level", 3)
        for flag in ["FP16"] + ["INT8"] * ("int8" in form):
            config.set_flag(getattr(trt.BuilderFlag, flag))

    shape = (1, 3, 512, 512)
    engine = tensorrt_network.serialise(parsed, [{"pixel_values": (shape, shape, shape)}], configure)
    (folder / f"{name}.trt").write_bytes(engine)
    loaded = trt.Runtime(logger(trt)).deserialize_cuda_engine(engine)
    text = loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text, strict=False).get("Layers", [])
    record = {
        "seconds": round(time.perf_counter() - start, 1),
        "layers": layers,
        "bytes": (folder / f"{name}.trt").stat().st_size,
    }
    (folder / f"{name}.json").write_text(json.dumps(record))


def load(folder: Path, name: str, gpu: Any) -> tuple[Any, Any]:
    """The engine, and an execution context with all its buffers."""
    import tensorrt as trt
    from vlmc.runtime.cuda import architecture
    from vlmc.runtime.tensorrt_engine import Engine

    spec: Any = SimpleNamespace(settings={"version": str(trt.__version__), "sm": architecture()}, device="h100")
    engine = Engine(trt, gpu, spec, folder / f"{name}.trt")
    context = engine.context()
    context.bind(engine.allocate(context))
    context.use_profile(0, engine.profiles[0])
    return engine, context


def launch(folder: Path, name: str) -> None:
    """Runs the form twice, the first time to set itself up."""
    from vlmc.runtime.cuda import Gpu

    gpu = Gpu()
    _engine, context = load(folder, name, gpu)
    for _ in range(2):
        context.enqueue()
        gpu.wait()


def measure(folder: Path) -> None:
    """Prints {"name": {"ms": median, "build_seconds", "layers", …}}; each run is one launch of a CUDA graph."""
    from engine_times import in_rounds
    from vlmc.runtime.cuda import Gpu

    gpu, launches = Gpu(), {}
    for name in FORMS:
        if (folder / f"{name}.trt").is_file():
            engine, context = load(folder, name, gpu)
            context.enqueue()
            gpu.wait()
            launches[name] = (gpu.capture(context.enqueue), engine, context)
    samples = in_rounds(gpu, launches)
    print(json.dumps({name: summary(folder, name, values) for name, values in samples.items()}, indent=1))


def summary(folder: Path, name: str, values: list[float]) -> dict[str, Any]:
    record = json.loads((folder / f"{name}.json").read_text())
    shown = [layer if isinstance(layer, str) else layer.get("Name", "") for layer in record["layers"]]
    return {
        "ms": round(statistics.median(values), 4),
        "least_ms": round(min(values), 4),
        "build_seconds": record["seconds"],
        "bytes": record["bytes"],
        "layers": len(shown),
        "fused_regions": sum("ForeignNode" in layer for layer in shown),
    }


if __name__ == "__main__":
    command, path, *names = sys.argv[1:]
    {"make": make, "build": build, "time": measure, "launch": launch}[command](Path(path), *names)
