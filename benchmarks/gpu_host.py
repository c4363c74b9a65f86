"""Everything that is measured on the GPU host of shared/gpu/README.md, in one command, by the host's own Python.

    bash benchmarks/gpu_unpack.sh                                    after the last part of gpu_pack.sh
    python3 benchmarks/gpu_host.py --seconds 1500 --builders 0,12,12,12    logs and records lie under /tmp/gpu

It takes the artefacts and skeletons that lie in /tmp/gpu/data. The demo is built by `vlmc build` and measured by `vlmc
profile`, on a GPU that it has to itself. Of the others every engine is built with one shape and timed, and PyTorch too
(engine_times.py, torch_times.py), for decoders of 30 layers with all their profiles were not built in eight minutes.
`--builders` says how many engines are in the making on each GPU at once. What is timed has its GPU to itself: a GPU
without builders times from the start, the others once nothing is left for them to build. What is not finished in time
is missing, and its log says where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_table
from gpu_steps import DEVICE, GIB, Run

HOME = Path("/tmp/gpu")
DATA = HOME / "data"
PRESETS = Path(__file__).parent.parent / "exporter" / "presets"
TORCH, TENSORRT = str(HOME / "torch-python"), str(HOME / "tensorrt-python")  # interpreters that gpu_unpack.sh made
VLMC = ("-m", "vlmc")
TIMES, FORMS = "benchmarks/engine_times.py", "benchmarks/tensorrt_variants.py"
DEMO = "demo"
WHOLE = (DEMO, "clip-vit-base-patch32", "blip-itm-base")  # by `vlmc build` and `vlmc profile`, on a GPU of their own
SIZES = ("smolvlm-256m", "smolvlm-500m", "smolvlm-2.2b")  # of which a prompt is timed too, and all baselines
STUDY = "smolvlm-2.2b-8of24"  # whose decoder's kernels are named
# Gemma 3n's tower is built at optimisation level 0, as `vlmc build` has it; PyTorch captures no graph of its step.
HARD, TOWER = "gemma3n-e4b-4of35", "level-0"
BOTH = ("fp16", "int8")
ENGINE = """import sys; from pathlib import Path; from vlmc.artifact import Artifact
from vlmc.engines.candidate import Candidate, build
build(Artifact(Path(sys.argv[1])), Candidate(*sys.argv[2:]))"""  # as `vlmc build` makes it
HALF, AGAIN = 20, 50  # later than what was never measured: what was in one precision, and in a form that is marked
TIMING = 45  # seconds before the end when no engine is built any more, so that those that are there are timed
EXPORT, DISK = 1.5, 1.7  # memory of an export, and disk for it and for what builds write, over its float32 weights
BUILDER = 5.5e9  # bytes that a build takes at its peak, and what it takes of a decoder's float32 weights, and another's
SPACE = {"fp16": (2.4, 5.5), "int8": (6.9, 10.0)}


class Model:
    """One artefact: filled, built, timed. `earlier` are results of earlier runs, by model, not measured again but, with
    `again`, where they are marked."""

    def __init__(self, run: Run, name: str, place: int, earlier: dict[str, Any], again: bool) -> None:
        self.run, self.name, self.folder, self.place = run, name, DATA / name, place
        self.earlier, self.again = earlier, again
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        specs = self.manifest["components"]
        self.parts = [p for p in specs if p != "embed_tokens" and (self.folder / specs[p]["file"]).is_file()]
        self.precisions = [one for one in BOTH if one == "fp16" or (self.folder / "plans" / f"{one}.json").is_file()]
        skeleton = self.folder / "skeleton.json"
        self.skeleton: dict[str, Any] = json.loads(skeleton.read_text()) if skeleton.is_file() else {}
        self.sketch = not any(name.endswith(".data") for name in self.manifest["files"])
        modes = ["eager"] + ["graph"] * (name != HARD)
        modes += ["compile"] * (name in (*SIZES, STUDY))
        modes += ["onnxruntime", "fake-quant"] * (name in SIZES)
        known = earlier.get(name, {}).get("torch", {})
        # Of PyTorch, where there are goldens; errors are text.
        self.modes = [mode for mode in modes if not isinstance(known.get(mode), dict) and not self.sketch]
        self.filled = threading.Event()

    def bytes(self, part: str) -> int:
        """Of the component's float32 weights, in the decoder's those of the embeddings that it is built with."""
        components = [part] + ["embed_tokens"] * (part == "decoder")
        names = [f"{self.manifest['components'][name]['file']}.data" for name in components]
        known = {f"onnx/{name}": entry for name, entry in self.skeleton.items()} | self.manifest["files"]
        return sum(int(known[name]["bytes"]) for name in names)

    def known(self, part: str, form: str) -> dict[str, Any]:
        """What earlier runs have of the component's engines. A cut decoder's vision encoder is the whole model's."""
        own: dict[str, Any] = self.earlier.get(self.name, {}).get("engines", {}).get(part, {}).get(form, {})
        model = gpu_table.whole_towers(self.earlier).get(gpu_table.whole(self.name), {}) if part != "decoder" else {}
        return {**model.get("engines", {}).get(part, {}).get(form, {}), **own}

    def prepare(self) -> None:
        """Brings the weights and asks for all that is to be built and timed."""
        run, name = self.run, self.name
        with run.writing():
            whole = self.fill()
            self.filled.set()
            if not whole:
                return
            if name in WHOLE:
                run.timings.put(0 if name == DEMO else 25 + self.place, self.whole)
                return
            for part in self.parts:
                self.group(part, TOWER if (name, part) == (HARD, "vision_encoder") else "single")
            if name in SIZES:
                self.group("decoder", "prefill")
            if "onnxruntime" in self.modes:
                self.others()
            threading.Thread(target=self.torch).start()
            time.sleep(1)  # by then it is a writer

    def fill(self) -> bool:
        """Gives a skeleton its weights; whether all are there."""
        if not self.skeleton:
            return True
        with self.run.filling:
            given = ("benchmarks/skeleton.py", "fill", str(self.folder))
            return self.run.step(f"{self.name}-fill", 0 if self.sketch else None, TORCH, *given)

    def group(self, part: str, form: str) -> None:
        """Asks for the component's engines in that form, and for their times once all are there: those that nobody has
        measured and, if asked to, those that are marked."""
        known = self.known(part, form)
        engines = {precision: known.get(f"tensorrt-{precision}") for precision in self.precisions}
        missing = [precision for precision, found in engines.items() if found is None]
        marked = [precision for precision, found in engines.items() if found and found.get("mark")]
        precisions = missing + marked * self.again
        if not precisions:
            return
        priority = self.priority(part) + HALF * any(engines.values()) + AGAIN * (not missing)
        run, left, lock = self.run, list(precisions), threading.Lock()
        writing = run.writing()
        writing.__enter__()

        def build(precision: str, gpu: int) -> None:
            try:
                self.build(part, form, precision, gpu)
            finally:  # what could not even be started must not keep the run waiting
                with lock:
                    left.remove(precision)
                    if not left:
                        run.timings.put(priority, functools.partial(self.measure, part, form))
                        writing.__exit__(None, None, None)

        def ask() -> None:
            for precision in precisions:
                run.builds.put(priority, functools.partial(build, precision))

        if any(engines.values()):
            run.later.append(ask)
        else:
            ask()

    def priority(self, part: str) -> int:
        """Vision encoders come first, for they take little memory for long."""
        return self.place if part == "decoder" else 0

    def build(self, part: str, form: str, precision: str, gpu: int) -> None:
        with self.run.room.taken(BUILDER + SPACE[precision][part != "decoder"] * self.bytes(part)):
            name, given = f"{self.name}-{part}-{form}-{precision}", (str(self.folder), part, form, precision)
            self.run.step(name, gpu, TENSORRT, TIMES, "build", *given, early=TIMING)

    def measure(self, part: str, form: str, gpu: int) -> None:
        run, given = self.run, (str(self.folder), part, form)
        engines = list(self.folder.glob(f"engines/{form}/{part}/*/*.trt"))  # others may come meanwhile
        run.step(f"{self.name}-{part}-{form}-times", gpu, TENSORRT, TIMES, "time", *given)
        if (self.name, form) == (SIZES[-1], "single") and part == "decoder":
            run.step(f"{self.name}-overhead", gpu, TENSORRT, "benchmarks/decode_overhead.py", str(self.folder))
        for precision in BOTH if (self.name, part, form) == (STUDY, "decoder", "single") else ():
            ncu = ("--metrics", "gpu__time_duration.sum", "--csv", TENSORRT, TIMES, "launch", *given)
            run.step(f"{self.name}-{part}-kernels-{precision}", gpu, "ncu", *ncu, f"tensorrt-{precision}")
        for engine in engines:
            engine.unlink(missing_ok=True)  # the disk is for the next

    def others(self) -> None:
        """Asks for the engines that take seconds."""

        def build(gpu: int) -> None:
            wanted = [("embed_tokens", "numpy", "fp32"), *((part, "onnxruntime_gpu", "fp16") for part in self.parts)]
            for made in wanted:
                name = "-".join((self.name, *made))
                self.run.step(name, gpu, TENSORRT, "-c", ENGINE, str(self.folder), DEVICE, *made)

        self.run.builds.put(0, build)

    def torch(self) -> None:
        """PyTorch's times. Its weights are loaded before it asks for a GPU, whose number it reads from a file."""
        run, loaded = self.run, self.folder / "loaded"
        if not self.modes:
            return
        copies = 2.5 if "fake-quant" in self.modes else 1.7  # float32 and half, and fake-quant's own
        with run.timings.writing(), run.loading, run.room.taken(copies * sum(map(self.bytes, self.parts))):
            done = threading.Event()
            step = run.start(f"{self.name}-torch", 0, TORCH, "benchmarks/torch_times.py", str(self.folder), *self.modes)
            while not loaded.exists() and step.process.poll() is None and time.monotonic() < run.end:
                time.sleep(0.2)

            def measure(gpu: int) -> None:
                try:
                    (self.folder / "go.new").write_text(str(gpu))
                    (self.folder / "go.new").rename(self.folder / "go")
                    step.wait(gpu)
                finally:
                    done.set()

            run.timings.put(20 + self.place, measure)
            done.wait()

    def whole(self, gpu: int) -> None:
        """Engines as `vlmc build` makes them, all at once, its verdict, and `vlmc profile`."""
        run, name, folder = self.run, self.name, str(self.folder)
        made = [(part, "tensorrt", precision) for part in self.parts for precision in BOTH]
        made += [(part, "onnxruntime_gpu", "fp16") for part in self.parts]
        if name == DEMO:
            made += [("vision_encoder", "tensorrt", "int8-implicit"), ("embed_tokens", "numpy", "fp32")]

        def build(one: tuple[str, str, str]) -> None:
            run.step("-".join((name, *one)), gpu, TENSORRT, "-c", ENGINE, folder, DEVICE, *one)

        with ThreadPoolExecutor(len(made)) as pool:
            list(pool.map(build, made))
        run.step(f"{name}-build", gpu, TENSORRT, *VLMC, "build", folder, "--device", DEVICE, "--int8")
        if name == DEMO:
            run.step(f"{name}-overhead", gpu, TENSORRT, "benchmarks/decode_overhead.py", folder)
        settings = ("--device", DEVICE, "--runs", "5", "--tokens", "64", "--samples", "20", "--torch-python", TORCH)
        run.step(f"{name}-profile", gpu, TENSORRT, *VLMC, "profile", folder, *settings)


