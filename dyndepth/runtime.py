"""Attaches a method to a Hugging Face model and executes its gates.

``attach`` swaps the class of every decoder block for a subclass whose ``forward`` consults the
runtime, and restores it on exit. The backend ``sparse`` computes only what the gates say; the
backend ``masked`` computes everything and multiplies, which is what training needs and the
yardstick that ``sparse`` must equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from dyndepth.blocks import (
    Block,
    blocks,
    cache_argument,
    cache_of,
    causal_lm,
    decoder,
    final_norm,
    readout,
)
from dyndepth.cache import skip_tokens
from dyndepth.errors import UserError
from dyndepth.flops import Bill, BlockCosts, Forward, Ledger
from dyndepth.foresight import Foresight
from dyndepth.gathering import Limits, limits_of
from dyndepth.method import ATTENTION, MLP, DynamicDepthMethod, ForwardContext, Gate, Phase
from dyndepth.patching import Stock, run_by
from dyndepth.selection import Selection
from dyndepth.settling import Settled, Settler

Backend = Literal["sparse", "masked"]
_MARK = "_dyndepth_runtime"


class Trace:
    """What an attached model executed, and what the caller says about its inputs.

    Attributes:
        documents: one id a sequence of the next forwards, for FLOPs by document and for methods
            that are deterministic by document. A batch that is a multiple (beams, several returned
            sequences) repeats each id.
        prompt_length: tokens of each sequence that belong to the prompt phase, an int or int64
            ``[batch]``. None: a forward without a past is prompt, one that extends a cache is
            generation.
    """

    def __init__(self, ledger: Ledger, head: Callable[[Tensor], Tensor]) -> None:
        self.documents: Sequence[str] | None = None
        self.prompt_length: int | Tensor | None = None
        self._ledger = ledger
        self._head = head
        self.reset = ledger.reset
        self.totals = ledger.totals
        self.by_document = ledger.by_document
        self.bill_last = ledger.bill_last

    @property
    def flops(self) -> dict[str, float]:
        """Useful FLOPs by cause, and ``padding`` beside them."""
        return self._ledger.totals()["by_cause"]

    def executed(self, phase: str | None = None) -> Tensor:
        """Executed fraction of tokens, float64 ``[layers, 2]`` (attention, mlp)."""
        return self._ledger.executed(phase)

    def gates(self) -> Tensor:
        """What the last forward executed: bool ``[batch, tokens, layers, 2]``, False on padding.

        Reading any count of this trace closes the forward; ask for its gates before. Raises
        RuntimeError if there is none.
        """
        last = self._ledger.last
        if last is None:
            raise RuntimeError("gates needs a forward through the attached model before it")
        return last.executed()

    def readout(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of chosen positions of the last forward's final hidden state.

        ``hidden`` is ``[n, hidden]``, already through the final norm; ``rows`` int64 ``[n]`` names
        each position's sequence, which the cost is billed to. Returns ``[n, vocabulary]``.
        """
        last = self._ledger.last
        if last is None:
            raise RuntimeError("readout needs a forward through the attached model before it")
        counts = torch.bincount(rows, minlength=last.batch)
        last.heads.append((counts, hidden.shape[0]))
        return self._head(hidden)


def attached(model: nn.Module) -> bool:
    """Whether a method is attached to ``model`` now."""
    return hasattr(decoder(model), _MARK)


@contextmanager
def attach(
    model: nn.Module,
    method: DynamicDepthMethod,
    *,
    backend: Backend = "sparse",
    documents: Sequence[str] | None = None,
    prompt_length: int | Tensor | None = None,
    limits: Limits | None = None,
) -> Iterator[Trace]:
    """Run ``model`` under ``method`` inside the ``with`` block; yields the Trace.

    Everything that the model can do works as before: ``model(...)``, ``model.generate(...)``, with
    and without a cache, padding on either side. ``limits`` says when selected tokens are gathered
    and when the dense kernel runs instead, with the same result; by default the measured rule of
    ``dyndepth.gathering``. On exit, also by an exception, the model is restored. Raises UserError
    for an unsupported architecture, a model that already has a method attached, or one whose blocks
    are wrapped by somebody else.
    """
    if backend not in ("sparse", "masked"):
        raise UserError(f"backend must be 'sparse' or 'masked', not {backend!r}")
    if method.foresees and not method.uses_labels:
        raise TypeError(f"{method.name} foresees but does not say that it uses labels")
    if hasattr(model, "_orig_mod"):
        raise UserError("a torch.compile'd model cannot be attached to; pass the original module")
    owner = decoder(model)
    if attached(model):
        raise UserError("the model already has a method attached; leave that attach first")
    split = blocks(model)
    runtime = _Runtime(model, split, method, backend, limits or limits_of(model))
    runtime.trace.documents, runtime.trace.prompt_length = documents, prompt_length
    handles = [
        owner.register_forward_pre_hook(runtime.begin, with_kwargs=True),
        runtime.head.register_forward_hook(runtime.bill_head),
    ]
    setattr(owner, _MARK, runtime)
    try:
        with run_by(split, runtime.run):
            yield runtime.trace
    finally:
        for handle in handles:
            handle.remove()
        delattr(owner, _MARK)


