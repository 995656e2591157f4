"""Where a number comes from: package versions, git commit, fingerprints of the code, hardware."""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from dyndepth.common.paths import path_of

PACKAGE = Path(__file__).resolve().parent.parent

METHODS = "dyndepth.methods"
"""Import name of the package that holds a file or a folder for each method."""

FRONT = frozenset(
    {
        "__init__.py",
        "__main__.py",
        "assets.py",
        "bench.py",
        "bench_evaluation.py",
        "bench_gates.py",
        "bench_goals.py",
        "bench_jobs.py",
        "bench_routes.py",
        "bench_shapes.py",
        "bench_sweep.py",
        "break_even.py",
        "break_even_command.py",
        "card_parameters.py",
        "card_status.py",
        "cards.py",
        "chance.py",
        "claims.py",
        "columns.py",
        "comparison.py",
        "comparison_columns.py",
        "comparison_show.py",
        "console.py",
        "countdown.py",
        "curve_tables.py",
        "curves.py",
        "deadline.py",
        "dense_tables.py",
        "driver.py",
        "errors.py",
        "estimate.py",
        "executors.py",
        "fingerprints.py",
        "fits.py",
        "grid.py",
        "importance_command.py",
        "intervals.py",
        "json_log.py",
        "judging.py",
        "leaderboard.py",
        "leaderboard_markdown.py",
        "leaderboard_page.py",
        "limits_command.py",
        "lm_eval_plugin.py",
        "machine.py",
        "manifest.py",
        "markdown.py",
        "memory.py",
        "merging.py",
        "mirror.py",
        "naming.py",
        "options.py",
        "page_blocks.py",
        "page_sentences.py",
        "pages.py",
        "pairing.py",
        "passes.py",
        "paths.py",
        "peers.py",
        "plot_chance.py",
        "plot_curves.py",
        "plot_fits.py",
        "plot_gaps.py",
        "plot_headings.py",
        "plot_parts.py",
        "plot_points.py",
        "plot_routes.py",
        "plot_targets.py",
        "plot_times.py",
        "plots.py",
        "progress.py",
        "provenance.py",
        "published.py",
        "ray_executor.py",
        "readable_rows.py",
        "recipe.py",
        "records.py",
        "recovered.py",
        "registry.py",
        "report.py",
        "rerun.py",
        "resampling.py",
        "routed.py",
        "routes.py",
        "routes_command.py",
        "schema.py",
        "scored.py",
        "sheets.py",
        "similarity.py",
        "spec.py",
        "stats.py",
        "store.py",
        "studies.py",
        "sweep.py",
        "tables.py",
        "timing.py",
        "timing_command.py",
        "trackers.py",
        "verify.py",
        "verify_again.py",
        "verify_rows.py",
        "verify_scores.py",
        "verify_stored.py",
        "verify_tables.py",
        "workbench.py",
        "worker.py",
    }
)
"""Files of the package that choose, record or show numbers without changing them. All others are
hashed into each cell, so a new file counts until somebody says here that it does not."""


@cache
def versions() -> dict[str, str]:
    """Installed version by distribution; ``unknown`` where there is no metadata."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


@cache
def git_commit() -> str:
    """The commit that the running code was checked out from, with ``+changes`` if it was edited.

    Empty where the package does not run from its own repository (an installed wheel).
    """
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "dyndepth" != PACKAGE:
        return ""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "dyndepth", "methods", at=Path(top))
    return f"{commit}+changes" if commit and changed else commit


def _git(*arguments: str, at: Path = PACKAGE) -> str:
    command = ["git", "-C", str(at), *arguments]
    try:
        done = subprocess.run(  # nosec B603  # git, constant words and the package's own path
            command, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@cache
def harness_code() -> str:
    """12 hex digits over every source and task file of the package that can change a number."""
    files = [
        path
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".yaml", ".yml"}
        and not (path.parent == PACKAGE and path.name in FRONT)
        and "methods" not in path.relative_to(PACKAGE).parts
    ]
    return _digest(files, PACKAGE)


@cache
def fitting_code() -> str:
    """12 hex digits over what methods share for finding their parameters, and all that it uses."""
    return _digest(_used_by("calibration", "gain", "importance", "training"), PACKAGE)


def _used_by(*modules: str) -> list[Path]:
    """Files of the package that these modules import, at whatever depth, and their own; without
    those of ``FRONT``."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = PACKAGE / f"{name}.py"
        if name in found or path.name in FRONT or not path.is_file():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                package, _, inner = node.module.partition(".")
                waiting += [inner] if package == PACKAGE.name else []
    return list(found.values())


