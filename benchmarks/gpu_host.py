"""Everything that is measured on the GPU host of shared/gpu/README.md, in one command, by the host's own Python.

    bash benchmarks/gpu_unpack.sh                                           after the last part of gpu_pack.sh
    python3 benchmarks/gpu_host.py --seconds 1200 demo,vit2 smolvlm-256m …  writes logs and records under /tmp/gpu

For each model: `vlmc export` and `vlmc calibrate` (the host's Python, with PyTorch) where they are not there yet, and
engines, several at once. Of the models named with --profile then `vlmc build`, to choose between them, and `vlmc
profile`; of the others the times of engines and of PyTorch alone (engine_times.py, torch_times.py), since a decoder of
30 layers with all its profiles was not built after eight minutes. `vit2` stands for the forms of
tensorrt_variants.py. What is timed has its GPU to itself: builds share it, and timing waits until they are done. Each
argument is what one of the GPUs does. What is not finished in time is missing, and its log says where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HOME = Path("/tmp/gpu")
LOGS, DATA = HOME / "logs", HOME / "data"
TORCH, TENSORRT = str(HOME / "torch-python"), str(HOME / "tensorrt-python")  # interpreters that gpu_unpack.sh made
ENGINE = """import sys; from pathlib import Path; from vlmc.artifact import Artifact
from vlmc.engines.candidate import Candidate, build
build(Artifact(Path(sys.argv[1])), Candidate("h100", *sys.argv[2:]))"""
FORMS = "vit2"  # not a model: the forms of a ViT's graph
WARM = """import sys; from pathlib import Path; from vlmc.artifact import Artifact
from vlmc.calibration.cuda_baseline import open_session; from vlmc.exporter import golden
artifact = Artifact(Path(sys.argv[1])); arrays = golden.read(artifact)[1]
session = open_session(artifact, "fp32", "compile"); session.vision.run({"pixel_values": arrays["0.pixel_values"]})
session.decoder.prefill(arrays["0.inputs_embeds"]); session.decoder.decode(4)"""  # torch.compile, ahead of timing
BUILDERS = 16  # engines in the making on one GPU


class Gpu:
    """One of the machine's GPUs: many may build on it at once, and one who times has it alone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._changed = threading.Condition()
        self._builders, self._alone = 0, False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and self._builders < BUILDERS)
            self._builders += 1
        try:
            yield
        finally:
            with self._changed:
                self._builders -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._builders)
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


