"""What must hold on any device, checked on a tiny model that is made on the spot.

Each check is a function of a ``Bed``; it raises for what does not hold. They are in an installed
package, where the test suite is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.fitting.loop import Schedule
from dyndepth.fitting.routers import Router, Tuning, tune_router
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.models.loading import load_model
from dyndepth.models.seeding import seeded
from dyndepth.models.shapes import shape_for
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs
from dyndepth.runtime.limits import ALWAYS, Limits
from dyndepth.runtime.recorder import Recorder
from dyndepth.timing.jobs import given

TOKENS, PROMPT = 48, 32
EXACT, HALF = 2e-3, 0.1
"""How far logits may be apart, relative to their length, in float32 and in half precision."""


class NotHeld(AssertionError):
    """Something is not as it must be."""


class NotHere(Exception):
    """A check that this device has no use for."""


class Bed:
    """A tiny model on ``device``, and gates of every kind for its tokens."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.model = self.built(device)
        layers = len(Decoder.of(self.model).layers)
        draw = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(4, 500, (3, TOKENS), generator=draw).to(self.device)
        self._plan = torch.rand(layers, 2, generator=draw) < 0.6
        self._plan[0] = True
        self._masks = torch.rand(layers, 2, 3, TOKENS, generator=draw) < 0.5
        self.methods = self.gates(3)
        self.recorder: Recorder | None = None

    def gates(self, rows: int) -> dict[str, DynamicDepthMethod]:
        """Gates of every kind for the first ``rows`` texts."""
        masks = self._masks[:, :, :rows]
        return {
            "all": given(torch.ones_like(self._plan)),
            "plan": given(self._plan),
            "masks": given(masks),
            "attention": given(torch.stack([masks[:, 0], torch.ones_like(masks[:, 0])], 1)),
        }

    @staticmethod
    def built(device: str, dtype: str = "float32") -> Any:
        """The model: weights wide enough that one wrong gate moves the logits by a tenth."""
        model = load_model(shape_for("trial"), dtype="float32", device="cpu")
        with seeded(0, torch.device("cpu")), torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        return model.to(device, getattr(torch, dtype))

    def logits(
        self, name: str, model: Any = None, tokens: Tensor | None = None, **how: Any
    ) -> Tensor:
        """Of one forward under a method."""
        model = self.model if model is None else model
        tokens = self.tokens if tokens is None else tokens
        with torch.inference_mode(), attach(model, self.methods[name], limits=ALWAYS, **how):
            return model(tokens.to(model.device)).logits

    def steps(self, name: str, rows: int = 3, **how: Any) -> Tensor:
        """Logits of single tokens over a cache, behind a prompt."""
        tokens, keyword, found = self.tokens[:rows], cache_argument(self.model), []
        method = self.gates(rows)[name]
        with torch.inference_mode(), attach(self.model, method, **how):
            cache = cache_of(self.model(tokens[:, :PROMPT], use_cache=True))
            for place in range(PROMPT, TOKENS):
                token = tokens[:, place : place + 1]
                found.append(self.model(token, **{keyword: cache}, use_cache=True).logits)
        return torch.cat(found, 1)


