"""What speculation costs and brings: drafts by part of the model, verified by all of it.

A part of ``python -m dyndepth.bench``, in the first of the dtypes:

* ``overhead``: a round of the loop, a draft that is the whole model, against its bare forwards;
* ``forced``: a draft by the first half of the blocks, accepted by a coin, against dense; and from
  which acceptance it wins, by the bytes of weights and as measured;
* ``compared``, on a model that has text: transformers' own drafts and methods that speculate, on
  the same prompts (``dyndepth.bench.rivals``).
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from dyndepth.bench.forced import Forced, drafting, first_blocks
from dyndepth.common.modes import EAGER
from dyndepth.common.printing import Column, print_columns
from dyndepth.models.blocks import blocks
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.loading import loaded
from dyndepth.models.shapes import is_shape
from dyndepth.results.noise import legend, told
from dyndepth.runtime.attach import attach
from dyndepth.runtime.draft_costs import DraftCosts, break_even, chance
from dyndepth.runtime.speculation import speculate
from dyndepth.timing.drafted import columns, read_costs
from dyndepth.timing.jobs import whole
from dyndepth.timing.pairing import Median, interleave, ratio
from dyndepth.timing.passes import How, Side, running

LENGTH = 4
"""Tokens of a draft."""
ROUNDS = 4
"""Of the loop, in one timed call."""
ACCEPTANCES = (0.6, 0.8, 0.95, 1.0)
"""That are forced."""
NEW_TOKENS = 40
PROMPT = {"cpu": 128, "cuda": 512}
"""Tokens of a prompt, by kind of device."""
TEXTS = 4
WARM_UP = 2

Line = dict[str, Any]


def lossless(corpus: Any, options: argparse.Namespace) -> dict[str, Line]:
    """All lines by name; a printed table a kind."""
    dtype = options.dtypes[0]
    model = loaded(vars(options), dtype)
    length = PROMPT.get(model.device.type, PROMPT["cpu"])
    texts = corpus.windows(
        length + (LENGTH + 1) * ROUNDS, TEXTS, seed=0, split="calibration", model=model
    ).to(model.device)
    found: dict[str, Line] = {}
    with torch.inference_mode():
        for mode in options.modes:
            more = "" if mode == EAGER else f"/{mode}"
            for measured in (overhead, forced):
                with running(mode) as how:
                    lines = measured(model, texts, length, options, how)
                named = {f"{name}/{dtype}{more}": line for name, line in lines.items()}
                _show(named)
                found |= named
    if not is_shape(options.model):
        from dyndepth.bench.rivals import compared

        found |= compared(model, corpus, options, dtype)
    return found


class _Rounds:
    """``ROUNDS`` rounds of the loop after a prompt, or their forwards by themselves.

    ``around`` reads the prompt, outside of the clock; ``run`` is timed.
    """

    def __init__(self, model: Any, texts: Tensor, length: int, how: How) -> None:
        self.model, self.length, self.how = model, length, how
        self._next = cycle(texts.split(1))

    @contextmanager
    def around(self) -> Iterator[None]:
        """One text more."""
        text = next(self._next)
        method = drafting(first_blocks(self.model, len(blocks(self.model))), LENGTH)
        with attach(self.model, method, warn=False, **self.how) as trace:
            prompt, limit = text[0, : self.length].tolist(), 1 + (LENGTH + 1) * ROUNDS
            self._writing = speculate(self.model, trace, method, prompt, limit=limit)
            next(self._writing)
            yield
            self.rounds = len(trace.speculation.rounds)

    def run(self) -> None:
        """What is timed."""
        deque(self._writing, maxlen=0)


class _Forwards(_Rounds):
    """The forwards of rounds in which all stands: single steps, which are taken back, and one over
    all their tokens. Nothing is chosen, the tokens are the text's own."""

    @contextmanager
    def around(self) -> Iterator[None]:
        """One text more."""
        text = next(self._next)
        dense = attach(self.model, whole(self.model), warn=False, **self.how)
        with dense if self.how else nullcontext():
            out = self.model(text[:, : self.length], use_cache=True, logits_to_keep=1)
            self._past: Any = cache_of(out)
            self._fed = text[:, self.length :].split(LENGTH + 1, 1)
            yield

    def run(self) -> None:
        """What is timed."""
        over = {cache_argument(self.model): self._past, "use_cache": True}
        for part in self._fed:
            for token in part[:, :LENGTH].split(1, 1):
                self.model(token, **over)
            self._past.crop(-LENGTH)
            self.model(part, **over)


def overhead(model: Any, texts: Tensor, length: int, options: Any, how: How) -> dict[str, Line]:
    """``ratio``: time of rounds whose draft is the whole model / time of their forwards in the
    stock model, ``LENGTH`` steps and one of ``LENGTH + 1`` tokens each, the median over pairs.
    ``rounds`` says how many there were in a call: more than ``ROUNDS`` if a draft was refused,
    because a step and a longer forward round differently."""
    sides = {
        "loop": _Rounds(model, texts, length, how),
        "forwards": _Forwards(model, texts, length, how),
    }
    times = _interleaved(sides, options)
    found = ratio(times["loop"], times["forwards"])
    more = {"rounds": sides["loop"].rounds, "length": LENGTH}
    return {"overhead": _spread("ratio", found) | more}


