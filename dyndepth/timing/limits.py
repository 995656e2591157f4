"""When gathering pays on this machine.

One block in the middle of the model runs on gathered tokens and with the dense kernel in turns, at
several executed shares and numbers of tokens. What is found is kept in the cache, and from then on
every ``attach`` of a model of that width and precision on that device goes by it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from dyndepth.models.blocks import Decoder
    from dyndepth.runtime.limits import Limits


SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
COUNTS = (8, 16, 32, 64, 128, 256)
MORE_COUNTS = (512, 1024)
"""Where the host runs ahead of the device, and short forwards measure the host."""


def measure_limits(
    model: Any, tokens: int, repeats: int, say: Callable[[str], None] = lambda line: None
) -> Limits:
    """The largest shares and the least number of tokens for which gathering is faster."""
    from dyndepth.runtime.execution import asks_early
    from dyndepth.runtime.limits import Limits

    shares = []
    for which in (0, 1):
        faster = [_faster(model, tokens, share, which, repeats, say) for share in SHARES]
        wins = len(list(takewhile(bool, faster)))  # a lucky win beyond a loss is none
        shares.append(SHARES[wins - 1] if wins else 0.0)
    counts = COUNTS + MORE_COUNTS * asks_early(next(model.parameters()).device)
    pays = [all(_faster(model, n, 0.5, which, repeats, say) for which in (0, 1)) for n in counts]
    least = next((n for k, n in enumerate(counts) if all(pays[k:])), max(counts) + 1)
    return Limits(attention=shares[0], mlp=shares[1], tokens=least)


def _faster(
    model: Any,
    tokens: int,
    share: float,
    sublayer: int,
    repeats: int,
    say: Callable[[str], None],
) -> bool:
    """Whether gathering ``share`` of ``tokens`` is faster than the dense kernel."""
    import torch

    from dyndepth.models.blocks import Decoder
    from dyndepth.models.selection import Selection
    from dyndepth.runtime.execution import asks_early
    from dyndepth.timing.pairing import interleave, ratio

    parts = Decoder.of(model)
    middle = len(parts.layers) // 2
    block = parts.blocks[middle]
    with torch.inference_mode():
        hidden, arguments = _entering(parts, middle, tokens)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
        mask = (order < round(share * tokens))[None].to(hidden.device)
        selection = Selection(mask, round(share * tokens), round(share * tokens))
        if sublayer == 0:

            def gathered() -> Tensor:
                fresh = Selection(mask, selection.count, selection.slots)
                if asks_early(hidden.device) and block.lays:
                    ahead = block.ahead(hidden, arguments)
                    update = block.attention_laid(ahead, fresh, arguments)
                else:
                    update = block.attention_selected(hidden, fresh, arguments)
                return hidden.flatten(0, 1).index_add(0, fresh.index, update)

            def whole() -> Tensor:
                return selection.put(hidden, hidden + block.attention_branch(hidden, arguments))
        else:

            def gathered() -> Tensor:
                fresh = Selection(mask, selection.count, selection.slots)
                flat = hidden.flatten(0, 1)
                update = block.mlp_branch(flat.index_select(0, fresh.index))
                return flat.index_add(0, fresh.index, update)

            def whole() -> Tensor:
                return selection.put(hidden, hidden + block.mlp_branch(hidden))

        times = interleave(
            {"whole": whole, "gathered": gathered},
            repeats=repeats,
            warmup=3,
            seed=0,
            device=hidden.device,
        )
    found = ratio(times["whole"], times["gathered"])
    say(
        f"{('attention', 'mlp')[sublayer]:9} {share:4.0%} of {tokens:4} tokens: gathering is "
        f"{found.median:.2f} times as fast [{found.low:.2f}, {found.high:.2f}]"
    )
    return found.median > 1.0


def _entering(parts: Decoder, index: int, tokens: int) -> tuple[Tensor, dict[str, Any]]:
    """What the block ``index`` is given in a forward of as many tokens, without a cache."""
    import torch

    from dyndepth.data.capacity import embeddings
    from dyndepth.runtime.patching import run_by

    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def run(number: int, stock: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if number == index:
            seen.append((hidden, arguments))
        return stock(hidden, **arguments)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings(parts.model), (1, tokens), generator=generator)
    with run_by(parts.blocks, run):
        device = next(parts.model.parameters()).device
        parts.owner(input_ids=ids.to(device), use_cache=False)
    return seen[0]
