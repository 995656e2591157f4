"""Decode steps recorded once and repeated: what a GPU can do when it need not wait for its host.

A forward of one token a sequence over a cache is many small kernels, which a host launches more
slowly than a GPU runs them. In the mode ``graphs`` such steps are recorded: whole where the gates
are known before, else a piece a block and verdict, and the host reads each verdict while the device
makes the block's keys and values, which are made whatever it is. All other forwards run as ever.
"""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyndepth.common.errors import UserError
from dyndepth.method import MLP, DynamicDepthMethod, Gate
from dyndepth.models.blocks import Block, Decoder
from dyndepth.models.caches import CACHE_ARGUMENTS, cache_of
from dyndepth.models.rotary import steady
from dyndepth.models.selection import UNREAD, Selection
from dyndepth.models.watching import watched
from dyndepth.runtime.cache import skip_tokens
from dyndepth.runtime.flops import Forward
from dyndepth.runtime.lanes import Lane, bucket
from dyndepth.runtime.patching import Run, Stock
from dyndepth.runtime.recorded_updates import Told, unrecordable
from dyndepth.runtime.recorder import CudaRecorder, Recorder
from dyndepth.runtime.steps import (
    Pieces,
    Place,
    Rule,
    Verdict,
    Whole,
    by_plan,
    by_rule,
    with_cache,
)

PAYS_BELOW = 0.8
"""Share of the work that is executed, below which a piece a block is faster than the whole step."""
_MEMORY = 0.9
_MOST = 32
"""Recordings that are kept: methods may have a plan for each sequence."""
_OPEN = [(True, True)]
_PASSED_ON = {"input_ids", "attention_mask", "position_ids", "use_cache", "return_dict"}
_PASSED_ON |= {"cache_position", *CACHE_ARGUMENTS}


class Graphs:
    """Recorded steps of one model, for ``attach(..., mode=...)``.

    They last as long as this, through any number of attachments, until ``close`` or the end of a
    ``with`` block. Memory: a copy of the keys and values of a batch for each batch size.
    A model whose modules or weights are others than before is recorded anew at the next attachment;
    what is switched inside a module that stays is not seen.

    Attributes:
        steps: decode steps that were repeated from a recording.
        others: forwards over a cache that were not, and ran as ever.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder, self._lent = recorder, recorder is not None
        self._owner: Any = None
        self._parts: Any = None
        self._lanes: dict[int, Lane] = {}
        self._recorded: OrderedDict[Any, Whole | Pieces] = OrderedDict()
        self._places: dict[int, Place] = {}
        self._shares: dict[Any, Share] = {}
        self.steps = self.others = 0

    def __enter__(self) -> Graphs:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was recorded, and of its memory."""
        self._recorded.clear()
        self._places.clear()
        self._lanes.clear()
        self._shares.clear()
        self._owner = self._parts = None
        if not self._lent:
            self._recorder = None

    def of(self, parts: Decoder) -> Graphs:
        """Itself, for this model. Raises UserError for a model that cannot be recorded, or another
        than before."""
        reason = obstacle(parts)
        if reason is not None:
            raise UserError(f"graphs cannot be recorded: {reason}; take mode='eager'")
        if self._recorder is None:
            self._recorder = CudaRecorder(next(parts.model.parameters()).device)
        if self._owner not in (None, parts.owner):
            raise UserError("these graphs are another model's; each model needs its own")
        self._owner = parts.owner
        found = _parts_of(parts.owner)
        if found != self._parts:
            self._recorded.clear()
            self._places.clear()
        self._parts = found
        return self

    def place(self, parts: Decoder, batch: int, keys: int) -> Place:
        """Where steps of ``batch`` sequences over at most ``keys`` keys are recorded."""
        assert self._recorder is not None
        if batch not in self._lanes:
            device = next(parts.model.parameters()).device
            self._lanes[batch] = Lane(len(parts.layers), batch, device)
        lane = self._lanes[batch]
        if lane.capacity < keys:
            lane.grow(keys)
            for key in [k for k, v in self._recorded.items() if v.place.lane is lane]:
                del self._recorded[key]
            self._places.pop(batch, None)
        if batch not in self._places:
            self._places[batch] = Place(parts, lane, self._recorder)
        return self._places[batch]

    def share(self, key: Any, batch: int) -> Share:
        """What is known of the method ``key``, for ``batch`` sequences."""
        return self._shares.setdefault((key, batch), Share(batch))

    def recorded(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was recorded under ``key``, else ``make()``; what was not asked for longest goes."""
        if key not in self._recorded:
            self._recorded[key] = make()
            if len(self._recorded) > _MOST:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]


class Share:
    """What share of the blocks' work a token method executes, lately."""

    def __init__(self, batch: int) -> None:
        self._mean: float | None = None
        self._alone = batch == 1

    def add(self, share: float) -> None:
        """Take in one step."""
        self._mean = share if self._mean is None else _MEMORY * self._mean + (1 - _MEMORY) * share

    @property
    def pieces_pay(self) -> bool:
        """Whether to wait for verdicts. At first for a single sequence: of several, some runs."""
        return self._alone if self._mean is None else self._mean < PAYS_BELOW


def _parts_of(owner: nn.Module) -> Any:
    """The modules of a decoder, and where their weights lie: what a recording is made of."""
    weights = itertools.chain(owner.parameters(), owner.buffers())
    return tuple(map(id, owner.modules())), tuple(each.data_ptr() for each in weights)


def obstacle(parts: Decoder) -> str | None:
    """Why steps of a model cannot be recorded; None if they can."""
    config = parts.config
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation!r}, not 'sdpa'"
    takes = inspect.signature(type(parts.owner).forward).parameters
    if parts.record.bias is not None or "position_ids" not in takes:
        return f"a {config.model_type} counts positions by itself"
    if any(block.window is not None for block in parts.blocks):
        return "its attention reaches back through a window"
    if not steady(parts.model):
        return "its rotary tables change with the length of a text"
    devices = {parameter.device for parameter in parts.model.parameters()}
    if len(devices) > 1:
        return "it lies on several devices"
    return None


