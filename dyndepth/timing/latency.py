"""A side's times as those who serve models name them, from the same passes as its speedup.

Time to first token, time per output token and tokens a second follow from the seconds that were
measured: nothing is timed for them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dyndepth.timing.levels import Shape
from dyndepth.timing.pairing import Median, median

if TYPE_CHECKING:
    from dyndepth.timing.memory import Peak

Row = dict[str, Any]

MS = 1000.0
"""Milliseconds of a second."""


def speeds(side: str, phase: str, shape: Shape, seconds: Sequence[float]) -> Row:
    """Columns of one side and phase, from ``seconds`` of whole passes: TTFT in ``prefill``, TPOT in
    ``decode``, and tokens a second of the batch, each with the ends of its 95% interval."""
    prompt = phase == "prefill"
    tokens = shape.batch * (shape.length if prompt else shape.new_tokens)
    pass_ = median(seconds)
    one = MS if prompt else MS / shape.new_tokens
    time = Median(pass_.median * one, pass_.low * one, pass_.high * one, pass_.n)
    rate = Median(tokens / pass_.median, tokens / pass_.high, tokens / pass_.low, pass_.n)
    return {
        **_spread(f"{side}_ttft_ms", time if prompt else None),
        **_spread(f"{side}_tpot_ms", None if prompt else time),
        **_spread(f"{side}_tokens_per_s", rate),
    }


def no_speeds(side: str) -> Row:
    """The columns of ``speeds``, empty."""
    names = (f"{side}_{what}" for what in ("ttft_ms", "tpot_ms", "tokens_per_s"))
    return {key: None for name in names for key in _spread(name, None)}


def kept(side: str, phase: str, passes: Sequence[Mapping[str, int | None]]) -> Row:
    """Bytes of keys and values at the end of a phase: the median over ``passes``, whose texts may
    keep different tokens."""
    known = [found for each in passes if (found := each[phase]) is not None]
    return {f"{side}_cache_bytes": round(statistics.median(known)) if known else None}


def held(side: str, peak: Peak | None) -> Row:
    """Columns of a peak."""
    whole, above = (peak.whole, peak.above) if peak else (None, None)
    return {f"{side}_peak_bytes": whole, f"{side}_peak_above_bytes": above}


def over_compiled(found: Median | None, fault: str) -> Row:
    """Columns of the method's speedup over compiled dense, or why there is none."""
    return {**_spread("speedup_over_compiled", found), "compiled_error": fault or None}


def _spread(name: str, found: Median | None) -> Row:
    values = (found.median, found.low, found.high) if found else (None, None, None)
    known = [None if value is None or math.isnan(value) else value for value in values]
    return dict(zip((name, f"{name}_low", f"{name}_high"), known, strict=True))
