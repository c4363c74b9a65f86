"""The decoder of SmolVLM-256M, a Llama of 135 M weights, in vlmc, llama.cpp and ONNX Runtime GenAI on this CPU.

    python -m venv PEERS && PEERS/bin/pip install llama-cpp-python gguf onnxruntime-genai    what vlmc does not need
    python benchmarks/peers.py --peers PEERS/bin/python --work out/peers --output benchmarks/results/cpu-peers.json

Random weights, batch 1: a prompt of 512 tokens is read, then greedy steps follow. Every sample is a process of its own
that has the machine to itself; they take turns, and a ratio is the median over turns. llama.cpp quantises the same
sizes its own way, ONNX Runtime GenAI as its builder does by itself; of vlmc they are the engines of its recipes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

PRESET = "smolvlm-256m"
PROMPT, STEPS, ROUNDS, CAPACITY = 512, 24, 7, 1024
FTYPES = {"q8_0": 7, "q4_0": 2}  # LLAMA_FTYPE_MOSTLY_… of llama.h
ENGINES = {
    "vlmc": ("fp32", "int8", "w8", "w4"),
    "llama.cpp": ("f16", "q8_0", "q4_0"),
    "genai": ("fp32", "int4"),
}
BASE = "vlmc w4"
Speed = tuple[float, float]  # milliseconds of the prompt, tokens a second behind it


def make(work: Path, peers: str) -> None:
    """What every engine needs, where it is not there yet. ONNX Runtime GenAI's builder needs torch, which this Python
    has."""
    vlmc = [sys.executable, "-m", "vlmc"]
    called([*vlmc, "export", PRESET, "--random-weights", "-o", str(work / "vlmc")])
    for recipe in ENGINES["vlmc"][1:]:
        called([*vlmc, "build", str(work / "vlmc"), "--device", "cpu", "--recipe", recipe])
    if not (work / "hf").is_dir():
        checkpoint(work / "hf")
    if not (work / "f16.gguf").is_file():
        called([peers, __file__, "--work", str(work), "gguf"])
    where = called([peers, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    builder = Path(where.strip()) / "onnxruntime_genai" / "models" / "builder.py"
    for precision in ENGINES["genai"]:
        target = work / f"genai-{precision}"
        if not (target / "genai_config.json").is_file():
            given = ["-i", work / "hf", "-o", target, "-p", precision, "-e", "cpu", "-c", work / "cache"]
            called([sys.executable, str(builder), *map(str, given)])


def called(command: list[str]) -> str:
    """What it prints; what it tells meanwhile comes only where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


def checkpoint(folder: Path) -> None:
    """The decoder as transformers saves a Llama, with the demo's tokenizer, which the builder wants to see."""
    import torch
    import transformers
    from vlmc.exporter.checkpoint import resolve

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**resolve(PRESET, random_weights=True).config["text_config"])
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(__file__).parent.parent / "demo" / "model" / name).read_bytes())


def gguf(work: Path) -> None:
    """llama.cpp's files of the same sizes, without a vocabulary."""
    import gguf
    import llama_cpp
    import numpy as np

    config, random = json.loads((work / "hf" / "config.json").read_text()), np.random.default_rng(0)
    width, inner, vocabulary = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    small = width * groups // heads
    layer = {"attn_q": (width, width), "attn_k": (small, width), "attn_v": (small, width)}
    layer |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
    layer |= {"ffn_down": (width, inner), "attn_norm": (width,), "ffn_norm": (width,)}
    tensors = {"token_embd": (vocabulary, width), "output_norm": (width,), "output": (vocabulary, width)}
    for index in range(config["num_hidden_layers"]):
        tensors |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    writer = gguf.GGUFWriter(work / "new.gguf", "llama")
    writer.add_context_length(CAPACITY)
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("none")
    for name, shape in tensors.items():
        drawn = random.standard_normal(shape) * 0.02
        writer.add_tensor(f"{name}.weight", drawn.astype(np.float16) if len(shape) > 1 else np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, ftype in FTYPES.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = ftype
        files = [str(work / f"{file}.gguf").encode() for file in ("new", name)]
        if failed := llama_cpp.llama_model_quantize(*files, ctypes.byref(settings)):
            raise SystemExit(f"llama.cpp could not make {name}: {failed}")
    (work / "new.gguf").rename(work / "f16.gguf")


def by_vlmc(work: Path, precision: str, ids: list[int]) -> Speed:
    import numpy as np
    from vlmc.artifact import Artifact
    from vlmc.runtime import backends

    artifact = Artifact(work / "vlmc")
    embed = backends.load_runner(artifact, "cpu", "embed_tokens", "onnxruntime-fp32", threads=0)
    decoder = backends.load_decoder(artifact, "cpu", f"onnxruntime-{precision}", embed, threads=0)

    def prompt() -> None:
        decoder.prefill(embed.run({"input_ids": np.array([ids])})["inputs_embeds"])

    return speed(prompt, decoder.decode)


def by_llama(work: Path, precision: str, ids: list[int]) -> Speed:
    import llama_cpp
    import numpy as np

    threads = len(os.sched_getaffinity(0))
    sizes = {"n_ctx": CAPACITY, "n_batch": PROMPT, "n_ubatch": PROMPT, "n_threads": threads, "n_threads_batch": threads}
    model = llama_cpp.Llama(str(work / f"{precision}.gguf"), verbose=False, **sizes)

    def choice() -> int:
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def prompt() -> None:
        model.reset()
        model.eval(ids)
        choice()

    def decode(count: int) -> None:
        for _ in range(count):
            model.eval([choice()])
        choice()

    return speed(prompt, decode)


def by_genai(work: Path, precision: str, ids: list[int]) -> Speed:
    import onnxruntime_genai as genai

    model = genai.Model(str(work / f"genai-{precision}"))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=CAPACITY, min_length=CAPACITY, do_sample=False)
    generators: list[Any] = []

    def prompt() -> None:
        generators[:] = [genai.Generator(model, settings)]
        generators[0].append_tokens(ids)
        generators[0].generate_next_token()

    def decode(count: int) -> None:
        for _ in range(count):
            generators[0].generate_next_token()

    return speed(prompt, decode)