def forced(model: Any, texts: Tensor, length: int, options: Any, how: How) -> dict[str, Line]:
    """A line for each of ``ACCEPTANCES``, its ``speedup`` over dense and what predictions make of
    it, and one of the break-even: ``by_bytes`` and ``measured``, each the chance of a token to be
    accepted at which the speedup is 1, None: at none of them."""
    method = drafting(first_blocks(model, len(blocks(model)) // 2), LENGTH)
    batches = list(texts[:, :length].split(1))
    costs = read_costs(model, method, batches[0][0].tolist(), NEW_TOKENS)
    dense = Side(model, whole(model) if how else None, batches, NEW_TOKENS, how)
    sides: dict[str, Any] = {"dense": dense}
    for acceptance in ACCEPTANCES:
        side = Forced(model, method, batches, NEW_TOKENS, how)
        side.chance = acceptance
        sides[f"{acceptance:g}"] = side
    _interleaved(sides, options)
    pairs = options.repeats
    lines: dict[str, Line] = {}
    steps = dense.watch.host["decode"][-pairs:]
    step = sorted(steps)[len(steps) // 2] / NEW_TOKENS
    for acceptance in ACCEPTANCES:
        own: Forced = sides[f"{acceptance:g}"]
        rounds = [each for one in own.rounds[-pairs:] for each in one]
        more = columns(rounds, own.laps(pairs), costs, step, 0.0, None)
        lines[f"forced/{acceptance:g}"] = {
            **_spread("speedup", ratio(steps, own.watch.host["decode"][-pairs:])),
            "forced": acceptance,
            "chance": chance(rounds),
            **{key: value for key, value in more.items() if key not in ("temperature", "fit_s")},
            "dense_step_ms": 1000 * step,
        }
    lines["break_even"] = {
        "draft_bytes": costs.draft,
        "by_bytes": break_even(costs, LENGTH),
        "by_times": _by_times(lines["forced/1"]),
        "measured": crossing({line["chance"]: line["speedup"] for line in lines.values()}),
    }
    return lines


def _by_times(line: Line) -> float | None:
    step = line["dense_step_ms"]
    return break_even(DraftCosts(line["draft_ms"] / step, line["verify_ms"] / step), LENGTH)


def crossing(speedups: Mapping[float, float]) -> float | None:
    """The acceptance from which on the speedup is 1 or more, between two that were measured; the
    smallest if it is so there; None if it is not at the largest."""
    places = sorted(speedups)
    below = [place for place in places if speedups[place] < 1]
    if not below:
        return places[0]
    low = below[-1]
    if low == places[-1]:
        return None
    high = places[places.index(low) + 1]
    return low + (1 - speedups[low]) / (speedups[high] - speedups[low]) * (high - low)


def _interleaved(sides: Mapping[str, Any], options: Any) -> dict[str, list[float]]:
    from tqdm import tqdm

    about = {"total": options.repeats, "unit": " rounds", "disable": None, "leave": False}
    with tqdm(desc="lossless", **about) as bar:

        def enough(times: Mapping[str, Sequence[float]]) -> bool:
            bar.update(len(next(iter(times.values()))) - bar.n)
            return False

        return interleave(
            {name: side.run for name, side in sides.items()},
            around={name: side.around for name, side in sides.items()},
            repeats=1,
            warmup=WARM_UP,
            seed=0,
            device=options.device,
            enough=enough,
            most=options.repeats,
        )


def _spread(name: str, found: Median) -> Line:
    """NaN where there are too few pairs for an interval."""
    return {name: found.median, "low": found.low, "high": found.high}


def _show(found: Mapping[str, Line]) -> None:
    if any(name.startswith("forced") for name in found):
        _show_forced({name: line for name, line in found.items() if name.startswith("forced")})
    for name, line in found.items():
        if name.startswith("overhead"):
            print(
                f"{name}: a round is {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}] "
                f"times its {LENGTH + 1} forwards ({line['rounds']} rounds a call)",
                flush=True,
            )
        if name.startswith("break_even"):
            told_of = [("measured", "measured"), ("by_bytes", "by bytes"), ("by_times", "by times")]
            each = ", ".join(f"{word} {_known(line[key])}" for key, word in told_of)
            print(
                f"{name}: this draft reads {line['draft_bytes']:.0%} of a step's bytes; it wins "
                f"from a chance of {each}",
                flush=True,
            )


def _show_forced(lines: Mapping[str, Line]) -> None:
    def of(heading: str, form: Callable[[Line], str], rank: int = 0) -> Column:
        return Column(heading, [form(line) for line in lines.values()], rank=rank)

    speeds = [
        told(line["speedup"], line["low"], line["high"], form="{:.3f}") for line in lines.values()
    ]
    table = [
        Column("forced acceptance", list(lines), name=True),
        Column("speedup over dense [95% interval]", speeds),
        of("accepted", lambda line: f"{line['acceptance']:.0%}"),
        of("tokens a round", lambda line: f"{line['tokens_per_verify']:.2f}"),
        of("draft ms", lambda line: f"{line['draft_ms']:.2f}", 1),
        of("verify ms", lambda line: f"{line['verify_ms']:.2f}", 1),
        of("by bytes", lambda line: f"{line['predicted_speedup']:.3f}"),
        of("by times", lambda line: f"{line['predicted_by_times']:.3f}"),
    ]
    about = f"drafts of {LENGTH} tokens by half of the blocks; forced: each token's chance to stand"
    print_columns(table, "Drafts accepted by a coin", f"{about}; {legend(speeds)}".rstrip("; "))


def _known(acceptance: float | None) -> str:
    return "never" if acceptance is None else f"{acceptance:.2f}"