def export(run: Run, name: str, models: list[Model], earlier: dict[str, Any], again: bool) -> None:
    """A preset that the machine which makes the skeletons has no memory for: exported and calibrated here, once the
    weights of `models` are there and the disk has room for its own."""
    folder, preset = str(DATA / name), json.loads((PRESETS / f"{name}.json").read_text())
    size = 4 * preset["published_parameters"]
    with run.writing():
        for model in models:
            model.filled.wait(max(run.end - time.monotonic(), 0))
        while shutil.disk_usage(DATA).free < DISK * size and time.monotonic() < run.end:
            time.sleep(1)
        with run.room.taken(EXPORT * size):
            given = ("--random-weights", "--cases", "1", "-o", folder)
            if not run.step(f"{name}-export", None, TORCH, *VLMC, "export", name, *given):
                return
            given = ("--recipe", "int8", "--observer", "minmax", "--limit", "1")
            if not run.step(f"{name}-calibrate", None, TORCH, *VLMC, "calibrate", folder, *given):
                return
        Model(run, name, 1 + len(models), earlier, again).prepare()


def forms(run: Run, names: list[str]) -> None:
    """Forms of tensorrt_variants.py, and the names of the kernels that they run."""
    folder, left, lock = str(DATA / "vit2"), list(names), threading.Lock()
    with run.writing():
        if not run.step("vit2-make", None, TORCH, FORMS, "make", folder):
            return
        timing = run.timings.writing()
        timing.__enter__()

        def build(name: str, gpu: int) -> None:
            try:
                with run.room.taken(6 * GIB):
                    run.step(f"vit2-{name}", gpu, TENSORRT, FORMS, "build", folder, name)
            finally:
                with lock:
                    left.remove(name)
                    if not left:
                        run.timings.put(35, measure)
                        timing.__exit__(None, None, None)

        def measure(gpu: int) -> None:
            run.step("vit2-time", gpu, TENSORRT, FORMS, "time", folder)
            for name in names:
                if name in (*BOTH, "int8-convolutions"):
                    ncu = ("--metrics", "gpu__time_duration.sum", "--csv", TENSORRT, FORMS, "launch", folder, name)
                    run.step(f"vit2-kernels-{name}", gpu, "ncu", *ncu)

        for name in names:
            run.builds.put(35, functools.partial(build, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--builders", default="0,12,12,12", help="engines in the making, GPU by GPU")
    parser.add_argument("--memory", type=float, default=440, help="GiB that steps may take together")
    parser.add_argument("--known", nargs="+", default=[], help="results of earlier runs, not measured again")
    parser.add_argument("--again", action="store_true", help="but for those that are marked")
    parser.add_argument("--export", nargs="+", default=[], help="presets to export here, after what lies there")
    parser.add_argument("--forms", default="", help="of tensorrt_variants.py, with commas")
    arguments = parser.parse_args()
    run = Run(HOME / "logs", arguments.seconds, arguments.memory)
    given = gpu_table.read(arguments.known), arguments.again
    names = sorted((path.parent.name for path in DATA.glob("*/manifest.json")), key=order)
    models = [Model(run, name, 1 + i, *given) for i, name in enumerate(names)]
    threads = [threading.Thread(target=model.prepare) for model in models]
    threads += [threading.Thread(target=export, args=(run, name, models, *given)) for name in arguments.export]
    if arguments.forms:
        threads.append(threading.Thread(target=forms, args=(run, arguments.forms.split(","))))

    def serve(gpu: int, builders: int) -> None:
        working = [threading.Thread(target=run.builds.serve, args=(gpu,)) for _ in range(builders)]
        for worker in working:
            worker.start()
        for worker in working:
            worker.join()
        run.timings.serve(gpu)

    counts = [int(count) for count in arguments.builders.split(",")]
    serving = [threading.Thread(target=serve, args=share) for share in enumerate(counts)]
    with run.writing():
        for thread in [*threads, *serving]:
            thread.start()
        for thread in threads:
            thread.join()
        for ask in run.later:
            ask()
    for thread in serving:
        thread.join()
    run.note("all done")


def order(name: str) -> tuple[bool, int, str]:
    """The demo, whose profile takes longest, then the large ones first."""
    files, skeleton = json.loads((DATA / name / "manifest.json").read_text())["files"], DATA / name / "skeleton.json"
    weights = json.loads(skeleton.read_text()) if skeleton.is_file() else files
    return (name != DEMO, -sum(file["bytes"] for file in weights.values()), name)


if __name__ == "__main__":
    main()
