"""What an attached model keeps with a Hugging Face cache: the method's memory, and where the prompt
ended.

Both belong to the sequences of the cache and not to the method, so that generations over different
caches never mix. A cache that keeps something of each sequence gets a class of its own, in which
that follows whatever is done to the sequences: beams, repeated and selected rows. Cropping leaves
it; a cache that holds no token keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dyndepth.common.culprits import definition
from dyndepth.common.errors import MethodFault, UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext
from dyndepth.runtime.flops import Forward
from dyndepth.runtime.trace import per_row, phase_of_tokens

_KEPT = "_dyndepth_kept"


@dataclass
class Kept:
    """What is kept with one cache.

    Attributes:
        prompt: how many tokens of the cache are prompt: columns, padding included, so that a
            forward's mask says what is real of them; where callers told other lengths, int64
            ``[sequences]``, without padding.
        memory: see ``ForwardContext``.
    """

    prompt: int | Tensor
    memory: dict[str, Tensor] = field(default_factory=dict)

    def real(self, mask: Tensor | None) -> int | Tensor:
        """Prompt tokens without padding; ``mask`` ``[batch, tokens]`` covers the cache or more."""
        if isinstance(self.prompt, Tensor) or mask is None:
            return self.prompt
        return mask[:, : self.prompt].sum(1)

    def begun(self, past: int, past_real: Tensor | None) -> Kept:
        """As a forward over ``past`` tokens finds it: what was cropped is no prompt any more."""
        if isinstance(self.prompt, Tensor):
            least = self.prompt.clamp_max(past if past_real is None else past_real)
            return Kept(least, dict(self.memory))
        return Kept(min(self.prompt, past), dict(self.memory))

    def map(self, change: Callable[[Tensor], Tensor]) -> Kept:
        """With ``change`` made to each tensor; self, which copies of a cache share, stays."""
        prompt = change(self.prompt) if isinstance(self.prompt, Tensor) else self.prompt
        return Kept(prompt, {name: change(each) for name, each in self.memory.items()})


def kept_with(past: Any) -> Kept | None:
    """What is kept with the cache ``past``, which may be None."""
    return getattr(past, _KEPT, None)


def keep(past: Any, kept: Kept) -> None:
    """Keep ``kept`` with the cache ``past``, through whatever is done to its sequences."""
    setattr(past, _KEPT, kept)
    if (kept.memory or isinstance(kept.prompt, Tensor)) and not hasattr(past, "_dyndepth_follows"):
        stock: Any = type(past)
        past.__class__ = _following(stock)


def end_prompt(
    kept: Kept,
    forward: Forward,
    context: ForwardContext,
    mask: Tensor | None,
    length: int | Tensor | None,
) -> None:
    """Say which tokens of a forward are prompt, and remember where it ends.

    ``mask`` ``[batch, tokens]`` covers the cache and the forward; ``length`` is a prompt length
    that the caller told.
    """
    if length is not None:
        forward.phase, forward.generation = phase_of_tokens(context, length)
    all_prompt = forward.phase == "prompt" and forward.generation is None
    if all_prompt and not isinstance(kept.prompt, Tensor) and kept.prompt == context.past_length:
        kept.prompt = forward.keys
        return
    if isinstance(length, Tensor):
        rows: Tensor = per_row(length, context.batch, "prompt lengths")
        kept.prompt = rows.to(context.device)
    elif length is not None:
        kept.prompt = length
        if mask is not None:
            kept.prompt = torch.full((context.batch,), length, device=context.device)
    if not all_prompt:
        context.prompt = partial(kept.real, mask)


def check(method: DynamicDepthMethod, memory: dict[str, Tensor], batch: int) -> None:
    """Raises MethodFault for memory that is not of the ``batch`` sequences of a forward."""
    for name, each in memory.items():
        known = isinstance(each, Tensor)
        if known and each.ndim and each.shape[0] == batch:
            continue
        kind = f"{each.dtype} {list(each.shape)}" if known else f"a {type(each).__name__}"
        raise MethodFault(
            f"{method.name}: what is kept in the context's memory must be tensors whose first "
            f"dimension is the sequences, here {batch}, not {kind} for {name!r} "
            f"({definition(type(method))})"
        )


def check_rows(kept: Kept, batch: int) -> None:
    """Raises UserError where a cache that keeps something is given to other sequences."""
    kept_of = [*kept.memory.values(), *([kept.prompt] if isinstance(kept.prompt, Tensor) else [])]
    for each in kept_of:
        if each.shape[0] != batch:
            raise UserError(
                f"the cache keeps the method's memory of {each.shape[0]} sequences, and the "
                f"forward has {batch}; repeat or select its rows by the cache's own "
                "batch_repeat_interleave, batch_select_indices or reorder_cache"
            )


def select(past: Any, rows: Tensor) -> None:
    """Have what is kept with ``past`` be that of the sequences ``rows`` (int64 ``[n]``)."""
    kept = kept_with(past)
    if kept is not None:
        setattr(past, _KEPT, kept.map(lambda each: each.index_select(0, rows.to(each.device))))


def join(past: Any, caches: Sequence[Any], widths: Sequence[int]) -> bool:
    """Have ``past``, a shallow copy of one of ``caches``, keep what all of them do, one after
    another. ``widths`` are their tokens, of which the widest is that of ``past``: the others are
    padded on the left. False where that is of different kinds, so that they cannot be one."""
    each = [kept_with(one) for one in caches]
    if all(kept is None for kept in each):
        return True
    ends = {
        None if kept is None or isinstance(kept.prompt, Tensor) else width - kept.prompt
        for kept, width in zip(each, widths, strict=True)
    }
    known = [kept for kept in each if kept is not None]
    kinds = [
        {name: (one.shape[1:], one.dtype, one.device) for name, one in kept.memory.items()}
        for kept in known
    ]
    if None in ends or len(ends) > 1 or any(kind != kinds[0] for kind in kinds):
        return False
    memory = {name: torch.cat([kept.memory[name] for kept in known]) for name in kinds[0]}
    keep(past, Kept(max(widths) - ends.pop(), memory))  # type: ignore[operator]
    return True


@cache
def _following(stock: Any) -> type:
    """A cache class in which what is kept follows the sequences."""

    class Following(stock):
        _dyndepth_follows = True

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            select(self, beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            select(self, indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            kept = kept_with(self)
            if kept is not None:
                setattr(self, _KEPT, kept.map(lambda each: each.repeat_interleave(repeats, 0)))

        def reset(self) -> None:
            super().reset()
            setattr(self, _KEPT, None)

    Following.__name__ = Following.__qualname__ = stock.__name__
    return Following
