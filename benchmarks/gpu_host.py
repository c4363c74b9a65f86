"""Everything that is measured on the GPU host of shared/gpu/README.md, in one command, by the host's own Python.

    bash benchmarks/gpu_unpack.sh                                    after the last part of gpu_pack.sh
    python3 benchmarks/gpu_host.py --seconds 1500 --builders 0,14,14 --slow 12    logs and records lie under /tmp/gpu

It takes the artefacts and skeletons that lie in /tmp/gpu/data. Of those in WHOLE it builds what `vlmc build` would and
runs `vlmc profile`; of the others every engine with one profile, and PyTorch's times (engine_times.py, torch_times.py).
`--builders` says how many engines are in the making on each GPU at once, `--slow` how many of the slowest kind on the
GPU behind them. What is timed has its GPU to itself: a GPU without builders times from the start, the others once
nothing is left for them to build. What is not finished in time is missing, and its log says where it was.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOME = Path("/tmp/gpu")
LOGS, DATA = HOME / "logs", HOME / "data"
TORCH, TENSORRT = str(HOME / "torch-python"), str(HOME / "tensorrt-python")  # interpreters that gpu_unpack.sh made
VLMC = ("-m", "vlmc")
TIMES, FORMS = "benchmarks/engine_times.py", "benchmarks/tensorrt_variants.py"
WHOLE = {
    "demo": "whole",
    "smolvlm-256m": "whole-level-1",
    "smolvlm-500m": "whole-level-1",
    "smolvlm-2.2b": "whole-level-1",
}
STUDY = "smolvlm-2.2b-8of24"  # whose decoder is built in many forms
BOTH = ("fp16", "int8")
STUDIED = {
    **dict.fromkeys(("level-1", "level-2", "level-5", "merged", "merged-level-5"), BOTH),
    **dict.fromkeys(("typed", "merged-typed"), ("fp16",)),
}
OTHER = """import sys; from pathlib import Path; from vlmc.artifact import Artifact
from vlmc.engines.candidate import Candidate, build
build(Artifact(Path(sys.argv[1])), Candidate("h100", *sys.argv[2:]))"""
GIB = 1 << 30
MOST = 480  # seconds that an engine may take which others wait behind


class Queue:
    """Calls in the order of their priority, the smallest first. `get` waits until there is one, or nobody may put
    another."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int, Callable[[int], None]]] = []
        self._changed, self._number, self._writers = threading.Condition(), itertools.count(), 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._writers += 1
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    def put(self, priority: int, call: Callable[[int], None]) -> None:
        with self._changed:
            heapq.heappush(self._calls, (priority, next(self._number), call))
            self._changed.notify()

    def serve(self, gpu: int) -> None:
        """Calls them with the GPU's number until none is left."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or not self._writers)
                if not self._calls:
                    return
                _, _, call = heapq.heappop(self._calls)
            try:
                call(gpu)
            except Exception:  # one step's mistake must not end the rest
                traceback.print_exc()


class Room:
    """Memory that steps share."""

    def __init__(self, size: float) -> None:
        self._free, self._size, self._changed = size, size, threading.Condition()

    @contextmanager
    def taken(self, size: float) -> Iterator[None]:
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()


class Run:
    """The clock, the log of steps, the engines to build and what to time."""

    def __init__(self, seconds: float, memory: float, runs: int) -> None:
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds
        self.room, self.filling, self.loading = Room(memory * GIB), threading.Semaphore(6), threading.Semaphore(3)
        self.runs, self.builds, self.slow, self.timings = str(runs), Queue(), Queue(), Queue()

    def step(self, name: str, gpu: int | None, python: str, *arguments: str, most: float = 2000) -> bool:
        """Runs it to its end or to the end of the time; whether it went well. Its output is logs/NAME.log."""
        left = min(most, self.end - time.monotonic())
        if left < 5:
            return False
        visible = "" if gpu is None else str(gpu)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "OMP_NUM_THREADS": "8", "COLUMNS": "100"}
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
        line = f"{now - self.begin:6.0f} s  {name:60s} {now - start:6.1f} s  GPU {gpu}  {code or 'ok'}"
        with (LOGS / "steps.txt").open("a") as steps:
            print(line, file=steps)
        return code == 0


class Model:
    """One artefact: filled, built, timed."""

    def __init__(self, run: Run, name: str, place: int) -> None:
        self.run, self.name, self.folder, self.place = run, name, DATA / name, place
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())

    def prepare(self) -> None:
        """Brings the weights and asks for all that is to be built and timed."""
        run, name, whole = self.run, self.name, WHOLE.get(self.name)
        with run.builds.writing(), run.slow.writing(), run.timings.writing():
            if (self.folder / "skeleton.json").is_file():
                size = 2.5 * sum(file["bytes"] for file in self.manifest["files"].values())
                with run.filling, run.room.taken(size):
                    if not run.step(f"{name}-fill", None, TORCH, "benchmarks/skeleton.py", "fill", str(self.folder)):
                        return
            parts = [part for part in self.manifest["components"] if part != "embed_tokens"]
            groups = []
            for part in parts:
                form = (
                    (whole if part == "decoder" else "whole") if whole else "level-1" if part == "decoder" else "step"
                )
                if name == STUDY:
                    form = "step"
                groups.append(self.group(part, form, self.folder, self.place))
            if whole:
                groups.append(self.others(parts))
                threading.Thread(target=self.profile, args=(groups,)).start()
                if name == "demo":
                    for part in parts:
                        self.group(part, "level-1", self.copy("level-1"), 20)
                elif "decoder" in parts:
                    self.group("decoder", "step", self.copy("step"), 3)
            if name == STUDY:
                for form, precisions in STUDIED.items():
                    self.group("decoder", form, self.copy(form), 4, precisions)
            if not whole:
                self.torch()

    def copy(self, form: str) -> Path:
        """The artefact once more, for engines of another form (onnx_ir refuses weights with several hard links)."""
        folder = DATA / f"{self.name}.{form}"
        if not folder.exists():
            shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("engines", "*.json"))
            for path in [*self.folder.glob("*.json"), *self.folder.glob("plans/*.json")]:
                shutil.copy(path, folder / path.relative_to(self.folder))
        return folder

    def group(
        self, part: str, form: str, folder: Path, priority: int, precisions: tuple[str, ...] = BOTH
    ) -> threading.Event:
        """Asks for the component's engines, and for their times once all are there; the event says that they are."""
        run, left, lock, done = self.run, list(precisions), threading.Lock(), threading.Event()
        if folder == self.folder and self.name == "demo" and part == "vision_encoder":
            left.append("int8-implicit")
        timing = run.timings.writing()
        timing.__enter__()
        slow = part == "decoder" and self.name in WHOLE and self.name != "demo"  # 30 layers: longer than all else

        def build(precision: str, gpu: int) -> None:
            name = f"{folder.name}-{part}-{precision}"
            size = (folder / self.manifest["components"][part]["file"]).with_suffix(".onnx.data").stat().st_size
            with run.room.taken(6 * GIB + 3.5 * size):
                run.step(
                    name, gpu, TENSORRT, TIMES, "build", str(folder), part, precision, form, most=2000 if slow else MOST
                )
            with lock:
                left.remove(precision)
                if left:
                    return
            done.set()
            run.timings.put(priority, lambda gpu: self.time(folder, part, gpu))
            timing.__exit__(None, None, None)

        for precision in tuple(left):
            queue = run.slow if slow else run.builds
            queue.put(priority, lambda gpu, precision=precision: build(precision, gpu))  # type: ignore[misc]
        return done

    def time(self, folder: Path, part: str, gpu: int) -> None:
        self.run.step(f"{folder.name}-{part}-times", gpu, TENSORRT, TIMES, "time", str(folder), part)
        if (self.name == "demo" and folder == self.folder) or (folder.name == STUDY and part == "decoder"):
            for precision in BOTH:
                kernels = ("--metrics", "gpu__time_duration.sum", "--csv", TENSORRT, TIMES, "launch", str(folder), part)
                name = f"{folder.name}-{part}-kernels-{precision}"
                self.run.step(name, gpu, "ncu", *kernels, f"tensorrt-{precision}", most=120)
        if self.name not in WHOLE or folder != self.folder:
            for engine in folder.glob(f"engines/h100/{part}/*/*.trt"):
                engine.unlink()  # the disk is for the next

    def others(self, parts: list[str]) -> threading.Event:
        """Asks for the engines that take seconds."""
        done = threading.Event()

        def build(gpu: int) -> None:
            for part, backend, precision in [
                ("embed_tokens", "numpy", "fp32"),
                *((part, "onnxruntime_gpu", "fp16") for part in parts),
            ]:
                name = f"{self.name}-{part}-{backend}-{precision}"
                self.run.step(name, gpu, TENSORRT, "-c", OTHER, str(self.folder), part, backend, precision)
            done.set()

        self.run.builds.put(self.place, build)
        return done

    def profile(self, needs: list[threading.Event]) -> None:
        """Once all engines are there: `vlmc build`, which chooses, and `vlmc profile`."""
        run, name, folder = self.run, self.name, str(self.folder)
        with run.timings.writing():
            for event in needs:
                event.wait(max(run.end - time.monotonic(), 0))

            def measure(gpu: int) -> None:
                run.step(f"{name}-build", gpu, TENSORRT, *VLMC, "build", folder, "--device", "h100", "--int8")
                run.step(f"{name}-overhead", gpu, TENSORRT, "benchmarks/decode_overhead.py", folder, most=120)
                few = ("--runs", self.run.runs, "--samples", "20" if name == "demo" else "0", "--tokens", "64")
                settings = ("--device", "h100", *few, "--torch-python", TORCH)
                run.step(f"{name}-profile", gpu, TENSORRT, *VLMC, "profile", folder, *settings)

            run.timings.put(self.place, measure)

    def torch(self) -> None:
        """PyTorch's times: its weights are loaded while it waits for a GPU."""
        run = self.run

        def measure(gpu: int) -> None:
            with run.loading:
                modes = ("compile",) if self.name == STUDY else ()
                run.step(f"{self.name}-torch", gpu, TORCH, "benchmarks/torch_times.py", str(self.folder), *modes)

        run.timings.put(50 + self.place, measure)


