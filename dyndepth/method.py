"""The contract between a dynamic-depth method and the harness.

A method decides, in each forward pass, which sublayers run for which tokens. It is a small
dataclass: its fields are its hyper-parameters, its ``repr`` is the experiment's identity. The
runtime asks it two questions and executes the answers:

* ``start(context)``, once a forward, before the first block: a *plan* for all blocks, or None;
* ``gates(layer, hidden)``, at the entry of each block when ``start`` returned None;

and, of methods that have them, what is added in place of a skipped update (``instead``) and by what
an executed one is multiplied (``weights``). A method that drafts what the whole model verifies says
how long a draft gets (``more``) and is told what became of it (``verified``). What a method keeps
of a text from one forward to the next lies in the context's ``memory``.

This module imports nothing of the project, so a method can be written against it alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

Gate = bool | Tensor
"""True: every token executes. False: none does. Bool ``[batch, tokens]``: True = execute.
The ``masked`` backend also takes a float tensor of that shape and lets its gradient through."""

Granularity = Literal["static", "sequence", "token"]
Phase = Literal["prompt", "generation", "mixed"]
Phases = Literal["generation", "both"]
KVPolicy = Literal["drop", "project", "prompt_only", "evict"]

ATTENTION, MLP = 0, 1
"""Positions of the two sublayers in the last dimension of a plan and of every routing table."""
SUBLAYERS = ("attention", "mlp")


@dataclass
class ForwardContext:
    """What a method may know about the forward pass that is about to run.

    Attributes:
        layers: number of blocks of the model.
        batch: sequences in the batch.
        tokens: tokens of each sequence in this forward, padding included.
        past_length: tokens already in the cache, padding included.
        device: where the hidden states live.
        phase: ``prompt`` for a forward without a past, ``generation`` for one that extends a
            cache, ``mixed`` where one forward holds tokens of both (see ``generation``).
        valid: bool ``[batch, tokens]``, False on padding; None when nothing is padded.
        generation: bool ``[batch, tokens]``, True on tokens of the generation phase; None unless
            ``phase`` is ``mixed``.
        documents: one id a sequence, if the caller named them; else None.
        head: final norm and LM head, ``[n, hidden] -> [n, vocabulary]``. Use ``readout``.
        past_real: tokens of each sequence in the cache, padding excluded, int64 ``[batch]``; None
            where nothing is padded.
        prompt: what ``prompt_real`` asks, once.
        foresight: for methods that say ``foresees``, None for all others. Calling it runs the
            same tokens at full depth, past included, and returns the likeliest next token after
            each depth: int64 ``[layers + 1, batch, tokens]``, first that of the embeddings, last
            the dense model's. What it costs is billed to nobody (the ledger's ``padding``).
        memory: what the method keeps from one forward to the next: name -> tensor whose first
            dimension is the sequences of the batch. It lives with the cache and follows it: beams,
            repeated and selected rows; cropping leaves it. Over an empty cache, and without one, it
            is empty. A method that keeps such a thing on itself mixes up two generations.
        readout_flops: cost of one token's readout.
        bill: ``bill(cause, flops_per_token, tokens)`` puts the method's own arithmetic into the
            ledger; ``tokens`` is a bool mask ``[batch, tokens]`` or None for all valid tokens.
    """

    layers: int
    batch: int
    tokens: int
    past_length: int
    device: torch.device
    phase: Phase
    valid: Tensor | None
    generation: Tensor | None
    documents: Sequence[str] | None
    head: Callable[[Tensor], Tensor] = field(repr=False)
    bill: Callable[[str, float, Tensor | None], None] = field(repr=False)
    readout_flops: float = 0.0
    past_real: Tensor | None = None
    foresight: Callable[[], Tensor] | None = field(default=None, repr=False)
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False)
    prompt: Callable[[], int | Tensor | None] = field(default=lambda: None, repr=False)

    @cached_property
    def positions(self) -> Tensor:
        """Index of each token in its sequence, padding not counted: int64 ``[batch, tokens]``."""
        past = self.past_length if self.past_real is None else self.past_real[:, None]
        if self.valid is None:
            steps = torch.arange(self.tokens, device=self.device).expand(self.batch, -1)
        else:
            steps = (self.valid.long().cumsum(1) - 1).clamp_min(0)
        return steps + past

    @cached_property
    def prompt_real(self) -> int | Tensor | None:
        """Tokens of each sequence's prompt, padding excluded: int64 ``[batch]``, or one number for
        all; None where all tokens are prompt. What was in a cache before anything was attached is
        prompt."""
        return self.prompt()

    @cached_property
    def generated(self) -> Tensor:
        """Index of each token since the prompt of its sequence ended, the first one's 0: int64
        ``[batch, tokens]``, 0 as well on the prompt and on padding before it."""
        if self.prompt_real is None:  # all of it is prompt
            return torch.zeros_like(self.positions)
        prompt = self.prompt_real
        prompt = prompt[:, None] if isinstance(prompt, Tensor) else prompt
        return (self.positions - prompt).clamp_min(0)

    def readout(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits ``[n, vocabulary]`` of the selected tokens, through final norm and LM head.

        ``hidden`` is the residual stream ``[batch, tokens, hidden]``; ``tokens`` a bool mask
        ``[batch, tokens]`` with n True. The logits lie on the stream's device. The cost is billed
        as ``readout``.
        """
        logits = self.head(hidden[tokens.to(hidden.device)]).to(hidden.device)
        self.bill("readout", self.readout_flops, tokens)
        return logits


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that a method drafted and nobody verified yet, as ``more`` sees them.

    Attributes:
        length: how many there are.
        probabilities: reads, for each of them, what the draft itself gave it, before temperature
            and other rules: float in [0, 1]. On a GPU the host waits for it.
        memory: that of the sequence; see ``ForwardContext``.
    """

    length: int
    probabilities: Callable[[], list[float]] = field(repr=False)
    memory: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Verified:
    """What became of a draft.

    Attributes:
        drafted, accepted: how many tokens were drafted, and how many of them stand.
        memory: that of the sequence; what is written here is there in the next draft.
        states: for a method that ``reads_states``, the stream of the last token that stands, at
            the entry of each block and after the last: ``[layers + 1, hidden]``. Else None.
        rerun: for such a method, ``rerun(layer, rows)``: what block ``layer`` makes of ``rows``
            ``[n, hidden]``, each in that token's place and over the keys of those before it.
            Billed as ``draft``. It holds until ``verified`` returns.
    """

    drafted: int
    accepted: int
    memory: dict[str, Tensor] = field(repr=False)
    states: Tensor | None = field(default=None, repr=False)
    rerun: Callable[[int, Tensor], Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What each plan of a set did on each document of one task; only bounds get to see it.

    Attributes:
        task, metric: the task and the metric, as ``name,filter``, that ``quality`` is.
        documents: ids, as in ``ForwardContext.documents``.
        quality: float64 ``[documents, plans]``, higher is better whatever the metric (one that
            falls with quality is negated).
        weights: float64 ``[documents]``, a document's weight in the task's value (bytes for bits
            per byte, else 1).
        flops: float64 ``[documents, plans]``, executed block FLOPs.
        dense_flops: float64 ``[documents]``, block FLOPs at full depth.
    """

    task: str
    metric: str
    documents: tuple[str, ...]
    quality: Tensor
    weights: Tensor
    flops: Tensor
    dense_flops: Tensor


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Text that a fit reads, as an estimate counts it.

    Attributes:
        windows, length: how many windows, and tokens in each.
        forwards: passes through all blocks over each of them; one that executes half counts half.
        backwards: as much again for gradients: 1 for those of states, 2 with those of all weights.
        heads: passes through the LM head, gradients included.
        kept: what is read off it is kept and serves every target.
    """

    windows: float
    length: int
    forwards: float = 1.0
    backwards: float = 0.0
    heads: float = 0.0
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Expenses:
    """What a method costs beside the blocks that it executes: for the estimate of a dry run alone.

    Attributes:
        fit: what ``fit`` reads.
        along: what it reads beside where adapters are trained along with it (``joint``).
        readouts: LM heads that the rule itself runs for a token.
        candidates: how many plans are tried on the documents that are scored.
        shipped: what ``fit`` would find comes with the method.
    """

    fit: tuple[Reading, ...] = ()
    along: tuple[Reading, ...] = ()
    readouts: float = 0.0
    candidates: int = 0
    shipped: bool = False


_TAKEN = {
    *("tensors", "facts", "curve", "fit_seconds", "anew", "bound", "context", "save"),
    *("instead", "weights"),
}
"""What every method has beside its fields: a field of such a name would be overwritten."""


@dataclass(kw_only=True)
class DynamicDepthMethod:
    """Base of every method. Subclasses are dataclasses with ``@dataclass(kw_only=True)``.

    Fields:
        target_speedup: dense block FLOPs / executed block FLOPs that is asked for, over the tokens
            of the phases in which the method skips.
        seed: of everything random in fitting or in the rule itself.

    Declared facts (class variables unless a field or property makes more sense):
        name: as in the entry point and in every table.
        granularity: ``static`` (one plan for all inputs), ``sequence`` or ``token``.
        paper: the source, or "control".
        phases: where it skips: ``generation`` (the prompt keeps full depth) or ``both``. A field
            where both make sense, ``both`` by default as everywhere; then ``--phases`` sets it.
        published_phases: where the method of the paper skips, which ``--phases published`` sets;
            None: as ``phases`` is by default. Nothing else looks at it.
        kv_policy: what becomes of keys and values of a skipped attention. ``drop``: a sequence
            that skips it once skips it always, so nothing is kept. ``project``: they are computed
            from the token's current hidden state and kept. ``prompt_only``: as ``drop``, but for
            generated tokens only. ``evict``: a token that skips an attention is invisible in it, to
            every token after it and for good; nothing of it is computed or kept there.
        reads_prompt: True if it looks at the prompt although it may skip in generated tokens alone:
            ``start`` and ``gates`` are then called for the prompt, too, whose gates are overruled
            to True. What it finds it keeps in the context's ``memory``. Wherever windows of text
            are read to fit, to calibrate or to recover, their first half is then their prompt.
        speculates: True if what it decides holds in drafts alone: tokens that part of the model
            proposes and all of it verifies, so that what is written is the dense model's
            (``dyndepth.runtime.speculation``). Everywhere else every block runs. ``start``,
            ``gates``, ``instead`` and ``weights`` are then asked in drafts alone (and, of a method
            that ``reads_prompt``, ``start`` and ``gates`` in the prompt); ``more`` and ``verified``
            belong to such methods only. Its ``phases`` is ``generation``, its target speedup that
            of the draft. It is listed apart, for it saves no FLOPs.
        reads_states: True if ``verified`` is to be given ``states`` and ``rerun``.
        needs_training: True if ``fit`` trains for minutes rather than calibrates for seconds.
        uses_labels: True for oracles: they see what a method in use cannot (``foresight``, the
            ``Outcomes`` of the documents that are scored) and are listed as bounds.
        foresees: True if it calls ``foresight``. It is never timed: the clock would see that too.
        pooled: True if it decides over the sequences of a batch together. It is then evaluated one
            sequence a forward, nothing shared, so that a result does not depend on batch mates.
        by_document: True if a decision depends on which document it is, and not on its tokens up
            to the one decided, and their positions, alone: documents then never share the forward
            of an equal beginning. By default true for granularity ``sequence``; a token method that
            reads the context's ``documents`` has to say it.
        capturable: True if ``gates`` is the same operations on the device each time, on ``hidden``
            and on tensors that stay where they are (``start`` may write to them): no branch on
            values, nothing read by the host, nothing else that changes from forward to forward, and
            bills for all tokens alone. Graphs then hold the gates, too. The same of ``instead``
            and ``weights``: a method that has them is recorded only if it says so, plan or not.
        budgeted: False if what is saved is the method's result and not its setting: every target
            speedup above 1 means the same, so a sweep makes one cell of them.
        quick: parameters under which ``fit`` takes about a second on a tiny model; the conformance
            suite uses them.
        fit_version: raise it when ``fit`` changes, so that cached fits are made again.
        remarks: parameter -> value -> what a row's name says of it for people, also where it is the
            default: whose training it was, say.
        shipped_adapters: folder of recovery adapters that come with the method, None if there are
            none; ``dyndepth.fitting.recovery.kept`` finds those that fit.
    """

    name: ClassVar[str]
    granularity: ClassVar[Granularity]
    paper: ClassVar[str]
    published_phases: ClassVar[Phases | None] = None
    reads_prompt: ClassVar[bool] = False
    speculates: ClassVar[bool] = False
    reads_states: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    uses_labels: ClassVar[bool] = False
    foresees: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    quick: ClassVar[dict[str, Any]] = {}
    fit_version: ClassVar[int] = 1
    remarks: ClassVar[dict[str, dict[Any, str]]] = {}
    shipped_adapters: ClassVar[Path | None] = None

    target_speedup: float = 1.0
    seed: int = 0

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        taken = _TAKEN & inspect.get_annotations(cls).keys()
        if taken:
            raise TypeError(
                f"{cls.__name__}: {', '.join(sorted(taken))} is what the contract keeps on a "
                "method; call the parameter something else"
            )

    @property
    def kv_policy(self) -> KVPolicy:
        """See the class docstring; token methods project, the others follow their phases."""
        if self.granularity == "token":
            return "project"
        return "prompt_only" if self.phases == "generation" else "drop"

    @property
    def phases(self) -> Phases:
        """See the class docstring."""
        return "both"

    @property
    def by_document(self) -> bool:
        """See the class docstring."""
        return self.granularity == "sequence"

    @property
    def budgeted(self) -> bool:
        """See the class docstring."""
        return True

    @property
    def substitutes(self) -> bool:
        """Whether ``instead`` is to be asked: by default, whether the class has one of its own."""
        return type(self).instead is not DynamicDepthMethod.instead

    @property
    def weighs(self) -> bool:
        """Whether ``weights`` is to be asked: by default, whether the class has one of its own."""
        return type(self).weights is not DynamicDepthMethod.weights

    @property
    def fitted(self) -> bool:
        """Whether its rule has all that it reads; ``attach`` refuses a method that has not.

        By default: one that has a ``fit`` of its own and is asked to skip has something in
        ``tensors`` or ``facts``. A method whose ``fit`` leaves nothing there, or need not be
        called, says so by a property of its own.
        """
        own = type(self).fit is not DynamicDepthMethod.fit and self.target_speedup > 1.0
        return not own or bool(self.tensors or self.facts)

    @property
    def window_length(self) -> int | None:
        """Tokens of the longest window that ``fit`` reads because a parameter says so: the field
        ``length``, where there is one. A sweep refuses more than the model takes. None: the method
        reads as much as suits, and no more than the model takes (``capacity.fitting``)."""
        return getattr(self, "length", None)

    def __post_init__(self) -> None:
        if not self.target_speedup >= 1.0:
            raise ValueError(
                f"{self.name}: target_speedup must be at least 1, not {self.target_speedup}"
            )
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self.curve: list[dict[str, float]] = []
        # Seconds that ``fit`` took when it was made, be it elsewhere; None: not known.
        self.fit_seconds: float | None = None
        # Set by who fits: take nothing that comes with the method.
        self.anew = False
        # Set by who loads a saved method: the model that it belongs to; see runtime/binding.py.
        self.bound: Any = None

    def max_speedup(self, layers: int) -> float:
        """The largest target speedup that the method can meet on a model of ``layers`` blocks."""
        return float("inf")

    def fit(self, model: torch.nn.Module, corpus: Any = None) -> Self:
        """Find whatever meets the target; return self.

        What is found goes into ``self.tensors`` (name -> tensor) and ``self.facts`` (plain JSON
        values), a training curve into ``self.curve`` (a row a step): those are all that is saved
        and restored. ``corpus`` is a
        ``dyndepth.data.corpus.Corpus``: calibration and training text, never evaluated on. None is
        enough for methods whose choice needs no text.
        """
        return self

    def expenses(
        self, layers: int, model: torch.nn.Module | None = None, corpus: Any = None
    ) -> Expenses:
        """What the method will cost on a model of ``layers`` blocks, before it is fitted.

        Only the estimate of a dry run asks. ``model`` and ``corpus`` are those of the sweep, or
        None where nothing was loaded. The default knows of the fields ``steps``, ``batch``,
        ``accumulate`` and ``length`` of a method that ``needs_training``: each step reads so many
        windows, forward, backward and through the LM head.
        """
        steps = getattr(self, "steps", None)
        if not (self.needs_training and steps and self.target_speedup > 1.0):
            return Expenses()
        windows = steps * (getattr(self, "batch", None) or 1)
        windows *= getattr(self, "accumulate", None) or 1
        length = self.window_length or 256
        return Expenses(fit=(Reading(windows=windows, length=length, backwards=1.0, heads=3.0),))

    def calibrate(self, model: torch.nn.Module, corpus: Any = None) -> None:
        """Called when the model's weights were adapted after ``fit``.

        Solve again what depends on the model's states and is solved, not trained (a threshold
        that meets the target). Writes ``self.facts`` and ``self.tensors`` as ``fit`` does. The
        default does nothing: right for a rule that does not look at the states.
        """
        return

    def save(self, folder: str | Path, model: torch.nn.Module) -> None:
        """Write what ``fit`` found on ``model`` into ``folder``, for ``dyndepth.load_method``.

        Safetensors and JSON, all of it or nothing, bound to the model's fingerprint. Raises
        UserError if the folder holds something else, TypeError for facts that are not plain JSON.
        """
        # This module imports nothing of the project: that which keeps fits comes when it is needed.
        import_module("dyndepth.fitting.fits").save_fit(self, model, folder)

    def candidates(self) -> Tensor | None:
        """Plans whose outcomes the method wants to see before a task is scored, after ``fit``.

        Bool on the CPU, ``[plans, layers, 2]``, the first one full. For methods with
        ``uses_labels`` alone; the default, None, wants none.
        """
        return None

    def choose(self, outcomes: Outcomes) -> None:
        """Called for each task before it is scored, with what the ``candidates`` did on it.

        Writes ``self.facts`` and ``self.tensors``; a later call for another task adds to them.
        """
        raise NotImplementedError(f"{self.name} wants candidates tried and does not choose")

    def start(self, context: ForwardContext) -> Tensor | None:
        """Called once a forward, before the first block.

        Returns a plan, bool on the CPU, ``[layers, 2]`` or ``[batch, layers, 2]`` with True =
        execute and the sublayers in the order attention, mlp; or None: then ``gates`` is asked.
        Not called for forwards that lie wholly in a phase in which the method does not skip, unless
        it says ``reads_prompt``.
        """
        self.context = context
        return None

    def gates(self, layer: int, hidden: Tensor) -> tuple[Gate, Gate]:
        """Gates of attention and MLP of block ``layer``, seen at the block's entry.

        ``hidden`` is the residual stream ``[batch, tokens, hidden]`` that enters the block.
        Padding and tokens of a phase in which the method does not skip are overruled by the
        runtime, so a method need not treat them.
        """
        raise NotImplementedError(f"{self.name} returned no plan and has no gates")

    def instead(self, layer: int, sublayer: int, rows: Tensor) -> Tensor | None:
        """The update of tokens that skip a sublayer, in place of none at all.

        ``rows`` ``[n, hidden]`` is their stream where the sublayer would have read it (before its
        norm; in a parallel block the block's input for both), ``sublayer`` ATTENTION or MLP.
        Returns ``[n, hidden]``, which is added to the stream, or None for no update. Asked after
        the gates of the block; padding may be among the rows, whose update nobody reads. Matrix
        products in it are billed by ``context.bill``, where None for tokens means the rows. It
        depends on its arguments and on what was fitted alone: gradient checkpointing asks it again
        in the backward pass, when the method's context may be that of another forward. Under
        ``masked``, all tokens are among the rows.
        """
        return None

    def weights(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Factors on the updates of the tokens that execute attention and MLP of block ``layer``.

        Float ``[batch, tokens]`` each, or None for 1. Asked after ``gates`` of the block, where
        not both of them are False. Tokens of a phase in which the method does not skip keep 1.
        """
        return None, None

    def more(self, draft: Draft) -> bool:
        """Whether another token is to be drafted; asked before each of them, the first included.

        Of methods that speculate. What it learns of a text belongs into ``draft.memory``. No
        longer asked where the text may not grow so far.
        """
        return False

    def verified(self, verdict: Verified) -> None:
        """Called after each verification, with what became of the draft, if there was one."""
        return
