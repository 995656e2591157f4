"""Attaches a method to a Hugging Face model and executes its gates.

``attach`` swaps the class of every decoder block for a subclass whose ``forward`` consults the
runtime, and restores it on exit. The backend ``sparse`` computes only what the gates say; the
backend ``masked`` computes everything and multiplies, which is what training needs and the
yardstick that ``sparse`` must equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import get_args

from torch import Tensor, nn

from dyndepth.common.errors import MethodFault, UserError
from dyndepth.common.modes import EAGER, MODES, Mode
from dyndepth.method import DynamicDepthMethod, KVPolicy
from dyndepth.models.blocks import Decoder, decoder
from dyndepth.runtime.binding import bind
from dyndepth.runtime.execution import Runtime
from dyndepth.runtime.generating import speculating
from dyndepth.runtime.graphs import Graphs, Stepper
from dyndepth.runtime.limits import Limits, limits_of
from dyndepth.runtime.patching import called_in, run_by, unsaved
from dyndepth.runtime.replay import Replay
from dyndepth.runtime.trace import Backend, Trace

_MARK = "_dyndepth_runtime"


def attached(model: nn.Module) -> bool:
    """Whether a method is attached to ``model`` now; not to what it is a copy of."""
    return _marked(decoder(model))


def _marked(owner: nn.Module) -> bool:
    return getattr(vars(owner).get(_MARK), "owner", None) is owner


@contextmanager
def attach(
    model: nn.Module,
    method: DynamicDepthMethod,
    *,
    backend: Backend = "sparse",
    documents: Sequence[str] | None = None,
    prompt_length: int | Tensor | None = None,
    limits: Limits | None = None,
    mode: Mode | Graphs = EAGER,
    count: bool = True,
    warn: bool = True,
) -> Iterator[Trace]:
    """Run ``model`` under ``method`` inside the ``with`` block; yields the Trace.

    Everything that the model can do works as before: ``model(...)``, ``model.generate(...)``, with
    and without a cache, padding on either side, gradient checkpointing; what others put on its
    modules as docs/families.md says. ``limits`` says when selected tokens are gathered and when the
    dense kernel runs instead, with the same result; by default the measured rule of
    ``dyndepth.runtime.gates``. On exit, also by an exception, the model is restored.

    ``mode="graphs"`` decodes by CUDA graphs: a forward of one token a sequence over a dynamic cache
    is recorded when it first comes and repeated from then on, with the same result. They are let go
    on exit; a ``Graphs`` in its place keeps them for other attachments to the same model. Any other
    forward runs as ever, which is always exact.

    The method is asked, and work is counted, in forwards of the decoder: those that complete, with
    the blocks that they call, in whatever order and however often. A block that is called outside
    of one, by hand or by another model that shares it, runs in full and is not counted.
    ``count=False`` counts nothing: under ``masked`` the host then waits for no gate, and a trace
    that is asked for counts raises RuntimeError.

    Where forwards ran, the method is asked for a speedup above 1 and no token skipped anything, the
    end of the block warns (``NothingSkipped``) and says why, unless ``warn`` is False.

    Inside, ``save_pretrained`` and ``push_to_hub`` of the model raise UserError: they would save
    the model as if nothing were attached. Where they save adapters alone, they do.

    Raises UserError for an unsupported architecture, a method that needs a fit and has none, a
    model that already has a method attached, one that is compiled or whose blocks are wrapped by
    somebody else, and, in the mode ``graphs``, for one that is not on one CUDA device or whose
    steps cannot be recorded.
    """
    if backend not in ("sparse", "masked"):
        raise UserError(f"backend must be 'sparse' or 'masked', not {backend!r}")
    if isinstance(mode, str) and mode not in MODES:
        raise UserError(f"mode must be 'eager' or 'graphs', not {mode!r}")
    if mode != EAGER and (backend == "masked" or method.foresees):
        raise UserError(
            "graphs are of the backend 'sparse', for methods that do not foresee; take mode='eager'"
        )
    if method.kv_policy not in get_args(KVPolicy):
        raise MethodFault(
            f"{method.name}: its kv_policy must be one of {', '.join(get_args(KVPolicy))}, not "
            f"{method.kv_policy!r}"
        )
    if mode != EAGER and method.kv_policy == "evict":
        raise UserError(
            f"graphs cannot be recorded: {method.name} evicts, so that how many keys a step reads "
            "depends on what was skipped; take mode='eager'"
        )
    if method.speculates and (method.phases != "generation" or method.kv_policy == "evict"):
        raise MethodFault(
            f"{method.name} speculates: its phases must be 'generation', and its kv_policy keep "
            "what a draft needs (drop, prompt_only or project)"
        )
    if method.foresees and not method.uses_labels:
        raise TypeError(f"{method.name} foresees but does not say that it uses labels")
    if not method.fitted:
        raise UserError(
            f"{method.name} is not fitted, and has nothing to decide by: call "
            ".fit(model, corpus) before attaching (a method whose fit leaves nothing in tensors "
            "or facts says by a property of its own that it is `fitted`)"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError("a torch.compile'd model cannot be attached to; pass the original module")
    parts = Decoder.of(model)
    kernel = parts.config._attn_implementation
    if method.kv_policy == "evict" and kernel not in ("sdpa", "eager"):
        raise UserError(
            f"{method.name} evicts, which needs masks that attention {kernel!r} does not take; "
            "load the model with attn_implementation='sdpa'"
        )
    owner = parts.owner
    if any(part._compiled_call_impl is not None for part in (model, parts.model, owner)):
        raise UserError("a model that was compiled in place cannot be attached to; load it anew")
    if _marked(owner):
        raise UserError("the model already has a method attached; leave that attach first")
    bind(model, method)
    runtime = Runtime(parts, method, backend, limits or limits_of(model), count)
    runtime.trace.documents, runtime.trace.prompt_length = documents, prompt_length
    if method.reads_states:
        runtime.trace.replay = Replay(parts, runtime.run, runtime.ledger if count else None)
        runtime.run = runtime.trace.replay.block
    run, forward, graphs = runtime.run, None, None
    if mode != EAGER:
        graphs = Graphs() if isinstance(mode, str) else mode
        stepper = Stepper(runtime, parts, graphs, runtime.run)
        run, forward = stepper.block, stepper.decoder
    handles = [
        owner.register_forward_pre_hook(runtime.begin, with_kwargs=True),
        owner.register_forward_hook(runtime.end),
        runtime.head.register_forward_hook(runtime.bill_head, with_kwargs=True),
    ]
    setattr(owner, _MARK, runtime)
    drafts: AbstractContextManager[None] = nullcontext()
    if method.speculates:
        drafts = speculating(parts.model, runtime.trace, method)
    try:
        with (
            drafts,
            unsaved((model, parts.model, owner)),
            called_in(owner, runtime.around, forward),
            run_by(parts.blocks, run, checkpointed=runtime.checkpointed, repeated=True),
        ):
            yield runtime.trace
    finally:
        for handle in handles:
            handle.remove()
        delattr(owner, _MARK)
        if isinstance(mode, str) and graphs is not None:
            graphs.close()
    if warn and runtime.idle is not None:
        runtime.idle.warn(runtime.trace, len(parts.blocks))
