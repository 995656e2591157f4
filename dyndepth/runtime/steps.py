"""A decode step as it is recorded: one token a sequence, in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dyndepth.method import ATTENTION, MLP, SUBLAYERS, DynamicDepthMethod
from dyndepth.models.blocks import Ahead, Block, Decoder
from dyndepth.models.caches import CACHE_ARGUMENTS
from dyndepth.runtime.flops import Bill, Forward
from dyndepth.runtime.lanes import Lane
from dyndepth.runtime.recorded_updates import Told
from dyndepth.runtime.recorder import Recorder

Verdict = tuple[bool, bool]
"""Whether attention and MLP of a block run for any sequence."""
Masks = tuple[Tensor | None, Tensor | None]
"""Which sequences they run for, bool ``[batch, 1]``; None: all."""
_PATIENCE = 50_000_000
"""Looks at a verdict before the device is asked what has become of it: some seconds."""
_UNSAID = 255


class Place:
    """Where the steps of a batch are recorded: what they read, and the stream that they change.

    Attributes:
        hidden: the stream, ``[batch, 1, hidden]``: each sublayer adds its branch to it.
        flags: which sequences execute what: bool ``[layers, 2, batch, 1]``.
        factors: on what they execute: float ``[layers, 2, batch, 1]``, where a method weighs.
    """

    def __init__(self, parts: Decoder, lane: Lane, recorder: Recorder) -> None:
        self.parts, self.lane, self.recorder = parts, lane, recorder
        parameter = next(parts.model.parameters())
        layers, size = parts.shape
        with torch.inference_mode(False):
            self.ids = torch.zeros(lane.batch, 1, dtype=torch.long, device=parameter.device)
            self.positions = torch.zeros_like(self.ids)
            self.hidden = parameter.new_zeros(lane.batch, 1, size)
            self.flags = self.ids.new_ones(layers, 2, lane.batch, 1, dtype=torch.bool)
            self.factors = parameter.new_ones(layers, 2, lane.batch, 1)
            self.always = self.flags[0, 0].clone()
            self.never = ~self.always
            self._unused = parameter.new_zeros(lane.batch, 1, 1, 1)
        self.visit: Callable[[int], None] | None = None

    def feed(self, ids: Tensor, past: int, positions: Tensor | None) -> None:
        """Take the step's tokens ``[batch, 1]``; without ``positions`` they are the next ones."""
        self.ids.copy_(ids)
        if positions is None:
            self.positions.fill_(past)
        else:
            self.positions.copy_(positions)

    def forward(self, stock: Callable[..., Any], keys: int, visit: Callable[[int], None]) -> Any:
        """The decoder's output, with ``visit(layer)`` in the place of each block."""
        self.visit = visit
        self._view = self.lane.view(keys)
        self.mask = self._view.mask(self.hidden.dtype)
        self.tables: Any = None
        try:
            # A mask that is prepared is taken as it is. None of the blocks gets to see it.
            return stock(
                input_ids=self.ids,
                attention_mask=self._unused,
                position_ids=self.positions,
                use_cache=False,
            )
        finally:
            self.visit = None

    def block(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """What a block does in ``forward``."""
        assert self.visit is not None
        if index == 0:
            self.tables = arguments.get("position_embeddings")
            self.hidden.copy_(hidden)
        self.visit(index)
        return self.hidden

    def ahead(self, index: int) -> Ahead:
        """What an attention does whoever executes it; see ``Block.ahead``."""
        block = self.parts.blocks[index]
        return block.ahead(self.hidden, self._arguments(block))

    def again(self, index: int, normed: Tensor) -> Ahead:
        """``ahead`` of a block whose keys are in the lane."""
        return Ahead(normed, *self._view.read(self.parts.blocks[index].index), None)

    def execute(
        self, index: int, ahead: Ahead | None, run: Verdict, masks: Masks, told: Told | None = None
    ) -> None:
        """Add what the sublayers ``run`` say to the stream, of the rows of a mask where there is
        one; what a method says of updates is ``told``."""
        block = self.parts.blocks[index]
        both = block.parallel and (all(run) or told is not None)
        entered = self.hidden.clone() if both else self.hidden
        for sublayer in (ATTENTION, MLP):
            mask, update = masks[sublayer], None
            if told is not None:
                update = told.instead(index, sublayer, entered, run[sublayer], mask)
            if run[sublayer]:
                branch = self._branch(block, sublayer, entered, ahead)
                if told is not None:
                    branch = told.weighted(index, sublayer, branch)
                self._add(branch, mask)
            if update is not None:
                self._add(update, None if mask is None else ~mask)

    def _branch(self, block: Block, sublayer: int, entered: Tensor, ahead: Ahead | None) -> Tensor:
        if sublayer == MLP:
            return block.mlp_branch(entered)
        assert ahead is not None
        return block.attention_laid(ahead, None, self._arguments(block)).view_as(self.hidden)

    def _add(self, branch: Tensor, mask: Tensor | None) -> None:
        if mask is None:
            self.hidden.add_(branch)
        else:
            # One kernel, as adding is. What overflows and is left out is no number, as in masked.
            self.hidden.addcmul_(branch, mask[..., None])

    def _arguments(self, block: Block) -> dict[str, Any]:
        return {
            "position_embeddings": self.tables,
            "attention_mask": self.mask,
            block.cache_argument: self._view,
        }

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A session of the recorder; a recording that fails in it is let go."""
        with self.recorder.session():
            try:
                yield
            except BaseException:
                self.recorder.abandon()
                raise


class Mail:
    """Verdicts on their way from the device to the host."""

    def __init__(self, layers: int, recorder: Recorder, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):
            self._sheet = torch.zeros(layers, 2, dtype=torch.bool, pin_memory=on_gpu)
            self._verdicts = torch.zeros(layers, 2, dtype=torch.bool, device=device)
        self._seen = self._sheet.view(torch.uint8).numpy()
        self._recorder = recorder
        self._rest = partial(torch.cuda.synchronize, device) if on_gpu else None
        self.reset()

    def reset(self) -> None:
        """Forget what was said. Nothing may be under way."""
        self._seen[:] = _UNSAID

    def post(self, layer: int, flags: Tensor) -> None:
        """On the device: say of ``[2, batch, 1]`` whether there is any."""
        torch.any(flags[..., 0], 1, out=self._verdicts[layer])
        with self._recorder.aside():
            self._sheet[layer].copy_(self._verdicts[layer], non_blocking=True)

    def post_all(self, flags: Tensor) -> None:
        """``post`` of all layers, ``[layers, 2, batch, 1]``."""
        torch.any(flags[..., 0], 2, out=self._verdicts)
        self._sheet.copy_(self._verdicts, non_blocking=True)

    def read(self, layer: int) -> Verdict:
        """Wait for what the device says of ``layer``. Raises RuntimeError if it never does."""
        said = self._seen[layer]
        for _ in range(_PATIENCE):
            if said[0] != _UNSAID and said[1] != _UNSAID:
                return bool(said[0]), bool(said[1])
        self.rest()  # which tells what is the matter with it
        if _UNSAID in said:
            raise RuntimeError(f"no verdict came on block {layer}")
        return bool(said[0]), bool(said[1])

    def all_read(self) -> list[Verdict] | None:
        """What was said of all layers; None while some of it is under way."""
        if (self._seen == _UNSAID).any():
            return None
        return [(bool(attention), bool(mlp)) for attention, mlp in self._seen.tolist()]

    def rest(self) -> None:
        """Wait until nothing is under way."""
        if self._rest is not None:
            self._rest()


class Rule:
    """The gates of a method that may be recorded, as the device finds them.

    They are first asked for in ``forward``; what they bill of it is in ``bills``, all blocks once.
    """

    def __init__(
        self,
        method: DynamicDepthMethod,
        place: Place,
        forward: Forward,
        told: Told | None = None,
    ) -> None:
        self._method, self._place, self._forward, self.told = method, place, forward, told
        self._billed: dict[int, list[Bill]] = {}
        self.mail = Mail(len(place.flags), place.recorder, place.ids.device)
        # So that no tensor that was recorded is let go: what the method had then.
        self._alive = dict(vars(method))

    def masks(self, layer: int) -> tuple[Tensor, Tensor]:
        """The gates of one block, bool ``[batch, 1]``. Raises TypeError for one that is none."""
        place, before = self._place, len(self._forward.bills)
        masks = []
        gates = self._method.gates(layer, place.hidden)
        for sublayer, gate in enumerate(gates):
            if isinstance(gate, bool):
                gate = place.always if gate else place.never
            elif gate.shape != place.ids.shape or gate.dtype != torch.bool:
                raise TypeError(
                    f"{self._method.name}: a gate must be a bool, or a bool tensor [batch, tokens],"
                    f" here {list(place.ids.shape)}, not {gate.dtype} {list(gate.shape)}, "
                    f"for the {SUBLAYERS[sublayer]} of block {layer}"
                )
            masks.append(gate)
        self._billed[layer] = self._forward.bills[before:]
        if self.told is not None:
            self.told.weigh(layer, gates)
        return masks[0], masks[1]

    def decide(self, layer: int) -> None:
        """Flags of one block, and what the host has to know of them."""
        flags = self._place.flags[layer]
        torch.stack(self.masks(layer), out=flags)
        self.mail.post(layer, flags)

    @property
    def bills(self) -> list[Bill]:
        """See above. Raises TypeError for a bill that names tokens, which are others each time."""
        bills = [bill for layer in sorted(self._billed) for bill in self._billed[layer]]
        if any(bill.tokens is not None for bill in bills):
            raise TypeError(f"{self._method.name} is capturable, but bills for some of the tokens")
        return bills


class Whole:
    """A step as one recording.

    ``unit(layer)`` does what a block does; ``rule`` is that of its gates, if they are found in it;
    ``told`` what a method says of updates.
    """

    def __init__(
        self,
        place: Place,
        stock: Callable[..., Any],
        keys: int,
        unit: Callable[[int], None],
        rule: Rule | None = None,
        told: Told | None = None,
    ) -> None:
        self.place, self.rule, self.told = place, rule, told
        with place.recording():
            place.forward(stock, keys, unit)
            place.recorder.begin()
            self._out = place.forward(stock, keys, unit)
            self._repeat = place.recorder.end()

    def step(self) -> Any:
        """The decoder's output of a step, in memory of its own."""
        self._repeat()
        return own(self._out)


def by_plan(
    place: Place, pattern: Sequence[tuple[Any, Any]], project: bool, told: Told | None = None
) -> Any:
    """The unit of a plan: for each block two of True, False, or None for some of the sequences."""

    def unit(layer: int) -> None:
        gates = pattern[layer]
        ahead = place.ahead(layer) if project or gates[ATTENTION] is not False else None
        run = (gates[0] is not False, gates[1] is not False)
        flags = place.flags[layer]
        masks = [flags[s] if gates[s] is None else None for s in (0, 1)]
        if told is not None:
            told.weigh(layer, gates)
        place.execute(layer, ahead, run, (masks[0], masks[1]), told)

    return unit


def by_rule(place: Place, rule: Rule) -> Any:
    """The unit of gates that are found on the way and executed by multiplying."""

    found: list[Tensor] = []

    def unit(layer: int) -> None:
        masks = rule.masks(layer)
        found.extend(masks)
        place.execute(layer, place.ahead(layer), (True, True), masks, rule.told)
        if len(found) == 2 * len(place.flags):  # nobody waits for one block's: all are told at once
            torch.stack(found, out=place.flags.flatten(0, 1))
            rule.mail.post_all(place.flags)
            found.clear()

    return unit


class Pieces:
    """A step as a recording for each block and verdict.

    With a ``rule``, each piece ends with the gates of the next block and, while the host reads
    them, that block's keys and values. Without, gates are asked for between the pieces.
    """

    def __init__(
        self, place: Place, stock: Callable[..., Any], keys: int, rule: Rule | None
    ) -> None:
        self.place, self.rule = place, rule
        self._told = None if rule is None else rule.told
        self._layers = len(place.parts.layers)
        self._pieces: dict[tuple[int, Verdict], Callable[[], None]] = {}
        self._normed = place.hidden.clone()
        with place.recording():
            warm = by_rule(place, rule) if rule is not None else by_plan(place, _all(place), True)
            place.forward(stock, keys, warm)
            place.recorder.begin()
            self._out = place.forward(stock, keys, self._record)
            self._tail = place.recorder.end()
        self._alive = place.mask, place.tables

    def _record(self, layer: int) -> None:
        """All pieces, when the forward comes to the first block."""
        if layer > 0:
            return
        recorder = self.place.recorder
        self._prepare(0)
        self._head = recorder.end()
        for index, run in product(range(self._layers), product((True, False), repeat=2)):
            verdict: Verdict = (run[0], run[1])
            last = self.rule is not None and index == self._layers - 1
            if last and not any(run) and self._told is None:
                self._pieces[index, verdict] = lambda: None
                continue
            recorder.begin()
            self._piece(index, verdict)
            self._pieces[index, verdict] = recorder.end()
        recorder.begin()

    def _prepare(self, layer: int) -> None:
        if self.rule is not None and layer < self._layers:
            self.rule.decide(layer)
            self._normed.copy_(self.place.ahead(layer).normed)

    def _piece(self, layer: int, run: Verdict) -> None:
        place = self.place
        ahead = place.ahead(layer) if self.rule is None else place.again(layer, self._normed)
        flags = place.flags[layer]
        several = place.lane.batch > 1
        masks: Masks = (flags[0], flags[1]) if several else (None, None)
        place.execute(layer, ahead, run, masks, self._told)
        self._prepare(layer + 1)

    def step(self, ask: Callable[[int], Verdict], meanwhile: Callable[[], None]) -> Any:
        """The decoder's output of a step, in memory of its own; ``ask(layer)`` gives verdicts.

        ``meanwhile`` is done while the device is at work, before the first verdict is read.
        """
        try:
            self._head()
            meanwhile()
            for layer in range(self._layers):
                self._pieces[layer, ask(layer)]()
            self._tail()
        except BaseException:
            if self.rule is not None:
                self.rule.mail.rest()  # or what is under way would be read as the next step's
            raise
        return own(self._out)


def _all(place: Place) -> list[tuple[Any, Any]]:
    return [(True, True)] * len(place.parts.layers)


def own(out: Any) -> Any:
    """The output of a recorded forward in memory of its own, without a cache."""
    return type(out)(last_hidden_state=out.last_hidden_state.clone())


def with_cache(out: Any, cache: Any) -> Any:
    """``out`` as the decoder would have it."""
    fields = type(out).__dataclass_fields__
    setattr(out, next(name for name in CACHE_ARGUMENTS if name in fields), cache)
    return out
