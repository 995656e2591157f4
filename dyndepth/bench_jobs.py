"""What the bench times: a method, or the stock model, on a prefill or on decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dyndepth.memory import peak_bytes
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import cache_argument, cache_of
from dyndepth.runtime.attach import attach
from dyndepth.runtime.trace import Backend

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

    def rewind(self, state: Any) -> None:
        """Take the steps off the cache again."""
        state.crop(-STEPS)


class Job:
    """One method on one shape: set up outside the clock, run inside.

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
    ) -> None:
        self.model, self.method, self.shape = model, method, shape
        self.attached: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.flop_ideal = 1.0
        if method is not None:
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

    def peak(self) -> int | None:
        """Peak memory of one more run, in bytes; see ``dyndepth.memory.peak_bytes``."""
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