def speed(prompt: Callable[[], Any], decode: Callable[[int], Any]) -> Speed:
    """The better of two prompts and the better of two runs of STEPS behind one, after a round to warm up."""
    read, rates = [], []
    for _ in range(3):
        start = time.perf_counter()
        prompt()
        read.append((time.perf_counter() - start) * 1000)
        decode(2)
        start = time.perf_counter()
        decode(STEPS)
        rates.append(STEPS / (time.perf_counter() - start))
    return min(read[1:]), max(rates[1:])


def measure(work: Path, peers: str) -> dict[str, list[Speed]]:
    """Samples by engine, in turns."""
    engines = [(name, precision) for name, precisions in ENGINES.items() for precision in precisions]
    samples: dict[str, list[Speed]] = {" ".join(engine): [] for engine in engines}
    for _ in range(ROUNDS):
        for engine in engines:
            python = sys.executable if engine[0] == "vlmc" else peers
            printed = called([python, __file__, "--work", str(work), "time", *engine])
            prompt_ms, rate = json.loads(printed.splitlines()[-1])
            samples[" ".join(engine)].append((prompt_ms, rate))
    return samples


def summary(own: list[Speed], base: list[Speed]) -> dict[str, Any]:
    """Medians, and how many times as fast as the base in the same turn: the median, the least and the most."""
    read = sorted(old[0] / new[0] for old, new in zip(base, own, strict=True))
    rates = sorted(new[1] / old[1] for old, new in zip(base, own, strict=True))
    return {
        "prompt_ms": round(statistics.median(one[0] for one in own), 1),
        "tokens_per_s": round(statistics.median(one[1] for one in own), 1),
        **{
            f"{what}_as_fast": [round(value, 3) for value in (statistics.median(found), found[0], found[-1])]
            for what, found in (("prompt", read), ("decode", rates))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/peers"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu-peers.json"))
    parser.add_argument("--peers", help="a Python that has llama_cpp, gguf and onnxruntime_genai")
    parser.add_argument("step", nargs="*", help=argparse.SUPPRESS)  # what this script asks of itself
    arguments = parser.parse_args()
    work, step = arguments.work.absolute(), arguments.step
    if step == ["gguf"]:
        gguf(work)
    elif step:
        vocabulary = json.loads((work / "hf" / "config.json").read_text())["vocab_size"]
        ids = [place * 7919 % vocabulary for place in range(PROMPT)]
        print(json.dumps({"vlmc": by_vlmc, "llama.cpp": by_llama, "genai": by_genai}[step[1]](work, step[2], ids)))
    else:
        from vlmc.profiles import machine

        work.mkdir(parents=True, exist_ok=True)
        make(work, arguments.peers)
        samples = measure(work, arguments.peers)
        found = {engine: summary(own, samples[BASE]) for engine, own in samples.items()}
        for engine, numbers in found.items():
            print(f"{engine:16s}", numbers, flush=True)
        installed = json.loads(called([arguments.peers, "-m", "pip", "list", "--format", "json"]))
        versions = {
            one["name"]: one["version"] for one in installed if one["name"].startswith(("llama", "gguf", "onnx"))
        }
        record = {
            "what": f"decoder of {PRESET}, random weights, batch 1: {PROMPT} tokens, then {STEPS} steps",
            "date": date.today().isoformat(),
            "command": "python benchmarks/peers.py --peers PEERS/bin/python",
            "machine": machine.describe(0),
            "peers": versions,
            "as fast as": BASE,
            "found": found,
            "samples": samples,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
