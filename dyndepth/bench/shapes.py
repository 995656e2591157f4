"""Kinds of skipped work on shapes of input, timed against the stock model.

A part of ``python -m dyndepth.bench``.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dyndepth.bench.lines import (
    EAGER_WORKS,
    NO_MEMORY,
    NO_TIME,
    REFERENCE,
    Line,
    Record,
    names,
    speed,
)
from dyndepth.common.errors import RunFailed, UserError
from dyndepth.common.modes import EAGER, GRAPHS
from dyndepth.results.noise import legend

if TYPE_CHECKING:
    from dyndepth.runtime.graphs import Graphs
    from dyndepth.timing.jobs import Decode, Prefill
    from dyndepth.timing.pairing import Times

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


def passes(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Phases and modes that are to be timed; only decode steps are recorded.

    Raises:
        UserError: there are none.
    """
    phases = options.phases or (ON_CPU if options.device == "cpu" else ON_GPU)
    found = [
        (phase, mode)
        for phase in phases
        for mode in options.modes
        if mode == EAGER or phase.startswith("decode")
    ]
    if not any(names(options.works, phase, "", mode) for phase, mode in found):
        raise UserError(
            f"graphs repeat decode steps, and not those of {' or '.join(EAGER_WORKS)}: nothing of "
            f"{', '.join([*options.works, *phases])} is left; add a phase of decode, or take "
            "--mode eager"
        )
    return found


def shapes(corpus: Any, options: argparse.Namespace) -> Record:
    """The chosen works on the chosen shapes, a printed line each."""
    import torch

    from dyndepth.models.loading import loaded
    from dyndepth.timing.conditions import conditions
    from dyndepth.timing.jobs import STEPS, Decode, Prefill

    record, chosen = Record(options), passes(options)
    record.want(
        name
        for dtype in options.dtypes
        for phase, mode in chosen
        for name in names(options.works, phase, dtype, mode).values()
    )
    deadline = time.monotonic() + options.seconds if options.seconds else math.inf
    headings = f"{'flop ideal':>12}{'byte ideal':>12}{'eff.':>7}{'peak':>7}"
    print(f"{'':43}{'speedup, 95% interval':40}{headings}")
    for dtype in options.dtypes:
        model = loaded(vars(options), dtype)
        record.under(conditions(model))
        for phase, mode in chosen:
            own = names(options.works, phase, dtype, mode)
            if record.lines.keys() >= set(own.values()):
                for name in own.values():
                    _show(name, record.lines[name], "  kept")
                continue
            what = f"{phase} by {mode} in {dtype}"
            if time.monotonic() > deadline:
                print(f"no time left for {what}", flush=True)
                record.leave(own.values(), NO_TIME)
                continue
            batch, length = PHASES[phase]
            tokens = corpus.windows(length + STEPS, batch, seed=0, split="calibration", model=model)
            tokens = tokens.to(model.device)  # or each step would wait for its token to be brought
            shape = Prefill(tokens[:, :length]) if "prefill" in phase else Decode(tokens, length)
            try:
                measured = dict(_measured(model, shape, options, mode, what))
            except torch.OutOfMemoryError:
                print(f"{what} is left out: {NO_MEMORY}", flush=True)
                record.leave(own.values(), NO_MEMORY)
            else:
                for work, line in measured.items():
                    _show(own[work], line)
                record.put({own[work]: line for work, line in measured.items()})
            _release()
        del model
        _release()
    print(f"{legend()}; kept: measured by an earlier call")
    record.write()
    return record


def _show(name: str, line: Line, more: str = "") -> None:
    print(
        f"{name:43}{speed(line):40}{line['flop_ideal']:12.3f}{line['byte_ideal']:12.3f}"
        f"{line['efficiency']:7.2f}{line['peak_ratio']:7.2f}{more}",
        flush=True,
    )


def _release() -> None:
    """Give back what a phase held: each of its works has a cache of its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measured(
    model: Any, shape: Prefill | Decode, options: argparse.Namespace, mode: str, what: str
) -> dict[str, Line]:
    """The line of each work on one shape in one mode.

    Raises:
        RunFailed: by graphs, and steps were not repeated from recordings.
    """
    import torch

    from dyndepth.runtime.graphs import Graphs

    with Graphs() as graphs, torch.inference_mode():
        held = graphs if mode == GRAPHS else None
        found = dict(_measure(model, shape, options, held, what))
    if held is not None and (graphs.others or not graphs.steps):
        raise RunFailed("decode steps were not repeated from recordings")
    return found


def _measure(
    model: Any,
    shape: Prefill | Decode,
    options: argparse.Namespace,
    graphs: Graphs | None,
    what: str,
) -> Iterator[tuple[str, Line]]:
    """All works on one shape, in one set of interleaved rounds."""
    from tqdm import tqdm

    from dyndepth.timing.jobs import Job, method
    from dyndepth.timing.pairing import interleave, ratio
    from dyndepth.timing.rounds import EXCESS

    batch, width = shape.gate_shape
    with tqdm(total=options.repeats, desc=what, unit=" rounds", disable=None, leave=False) as bar:
        jobs = {"dense": Job(model, None, shape, graphs=graphs)}
        for work in options.works:
            if work in EAGER_WORKS and graphs is not None:
                continue
            backend: Any = "masked" if work == REFERENCE else "sparse"
            own = method(work, model, batch, width)
            jobs[work] = Job(model, own, shape, backend, graphs)

        def enough(times: Times) -> bool:
            bar.update(len(times["dense"]) - bar.n)
            return False

        times = interleave(
            {name: job.run for name, job in jobs.items()},
            around={name: job.prepared for name, job in jobs.items()},
            repeats=1,
            warmup=2,
            seed=0,
            device=options.device,
            enough=enough,
            most=options.repeats,
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
                "suspect": found.median > flop_ideal * (1 + EXCESS),
                "peak_ratio": (jobs[work].peak() or math.nan) / dense_peak,
            },
        )
