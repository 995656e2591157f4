"""How near the runtime comes to the arithmetic limit: ``python -m dyndepth.bench``.

Each line is one kind of skipped work on one shape, timed in interleaved rounds with the stock
model, the gates being given and not computed. ``flop_ideal`` is the speedup that the executed FLOPs
allow, ``byte_ideal`` the one that the bytes of weights touched allow (in decode a weight is read if
any sequence of the batch executes its sublayer); efficiency = speedup / flop_ideal.

The lines ``routes`` compare many static plans that are scored together (``dyndepth.trie``) with the
same plans scored one by one, on the same documents. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from dyndepth.method import DynamicDepthMethod
    from dyndepth.scoring import Group

PARTS = ("shapes", "routes")
WORKS = (
    "all_execute",
    "static_8",
    "static_15",
    "mask_75",
    "mask_50",
    "early_exit_half",
    "masked_reference",
)
PHASES = {
    "prefill_1x512": (1, 512),
    "prefill_8x256": (8, 256),
    "decode_1": (1, 128),
    "decode_8": (8, 128),
}
DTYPES = ("float32", "bfloat16")
SKIPPING = ("both", "generation")
_STEPS = 12
_BATCH = 8


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dyndepth.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="embedded", help="hub id, path, or 'embedded' (default)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="rounds a shape (default: 9)")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own choice")
    parser.add_argument(
        "--documents", type=int, default=100, help="that the routes are scored on (default: 100)"
    )
    for flag, name, choices in (
        ("parts", "part", PARTS),
        ("works", "work", WORKS),
        ("phases", "phase", PHASES),
        ("dtypes", "dtype", DTYPES),
        ("skipping", "phases", SKIPPING),
    ):
        parser.add_argument(
            f"--{flag}", nargs="+", default=list(choices), choices=list(choices), metavar=name
        )
    options = parser.parse_args(arguments)
    from dyndepth.errors import UserError

    try:
        bench(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def bench(options: argparse.Namespace) -> None:
    """Run the chosen lines and print them."""
    import torch

    from dyndepth.corpus import load_corpus
    from dyndepth.machine import steady_allocator
    from dyndepth.models import load_tokenizer

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        steady_allocator()
    corpus = load_corpus("embedded", load_tokenizer(options.model))
    print(f"threads {torch.get_num_threads()}, device {options.device}, torch {torch.__version__}")
    found: dict[str, Any] = {}
    if "shapes" in options.parts:
        found["bench"] = _shapes(corpus, options)
    if "routes" in options.parts:
        found["routes"] = _routes(corpus, options)
    print(json.dumps(found))


def _shapes(corpus: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The chosen works on the chosen shapes, a printed line each."""
    import torch

    from dyndepth.models import load_model

    headings = f"{'speedup':>9}{'95% interval':>17}{'flop ideal':>12}{'byte ideal':>12}{'eff.':>7}"
    print(f"{'':42}{headings}")
    lines: dict[str, dict[str, float]] = {}
    for dtype in options.dtypes:
        model = load_model(options.model, dtype=dtype, device=options.device)
        for phase in options.phases:
            batch, length = PHASES[phase]
            tokens = corpus.windows(length + _STEPS, batch, seed=0, split="calibration")
            shape = Prefill(tokens[:, :length]) if "prefill" in phase else Decode(tokens, length)
            with torch.inference_mode():
                for work, line in _measure(model, shape, options):
                    name = f"{work}/{phase}/{dtype}"
                    lines[name] = line
                    print(
                        f"{name:42}{line['speedup']:9.3f}   [{line['low']:.3f}, {line['high']:.3f}]"
                        f"{line['flop_ideal']:12.3f}{line['byte_ideal']:12.3f}"
                        f"{line['efficiency']:7.2f}",
                        flush=True,
                    )
    return lines


def _measure(
    model: Any, shape: Prefill | Decode, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    """All works on one shape, in one set of interleaved rounds."""
    from dyndepth.pairing import interleave, ratio

    batch, width = shape.gate_shape
    jobs: dict[str, Job] = {"dense": Job(model, None, "sparse", shape)}
    for work in options.works:
        method = _method(work, model, batch, width)
        backend = "masked" if work == "masked_reference" else "sparse"
        jobs[work] = Job(model, method, backend, shape)
    times = interleave(
        {name: job.run for name, job in jobs.items()},
        around={name: job.prepared for name, job in jobs.items()},
        repeats=options.repeats,
        warmup=2,
        seed=0,
        device=options.device,
    )
    for work in options.works:
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
            },
        )


# --- the work -----------------------------------------------------------------------------------


