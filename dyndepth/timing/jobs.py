"""What is timed in turns: a method, given gates or the stock model, on given shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dyndepth.common.modes import EAGER
from dyndepth.method import SUBLAYERS, DynamicDepthMethod, KVPolicy
from dyndepth.models.blocks import blocks
from dyndepth.models.caches import cache_argument, cache_of
from dyndepth.runtime.attach import attach
from dyndepth.runtime.graphs import Graphs
from dyndepth.runtime.trace import Backend
from dyndepth.timing.memory import peaks

STEPS = 12
"""Single-token steps of one timed decode."""


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

    def settle(self, model: Any, state: Any) -> None:
        """Nothing is kept."""

    def rewind(self, state: Any) -> None:
        """Nothing is kept."""


@dataclass
class Decode:
    """``STEPS`` single-token steps over a cache of ``length`` tokens."""

    tokens: Tensor
    length: int

    @property
    def gate_shape(self) -> tuple[int, int]:
        """Tokens that need a gate: batch and width of the prefill."""
        return self.tokens.shape[0], self.length

    def prefill(self, model: Any) -> Any:
        """The cache that the steps extend."""
        prompt = self.tokens[:, : self.length].to(model.device)
        return cache_of(model(prompt, logits_to_keep=1, use_cache=True))

    def run(self, model: Any, state: Any) -> None:
        """The timed steps."""
        keyword = cache_argument(model)
        for step in range(self.length, self.length + STEPS):
            token = self.tokens[:, step : step + 1].to(model.device)
            model(token, **{keyword: state}, use_cache=True)

    def settle(self, model: Any, state: Any) -> None:
        """One step that leaves no trace: where steps are recorded, the cache gets its place."""
        model(self.tokens[:, :1].to(model.device), **{cache_argument(model): state}, use_cache=True)
        state.crop(-1)

    def rewind(self, state: Any) -> None:
        """Take the steps off the cache again."""
        state.crop(-STEPS)


class Job:
    """One method on one shape: set up outside the clock, run inside.

    With ``graphs`` decode steps are repeated from recordings, those of the stock model, too.

    Attributes:
        flop_ideal: dense FLOPs / executed FLOPs of what is timed.
        bytes_read: of the weights that are touched, each time that they are.
    """

    def __init__(
        self,
        model: Any,
        method: DynamicDepthMethod | None,
        shape: Prefill | Decode,
        backend: Backend = "sparse",
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.shape, self._graphs = model, shape, graphs
        if method is None and graphs is not None:
            method = whole(model)
        self.method = method
        self.flop_ideal = 1.0
        eager: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.attached = eager
        if method is not None:
            own = method
            eager = lambda: attach(model, own, backend=backend, warn=False)  # noqa: E731
            self.attached = lambda: attach(
                model, own, backend=backend, mode=graphs or EAGER, warn=False
            )
        with eager() as trace:
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
            if self._graphs is not None:
                self.shape.settle(self.model, self.state)
            yield
        self.shape.rewind(self.state)

    def run(self) -> None:
        """What is timed."""
        self.shape.run(self.model, self.state)

    def peak(self) -> int | None:
        """Peak memory of one more run, in bytes; see ``dyndepth.timing.jobs.peak_bytes``. None by
        graphs, whose memory lies ready."""
        if self._graphs is not None:
            return None
        with self.attached():
            return peak_bytes(
                lambda state: self.shape.run(self.model, state),
                self.model.device,
                prepare=lambda: self.shape.prefill(self.model),
            )


@contextmanager
def _weights_read(model: nn.Module) -> Iterator[list[int]]:
    """Collects the bytes of every linear map's weight, each time that it is applied."""
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


def method(work: str, model: Any, batch: int, width: int) -> DynamicDepthMethod:
    """Gates of one kind of work for ``[batch, width]`` tokens at a time."""
    layers = len(blocks(model))
    if work == "all_execute":
        return whole(model)
    if work.startswith("static_"):
        dropped = round(int(work.removeprefix("static_")) / 30 * layers)
        plan = torch.ones(layers, 2, dtype=torch.bool)
        plan[torch.linspace(1, layers - 2, dropped).round().long()] = False
        return given(plan)
    generator = torch.Generator().manual_seed(0)
    if work == "early_exit_half":
        depth = torch.randint(1, layers, (batch, width), generator=generator)
        executed = torch.arange(layers)[:, None, None] < depth
        return given(torch.stack([executed, executed], dim=1))
    rate = 0.75 if work == "mask_75" else 0.5
    masks = torch.rand(layers, 2, batch, width, generator=generator) < rate
    if work in ("mask_50_blocks", "mask_50_evicted"):
        masks[:, 1] = masks[:, 0]
        return given(masks, kv="evict" if work == "mask_50_evicted" else "project")
    if work.startswith("mask_50_"):
        masks[:, 1 - SUBLAYERS.index(work.removeprefix("mask_50_"))] = True
    return given(masks)


def whole(model: Any) -> DynamicDepthMethod:
    """Executes everything: dense where dense has to be attached."""
    return given(torch.ones(len(blocks(model)), 2, dtype=torch.bool))


def given(
    decided: Tensor,
    skipping: Literal["both", "generation"] = "both",
    routers: Sequence[nn.Module] | None = None,
    kv: KVPolicy = "project",
) -> DynamicDepthMethod:
    """A method that answers with a plan ``[layers, 2]`` or masks ``[layers, 2, batch, width]``, of
    the policy ``kv``.

    A decode step takes the next column of masks drawn for all steps at once. ``routers``, one a
    block, are run on the hidden states at its entry and billed; what they say changes nothing.
    """
    plan = decided.ndim == 2
    shared = bool((decided[:, 0] == decided[:, 1]).all())

    placed: dict[Any, Tensor] = {}

    class Given(DynamicDepthMethod):
        name = "given"
        granularity = "static" if plan else "token"
        paper = "bench"
        phases = skipping
        capturable = True

        @property
        def kv_policy(self) -> KVPolicy:
            return super().kv_policy if plan else kv

        def start(self, context: Any) -> Tensor | None:
            self.context = context
            if plan:
                return decided
            if context.device not in placed:
                placed[context.device] = decided.to(context.device)
                placed[context.device, 1] = placed[context.device][..., :1].clone()
            chosen = placed[context.device][..., : context.tokens]
            if context.tokens == 1:
                # Where it stays: a recording reads it there.
                column = context.past_length % decided.shape[3]
                chosen = placed[context.device, 1]
                chosen.copy_(placed[context.device][..., column : column + 1])
            self.masks = [(pair[0], pair[0] if shared else pair[1]) for pair in chosen.unbind(0)]
            return None

        def gates(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            if routers is not None:
                routers[layer](hidden)
                weights = sum(each.numel() for each in routers[layer].parameters() if each.ndim > 1)
                self.context.bill("router", 2.0 * weights, None)
            return self.masks[layer]

    return Given()


def peak_bytes(
    function: Callable[[Any], Any],
    device: str | torch.device = "cpu",
    prepare: Callable[[], Any] = lambda: None,
) -> int | None:
    """Bytes that torch's allocator held at most during ``function(prepare())``, beyond those that
    it held when ``prepare`` was done.

    So weights, and a cache that ``prepare`` fills, do not count; how, ``memory.peaks`` says. On a
    device that is neither CUDA nor a CPU nothing is measured, or run: None.
    """
    state: list[Any] = []
    found = peaks(
        {"it": lambda: function(state[0])},
        [torch.device(device)],
        lambda: state.append(prepare()),
    )
    return found["it"].above if found else None