def forms(run: Run) -> None:
    """The forms of tensorrt_variants.py, and the names of the kernels that they run."""
    folder = str(DATA / "vit2")
    with run.builds.writing(), run.timings.writing():
        if not run.step("vit2-make", None, TORCH, FORMS, "make", folder):
            return
        names = sorted(path.stem for path in (DATA / "vit2" / "onnx").glob("*.onnx"))
        left, lock = list(names), threading.Lock()
        timing = run.timings.writing()
        timing.__enter__()

        def measure(gpu: int) -> None:
            run.step("vit2-time", gpu, TENSORRT, FORMS, "time", folder)
            for name in ("fp16", "int8"):
                kernels = ("--metrics", "gpu__time_duration.sum", "--csv", TENSORRT, FORMS, "launch", folder, name)
                run.step(f"vit2-kernels-{name}", gpu, "ncu", *kernels, most=120)

        def build(name: str, gpu: int) -> None:
            with run.room.taken(6 * GIB):
                run.step(f"vit2-{name}", gpu, TENSORRT, FORMS, "build", folder, name, most=400)
            with lock:
                left.remove(name)
                if left:
                    return
            run.timings.put(5, measure)
            timing.__exit__(None, None, None)

        for name in names:
            run.builds.put(5, lambda gpu, name=name: build(name, gpu))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--builders", default="0,14,14", help="engines in the making, GPU by GPU")
    parser.add_argument("--slow", type=int, default=12, help="large decoders in the making, on one GPU more")
    parser.add_argument("--memory", type=float, default=380, help="GiB that steps may take together")
    parser.add_argument("--runs", type=int, default=5, help="of each variant in a profile")
    arguments = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.seconds, arguments.memory, arguments.runs)
    names = sorted((path.parent.name for path in DATA.glob("*/manifest.json")), key=order)
    threads = [threading.Thread(target=forms, args=(run,))]
    threads += [threading.Thread(target=Model(run, name, 1 + i).prepare) for i, name in enumerate(names)]
    with run.builds.writing(), run.slow.writing(), run.timings.writing():
        for thread in threads:
            thread.start()
        time.sleep(1)  # by then each of them is a writer

    def serve(gpu: int, queue: Queue, builders: int) -> None:
        working = [threading.Thread(target=queue.serve, args=(gpu,)) for _ in range(builders)]
        for worker in working:
            worker.start()
        for worker in working:
            worker.join()
        run.timings.serve(gpu)

    shares = [(run.builds, int(count)) for count in arguments.builders.split(",")] + [(run.slow, arguments.slow)]
    serving = [threading.Thread(target=serve, args=(gpu, *share)) for gpu, share in enumerate(shares)]
    for thread in serving:
        thread.start()
    for thread in [*serving, *threads]:
        thread.join()
    with (LOGS / "steps.txt").open("a") as steps:
        print(f"{time.monotonic() - run.begin:6.0f} s  all done", file=steps)


def order(name: str) -> tuple[int, int, str]:
    """The demo first, then what is profiled, the study of forms and the rest, small ones ahead."""
    size = sum(file["bytes"] for file in json.loads((DATA / name / "manifest.json").read_text())["files"].values())
    return (0 if name == "demo" else 1 if name == STUDY or name in WHOLE else 2, size, name)


if __name__ == "__main__":
    main()
