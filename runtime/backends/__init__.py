"""One file a backend, found by its name: it loads an engine and runs it.

Each module has `TITLE` (what people call it), `unavailable() -> str` (empty where the backend can run here, else the
reason), `load_runner(spec, path, threads)` and `load_decoder(spec, path, embed, threads)`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from types import ModuleType

from ...artifact import Artifact, BuildSpec, EngineSpec, parts_of
from ...errors import VlmcError
from ..runner import Decoder, Runner


def names() -> list[str]:
    """Every backend that vlmc knows, whether or not it can run here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def title(name: str) -> str:
    """What people call the backend; its name where vlmc does not know it."""
    return str(_module(name).TITLE) if name in names() else name


def unavailable(name: str) -> str:
    """Why the backend cannot run here; empty where it can."""
    return str(_module(name).unavailable())


def can_run(build: BuildSpec) -> bool:
    """Whether the backends of the engines that the build kept can run here; a graph that waits to be built cannot."""
    return not any(unavailable(parts_of(choice.engine)[0]) for choice in build.choices.values())


def processors() -> int:
    """How many this process may use: what `threads` of 0 comes to."""
    return len(os.sched_getaffinity(0))


def load_runner(artifact: Artifact, device: str, component: str, engine: str, threads: int) -> Runner:
    """The component's engine BACKEND-PRECISION, loaded."""
    spec, path = artifact.engine(device, component, engine)
    runner: Runner = _usable(spec).load_runner(spec, path, threads)
    return runner


def load_decoder(artifact: Artifact, device: str, engine: str, embed: Runner, threads: int) -> Decoder:
    """The decoder's engine BACKEND-PRECISION, loaded, with a KV cache of its own."""
    spec, path = artifact.engine(device, "decoder", engine)
    decoder: Decoder = _usable(spec).load_decoder(spec, path, embed, threads)
    return decoder


def _usable(spec: EngineSpec) -> ModuleType:
    module = _module(spec.backend)
    if reason := module.unavailable():
        raise VlmcError(
            f"The {spec.component} engine for {spec.device!r} needs the backend {spec.backend}, which cannot run here",
            found=reason,
            fix="install what is missing, run it on the device, or build here with `vlmc build … --device cpu`",
        )
    return module


def _module(name: str) -> ModuleType:
    if name not in names():
        known = "one of " + ", ".join(names())
        raise VlmcError(f"There is no backend {name!r}", expected=known, fix="build again with this version of vlmc")
    return importlib.import_module(f"{__name__}.{name}")
