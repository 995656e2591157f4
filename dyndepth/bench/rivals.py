"""Lossless drafts as people have them, in one set of interleaved rounds: transformers' early exit
and prompt lookup beside methods that speculate, all by ``model.generate`` on the same prompts.

Of the part ``lossless`` of ``python -m dyndepth.bench``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from dyndepth.bench.forced import drafting, first_blocks
from dyndepth.common.errors import UserError
from dyndepth.common.printing import Column, print_columns
from dyndepth.common.registry import load_method, method_class, methods, parse_methods
from dyndepth.fitting.fits import fit_cached
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import blocks
from dyndepth.results.noise import legend, told
from dyndepth.runtime.attach import attach
from dyndepth.timing.pairing import interleave, ratio

LENGTH = 4
"""Tokens of our drafts, and of transformers' where they are set."""
PROMPT = 64
NEW_TOKENS = 48
WARM_UP = 2
SPEEDUP = 1.25
"""Target of drafts whose specification names none."""

Line = dict[str, Any]


@dataclass
class Generating:
    """One way to write, by ``model.generate``, of exactly ``NEW_TOKENS`` greedy tokens a prompt.

    Attributes:
        options: of ``generate``, beside those that all have.
        settings: of the model's own generation settings, where transformers looks for an
            assistant's.
        method: that is attached, if there is one.
        texts: what was written of each prompt, by its number.
        drafted, accepted: tokens of drafts, and those of them that stand, of ``counted`` calls.
        forwards: of the whole model, likewise, prompts' included.
    """

    model: Any
    prompts: Sequence[Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: DynamicDepthMethod | None = None

    def __post_init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        self.drafted = self.accepted = self.forwards = 0
        self._next = cycle(range(len(self.prompts)))

    @contextmanager
    def around(self) -> Iterator[None]:
        """Chooses the prompt; the method is attached inside."""
        self.number = next(self._next)
        if self.method is None:
            stock = self.model.generation_config
            own = self.model.generation_config = copy.deepcopy(stock)
            own.update(**self.settings)
            try:
                yield
            finally:
                self.model.generation_config = stock
            return
        with attach(self.model, self.method, warn=False) as trace:
            yield
            self.trace = trace

    def run(self) -> None:
        """What is timed."""
        prompt = self.prompts[self.number]
        written = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **self.options,
        )
        self.texts[self.number] = written[0, prompt.shape[1] :].tolist()

    def count(self) -> None:
        """Write every prompt once more and count drafts: ours as they are recorded, transformers'
        by watching what its source of candidates hands out and is told to have matched."""
        for _ in self.prompts:
            with self.around(), self._watched():
                self.run()
            if self.method is not None:
                self.drafted += self.trace.speculation.drafted
                self.accepted += self.trace.speculation.accepted
                self.forwards += 1 + len(self.trace.speculation.rounds)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if self.method is not None or not self.options:
            yield
            return
        stock = self.model._get_candidate_generator

        def watching(*args: Any, **kwargs: Any) -> Any:
            source = stock(*args, **kwargs)
            give, hear = source.get_candidates, source.update_candidate_strategy

            def candidates(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
                found = give(ids, *args, **kwargs)
                self.drafted += found[0].shape[1] - ids.shape[1]
                self.forwards += 1
                return found

            def matched(ids: Tensor, scores: Tensor, number: Any) -> Any:
                self.accepted += int(number)
                return hear(ids, scores, number)

            source.get_candidates, source.update_candidate_strategy = candidates, matched
            return source

        self.model._get_candidate_generator = watching
        try:
            yield
        finally:
            del self.model._get_candidate_generator


def compared(model: Any, corpus: Any, options: argparse.Namespace, dtype: str) -> dict[str, Line]:
    """A line each: ``speedup`` over dense ``generate``, the median over pairs, a prompt a pair;
    ``tokens_per_s``; ``acceptance``, accepted / drafted, and ``tokens_per_forward`` of the whole
    model, the prompt's one included, both of further passes (see ``Generating.count``); and in how
    many of the ``prompts`` the text is dense's (``equal``).

    transformers' ``assistant_early_exit`` has its own length and threshold of drafts, and beside
    them ``LENGTH`` without any; our draft by the same blocks is ``exit``.
    """
    windows = corpus.windows(PROMPT, options.repeats, seed=0, split="calibration", model=model)
    prompts = list(windows.to(model.device).split(1))
    depth = round(len(blocks(model)) * 2 / 3)
    same = {
        "num_assistant_tokens": LENGTH,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    sides = {
        "dense": Generating(model, prompts),
        f"assistant_early_exit={depth}": Generating(
            model, prompts, {"assistant_early_exit": depth}
        ),
        f"assistant_early_exit={depth}, {LENGTH} tokens": Generating(
            model, prompts, {"assistant_early_exit": depth}, same
        ),
        "prompt_lookup_num_tokens=10": Generating(model, prompts, {"prompt_lookup_num_tokens": 10}),
        f"ours: exit={depth}, {LENGTH} tokens": Generating(
            model, prompts, method=drafting(first_blocks(model, depth), LENGTH)
        ),
    }
    for method in speculating(options.drafts):
        found = fit_cached(method, model, corpus)
        sides[f"ours: {method!r}"] = Generating(model, prompts, method=found)
    times = interleave(
        {name: side.run for name, side in sides.items()},
        around={name: side.around for name, side in sides.items()},
        repeats=options.repeats,
        warmup=WARM_UP,
        device=options.device,
    )
    for side in sides.values():
        side.count()
    lines = {
        f"compared/{name}/{dtype}": _line(times["dense"], times[name], side, sides["dense"])
        for name, side in sides.items()
    }
    _show(lines)
    return lines


def speculating(specs: str | None) -> list[DynamicDepthMethod]:
    """The methods of these specifications; None: all registered ones that speculate and need no
    training. Raises UserError for one that does not speculate."""
    if specs is None:
        classes = {name: method_class(name) for name in methods()}
        chosen = [
            name for name, each in classes.items() if each.speculates and not each.needs_training
        ]
        return [load_method(name, target_speedup=SPEEDUP) for name in chosen]
    found = []
    for name, given in parse_methods(specs):
        method = load_method(name, **{"target_speedup": SPEEDUP, **given})
        if not method.speculates:
            raise UserError(f"--drafts takes methods that speculate, and {name} does not")
        found.append(method)
    return found


def _line(dense_s: list[float], own_s: list[float], side: Generating, dense: Generating) -> Line:
    found = ratio(dense_s, own_s)
    drafts = side.drafted > 0
    return {
        "speedup": found.median,
        "low": found.low,
        "high": found.high,
        "tokens_per_s": NEW_TOKENS / statistics.median(own_s),
        "acceptance": side.accepted / side.drafted if drafts else None,
        "tokens_per_forward": NEW_TOKENS * len(side.prompts) / side.forwards if drafts else None,
        "equal": sum(side.texts[each] == dense.texts[each] for each in dense.texts),
        "prompts": len(dense.texts),
    }


def _show(lines: Mapping[str, Line]) -> None:
    def of(heading: str, form: Callable[[Line], str], rank: int = 0) -> Column:
        return Column(heading, [form(line) for line in lines.values()], rank=rank)

    speeds = [
        told(line["speedup"], line["low"], line["high"], form="{:.3f}") for line in lines.values()
    ]
    table = [
        Column("generate", [name.removeprefix("compared/") for name in lines], name=True),
        Column("speedup over dense [95% interval]", speeds),
        of("tokens/s", lambda line: f"{line['tokens_per_s']:.1f}", 1),
        of("accepted", lambda line: _known(line["acceptance"], "{:.0%}")),
        of("tokens a forward", lambda line: _known(line["tokens_per_forward"], "{:.2f}")),
        of("text is dense's", lambda line: f"{line['equal']} of {line['prompts']}"),
    ]
    about = (
        f"prompts of {PROMPT} tokens and {NEW_TOKENS} new ones, greedily; the prompt is timed, too"
    )
    print_columns(table, "Lossless drafts by generate", f"{about}; {legend(speeds)}".rstrip("; "))


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
