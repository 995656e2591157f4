"""The parts of ten minutes on a GPU: each a command of its own, within its own time.

A part that fails, hangs or is killed takes no other with it. What is done stands in the folder and
is not done again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dyndepth.bench.lines import NO_MEMORY
from dyndepth.common.digests import harness_code, placed_code, timing_code
from dyndepth.common.files import write_atomically
from dyndepth.common.provenance import git_commit, versions
from dyndepth.models.shapes import SHAPE, shape_for, shapes

RECORD = "gpu.json"
MODEL, TRIAL = shape_for("bench"), shape_for("trial")
_RESERVE = 5.0
"""Seconds that are kept for the end."""


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: of its files in the folder.
        what: in words.
        share: of the time that is left when its turn comes, at most.
        least: seconds below which it is not begun.
        command: its words after ``python``, given folder, device and its seconds.
        needs: why it cannot be done here; None if it can.
        left: what another call would still do, given the folder; None for nothing.
    """

    name: str
    what: str
    share: float
    least: float
    command: Callable[[Path, str, float], list[str]]
    needs: Callable[[], str | None] = lambda: None
    left: Callable[[Path], str | None] = lambda folder: None


def parts(small: bool, methods: str) -> list[Part]:
    """All parts, the most important first; ``small``: what a CPU does in a minute or two."""
    return [
        Part("checks", "results are exact on this device", 0.2, 10, _checks),
        Part("bench", f"speed on {TRIAL if small else f'{MODEL}, eager and by graphs'}", 0.5, 20,
             _bench(small), left=_left),
        Part("training", "tokens a second of router training", 0.25, 20, _training(small)),
        Part("sweep", f"the embedded sweep{'' if small else ', timed'}", 0.6, 40,
             _sweep(small, methods), lambda: _assets() if methods else "no --methods were given"),
        Part("tests", f"{'some of ' * small}the test suite's own tests of what runs on a device",
             1.0, 30, _tests(small), _no_tests),
    ]  # fmt: skip


def _checks(folder: Path, device: str, seconds: float) -> list[str]:
    return ["-m", "dyndepth.gpu", "checks", "--device", device, "--output_path", str(folder)]


def _bench(small: bool) -> Callable[[Path, str, float], list[str]]:
    def command(folder: Path, device: str, seconds: float) -> list[str]:
        words = ["-m", "dyndepth.bench", "--device", device, "--parts", "shapes"]
        words += ["--output_path", str(folder / "bench.json"), "--seconds", str(int(seconds * 0.8))]
        works = ["all_execute", "static_15", "mask_75", "mask_50", "early_exit_half"]
        if small:
            words += ["--model", TRIAL, "--dtype", "float32", "--repeats", "6"]
            return [*words, "--works", *works[1:4:2], "--passes", "prefill_1x512", "decode_1"]
        words += ["--model", MODEL, "--dtype", "bfloat16", "--repeats", "7"]
        return [*words, "--works", *works]

    return command


def _training(small: bool) -> Callable[[Path, str, float], list[str]]:
    def command(folder: Path, device: str, seconds: float) -> list[str]:
        words = ["-m", "dyndepth.gpu", "training", "--device", device]
        words += ["--output_path", str(folder)]
        return [*words, "--small"] if small else words

    return command


def _sweep(small: bool, methods: str) -> Callable[[Path, str, float], list[str]]:
    def command(folder: Path, device: str, seconds: float) -> list[str]:
        words = ["-m", "dyndepth.sweep", "--device", device, "--output_path", str(folder / "sweep")]
        words += ["--speedups", "1.5", "--methods", methods]
        if small:
            return [*words, "--timing", "off", "--limit", "1", "--tasks", "last_word"]
        return [*words, "--timing", "quick", "--limit", "100"]

    return command


def _tests(small: bool) -> Callable[[Path, str, float], list[str]]:
    def command(folder: Path, device: str, seconds: float) -> list[str]:
        chosen = ["runtime/test_flops.py"] if small else [
            "runtime/test_graphs.py", "runtime/test_asking_early.py", "runtime/test_attach.py",
            "runtime/test_flops.py", "methods/test_conformance.py", "fitting/test_routers.py",
            "evaluation/test_scoring.py",
        ]  # fmt: skip
        suite = _suite()
        assert suite is not None
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=50"]
        if not small:
            words += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
        family = shapes()[TRIAL.removeprefix(SHAPE)]["config"]["model_type"]
        words += ["-k", f"masks and {family}"] if small else []
        return [*words, f"--rootdir={suite.parent}", *(str(suite / name) for name in chosen)]

    return command