def near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Raises NotHeld for logits that are further apart than rounding puts them."""
    found, wanted = found.float().cpu(), wanted.float().cpu()
    gap = float((found - wanted).norm() / wanted.norm())
    if not gap <= tolerance:
        raise NotHeld(f"{what}: {gap:.2e} apart, {tolerance:.0e} allowed")


def same_as_cpu(bed: Bed) -> None:
    """Logits are those of the CPU, dense and under gates of every kind."""
    reference = bed.built("cpu")
    for name in bed.methods:
        near(bed.logits(name), bed.logits(name, reference), EXACT, name)


def sparse_equals_masked(bed: Bed) -> None:
    """What is skipped is what computing everything and multiplying leaves out."""
    for name in bed.methods:
        near(bed.logits(name), bed.logits(name, backend="masked"), EXACT, name)


def half_precision(bed: Bed) -> None:
    """The same in bfloat16, of which a GPU has other kernels."""
    model = bed.built(str(bed.device), "bfloat16")
    for name in bed.methods:
        near(bed.logits(name, model), bed.logits(name, model, backend="masked"), HALF, name)


def whole_is_exact(bed: Bed) -> None:
    """Short forwards, which compute everything unasked, say the same."""
    never = Limits(0.0, 0.0, 10**9)
    for name in bed.methods:
        wanted = bed.logits(name)
        with torch.inference_mode(), attach(bed.model, bed.methods[name], limits=never):
            near(bed.model(bed.tokens).logits, wanted, EXACT, name)


def padding(bed: Bed) -> None:
    """A padded row says what it says alone."""
    width, keep = 24, 15
    mask = torch.ones(2, width, dtype=torch.long, device=bed.device)
    mask[1, : width - keep] = 0
    how = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.inference_mode(), attach(bed.model, bed.methods["plan"]):
        together = bed.model(bed.tokens[:2, :width], **how).logits[1, width - keep :]
        alone = bed.model(bed.tokens[1:2, width - keep : width]).logits[0]
    near(together, alone, EXACT, "a padded row")


def cached_steps(bed: Bed) -> None:
    """Steps over a cache say what one forward says."""
    near(bed.steps("plan"), bed.logits("plan")[:, PROMPT:], EXACT, "a plan")


def graphs(bed: Bed) -> None:
    """Steps by graphs are eager steps, for every kind of gate, alone and in a batch."""
    if bed.device.type != "cuda" and bed.recorder is None:
        raise NotHere("graphs are CUDA's")
    for name in bed.methods:
        for rows in (1, 3):
            with Graphs(bed.recorder) as held:
                found = bed.steps(name, rows, mode=held)
                _all_repeated(name, held)
            near(found, bed.steps(name, rows), EXACT, f"{name}, {rows} rows")


def _all_repeated(name: str, held: Graphs) -> None:
    """Raises NotHeld unless every step, and nothing else, was repeated from a recording."""
    if held.others or held.steps != TOKENS - PROMPT:
        raise NotHeld(
            f"{name}: {held.steps} of {TOKENS - PROMPT} steps were repeated, {held.others} were not"
        )


def waits(bed: Bed) -> None:
    """Nothing waits for the device but, under masks, the one reading of counts a block."""
    if bed.device.type != "cuda":
        raise NotHere("a CPU waits for nobody")
    for name in bed.methods:
        bed.logits(name)
        with _no_waits(name):
            bed.logits(name)


@contextmanager
def _no_waits(name: str) -> Iterator[None]:
    """CUDA refuses to be waited for, but for events, by which counts are read."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as fault:
        raise NotHeld(f"{name}: {str(fault).splitlines()[0]}") from fault
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Tiny(Router):
    """A linear router; see ``dyndepth.fitting.routers.Router``."""

    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(layers, 2, size, generator=draw) * size**-0.5)
        self.bias = nn.Parameter(torch.full((layers, 2), 0.5))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits of both sublayers."""
        return hidden.float() @ self.weight[layer].T + self.bias[layer]


def training(bed: Bed) -> None:
    """Routers learn the same in their first steps as on the CPU."""
    curves = []
    windows = bed.tokens[:, :TOKENS].cpu().repeat(4, 1)
    schedule = Schedule(steps=4, batch=1, length=TOKENS, accumulate=2)
    tuning = Tuning(target_speedup=1.5)
    for device in ("cpu", str(bed.device)):
        model = bed.built(device)
        router = Tiny(*Decoder.of(model).shape).to(device)
        curves.append(tune_router(model, router, windows, tuning, schedule, progress=False))
    for one, other in zip(*curves, strict=True):
        for key in ("loss", "executed"):
            if not math.isclose(one[key], other[key], rel_tol=0.02, abs_tol=0.02):
                raise NotHeld(f"{key} is {other[key]:.4g}, and {one[key]:.4g} on the CPU")


CHECKS: dict[str, Callable[[Bed], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        same_as_cpu,
        sparse_equals_masked,
        half_precision,
        whole_is_exact,
        padding,
        cached_steps,
        graphs,
        waits,
        training,
    )
}


def run(device: str, say: Callable[[str], None] = print) -> dict[str, dict[str, Any]]:
    """Each check's outcome by name: ``status`` (held, failed, not here), ``why``, ``seconds``."""
    bed, found = Bed(device), {}
    for name, check in CHECKS.items():
        began, status, why = time.monotonic(), "held", ""
        try:
            check(bed)
        except NotHere as reason:
            status, why = "not here", str(reason)
        except Exception as fault:  # noqa: BLE001 - whatever fails is what is to be told
            status, why = "failed", f"{type(fault).__name__}: {str(fault).strip().splitlines()[0]}"
        found[name] = {"status": status, "why": why, "seconds": time.monotonic() - began}
        say(f"{name:24} {status} {why}".rstrip())
    return found