class Stepper:
    """One attachment's steps through graphs: stands in for the decoder's and the blocks' forward.

    ``runtime`` is the attachment, ``run`` what its blocks do in all other forwards.
    """

    def __init__(self, runtime: Any, parts: Decoder, graphs: Graphs, run: Run) -> None:
        self._runtime, self._parts, self._graphs, self._run = runtime, parts, graphs.of(parts), run
        self._method: DynamicDepthMethod = runtime.method
        reason = unrecordable(self._method)
        if reason is not None:
            raise UserError(f"graphs cannot be recorded: {reason}; take mode='eager'")
        updates = runtime.updates
        self._updates = updates if updates.substitutes or updates.weighs else None
        self._recording: Place | None = None
        self._identity: Any = None
        self._device = next(parts.model.parameters()).device.type
        costs = runtime.ledger.costs
        self._work = np.stack([costs.projections - costs.key_value, costs.mlp], axis=1)
        self._always = float(costs.key_value.sum())

    def block(self, index: int, stock: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The forward of a block."""
        if self._recording is None:
            return self._run(index, stock, hidden, arguments)
        return self._recording.block(index, hidden, arguments)

    def decoder(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of the decoder, whose stock one is ``stock``."""
        now = self._runtime.passes[-1] if self._runtime.passes else None
        if now is None or now.forward.phase == "prompt":
            return stock(*args, **kwargs)
        out = self._step(now, stock, args, kwargs) if self._can(now, args, kwargs) else None
        if out is None:
            self._graphs.others += 1
            return stock(*args, **kwargs)
        self._graphs.steps += 1
        return out

    def _step(self, now: Any, stock: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder's output by recordings; None where they leave something out."""
        cache, past, batch = cache_of(kwargs), now.forward.keys - 1, now.forward.batch
        blocks, project = self._parts.blocks, self._runtime.project
        kept = [
            block.index
            for block, (attention, _) in zip(blocks, now.plan or _OPEN * len(blocks), strict=True)
            if project or attention is not False
        ]
        with torch.inference_mode(False), torch.no_grad():
            keys = bucket(past + 1)
            place = self._graphs.place(self._parts, batch, keys)
            lane = place.lane
            if not lane.holds(cache, kept, past):
                if not lane.serves(cache, kept, past):
                    return None
                if lane.take(cache, kept, past) and any(map(_seen, blocks)):
                    return None
            lane.at(past, kwargs.get("attention_mask"))
            place.feed(args[0] if args else kwargs["input_ids"], past, kwargs.get("position_ids"))
            skipped = {block.index for block in blocks} - set(kept)

            def meanwhile() -> None:
                """What the cache is after the step."""
                lane.give(cache, kept, past + 1)
                for index in sorted(skipped):
                    skip_tokens(cache, index, 1)

            self._recording = place
            try:
                step = self._planned if now.plan is not None else self._routed
                out = step(now, place, keys, stock, meanwhile)
            finally:
                self._recording = None
        return with_cache(out, cache)

    def _can(self, now: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a forward is a decode step with nothing to it that a recording leaves out."""
        forward, mask = now.forward, kwargs.get("attention_mask")
        return (
            forward.width == 1
            and forward.phase == "generation"
            and forward.generation is None
            and forward.valid is None
            and now.weights is None
            and cache_of(kwargs) is not None
            and len(args) + (kwargs.get("input_ids") is not None) == 1
            and all(value is None or value is False for value in _others(kwargs))
            and (mask is None or mask.ndim == 2)
            and not self._parts.owner.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(self._device)
            and self._runtime.asked(kwargs, "return_dict")
            and not self._runtime.asked(kwargs, "output_hidden_states")
            # Gates that are asked for may drop a token from one cache and keep it in another.
            and (now.plan is not None or self._runtime.project)
        )

    def _planned(
        self, now: Any, place: Place, keys: int, stock: Stock, meanwhile: Callable[[], None]
    ) -> Any:
        """A step whose gates are known."""
        forward, project = now.forward, self._runtime.project
        pattern = tuple((_known(attention), _known(mlp)) for attention, mlp in now.plan)
        key: tuple[Any, ...] = ("plan", pattern, project, forward.batch, keys)
        updates = None if now.overruled else self._updates
        if updates is not None:
            key += (self._known_as(),)
        billed = len(forward.bills)

        def make() -> Whole:
            told = None if updates is None else self._told(place, forward)
            unit = by_plan(place, pattern, project, told)
            return Whole(place, stock, keys, unit, told=told)

        whole: Whole = self._graphs.recorded(key, make)
        if any(None in gates for gates in pattern):
            for layer, gates in enumerate(now.plan):
                for sublayer, gate in enumerate(gates):
                    if not isinstance(gate, bool):
                        place.flags[layer, sublayer].copy_(gate)
        out = whole.step()
        meanwhile()
        del forward.bills[billed:]  # of the recording
        settled = [
            gates if None not in known else now.settler(gates, place.hidden).read()
            for gates, known in zip(now.plan, pattern, strict=True)
        ]
        self._enter(forward, settled, whole.told)
        return out

    def _routed(
        self, now: Any, place: Place, keys: int, stock: Stock, meanwhile: Callable[[], None]
    ) -> Any:
        """A step whose gates are found on the way."""
        forward = now.forward
        if not self._method.capturable:
            pieces: Pieces = self._graphs.recorded(
                ("pieces", forward.batch, keys), lambda: Pieces(place, stock, keys, None)
            )
            settled: list[Any] = []
            out = pieces.step(lambda layer: self._ask(now, place, layer, settled), meanwhile)
            self._enter(forward, settled)
            return out
        method = self._known_as()
        key, share = (method, forward.batch, keys), self._graphs.share(method, forward.batch)
        billed = len(forward.bills)
        verdicts: list[Verdict] | None = None
        rule: Any
        if share.pieces_pay:
            pieces = self._graphs.recorded(
                ("pieces", *key),
                lambda: Pieces(place, stock, keys, self._rule(place, forward)),
            )
            rule = pieces.rule
            rule.mail.reset()
            out = pieces.step(rule.mail.read, meanwhile)
            verdicts = rule.mail.all_read()
            assert verdicts is not None
            share.add(self._share(verdicts))
        else:
            whole: Whole = self._graphs.recorded(
                ("whole", *key), lambda: self._multiplied(place, stock, keys, forward)
            )
            rule = whole.rule
            before = rule.mail.all_read()  # of the step before, if the device is done with it
            if before is not None:
                share.add(self._share(before))
                rule.mail.reset()
            out = whole.step()
            meanwhile()
        del forward.bills[billed:]
        forward.bills += rule.bills
        flags = place.flags.clone() if forward.batch > 1 or verdicts is None else None
        layers = range(len(self._parts.layers))
        self._enter(forward, [_settled(layer, verdicts, flags) for layer in layers], rule.told)
        return out

    def _ask(self, now: Any, place: Place, layer: int, told: list[Any]) -> Verdict:
        """The verdict of a method that is asked between pieces; its gates are added to ``told``."""
        settled = now.settler(self._method.gates(layer, place.hidden.clone()), place.hidden).read()
        for sublayer, gate in enumerate(settled):
            if place.lane.batch > 1:
                mask = gate.mask if isinstance(gate, Selection) else gate
                flags = place.flags[layer, sublayer]
                flags.fill_(mask) if isinstance(mask, bool) else flags.copy_(mask)
        told.append(settled)
        return settled[0] is not False, settled[1] is not False

    @staticmethod
    def _enter(
        forward: Forward, settled: Sequence[tuple[Any, Any]], told: Told | None = None
    ) -> None:
        """Tell the ledger what the blocks executed."""
        if told is not None:
            forward.bills += told.bills(settled)
        forward.calls = [(layer, *gates) for layer, gates in enumerate(settled)]
        forward.cached = True
        forward.whole = {
            (layer, sublayer)
            for layer, gates in enumerate(settled)
            for sublayer in (0, 1)
            if isinstance(gates[sublayer], Selection)
        }

    def _multiplied(self, place: Place, stock: Any, keys: int, forward: Forward) -> Whole:
        rule = self._rule(place, forward)
        return Whole(place, stock, keys, by_rule(place, rule), rule)

    def _rule(self, place: Place, forward: Forward) -> Rule:
        return Rule(self._method, place, forward, self._told(place, forward))

    def _told(self, place: Place, forward: Forward) -> Told | None:
        return None if self._updates is None else Told(self._updates, place, forward)

    def _share(self, verdicts: Sequence[Verdict]) -> float:
        """Of a block's work, keys and values included, what is executed."""
        executed = float((self._work * np.array(verdicts)).sum()) + self._always
        return executed / (float(self._work.sum()) + self._always)

    def _known_as(self) -> Any:
        """What the method's gates depend on, beside the stream."""
        if self._identity is None:
            method = self._method
            tensors = tuple((name, each.data_ptr()) for name, each in method.tensors.items())
            self._identity = id(method), repr(method), tensors, repr(method.facts)
        return self._identity


def _others(kwargs: dict[str, Any]) -> Iterator[Any]:
    """Arguments of a forward that a recording knows nothing of."""
    return (value for name, value in kwargs.items() if name not in _PASSED_ON)


def _seen(block: Block) -> bool:
    """Whether somebody watches modules of a block, who would see nothing of what is repeated."""
    return watched(block.layer) or not (block.lays and block.gathers(MLP))


def _known(gate: Gate) -> bool | None:
    return gate if isinstance(gate, bool) else None


def _settled(
    layer: int, verdicts: Sequence[Verdict] | None, flags: Tensor | None
) -> tuple[bool | Selection, bool | Selection]:
    """The gates of a block as the ledger takes them: what the host knows, else the flags."""
    first, second = (
        Selection(flags[layer, sublayer], UNREAD, UNREAD)
        if flags is not None and (verdicts is None or verdicts[layer][sublayer])
        else verdicts is not None and verdicts[layer][sublayer]
        for sublayer in (0, 1)
    )
    return first, second
