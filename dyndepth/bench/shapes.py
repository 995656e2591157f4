"""Kinds of skipped work on shapes of input, timed against the stock model.

A part of ``python -m dyndepth.bench``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isnan
from typing import TYPE_CHECKING, Any

from dyndepth.common.digests import harness_code, timing_code
from dyndepth.common.errors import RunFailed, UserError
from dyndepth.common.files import write_atomically

if TYPE_CHECKING:
    from dyndepth.runtime.graphs import Graphs
    from dyndepth.timing.jobs import Decode, Prefill


REFERENCE = "masked_reference"
"""Compute everything and multiply by masks of 50%, as published references do: the backend
``masked`` of the runtime. All other works run on ``sparse``."""
WORKS = (
    "all_execute",
    "static_8",
    "static_15",
    "mask_75",
    "mask_50",
    "early_exit_half",
    REFERENCE,
)
MORE_WORKS = ("mask_50_attention", "mask_50_mlp")
"""On request: masks in one of the two sublayers, the other one executes."""
PHASES = {
    "prefill_1x512": (1, 512),
    "prefill_8x256": (8, 256),
    "decode_1": (1, 128),
    "decode_8": (8, 128),
    "prefill_1x2048": (1, 2048),
    "prefill_8x2048": (8, 2048),
    "decode_1x512": (1, 512),
    "decode_8x512": (8, 512),
    "decode_32x512": (32, 512),
    "decode_1x4096": (1, 4096),
    "decode_8x4096": (8, 4096),
    "decode_32x4096": (32, 4096),
}
"""Batch and length; in decode the length of the cache."""
ON_CPU = ("prefill_1x512", "prefill_8x256", "decode_1", "decode_8")
ON_GPU = (
    "prefill_8x2048",
    "prefill_1x2048",
    "decode_1x512",
    "decode_8x512",
    "decode_32x512",
    "prefill_1x512",
)
"""What is measured unless phases are named, the most telling first."""

Lines = dict[str, dict[str, float]]
"""By ``work/phase/dtype``, and ``/graphs`` in that mode: ``speedup`` with its interval ``low`` to
``high``, ``flop_ideal``, ``byte_ideal``, ``efficiency``, ``peak_ratio`` (NaN where memory is not
measured)."""


def shapes(corpus: Any, options: argparse.Namespace) -> Lines:
    """The chosen works on the chosen shapes, a printed line each."""
    import torch

    from dyndepth.models.loading import loaded
    from dyndepth.runtime.graphs import Graphs
    from dyndepth.timing.jobs import STEPS, Decode, Prefill

    lines = _kept(options)
    deadline = time.monotonic() + options.seconds if options.seconds else math.inf
    headings = f"{'speedup':>9}{'95% interval':>17}{'flop ideal':>12}{'byte ideal':>12}{'eff.':>7}"
    print(f"{'':42}{headings}{'peak':>7}")
    for dtype in options.dtypes:
        model = loaded(vars(options), dtype)
        for phase, mode in _passes(options, model):
            names = _names(options.works, phase, dtype, mode)
            if names and lines.keys() >= set(names.values()):
                continue
            if time.monotonic() > deadline:
                print(f"no time left for {phase} by {mode}")
                continue
            batch, length = PHASES[phase]
            tokens = corpus.windows(length + STEPS, batch, seed=0, split="calibration", model=model)
            shape = Prefill(tokens[:, :length]) if "prefill" in phase else Decode(tokens, length)
            with Graphs() as graphs, torch.inference_mode():
                held = graphs if mode == "graphs" else None
                for work, line in _measure(model, shape, options, held):
                    name = names[work]
                    lines[name] = line
                    print(
                        f"{name:42}{line['speedup']:9.3f}   [{line['low']:.3f}, {line['high']:.3f}]"
                        f"{line['flop_ideal']:12.3f}{line['byte_ideal']:12.3f}"
                        f"{line['efficiency']:7.2f}{line['peak_ratio']:7.2f}",
                        flush=True,
                    )
            if held is not None and (graphs.others or not graphs.steps):
                raise RunFailed("decode steps were not repeated from recordings")
            if options.output_path is not None:
                kept = {"about": _about(options, model), "bench": lines}
                write_atomically(options.output_path, json.dumps(kept, indent=1) + "\n")
    return lines


def _names(works: Sequence[str], phase: str, dtype: str, mode: str) -> dict[str, str]:
    """The line of each work."""
    graphs = mode == "graphs"
    return {
        work: f"{work}/{phase}/{dtype}" + "/graphs" * graphs
        for work in works
        if not (graphs and work == REFERENCE)
    }


def _kept(options: argparse.Namespace) -> Lines:
    """Lines that the file of an earlier call holds. Raises UserError for a file of other kind."""
    path = options.output_path
    if path is None or not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        about, lines = found["about"], dict(found["bench"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--output_path {str(path)!r} is no file of a bench; name another"
        ) from None
    if (about["model"], about["code"]) != (options.model, _code()):
        raise UserError(
            f"--output_path {str(path)!r} has lines of {about['model']} and of the code "
            f"{about['code']}; name another, or remove it"
        )
    return lines


def _about(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    from dyndepth.timing.conditions import conditions

    about = {"model": options.model, "repeats": options.repeats, "code": _code()}
    return about | conditions(model)


def _code() -> str:
    """Digests of what is timed and of how."""
    return f"{harness_code()} {timing_code()}"


def _passes(options: argparse.Namespace, model: Any) -> list[tuple[str, str]]:
    """Phases and modes; only decode steps are recorded."""
    on_gpu = model.device.type == "cuda"
    modes = options.modes or (("eager", "graphs") if on_gpu else ("eager",))
    phases = options.phases or (ON_GPU if on_gpu else ON_CPU)
    return [
        (phase, mode)
        for phase in phases
        for mode in modes
        if mode == "eager" or phase.startswith("decode")
    ]


def _measure(
    model: Any, shape: Prefill | Decode, options: argparse.Namespace, graphs: Graphs | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """All works on one shape, in one set of interleaved rounds."""
    from dyndepth.timing.jobs import Job, method
    from dyndepth.timing.pairing import interleave, ratio

    batch, width = shape.gate_shape
    jobs = {"dense": Job(model, None, shape, graphs=graphs)}
    for work in options.works:
        if work == REFERENCE and graphs is not None:
            continue
        backend: Any = "masked" if work == REFERENCE else "sparse"
        own = method(work, model, batch, width)
        jobs[work] = Job(model, own, shape, backend, graphs)
    times = interleave(
        {name: job.run for name, job in jobs.items()},
        around={name: job.prepared for name, job in jobs.items()},
        repeats=options.repeats,
        warmup=2,
        seed=0,
        device=options.device,
    )
    dense_peak = jobs["dense"].peak() or math.nan
    for work in [name for name in jobs if name != "dense"]:
        found = ratio(times["dense"], times[work])
        flop_ideal = jobs[work].flop_ideal
        yield (
            work,
            {
                "speedup": found.median,
                "flop_ideal": flop_ideal,
                "byte_ideal": jobs["dense"].bytes_read / jobs[work].bytes_read,
                "efficiency": found.median / flop_ideal,
                "low": found.low,
                "high": found.high,
                "peak_ratio": (jobs[work].peak() or math.nan) / dense_peak,
            },
        )


@dataclass(frozen=True)
class Goal:
    """A bound on ``quantity`` of all lines whose name, work/phase/dtype, matches ``lines``.

    ``at_most`` makes it an upper bound, else it is a lower one.
    """

    lines: str
    quantity: str
    bound: float
    at_most: bool = False


GOALS = (
    Goal("all_execute/*", "speedup", 0.98),
    Goal("static_*/prefill_*", "efficiency", 0.97),
    Goal("static_*/decode_1/*", "efficiency", 0.97),
    Goal("mask_75/prefill_1x512/float32", "efficiency", 0.93),
    Goal("mask_50/prefill_1x512/float32", "efficiency", 0.89),
    Goal("mask_75/prefill_8x256/float32", "efficiency", 0.94),
    Goal("mask_50/prefill_8x256/float32", "efficiency", 0.90),
    Goal("mask_75/prefill_*/bfloat16", "efficiency", 0.83),
    Goal("mask_50/prefill_*/bfloat16", "efficiency", 0.78),
    Goal("mask_75/decode_1/*", "efficiency", 0.94),
    Goal("mask_50/decode_1/*", "efficiency", 0.92),
    Goal("early_exit_half/prefill_*/float32", "efficiency", 0.88),
    Goal("mask_75/decode_8/*", "speedup", 0.98),
    Goal("mask_50/decode_8/*", "speedup", 0.98),
    *(
        Goal(f"{work}/*", "peak_ratio", 1.05, at_most=True)
        for work in (*WORKS, *MORE_WORKS)
        if work != REFERENCE
    ),
)
"""Where no other is named, in all shapes and dtypes."""
GPU_GOALS = (
    Goal("all_execute/prefill_*2048/*", "speedup", 0.98),
    Goal("all_execute/prefill_1x512/*", "speedup", 0.96),
    Goal("all_execute/decode_*", "speedup", 0.96),
    Goal("static_*", "efficiency", 0.97),
    Goal("mask_50/prefill_8x2048/*", "speedup", 1.62),
    Goal("mask_50/prefill_1x2048/*", "speedup", 1.50),
    Goal("mask_75/prefill_8x2048/*", "speedup", 1.20),
    Goal("mask_75/prefill_1x2048/*", "speedup", 1.12),
    Goal("mask_50/decode_1x512/*/graphs", "speedup", 1.45),
    Goal("mask_*/*/graphs", "speedup", 0.97),
    Goal("early_exit_half/*/graphs", "speedup", 0.97),
    Goal("early_exit_half/prefill_8x2048/*", "speedup", 1.62),
)
"""For an 8B shape in bfloat16 on an H100 or H200. Efficiency in decode is of the FLOP ideal."""

MET, UNCERTAIN, MISSED = "met", "missed within noise", "missed"


@dataclass(frozen=True)
class Check:
    """A goal on one line; ``verdict`` is MET, MISSED, or UNCERTAIN where the median misses the
    bound and the end of its 95% interval does not."""

    line: str
    goal: Goal
    value: float
    verdict: str

    def __str__(self) -> str:
        sign = "<=" if self.goal.at_most else ">="
        name = f"{self.line} {self.goal.quantity}"
        return f"{name:58}{self.value:7.3f} {sign} {self.goal.bound:.2f}  {self.verdict}"


def check(lines: Lines, goals: Sequence[Goal] = GOALS) -> Iterator[Check]:
    """Each goal on each measured line that it speaks of, in the order of the lines; not where its
    quantity is NaN, which was not measured."""
    for name, line in lines.items():
        for goal in goals:
            value = line[goal.quantity]
            if fnmatchcase(name, goal.lines) and not isnan(value):
                yield Check(name, goal, value, _verdict(goal, value, line))


def _verdict(goal: Goal, value: float, line: dict[str, float]) -> str:
    if value <= goal.bound if goal.at_most else value >= goal.bound:
        return MET
    # Peak memory has no noise; an interval that is missing is NaN and compares as False.
    scale = {"speedup": 1.0, "efficiency": line["flop_ideal"]}.get(goal.quantity)
    return UNCERTAIN if scale and line["high"] / scale >= goal.bound else MISSED
