"""``model.generate`` of a model that a method which speculates is attached to.

Where transformers would sample or take the likeliest token in a loop of its own, the loop here
does: one sequence after another, with the same processors of logits, stopping criteria and
streamer. Other searches are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

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
        _refuse(generation_config, given)
        cache = cache_of(given)
        filled = cache is not None and cache.get_seq_length() > 0
        batch, width = input_ids.shape
        if filled and batch > 1:
            raise UserError(
                "speculation runs one sequence after another, and the cache holds several; leave "
                "it out, or give one sequence"
            )
        mask = given.get("attention_mask")
        documents = per_row(trace.documents, batch, "document ids")
        texts = []
        try:
            for row in range(batch):
                if documents is not None:
                    trace.documents = [documents[row]]
                real = torch.ones_like(input_ids[row]) if mask is None else mask[row]
                if not filled:
                    cache = DynamicCache()
                text = _Text(input_ids, row, logits_processor, stopping_criteria)
                rounds = speculate(
                    module,
                    trace,
                    method,
                    input_ids[row][real.bool()].tolist(),
                    limit=generation_config.max_length - width,
                    ends=text.ends,
                    choice=Choice(text.rules(), bool(generation_config.do_sample)),
                    cache=cache,
                )
                written: list[int] = []
                for tokens in rounds:
                    written += tokens
                    if streamer is not None:
                        for token in tokens:
                            streamer.put(torch.tensor([token]))
                texts.append(torch.tensor(written, device=input_ids.device))
        finally:
            trace.documents = documents
        if streamer is not None:
            streamer.end()
        longest = max(map(len, texts))
        filler = generation_config._pad_token_tensor
        filler = 0 if filler is None else int(filler)
        rows = [pad(each, (0, longest - len(each)), value=filler) for each in texts]
        found = torch.cat((input_ids, torch.stack(rows)), 1)
        if not generation_config.return_dict_in_generate:
            return found
        kept = {_CACHE: cache if batch == 1 else None}
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
            self._ids(written), logits.float().repeat(self._batch, 1)
        )[self._row]

    def ends(self, written: Sequence[int]) -> bool:
        """Whether a criterion stops after these tokens."""
        return bool(self._criteria(self._ids(written), None)[self._row])

    def _ids(self, written: Sequence[int]) -> Tensor:
        more = torch.tensor(list(written), dtype=torch.long, device=self._prompt.device)
        return torch.cat((self._prompt, more)).repeat(self._batch, 1)


def _refuse(config: Any, given: Any) -> None:
    wanted = [name for name in _OUTPUTS if getattr(config, name, None)]
    if wanted:
        raise UserError(
            f"{wanted[0]} can't be had of a text that was drafted and verified; leave it out"
        )
    if given.get("inputs_embeds") is not None:
        raise UserError("speculation reads token ids; give input_ids, not inputs_embeds")
