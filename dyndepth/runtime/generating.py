"""``model.generate`` of a model that a method which speculates is attached to.

Where transformers would sample or take the likeliest token in a loop of its own, the loop here
does: one sequence after another, with the same processors of logits, stopping criteria and
streamer. Processors and criteria must go by the tokens and logits that they are given alone: they
are asked about tokens that don't stand, too. What the loop cannot do as transformers does is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from dyndepth.common.errors import UserError
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.caches import CACHE_ARGUMENTS, cache_of
from dyndepth.runtime.choosing import Choice
from dyndepth.runtime.patching import called_as
from dyndepth.runtime.speculation import speculate
from dyndepth.runtime.trace import Trace, per_row

_CACHE = next(
    name for name in CACHE_ARGUMENTS if name in GenerateDecoderOnlyOutput.__dataclass_fields__
)
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_GIVEN = {"attention_mask", "position_ids", "cache_position", "use_cache", "logits_to_keep"}
_GIVEN |= set(CACHE_ARGUMENTS)
_GIVEN |= {"tokenizer", "assistant_tokenizer"}
"""What ``generate`` hands to ``_sample``; of a tokenizer, the criteria know already."""
_REMEMBERING = (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that remember what they were asked before."""


@contextmanager
def speculating(model: Any, trace: Trace, method: DynamicDepthMethod) -> Iterator[None]:
    """Inside, ``model.generate`` drafts with ``method``, which is attached, and verifies."""

    def sample(
        module: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **given: Any,
    ) -> Any:
        config, (batch, width) = generation_config, input_ids.shape
        _refuse(module, config, given, logits_processor)
        if synced_gpus:
            raise UserError("speculation does not wait for other processes; leave out synced_gpus")
        if batch > 1:
            _refuse_several(stopping_criteria, streamer)
        cache = _cache(batch, config, given)
        prompts = _prompts(input_ids, config, given)
        documents = per_row(trace.documents, batch, "document ids")
        lengths = trace.prompt_length
        rows = per_row(lengths, batch, "prompt lengths") if isinstance(lengths, Tensor) else None
        texts = []
        try:
            for row, prompt in enumerate(prompts):
                if documents is not None:
                    trace.documents = [documents[row]]
                if rows is not None:
                    trace.prompt_length = rows[row : row + 1]
                if row:
                    cache = _cache(batch, config, given)
                text = _Text(input_ids, row, logits_processor, stopping_criteria)
                rounds = speculate(
                    module,
                    trace,
                    method,
                    prompt,
                    limit=config.max_length - width,
                    ends=text.ends,
                    choice=Choice(text.rules(), bool(config.do_sample)),
                    cache=cache,
                )
                written: list[int] = []
                for tokens in rounds:
                    written += tokens
                    if streamer is not None:
                        for token in tokens:
                            streamer.put(torch.tensor([token]))
                texts.append(torch.tensor(written, dtype=torch.long, device=input_ids.device))
        finally:
            trace.documents, trace.prompt_length = documents, lengths
        if streamer is not None:
            streamer.end()
        longest = max(map(len, texts))
        filler = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        filled = [pad(each, (0, longest - len(each)), value=filler) for each in texts]
        found = torch.cat((input_ids, torch.stack(filled)), 1)
        if not config.return_dict_in_generate:
            return found
        kept = {_CACHE: cache if batch == 1 and given.get("use_cache", True) else None}
        return GenerateDecoderOnlyOutput(sequences=found, **kept)  # type: ignore[arg-type]

    def others(module: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            f"{method.name} drafts what one sequence continues with; beams and other models' "
            "drafts have no place in it: leave out num_beams, assistant_model and prompt lookup"
        )

    members: dict[str, Callable[..., Any]] = {"_sample": sample}
    members |= dict.fromkeys(("_beam_search", "_assisted_decoding"), others)
    with called_as(model, members):
        yield