class Run:
    """What all models share: the clock, the log of steps, and how many exports fit the memory at once."""

    def __init__(self, seconds: float, exports: int, threads: int, profiled: list[str], runs: int) -> None:
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.exports, self.threads = threading.Semaphore(exports), threads
        self.profiled, self.runs = profiled, str(runs)

    def step(self, name: str, gpu: Gpu, python: str, *arguments: str, most: float = 600) -> bool:
        """Runs it to its end or to the end of the time; whether it went well. Its output is logs/NAME.log."""
        left = min(most, self.end - time.monotonic())
        if left < 5:
            return False
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": str(gpu.number),
            "OMP_NUM_THREADS": str(self.threads),
            "COLUMNS": "100",
        }
        start = time.monotonic()
        with (LOGS / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [python, *arguments], stdout=log, stderr=log, env=environment, start_new_session=True
            )
            try:
                code: int | str = process.wait(left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = "out of time"
        now = time.monotonic()
        line = f"{now - self.begin:6.0f} s  {name:44s} {now - start:6.1f} s  GPU {gpu.number}  {code or 'ok'}"
        with (LOGS / "steps.txt").open("a") as steps:
            print(line, file=steps)
        return code == 0


def model(run: Run, name: str, gpu: Gpu) -> None:
    """One model from checkpoint to times."""
    folder, whole = DATA / name, name in run.profiled
    vlmc = ("-m", "vlmc")
    random = [] if name == "demo" else ["--random-weights"]
    limit = [] if name == "demo" else ["--limit", "4"]  # random weights: scales that are of the right size will do
    recipes = ["int8", "int8-implicit"] if whole else ["int8"]
    with run.exports:
        ok = (folder / "manifest.json").is_file()  # sent, or of an earlier run
        ok = ok or run.step(f"{name}-export", gpu, TORCH, *vlmc, "export", name, *random, "-o", str(folder))
        for recipe in recipes:
            known = (folder / "plans" / f"{recipe}.json").is_file()
            calibrate = ("calibrate", str(folder), "--recipe", recipe, *limit)
            ok = ok and (known or run.step(f"{name}-calibrate-{recipe}", gpu, TORCH, *vlmc, *calibrate))
    if not ok:
        return

    def engine(component: str, backend: str, precision: str) -> None:
        with gpu.shared():
            script = ("-c", ENGINE) if whole else ("benchmarks/engine_times.py", "build")
            given = (str(folder), component, backend, precision) if whole else (str(folder), component, precision)
            run.step(f"{name}-engine-{component}-{backend}-{precision}", gpu, TENSORRT, *script, *given)

    components = json.loads((folder / "manifest.json").read_text())["components"]
    wanted = [(part, "tensorrt", precision) for precision in ("fp16", "int8") for part in components]
    wanted = [made for made in wanted if made[0] != "embed_tokens"]
    if whole:
        wanted += [("embed_tokens", "numpy", "fp32"), ("vision_encoder", "tensorrt", "int8-implicit")]
        wanted += [(part, "onnxruntime_gpu", "fp16") for part in components if part != "embed_tokens"]

    def warm() -> None:
        with gpu.shared():
            run.step(f"{name}-warm", gpu, TORCH, "-c", WARM, str(folder))

    with ThreadPoolExecutor(len(wanted) + 2) as pool:
        if whole:
            pool.submit(warm)
        else:
            torch = pool.submit(run.step, f"{name}-torch", gpu, TORCH, "benchmarks/torch_times.py", str(folder))
        list(pool.map(lambda made: engine(*made), wanted))
        if not whole:
            with gpu.alone():
                run.step(f"{name}-engines", gpu, TENSORRT, "benchmarks/engine_times.py", "time", str(folder))
                (folder / "go").touch()  # PyTorch has its weights ready
                torch.result()
            for weights in [*folder.glob("onnx/*.data"), *folder.glob("engines/h100/*/*/*.trt")]:
                weights.unlink()  # the disk is for the next
            return
    with gpu.alone():
        run.step(f"{name}-build", gpu, TENSORRT, *vlmc, "build", str(folder), "--device", "h100", "--int8")
        if name == "demo":
            question = ("--device", "h100", "--prompt", "Describe the picture briefly.")
            run.step("demo-run", gpu, TENSORRT, *vlmc, "run", str(folder), str(folder / "golden" / "00.png"), *question)
        run.step(f"{name}-overhead", gpu, TENSORRT, "benchmarks/decode_overhead.py", str(folder), most=120)
        run.step(f"{name}-engines", gpu, TENSORRT, "benchmarks/engine_times.py", "time", str(folder))
        settings = ("--device", "h100", "--runs", run.runs, "--tokens", "64", "--torch-python", TORCH)
        run.step(f"{name}-profile", gpu, TENSORRT, *vlmc, "profile", str(folder), *settings)


def forms(run: Run, _: str, gpu: Gpu) -> None:
    """The forms of tensorrt_variants.py, and the names of the kernels that they run."""
    script, folder = "benchmarks/tensorrt_variants.py", str(DATA / FORMS)
    if not run.step(f"{FORMS}-make", gpu, TORCH, script, "make", folder):
        return

    def build(name: str) -> None:
        with gpu.shared():
            run.step(f"{FORMS}-{name}", gpu, TENSORRT, script, "build", folder, name, most=240)

    names = sorted(path.stem for path in (DATA / FORMS / "onnx").glob("*.onnx"))
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(build, names))
    with gpu.alone():
        run.step(f"{FORMS}-time", gpu, TENSORRT, script, "time", folder)
        for name in ("fp16", "int8"):
            kernels = ("--metrics", "gpu__time_duration.sum", "--csv", TENSORRT, script, "launch", folder, name)
            run.step(f"{FORMS}-kernels-{name}", gpu, "ncu", *kernels, most=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="+", help="models of each GPU, with commas")
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--profile", default="demo", help="models with `vlmc build` and `vlmc profile`, with commas")
    parser.add_argument("--runs", type=int, default=12, help="of each variant in a profile")
    parser.add_argument("--exports", type=int, default=4, help="at once")
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    DATA.mkdir(parents=True, exist_ok=True)
    threads = max((os.cpu_count() or 1) // arguments.exports, 2)
    run = Run(arguments.seconds, arguments.exports, threads, arguments.profile.split(","), arguments.runs)
    work = [(name, Gpu(number)) for number, names in enumerate(arguments.gpus) for name in names.split(",")]
    gpus = {gpu.number: gpu for _, gpu in work}
    with ThreadPoolExecutor(len(work)) as pool:
        done = [pool.submit(forms if name == FORMS else model, run, name, gpus[gpu.number]) for name, gpu in work]
    for future in done:
        future.result()


if __name__ == "__main__":
    main()
