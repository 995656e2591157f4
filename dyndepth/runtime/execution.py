"""What an attached model does: each block under the method's gates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from dyndepth.common.culprits import definition
from dyndepth.common.errors import MethodFault, UserError
from dyndepth.method import DynamicDepthMethod, ForwardContext, Gate
from dyndepth.models.blocks import Decoder
from dyndepth.models.caches import cache_argument, cache_in, cache_of
from dyndepth.models.rotary import forget
from dyndepth.runtime.evicting_layer import evicts
from dyndepth.runtime.eviction import Eviction
from dyndepth.runtime.flops import Bill, BlockCosts, Forward, Ledger
from dyndepth.runtime.foresight import Foresight
from dyndepth.runtime.gates import Settler, pair
from dyndepth.runtime.idle import Idle
from dyndepth.runtime.limits import Limits
from dyndepth.runtime.memory import Kept, check, check_rows, end_prompt, keep, kept_with
from dyndepth.runtime.patching import Stock, places
from dyndepth.runtime.sublayers import Executor, Weights
from dyndepth.runtime.trace import Backend, Trace, per_row
from dyndepth.runtime.updates import Updates, Updating


@dataclass
class _Pass:
    """A forward of the decoder that is under way, in one thread.

    ``given`` is set while a block runs under gradient checkpointing: its place, and the gates and
    factors that were decided before. ``weights`` are those of each attention where they were asked
    for, with ``handles`` of the hooks that see them; ``as_tuple`` says that the caller wants a
    plain tuple.
    """

    thread: int
    forward: Any = None
    settler: Any = None
    cache: Any = None
    kept: Any = None
    overruled: bool = False
    plan: list[tuple[Gate, Gate]] | None = None
    given: tuple[int, tuple[Gate, Gate], Weights | None] | None = None
    weights: list[Tensor | None] | None = None
    handles: list[RemovableHandle] = field(default_factory=list)
    as_tuple: bool = False


class Runtime:
    """One method attached to one model."""

    def __init__(
        self,
        parts: Decoder,
        method: DynamicDepthMethod,
        backend: Backend,
        limits: Limits,
        count: bool = True,
    ) -> None:
        self.blocks = parts.blocks
        self.method = method
        self.limits = limits
        self.masked = backend == "masked"
        self.count = count
        self.project = method.kv_policy == "project"
        self.config = parts.config
        self.early = asks_early(next(parts.model.parameters()).device)
        self.evict = Eviction(limits, self.masked) if method.kv_policy == "evict" else None
        self.updates = Updates(method)
        how = self.blocks, limits, self.masked, self.project, self.evict, self.early
        self.execute = Executor(*how)
        if self.updates.substitutes or self.updates.weighs:
            self.execute = Updating(*how, self.updates)
        self.norm: nn.Module = parts.norm
        self.head: nn.Module = parts.head
        self.ledger = Ledger(BlockCosts.of_parts(parts))
        self.readout = parts.readout
        self.trace = Trace(self.ledger if count else None, self.readout)
        self.owner: nn.Module = parts.owner
        self.layers = set(map(id, parts.layers))
        self.list_name = parts.record.layers
        self.repeated = {each[0]: each for each in places(self.blocks).values() if len(each) > 1}
        self.passes: list[_Pass] = []
        self.warned = False
        self.idle = Idle(method) if count else None
        self.foresight = Foresight(parts, self.block) if method.foresees else None
        self.run = self.block if self.foresight is None else self.foresight.block

    def __deepcopy__(self, memo: Any) -> Runtime:
        """Itself: a copy of the model has its hooks, which do nothing there."""
        return self

    def __reduce__(self) -> Any:
        raise UserError(
            "a model cannot be pickled while a method is attached; leave that attach first, or "
            "save its state_dict"
        )

    # --- the start and the end of a forward -----------------------------------------------------

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around a call of the decoder: the forward that began in it is over with it."""
        before = len(self.passes)
        try:
            yield
        finally:
            while len(self.passes) > before and self.passes[-1].thread == get_ident():
                for handle in self.passes.pop().handles:
                    handle.remove()

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the decoder: learn the shapes, ask the method for a plan.

        Returns the decoder's arguments where they had to be changed. Raises UserError if a forward
        of another thread is under way, or if the model has more blocks than when it was attached
        to.
        """
        if module is not self.owner:
            return None
        now = _Pass(get_ident())
        if self.passes and self.passes[-1].thread != now.thread:
            raise UserError(
                "another thread is in a forward of this model; while a method is attached it runs "
                "one forward at a time"
            )
        self.passes.append(now)
        self._check_blocks()
        forget(module)
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        batch, width = inputs.shape[:2]
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and (mask.ndim != 2 or bool(mask.all())):
            mask = None
        if self.foresight is not None and cache is None and self.asked(kwargs, "use_cache"):
            # The decoder would make it later than it is needed.
            cache = DynamicCache(config=self.config)
            kwargs = kwargs | {cache_argument(module): cache}
        valid = None if mask is None else mask[:, -width:].bool()
        now.forward = forward = Forward(
            documents=per_row(self.trace.documents, batch, "document ids"),
            phase="prompt" if past == 0 else "generation",
            batch=batch,
            width=width,
            keys=past + width,
            valid=valid if valid is None or not bool(valid.all()) else None,
            generation=None,
            context=None if mask is None else mask.sum(1),
            project=self.project,
            cached=False,  # until a block is seen to get one
            masked=self.masked,
            attended=None if mask is None or self.evict is None else mask.bool(),
        )
        self.trace.opened(forward)
        if self.foresight is not None:
            self.foresight.begin(forward, args, kwargs, cache)
        past_real = None if mask is None else mask[:, :-width].sum(1)
        kept = kept_with(cache) if past else None
        if kept is not None:
            check_rows(kept, batch)
        # What was there before anything was attached is prompt.
        now.cache = cache
        now.kept = Kept(past) if kept is None else kept.begun(past, past_real)
        context = ForwardContext(
            layers=len(self.blocks),
            batch=batch,
            tokens=width,
            past_length=past,
            device=inputs.device,
            phase="prompt",
            valid=forward.valid,
            generation=None,
            documents=forward.documents,
            head=lambda hidden: self.readout(self.norm(hidden)),
            bill=partial(_bill, forward, "draft" if self.method.speculates else None),
            readout_flops=float(self.ledger.costs.lm_head),
            past_real=past_real,
            foresight=self.foresight,
            memory=now.kept.memory,
        )
        end_prompt(now.kept, forward, context, mask, self.trace.prompt_length)
        context.phase = "mixed" if forward.generation is not None else forward.phase
        context.generation = forward.generation
        least = self.limits.tokens if self.early else 0
        now.settler = Settler(self.method, forward, self.masked, inputs.device, least)
        now.plan = self._plan(context, now)
        if self.foresight is not None:
            plan = now.plan or []
            full = now.overruled or bool(plan) and all(a is True and m is True for a, m in plan)
            self.foresight.end(full)
        if self.asked(kwargs, "output_attentions"):
            now.as_tuple = not self.asked(kwargs, "return_dict")
            kwargs = kwargs | {"return_dict": True}
            self._watch(now)
        return args, kwargs

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the decoder, which came to its end: count what ran.

        A forward inside a backward pass is one computed again, which was counted before. Returns
        the decoder's output where attentions were asked for: one entry a block, None where no
        attention was called.
        """
        if module is not self.owner or not self.passes or self.passes[-1].thread != get_ident():
            return None
        now = self.passes[-1]
        if now.kept.memory:
            check(self.method, now.kept.memory, now.forward.batch)
        cache = cache_in(output) if now.cache is None else now.cache
        if cache is not None:
            keep(cache, now.kept)
        if self.count and not _in_backward():
            self.ledger.add(now.forward)
            if self.idle is not None and not self.idle.skipped:
                self.idle.see(now.forward)
        if now.weights is None:
            return None
        output["attentions"] = tuple(now.weights)
        return output.to_tuple() if now.as_tuple else output

    def asked(self, kwargs: dict[str, Any], name: str) -> bool:
        """An argument of the decoder, whose default is in the configuration."""
        value = kwargs.get(name)
        return bool(getattr(self.config, name, False) if value is None else value)

    def _check_blocks(self) -> None:
        held: Any = getattr(self.owner, self.list_name)
        for index, layer in enumerate(islice(held, self.config.num_hidden_layers)):
            if id(layer) not in self.layers:
                raise UserError(
                    f"block {index} was not in the model when the method was attached, so that it "
                    "would run uncounted; leave that attach and attach again"
                )

    def _watch(self, now: _Pass) -> None:
        """Keep the weights of each attention that is called in this forward."""
        weights: list[Tensor | None] = [None] * len(self.blocks)
        now.weights = weights
        calls = now.forward.calls

        def seen(module: nn.Module, args: Any, output: Any) -> None:
            weights[calls[-1][0]] = output[1]

        modules = {id(block.attention): block.attention for block in self.blocks}
        now.handles = [each.register_forward_hook(seen) for each in modules.values()]

    def _plan(self, context: ForwardContext, now: _Pass) -> list[tuple[Gate, Gate]] | None:
        """The gates of all blocks if they are known before the forward, else None."""
        full: list[tuple[Gate, Gate]] = [(True, True)] * context.layers
        now.overruled = self.method.phases == "generation" and context.phase == "prompt"
        unasked = now.overruled and not self.method.reads_prompt
        if self.method.speculates and not self.trace.drafting:
            now.overruled = True
            unasked = not (self.method.reads_prompt and context.phase != "generation")
        if unasked:
            return full
        plan = self.method.start(context)
        if plan is None:
            return None
        rows = (context.batch, context.layers, 2)
        known = isinstance(plan, Tensor)
        if not known or plan.dtype != torch.bool or tuple(plan.shape) not in (rows, rows[1:]):
            kind = f"{plan.dtype} {list(plan.shape)}" if known else f"a {type(plan).__name__}"
            raise MethodFault(
                f"{self.method.name}: a plan must be bool [layers, 2] or [batch, layers, 2], here "
                f"{list(rows[1:])} or {list(rows)}, not {kind} ({definition(self.method.start)})"
            )
        if now.overruled:
            return full
        if plan.ndim == 3 and bool((plan == plan[:1]).all()):
            plan = plan[0]
        if plan.ndim == 2:
            return [(attention, mlp) for attention, mlp in plan.tolist()]
        rows_of = now.settler.rows
        return [
            (rows_of(attention), rows_of(mlp)) for attention, mlp in plan.cpu().permute(1, 2, 0)
        ]

    def bill_head(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Forward hook of the LM head: bills calls with states of the last forward's batch.

        Those are ``[batch, n, hidden]``, as the causal LM makes them, or rows of all its tokens.
        Whose other rows are is not known: they are counted, for nobody. Readouts bill themselves.
        """
        last = self.ledger.last
        if module is not self.head or last is None or _in_backward():
            return
        hidden = args[0] if args else kwargs["input"]
        rows = hidden.shape[:-1].numel()
        if hidden.ndim == 3 and hidden.shape[0] == last.batch:
            last.heads.append((hidden.shape[1], rows))
        elif not self.passes and not self.trace.reading:
            last.heads.append((last.width if rows == last.batch * last.width else 0, rows))

    # --- one block ------------------------------------------------------------------------------

    def block(self, index: int, stock: Stock, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The forward of one block: the stock one where everything runs."""
        if not self.passes:
            self._outside(index)
            return stock(hidden, **arguments)
        now = self.passes[-1]
        index, asked, weights = now.given or self._ask(now, index, hidden)
        forward: Forward = now.forward
        open_ = asked[0] is True and asked[1] is True and weights is None
        if open_ and not self._lacks(index, arguments):
            forward.calls.append((index, True, True))
            return stock(hidden, **arguments)
        settling, block = now.settler(asked, hidden), self.blocks[index]
        ahead = None
        waits = self.early and settling.waiting and self.evict is None
        if waits and not isinstance(asked[0], bool) and block.lays:
            # Whatever the answer is, this has to be done: the wait for it hides behind.
            ahead = block.ahead(hidden, arguments)
            forward.laid.add(len(forward.calls))
        gates = settling.read()
        # Uncounted, it is a call like any other: what was decided need not be known.
        decided = now.settler.decided(gates) if self.count else (True, True)
        forward.calls.append((index, *decided))
        full = gates[0] is True and gates[1] is True and ahead is None and weights is None
        if full and not self._lacks(index, arguments):
            return stock(hidden, **arguments)
        if arguments.get(block.cache_argument) is not None:
            forward.cached = True
        dropped = gates[0] is False and not isinstance(asked[0], bool)
        if dropped and not self.project and self.evict is None:
            # Nobody here, but a sequence that is all padding now may run it later: it stays in the
            # cache, whose tokens must stand in line.
            forward.kept.add(len(forward.calls) - 1)
        return self.execute(forward, index, hidden, gates, arguments, ahead, weights)

    def _lacks(self, index: int, arguments: dict[str, Any]) -> bool:
        """Whether tokens in the cache are invisible to a block, so that it is not the stock one."""
        if self.evict is None:
            return False
        block = self.blocks[index]
        return evicts(arguments.get(block.cache_argument), block.index)

    def _ask(
        self, now: _Pass, index: int, hidden: Tensor
    ) -> tuple[int, tuple[Gate, Gate], Weights | None]:
        """A block's place, its gates and factors; one that stands in several has them in turn."""
        if index in self.repeated:
            each = self.repeated[index]
            before = sum(layer in each for layer, _, _ in now.forward.calls)
            index = each[min(before, len(each) - 1)]
        if now.plan is None:
            gates = self.method.gates(index, hidden)
            if not isinstance(gates, tuple):
                # A list, say, or a tensor of both, whose rows are gates.
                gates = pair(self.method, gates)
            if now.overruled:
                return index, (True, True), None
        else:
            gates = now.plan[index]
        if not self.updates.weighs or now.overruled:
            return index, gates, None
        return index, gates, self.updates.weights(now.forward, index, gates, hidden)

    def checkpointed(self, index: int, checkpoint: Any, function: Any, *inputs: Any) -> Any:
        """One block under gradient checkpointing: ``checkpoint(function, *inputs)``.

        The method is asked once, outside of what is computed again, and so is the ledger told:
        what is computed again goes to a forward that nobody counts. Gates and factors are handed
        over as inputs, so that they get their gradient either way of checkpointing. What the method
        has in place of skipped updates is computed again as they are.
        """
        if not self.passes:
            return checkpoint(function, *inputs)
        now = self.passes[-1]
        hidden = inputs[0] if inputs else function.keywords["hidden_states"]
        index, gates, weights = self._ask(now, index, hidden)
        tensors = [each for each in (*gates, *(weights or ())) if isinstance(each, Tensor)]
        counted = [now.forward]

        def run(*given: Any) -> Any:
            rest = iter(given[len(inputs) :])
            decided: Any = [
                both and tuple(next(rest) if isinstance(each, Tensor) else each for each in both)
                for both in (gates, weights)
            ]
            forward = counted.pop() if counted else now.forward.again()
            self.passes.append(replace(now, forward=forward, given=(index, *decided)))
            try:
                return function(*given[: len(inputs)])
            finally:
                self.passes.pop()

        return checkpoint(run, *inputs, *tensors)

    def _outside(self, index: int) -> None:
        """A block is called outside of any forward of the decoder."""
        if _in_backward():
            raise UserError(
                f"block {index} is computed again in a backward pass, by a checkpoint that does "
                "not hold its gates; use the model's own gradient_checkpointing_enable()"
            )
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"block {index} was called outside of a forward of {type(self.owner).__name__}, in "
                "which the method decides: such calls run in full and are not counted",
                stacklevel=2,
            )


def asks_early(device: torch.device) -> bool:
    """Whether the host runs ahead of ``device``, so that what it asks is best read late, and shapes
    that vary are best kept from kernels."""
    return device.type != "cpu"


def _in_backward() -> bool:
    """Whether this thread is in a backward pass, which computes a checkpointed forward again."""
    return torch._C._current_graph_task_id() != -1


def _bill(forward: Forward, own: str | None, cause: str, each: float, tokens: Any) -> None:
    """A method bills, one that drafts as its ``own`` cause whatever it computes, in a prompt, too.
    What a backward pass computes again was billed before."""
    if not _in_backward():
        forward.bills.append(Bill(own or cause, each, tokens))