@cache
def recovery_code() -> str:
    """12 hex digits over what decides, beside a method's fit, what a recovery finds."""
    return _digest(_used_by("adapters", "recovery"), PACKAGE)


def task_files(folder: str) -> str:
    """12 hex digits over the code and the settings in a folder given by ``--include_path``, but for
    hidden folders and those of runs; ``task_content`` covers the data of tasks that are scored."""
    root = path_of(folder)
    files: list[Path] = []
    for place, inner, names in os.walk(root):
        own = Path(place)
        inner[:] = [x for x in inner if not x.startswith(".") and not (own / x / "cells").is_dir()]
        files += [own / x for x in names if Path(x).suffix in {".py", ".yaml", ".yml"}]
    return _digest(files, root)


def task_content(task: Any, num_fewshot: int | None) -> dict[str, str]:
    """12 hex digits over a loaded lm-eval task, by its name: its settings, wherever they were
    included from, and the documents that it is scored on, wherever they lie; and by its name and
    ``/shots``, if there are any, those that its examples are drawn from."""
    settings = task.dump_config()
    settings["metadata"] = {**(settings.get("metadata") or {}), "config_source": None}
    own = settings.pop("num_fewshot", None)
    found = {task.task_name: _documents([settings], task.eval_docs)}
    # lm-eval's rule: a task that fixes 0 examples keeps 0.
    if own != 0 and (own if num_fewshot is None else num_fewshot):
        found[f"{task.task_name}/shots"] = _documents(task.fewshot_docs())
    return found


def _documents(*parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for each in itertools.chain(*parts):
        text = json.dumps(each, sort_keys=True, default=str)
        # What is no plain value is shown with its place in memory.
        text = re.sub(r" at 0x[0-9a-f]+", "", text) + "\n"
        digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


def method_code(cls: type) -> str:
    """12 hex digits over a method's module, what it imports at its top from beside it, and whole
    folders where a method is one (shipped weights and adapters included)."""
    inside = METHODS if cls.__module__.startswith(f"{METHODS}.") else cls.__module__.split(".")[0]
    modules: dict[str, ModuleType] = {}
    waiting = [base.__module__ for base in cls.__mro__]
    while waiting:
        name = waiting.pop()
        home = name == cls.__module__ or name.startswith(f"{inside}.")
        if name in modules or not home:
            continue
        modules[name] = module = sys.modules.get(name) or import_module(name)
        waiting.append(module.__package__ or "")
        for value in vars(module).values():
            waiting.append(value.__name__ if isinstance(value, ModuleType) else _origin(value))
    shipped = getattr(cls, "shipped_adapters", None)
    files = _sources(shipped) if shipped is not None else set()
    for module in modules.values():
        if module.__file__:
            path = Path(module.__file__)
            files.add(path)
            files |= _sources(path.parent) if hasattr(module, "__path__") else set()
    return _digest(sorted(files), None)


def _sources(folder: Path) -> set[Path]:
    suffixes = {".py", ".json", ".safetensors"}
    return {path for path in folder.rglob("*") if path.suffix in suffixes}


def _origin(value: Any) -> str:
    origin = getattr(value, "__module__", None)
    return origin if isinstance(origin, str) else ""


def _digest(files: list[Path], root: Path | None) -> str:
    """SHA-256 over names (relative to ``root``; bare if None) and contents, whatever the order."""
    parts = sorted(
        (str(path.relative_to(root)) if root else path.name, path.read_bytes()) for path in files
    )
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def conditions(device: str) -> dict[str, Any]:
    """Hardware and run-time conditions of a cell: recorded, never hashed."""
    import torch

    on_gpu = device.startswith("cuda")
    return {
        "device_name": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "remote_code": remote_code(),
    }


def remote_code() -> bool:
    """Whether this process has loaded code that came with a model, as ``trust_remote_code`` lets
    it."""
    return any(name.partition(".")[0] == "transformers_modules" for name in sys.modules)


@cache
def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


VERSIONS = ("torch", "transformers", "lm_eval", "dyndepth")
"""Packages whose version is a part of the identity, by the name they are installed by."""


def brought_code(*owners: Any) -> str:
    """Digest of the source files that came along with the classes of ``owners``; empty if none."""
    found: list[dict[str, str]] = []
    for owner in owners:
        module = inspect.getmodule(type(owner))
        files: list[Path] = []
        if module is not None and module.__name__.startswith("transformers_modules."):
            files = sorted(Path(str(module.__file__)).parent.glob("*.py"))
        found.append({each.name: each.read_text(encoding="utf-8") for each in files})
    return facts_digest({"files": found}) if any(found) else ""


def facts_digest(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
