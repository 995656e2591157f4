"""How near the runtime comes to the arithmetic limit: ``python -m dyndepth.bench``.

Each line is one kind of skipped work on one shape, timed in interleaved rounds with the stock
model, the gates being given and not computed. ``flop_ideal`` is the speedup that the executed FLOPs
allow, ``byte_ideal`` the one that the bytes of weights touched allow (in decode a weight is read if
any sequence of the batch executes its sublayer); efficiency = speedup / flop_ideal.

The part ``routes`` is in ``dyndepth.bench_routes``: many static plans scored together and one by
one. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dyndepth.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dyndepth.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="embedded", help="hub id, path, or 'embedded' (default)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="rounds a shape (default: 9)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument(
        "--documents", type=int, default=100, help="that the routes are scored on (default: 100)"
    )
    for flag, name, choices, default in (
        ("parts", "part", PARTS, PARTS),
        ("works", "work", WORKS, WORKS),
        ("phases", "phase", PHASES, PHASES),
        ("dtypes", "dtype", DTYPES, DTYPES),
        ("skipping", "phases", SKIPPING, SKIPPING[:1]),
    ):
        said = "all" if default is choices else " ".join(default)
        parser.add_argument(
            f"--{flag}",
            nargs="+",
            default=list(default),
            choices=list(choices),
            metavar=name,
            help=f"of {', '.join(choices)} (default: {said})",
        )
    options = parser.parse_args(arguments)
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

    for name in ("repeats", "threads", "documents"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name} takes a whole number of at least 1, not {given}")
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
        from dyndepth.bench_routes import routes

        found["routes"] = routes(corpus, options)
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
    from dyndepth.bench_gates import method
    from dyndepth.pairing import interleave, ratio

    batch, width = shape.gate_shape
    jobs: dict[str, Job] = {"dense": Job(model, None, "sparse", shape)}
    for work in options.works:
        backend = "masked" if work == "masked_reference" else "sparse"
        jobs[work] = Job(model, method(work, model, batch, width), backend, shape)
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


if __name__ == "__main__":
    sys.exit(main())
