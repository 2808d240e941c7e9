"""Python runs this at its start where this folder is on PYTHONPATH: it notes when a command, and the workers that it
starts, come to certain places. One JSON line a note, in the file that COPERNICUS_MARKS names. The command itself is not
changed: modules are watched as they are imported, and the functions named below are wrapped then.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

WRAPPED = {
    "copernicus.platform.experiment": ["load_experiment"],
    "copernicus.platform.run": ["run_experiment", "Tracker.__init__", "make_miniature", "Tracker.start"],
    "copernicus.platform.pretrain": ["pretrain", "open_index", "train_worker"],
    "copernicus.platform.pretrain_worker": ["build_autoencoder", "Evaluation.__call__", "post"],
    "copernicus.platform.stream": ["batches"],
    "ray._private.worker": ["init"],
    "ray.train.v2.api.data_parallel_trainer": ["DataParallelTrainer.fit"],
}
IMPORTS = (
    "torch",
    "ray",
    "ray.data",
    "ray.train",
    "ray.tune",
    "mlflow",
    "optuna",
    "pyarrow",
    "rasterio",
    "scipy",
    "matplotlib",
)
IMPORTS_OF_OURS = tuple(name for name in WRAPPED if name.startswith("copernicus"))


def note(name: str, event: str, **more: Any) -> None:
    line = json.dumps({"t": time.time(), "pid": os.getpid(), "name": name, "event": event, **more})
    with open(os.environ["COPERNICUS_MARKS"], "a") as file:  # short lines appended: processes do not mix them
        file.write(line + "\n")


def wrap(owner: Any, name: str) -> None:
    function = getattr(owner, name)
    label = f"{owner.__name__}.{name}" if isinstance(owner, type) else name

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        if label == "post":
            answer = function(*args, **kwargs)
            note(label, "end", rank=args[1], step=args[2])
            return answer
        if label == "batches":
            return noted_stream(function(*args, **kwargs))
        note(label, "start")
        try:
            return function(*args, **kwargs)
        finally:
            note(label, "end")

    setattr(owner, name, noted)


def noted_stream(stream: Iterator[Any]) -> Iterator[Any]:
    note("first batch", "start")
    for number, item in enumerate(stream):
        if not number:
            note("first batch", "end")
        yield item


class Loader(importlib.abc.Loader):
    """Another loader, timed."""

    def __init__(self, loader: Any, done: Callable[[ModuleType], None]):
        self.loader, self.done = loader, done

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        started = time.perf_counter()
        self.loader.exec_module(module)
        note(f"import {module.__name__}", "end", seconds=time.perf_counter() - started)
        self.done(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in IMPORTS and name not in WRAPPED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                spec.loader = Loader(spec.loader, patch)
                return spec
        return None


def patch(module: ModuleType) -> None:
    for dotted in WRAPPED.get(module.__name__, []):
        owner: Any = module
        *parents, name = dotted.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        if hasattr(owner, name):  # a place that is gone by now shows as a row that is missing
            wrap(owner, name)


if "COPERNICUS_MARKS" in os.environ:
    note("python", "start")
    sys.meta_path.insert(0, Finder())