def _method(work: str, model: Any, batch: int, width: int) -> DynamicDepthMethod:
    """Gates of one kind of work for ``[batch, width]`` tokens at a time."""
    import torch

    from dyndepth.blocks import blocks

    layers = len(blocks(model))
    if work == "all_execute":
        return _given(torch.ones(layers, 2, dtype=torch.bool))
    if work.startswith("static_"):
        dropped = round(int(work.removeprefix("static_")) / 30 * layers)
        plan = torch.ones(layers, 2, dtype=torch.bool)
        plan[torch.linspace(1, layers - 2, dropped).round().long()] = False
        return _given(plan)
    generator = torch.Generator().manual_seed(0)
    if work == "early_exit_half":
        depth = torch.randint(1, layers, (batch, width), generator=generator)
        executed = torch.arange(layers)[:, None, None] < depth
        return _given(torch.stack([executed, executed], dim=1))
    rate = 0.75 if work == "mask_75" else 0.5
    return _given(torch.rand(layers, 2, batch, width, generator=generator) < rate)


def _given(given: Tensor, skipping: Literal["both", "generation"] = "both") -> DynamicDepthMethod:
    """A method that answers with a plan ``[layers, 2]`` or masks ``[layers, 2, batch, width]``.

    A decode step takes the next column of masks drawn for all steps at once.
    """
    from dyndepth.method import DynamicDepthMethod

    class Given(DynamicDepthMethod):
        name = "given"
        granularity = "static" if given.ndim == 2 else "token"
        paper = "bench"
        phases = skipping

        def start(self, context: Any) -> Tensor | None:
            if given.ndim == 2:
                return given
            column = context.past_length % given.shape[3] if context.tokens == 1 else 0
            chosen = given[..., column : column + context.tokens].to(context.device)
            shared = bool((given[:, 0] == given[:, 1]).all())
            self.masks = [(pair[0], pair[0] if shared else pair[1]) for pair in chosen.unbind(0)]
            return None

        def gates(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self.masks[layer]

    return Given()


# --- the shapes ---------------------------------------------------------------------------------


@dataclass
class Prefill:
    """One forward over the tokens ``[batch, length]``, logits of the last position."""

    tokens: Tensor

    @property
    def gate_shape(self) -> tuple[int, int]:
        """Tokens that need a gate: batch and width."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def prefill(self, model: Any) -> None:
        """Nothing comes before."""

    def run(self, model: Any, state: Any) -> None:
        """The timed forward."""
        model(self.tokens.to(model.device), logits_to_keep=1, use_cache=True)

    def rewind(self, state: Any) -> None:
        """Nothing is kept."""


@dataclass
class Decode:
    """``_STEPS`` single-token steps over a cache of ``length`` tokens."""

    tokens: Tensor
    length: int

    @property
    def gate_shape(self) -> tuple[int, int]:
        """Tokens that need a gate: batch and width of the prefill."""
        return self.tokens.shape[0], self.length

    def prefill(self, model: Any) -> Any:
        """The cache that the steps extend."""
        from dyndepth.blocks import cache_of

        prompt = self.tokens[:, : self.length].to(model.device)
        return cache_of(model(prompt, logits_to_keep=1, use_cache=True))

    def run(self, model: Any, state: Any) -> None:
        """The timed steps."""
        from dyndepth.blocks import cache_argument

        keyword = cache_argument(model)
        for step in range(self.length, self.length + _STEPS):
            token = self.tokens[:, step : step + 1].to(model.device)
            model(token, **{keyword: state}, use_cache=True)

    def rewind(self, state: Any) -> None:
        """Take the steps off the cache again."""
        state.crop(-_STEPS)


class Job:
    """One method on one shape: set up outside the clock, run inside."""

    def __init__(self, model: Any, method: Any, backend: Any, shape: Prefill | Decode) -> None:
        self.model, self.method, self.shape = model, method, shape
        self.attached: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.flop_ideal = 1.0
        if method is not None:
            from dyndepth.runtime import attach

            self.attached = lambda: attach(model, method, backend=backend)
        with self.attached() as trace:
            self.state = shape.prefill(model)
            if trace is not None:
                trace.reset()
            with _weights_read(model) as read:
                shape.run(model, self.state)
            self.bytes_read = sum(read)
            if trace is not None:
                totals = trace.totals()
                self.flop_ideal = totals["dense_total_flops"] / totals["total_flops"]
        shape.rewind(self.state)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Attached before and rewound after the timed run."""
        with self.attached():
            yield
        self.shape.rewind(self.state)

    def run(self) -> None:
        """What is timed."""
        self.shape.run(self.model, self.state)


@contextmanager
def _weights_read(model: Any) -> Iterator[list[int]]:
    """Collects the bytes of every linear map's weight, each time that it is applied."""
    from torch import nn

    read: list[int] = []
    handles = [
        module.register_forward_pre_hook(
            lambda m, _: read.append(m.weight.numel() * m.weight.element_size())
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


# --- the routes ---------------------------------------------------------------------------------


def _routes(corpus: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Many plans together against one by one, in the first of the dtypes; a printed line each.

    ``ratio`` is seconds together / seconds one by one: the median over the parts of the documents,
    in whose rounds the two alternate. ``computed`` is the share of the plans' sublayers that is
    left to compute where equal beginnings are shared; ``difference`` the largest between the
    log-likelihoods of the two (nats).
    """
    from dyndepth.blocks import blocks
    from dyndepth.models import load_model
    from dyndepth.pairing import interleave, ratio

    dtype = options.dtypes[0]
    model = load_model(options.model, dtype=dtype, device=options.device)
    plans = _plans(len(blocks(model)))
    documents = _documents(corpus, options.documents)
    parts = [documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH)]
    lines: dict[str, dict[str, float]] = {}
    for skipping in options.skipping:
        sides = {"together": Together(model, plans, parts, skipping)}
        sides["one by one"] = OneByOne(model, plans, parts, skipping)
        for side in sides.values():
            side.warm_up()
        times = interleave(
            {name: side.run for name, side in sides.items()},
            repeats=len(parts),
            warmup=0,
            seed=0,
            device=options.device,
        )
        together, alone = (side.found for side in sides.values())
        found = ratio(times["together"], times["one by one"])
        line = {
            "ratio": found.median,
            "low": found.low,
            "high": found.high,
            "together_s": sum(times["together"]),
            "one_by_one_s": sum(times["one by one"]),
            "computed": _computed(plans),
            "difference": max(
                (a - b).abs().max().item() for a, b in zip(together, alone, strict=True)
            ),
        }
        name = f"routes/{skipping}/{dtype}"
        lines[name] = line
        print(
            f"{name:42} {len(plans)} plans on {len(documents)} documents: "
            f"{line['together_s']:.1f} s together, {line['one_by_one_s']:.1f} s one by one, "
            f"ratio {line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}], "
            f"shares compute {line['computed']:.3f}, differ by {line['difference']:.1e} nats",
            flush=True,
        )
    return lines


def _plans(layers: int) -> Tensor:
    """For each number of blocks one plan that is spaced and two that are random: bool
    ``[3 layers, layers, 2]``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    plans = torch.zeros(layers, 3, layers, 2, dtype=torch.bool)
    for count in range(1, layers + 1):
        plans[count - 1, 0, _spaced(count, layers)] = True
        for plan in plans[count - 1, 1:]:
            plan[torch.randperm(layers, generator=generator)[:count]] = True
    return plans.flatten(0, 1)


def _spaced(count: int, layers: int) -> list[int]:
    """The first block, the last one, and between them the multiples of a whole interval."""
    if count == 1:
        return [0]
    interval = layers // (count - 1)
    inner = [block for block in range(1, layers - 1) if block % interval == 0]
    return [0, *inner[: count - 2], layers - 1]


def _computed(plans: Tensor) -> float:
    """Distinct executed beginnings / executed sublayers."""
    beginnings, executed = set(), 0
    for plan in plans.flatten(1):
        done = tuple(plan.nonzero()[:, 0].tolist())
        beginnings |= {done[: stop + 1] for stop in range(len(done))}
        executed += len(done)
    return len(beginnings) / executed


def _documents(corpus: Any, count: int) -> list[Group]:
    """Like questions with three choices, cut from the corpus, the longest first.

    Contexts have 48 to 80 tokens, choices 2 to 6.
    """
    import torch

    from dyndepth.scoring import Group

    generator = torch.Generator().manual_seed(0)
    found = []
    for number, window in enumerate(corpus.windows(98, count, seed=0, split="calibration")):
        context = int(torch.randint(48, 81, (1,), generator=generator))
        lengths = torch.randint(2, 7, (3,), generator=generator).tolist()
        rest = window[80:].tolist()
        choices = [rest[6 * place : 6 * place + length] for place, length in enumerate(lengths)]
        found.append(Group(str(number), window[80 - context : 80].tolist(), choices))
    return sorted(found, key=lambda group: group.size, reverse=True)


@dataclass
class Together:
    """All plans at once on one part of the documents after the other.

    ``found`` holds the log-likelihoods, float64 ``[plans, continuations]``, a part each.
    """

    model: Any
    plans: Tensor
    parts: list[list[Group]]
    skipping: Any

    def __post_init__(self) -> None:
        self.found: list[Tensor] = []
        self._next = cycle(self.parts)

    def score(self, part: list[Group], plans: Tensor) -> Tensor:
        """Log-likelihoods of one part."""
        import torch

        from dyndepth.trie import score

        results = dict(score(self.model, plans, part, phases=self.skipping))
        logs = [log.sum(1) for index in range(len(part)) for log, _ in results[index]]
        return torch.stack(logs, 1)

    def warm_up(self) -> None:
        """The first plans on the first part."""
        self.score(self.parts[0], self.plans[:3])

    def run(self) -> None:
        """What is timed."""
        self.found.append(self.score(next(self._next), self.plans))


class OneByOne(Together):
    """One plan after the other, attached as a method."""

    def score(self, part: list[Group], plans: Tensor) -> Tensor:
        """Log-likelihoods of one part."""
        import torch

        from dyndepth.runtime import attach
        from dyndepth.scoring import score

        rows = []
        for plan in plans:
            with attach(self.model, _given(plan, self.skipping)) as trace:
                results = dict(score(self.model, trace, part, _BATCH))
            rows.append([log for index in range(len(part)) for log, _ in results[index]])
        return torch.tensor(rows, dtype=torch.float64)


if __name__ == "__main__":
    sys.exit(main())