class _Text:
    """One sequence of a batch, as the processors and criteria of transformers want to see it: they
    may know something of each row, so all rows are what this one is."""

    def __init__(self, prompts: Tensor, row: int, processors: Any, criteria: Any) -> None:
        self._batch, self._row, self._prompt = len(prompts), row, prompts[row]
        self._processors, self._criteria = processors, criteria

    def rules(self) -> Callable[[Sequence[int], Tensor], Tensor] | None:
        """What the processors do; None where there are none."""
        if not self._processors:
            return None
        return lambda written, logits: self._processors(
            self._ids(written), logits.float().to(self._prompt.device).repeat(self._batch, 1)
        )[self._row]

    def ends(self, written: Sequence[int]) -> bool:
        """Whether a criterion stops after these tokens."""
        return bool(self._criteria(self._ids(written), None)[self._row])

    def _ids(self, written: Sequence[int]) -> Tensor:
        more = torch.tensor(list(written), dtype=torch.long, device=self._prompt.device)
        return torch.cat((self._prompt, more)).repeat(self._batch, 1)


def _prompts(input_ids: Tensor, config: Any, given: Any) -> list[list[int]]:
    """The tokens of each sequence without padding, those before them that are in a cache included:
    where only what follows these was given, something of their number stands for them."""
    batch, width = input_ids.shape
    cache, mask = cache_of(given), given.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    whole = getattr(config, "_mask_length", width) if mask is None else mask.shape[1]
    before = past if past and whole != width else 0
    if mask is None:
        mask = torch.ones(batch, before + width, dtype=torch.bool, device=input_ids.device)
    mask = mask.bool()
    if not bool(mask[:, -1].all()):
        raise UserError(
            "speculation goes on from the last token, which is padding; pad on the left"
        )
    if past and not bool(mask.all()):
        raise UserError("speculation reads no padding out of a cache; leave out one of the two")
    real = mask[:, before:]
    positions = given.get("position_ids")
    if positions is not None:
        counted = (mask.long().cumsum(1) - 1)[:, -positions.shape[-1] :]
        seen = mask[:, -positions.shape[-1] :]
        if not torch.equal(positions.expand_as(counted)[seen], counted[seen].to(positions)):
            raise UserError("speculation counts positions by itself; leave out position_ids")
    return [[0] * before + ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]


def _cache(batch: int, config: Any, given: Any) -> Any:
    """The caller's cache, or a new one in the place of that which generate made."""
    cache = cache_of(given)
    if cache is None or not getattr(cache, "_is_user_defined", False):
        kind = getattr(config, "cache_implementation", None)
        if kind not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation={kind!r} cannot give up drafted tokens; leave it out"
            )
        return DynamicCache()
    if batch > 1:
        raise UserError(
            "speculation runs one sequence after another, which cannot share a cache; leave it "
            "out, or give one sequence"
        )
    return cache


def _refuse_several(criteria: Any, streamer: Any) -> None:
    """Raises UserError for what goes by all sequences of a batch at once."""
    if streamer is not None:
        raise UserError("speculation writes one sequence after another; stream one at a time")
    # Without an end of text, transformers writes sequences on until the last has come to its end.
    if any(hasattr(each, "eos_token_id") for each in criteria):
        return
    other = next((each for each in criteria if not isinstance(each, MaxLengthCriteria)), None)
    if other is not None:
        raise UserError(
            f"without an eos_token_id, where a {type(other).__name__} ends one sequence is for the "
            "others to say, and speculation writes one after another; give an eos_token_id, or one "
            "sequence"
        )


def _refuse(module: Any, config: Any, given: Any, processors: Any) -> None:
    """Raises UserError for what would not be as without the method, or not at all."""
    wanted = [name for name in _OUTPUTS if getattr(config, name, None)]
    if wanted and config.return_dict_in_generate:
        raise UserError(
            f"{wanted[0]} can't be had of a text that was drafted and verified; leave it out"
        )
    if given.get("inputs_embeds") is not None:
        raise UserError("speculation reads token ids; give input_ids, not inputs_embeds")
    unknown = [name for name in given if given[name] is not None and name not in _GIVEN]
    if unknown:
        raise UserError(f"speculation cannot hand {unknown[0]} to the model; leave it out")
    if "prepare_inputs_for_generation" in vars(module):
        raise UserError(
            "speculation reads token ids alone, and a learned prompt, say, is put before this "
            "model's; take adapters of another kind"
        )
    for each in processors:
        if isinstance(each, _REMEMBERING):
            raise UserError(
                f"a {type(each).__name__} remembers tokens that it was asked about, and drafted "
                "ones need not stand; leave it out"
            )