class _Runtime:
    """One method attached to one model."""

    def __init__(
        self,
        model: nn.Module,
        split: list[Block],
        method: DynamicDepthMethod,
        backend: Backend,
        limits: Limits,
    ) -> None:
        self.blocks = split
        self.method = method
        self.limits = limits
        self.masked = backend == "masked"
        self.project = method.kv_policy == "project"
        self.config = causal_lm(model).config
        self.norm: nn.Module = final_norm(model)
        self.head: nn.Module = causal_lm(model).get_output_embeddings()
        self.ledger = Ledger(BlockCosts.of(model))
        self.readout = readout(model)
        self.trace = Trace(self.ledger, self.readout)
        self.forward: Forward
        self.plan: list[tuple[Gate, Gate]] | None = None
        self.settler: Settler
        self.foresight = Foresight(model, self.block) if method.foresees else None
        self.run = self.block if self.foresight is None else self.foresight.block

    # --- the start of a forward -----------------------------------------------------------------

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the decoder: learn the shapes, ask the method for a plan.

        Returns the decoder's arguments where a method with foresight had a cache added to them.
        """
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        batch, width = inputs.shape[:2]
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and (mask.ndim != 2 or bool(mask.all())):
            mask = None
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", False)
        if self.foresight is not None and cache is None and use_cache:
            # The decoder would make it later than it is needed.
            cache = DynamicCache(config=self.config)
            kwargs = kwargs | {cache_argument(module): cache}
        valid = None if mask is None else mask[:, -width:].bool()
        self.forward = forward = Forward(
            documents=_per_row(self.trace.documents, batch, "document ids"),
            phase="prompt" if past == 0 else "generation",
            batch=batch,
            width=width,
            keys=past + width,
            valid=valid if valid is None or not bool(valid.all()) else None,
            generation=None,
            context=None if mask is None else mask.sum(1),
            project=self.project,
            cached=cache is not None or bool(use_cache),
            masked=self.masked,
        )
        self.ledger.add(forward)
        if self.foresight is not None:
            self.foresight.begin(forward, args, kwargs, cache)
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
            bill=self._bill,
            readout_flops=float(self.ledger.costs.lm_head),
            past_real=None if mask is None else mask[:, :-width].sum(1),
            foresight=self.foresight,
        )
        if self.trace.prompt_length is not None:
            length = self.trace.prompt_length
            forward.phase, forward.generation = _phase_of_tokens(context, length)
        context.phase = "mixed" if forward.generation is not None else forward.phase
        context.generation = forward.generation
        self.settler = Settler(self.method, forward, self.masked, inputs.device)
        self.plan = self._plan(context)
        if self.foresight is None:
            return None
        full = self.plan is not None and all(a is True and m is True for a, m in self.plan)
        self.foresight.end(full)
        return args, kwargs

    def _plan(self, context: ForwardContext) -> list[tuple[Gate, Gate]] | None:
        """The gates of all blocks if they are known before the forward, else None."""
        full: list[tuple[Gate, Gate]] = [(True, True)] * context.layers
        if self.method.phases == "generation" and context.phase == "prompt":
            return full
        plan = self.method.start(context)
        if plan is None:
            return None
        rows = (context.batch, context.layers, 2)
        if plan.dtype != torch.bool or tuple(plan.shape) not in (rows, rows[1:]):
            raise TypeError(
                f"{self.method.name}: a plan must be bool [layers, 2] or [batch, layers, 2], here "
                f"{list(rows[1:])} or {list(rows)}, not {plan.dtype} {list(plan.shape)}"
            )
        if plan.ndim == 3 and bool((plan == plan[:1]).all()):
            plan = plan[0]
        if plan.ndim == 2:
            return [(attention, mlp) for attention, mlp in plan.tolist()]
        rows_of = self.settler.rows
        return [
            (rows_of(attention), rows_of(mlp)) for attention, mlp in plan.cpu().permute(1, 2, 0)
        ]

    def _bill(self, cause: str, flops_per_token: float, tokens: Tensor | None) -> None:
        self.forward.bills.append(Bill(cause, flops_per_token, tokens))

    def bill_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the LM head: bills calls made by the causal LM itself."""
        (hidden,) = args
        if hidden.ndim == 3 and hidden.shape[0] == self.forward.batch:
            self.forward.heads.append((hidden.shape[1], hidden.shape[0] * hidden.shape[1]))

    # --- one block ------------------------------------------------------------------------------

    def block(self, index: int, stock: Stock, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The forward of one block: the stock one where everything runs."""
        asked = self.method.gates(index, hidden) if self.plan is None else self.plan[index]
        if asked[0] is True and asked[1] is True:
            self.forward.gates.append((True, True))
            return stock(hidden, **arguments)
        gates = self.settler(asked, hidden)
        self.forward.gates.append(self.settler.decided(gates))
        if gates[0] is True and gates[1] is True:
            return stock(hidden, **arguments)
        if gates[0] is False and not isinstance(asked[0], bool) and not self.project:
            # Nobody here, but a sequence that is all padding now may run it later: it stays in the
            # cache, whose tokens must stand in line.
            self.forward.kept.add(index)
        return self.execute(index, hidden, gates, arguments)

    def execute(
        self, index: int, hidden: Tensor, gates: tuple[Settled, Settled], arguments: dict[str, Any]
    ) -> Tensor:
        """One block whose gates are not both True."""
        block, entered = self.blocks[index], hidden
        attention, mlp = gates
        if isinstance(attention, Selection):
            hidden = self._attend(block, index, hidden, attention, arguments)
        elif attention is True or self.masked:
            hidden = hidden + _multiplied(block.attention_branch(hidden, arguments), attention)
        else:
            self._skip_attention(block, index, hidden, arguments)
        source = entered if block.parallel else hidden
        if isinstance(mlp, Selection):
            return self._feed(block, index, source, hidden, mlp, owned=hidden is not entered)
        if mlp is True or self.masked:
            return hidden + _multiplied(block.mlp_branch(source), mlp)
        return hidden

    def _skip_attention(
        self, block: Block, index: int, hidden: Tensor, arguments: dict[str, Any]
    ) -> None:
        """What a wholly skipped attention still owes to the cache."""
        cache = arguments.get(block.cache_argument)
        if cache is None:
            return
        if self.project or index in self.forward.kept:
            block.keep(hidden, arguments)
        else:
            skip_tokens(cache, block.index, hidden.shape[1])

    def _attend(
        self,
        block: Block,
        index: int,
        hidden: Tensor,
        selection: Selection,
        arguments: dict[str, Any],
    ) -> Tensor:
        """The attention branch, added for the selected tokens."""
        if not (block.gathers and self.limits.gather(ATTENTION, selection)):
            self.forward.whole.add((index, ATTENTION))
            return selection.put(hidden, hidden + block.attention_branch(hidden, arguments))
        update = block.attention_selected(hidden, selection, arguments)
        flat = hidden.flatten(0, 1)
        return flat.index_add(0, selection.index, update.to(flat.dtype)).view_as(hidden)

    def _feed(
        self,
        block: Block,
        index: int,
        source: Tensor,
        hidden: Tensor,
        selection: Selection,
        *,
        owned: bool,
    ) -> Tensor:
        """The MLP branch of ``source``, added to ``hidden`` for the selected tokens.

        ``owned`` says that ``hidden`` was made in this block, so that it may be written to.
        """
        if not self.limits.gather(MLP, selection):
            self.forward.whole.add((index, MLP))
            return selection.put(hidden, hidden + block.mlp_branch(source))
        update = block.mlp_branch(source.flatten(0, 1).index_select(0, selection.index))
        flat = hidden.flatten(0, 1)
        add = flat.index_add_ if owned else flat.index_add
        return add(0, selection.index, update.to(flat.dtype)).view_as(hidden)


def _phase_of_tokens(context: ForwardContext, length: int | Tensor) -> tuple[Phase, Tensor | None]:
    """Phase of a forward under an explicit prompt length, and the mask if it holds both."""
    if isinstance(length, Tensor):
        rows: Tensor = _per_row(length, context.batch, "prompt lengths")
        length = rows.to(context.device)[:, None]
    generation = context.positions >= length
    seen = generation if context.valid is None else generation[context.valid]
    if bool(seen.all()):
        return "generation", None
    return "prompt", generation if bool(seen.any()) else None


def _per_row(values: Any, batch: int, what: str) -> Any:
    """One value a sequence; each is repeated where the batch is a multiple (beams)."""
    if values is None or len(values) == batch:
        return values
    if not len(values) or batch % len(values):
        raise UserError(f"{len(values)} {what} were given for a batch of {batch} sequences")
    times = batch // len(values)
    if isinstance(values, Tensor):
        return values.repeat_interleave(times)
    return [value for value in values for _ in range(times)]


def _multiplied(branch: Tensor, gate: Settled) -> Tensor:
    """A computed branch times its gate, which is no Selection."""
    assert not isinstance(gate, Selection)
    if isinstance(gate, bool):
        return branch if gate else branch * 0.0
    return branch * gate.to(branch.dtype)[..., None]