def _left(folder: Path) -> str | None:
    """The lines of the bench that there was no time for; memory is not there a second time."""
    try:
        found: dict[str, str] = json.loads((folder / "bench.json").read_text("utf-8"))["left"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    waiting = [name for name, why in found.items() if why != NO_MEMORY]
    return f"lines that were not measured: {len(waiting)}" if waiting else None


def _assets() -> str | None:
    from dyndepth.common.errors import UserError
    from dyndepth.data.wheels import asset

    try:
        for name in ("model", "data"):
            asset(name)
    except UserError as fault:
        return str(fault)
    return None


def _suite() -> Path | None:
    """The test suite: of the repository that the package runs from, or that one stands in."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "tests" / "runtime" / "test_graphs.py").is_file():
            return root / "tests"
    return None


def _no_tests() -> str | None:
    if _suite() is None:
        return "the package is installed, its test suite is not here"
    missing = [name for name in ("pytest", "xdist", "hypothesis") if find_spec(name) is None]
    return f"{' and '.join(missing)} are not installed" if missing else None


def run_all(
    folder: Path, device: str, minutes: float, small: bool, methods: str, only: Sequence[str]
) -> dict[str, Any]:
    """Run the parts that are missing, and return the record that is kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = _begun(folder, device, small)
    end = time.monotonic() + 60 * minutes - _RESERVE
    for part in parts(small, methods):
        if part.name not in only or record["parts"].get(part.name, {}).get("status") == "done":
            continue
        left = end - time.monotonic()
        reason = part.needs()
        if reason is None and left < part.least:
            reason = f"no time was left ({max(0.0, left):.0f} s)"
        if reason is not None:
            record["parts"][part.name] = {"status": "not run", "why": reason, "seconds": 0.0}
        else:
            seconds = max(part.least, left * part.share)
            log = folder / f"{part.name}.txt"
            print(f"{part.name}: {part.what}, at most {seconds:.0f} s; it writes {log}", flush=True)
            words = part.command(folder, device, seconds)
            told = record["parts"][part.name] = _run(part.name, words, log, device, seconds)
            more = part.left(folder)
            if told["status"] == "done" and more is not None:
                told |= {"status": "cut off", "why": more}
        told = record["parts"][part.name]
        print(f"{part.name}: {told['status']} {told['why']}".rstrip(), flush=True)
        write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def _begun(folder: Path, device: str, small: bool) -> dict[str, Any]:
    """The record of an earlier call with the same code on the same device, else a new one."""
    now = about(device) | {"small": small}
    try:
        kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        same = all(kept[key] == now[key] for key in ("card", "code", "small", "versions"))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if same:
        return now | {"date": kept["date"], "parts": kept["parts"]}
    for name in ("bench.json", "checks.json", "training.json"):
        (folder / name).unlink(missing_ok=True)
    return now | {"parts": {}}


def about(device: str) -> dict[str, Any]:
    """Where and on which code: card, driver, versions, commit, digests, date."""
    import torch

    from dyndepth.common.provenance import processor

    on_gpu = device.startswith("cuda")
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "device": device,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": sys.version.split()[0],
        "versions": versions(),
        "commit": git_commit(),
        "code": code(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def code() -> dict[str, str]:
    """Digests of all that a number of these parts, or whether a check holds, can hang on."""
    rooms = {room: placed_code(room) for room in ("fitting", "bench", "gpu")}
    return {"harness": harness_code(), "timing": timing_code(), **rooms}


def _run(name: str, words: Sequence[str], log: Path, device: str, seconds: float) -> dict[str, Any]:
    """Run ``python words`` for at most as long; its output goes to ``log``."""
    began = time.monotonic()
    environment = os.environ | {
        "DYNDEPTH_TEST_DEVICE": device,
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(  # nosec B603  # this Python and words of this file
            [sys.executable, "-P", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status = _waited(child, name, seconds)
        except BaseException as fault:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(fault, subprocess.TimeoutExpired):
                raise
            status = None
    told = {"status": "done", "why": "", "seconds": round(time.monotonic() - began, 1)}
    if status is None:
        told |= {"status": "cut off", "why": f"not done within {seconds:.0f} s"}
    elif status:
        told |= {"status": "failed", "why": _last_line(log)}
    return told


def _waited(child: Any, name: str, seconds: float) -> int:
    """Its exit status; on a terminal the seconds gone are shown. Raises TimeoutExpired."""
    from tqdm import tqdm

    form = "{desc}: {n:.0f} of {total:.0f} s"
    began = time.monotonic()
    with tqdm(total=seconds, desc=name, bar_format=form, disable=None, leave=False) as bar:
        while True:
            gone = time.monotonic() - began
            try:
                return child.wait(max(0.0, min(1.0, seconds - gone)))
            except subprocess.TimeoutExpired:
                gone = time.monotonic() - began
                if gone >= seconds:
                    raise
                bar.update(gone - bar.n)


def _last_line(log: Path) -> str:
    """What a command said at the end, without what is no sentence."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").split("\n")]
    return next((line[:300] for line in reversed(lines) if line), "it said nothing")
