"""Writes texts under any method, by ``attach`` and the model's own ``generate``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dyndepth.models.seeding import seeded
from dyndepth.runtime.attach import attach
from dyndepth.timing.pairing import draining
from dyndepth.writing.pieces import pieces, text_after
from dyndepth.writing.preparation import prepared, spec_of
from dyndepth.writing.prompts import Message, Prompt, check_room, several, tokens_of
from dyndepth.writing.result import Finish, Generated, Proposal
from dyndepth.writing.settings import Settings, checked

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus
    from dyndepth.method import DynamicDepthMethod
    from dyndepth.runtime.acceptance import Round
    from dyndepth.runtime.trace import Trace

_SHOWN = 24
"""Tokens of the prompt's end that ``Generated.prompt`` has in words."""


@overload
def generate(
    model: Any, tokenizer: Any, prompt: str | Sequence[Message], **how: Any
) -> Generated: ...
@overload
def generate(
    model: Any, tokenizer: Any, prompt: Sequence[str] | Sequence[Sequence[Message]], **how: Any
) -> list[Generated]: ...
def generate(  # type: ignore[misc]  # keywords are written out here alone
    model: Any,
    tokenizer: Any,
    prompt: Any,
    *,
    method: DynamicDepthMethod | str = "dense",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    corpus: Corpus | str | Path | None = None,
    streamer: Any = None,
) -> Generated | list[Generated]:
    """What ``model`` writes after ``prompt`` under ``method``, and what it came to.

    ``prompt`` is a text, the messages of a conversation (``role`` and ``content``, put into words
    by the tokenizer's chat template), or a list of such: these are written one after another, and a
    list comes back. ``method`` is any method, or its spec
    (``"name(parameter=value, target_speedup=1.25)"``); one that speculates writes what dense does.
    It is fitted where it needs to be, on ``corpus``, the name of one, or the embedded text; the fit
    is kept and found again.

    At ``temperature`` 0 the likeliest token is taken. Above it tokens are drawn, among the
    ``top_k`` likeliest or those that make up ``top_p``, from ``seed`` on (text i of a list: from
    ``seed + i``); torch's own generators stay as they were. ``stop`` are texts that end what is
    written. What else the model's generation settings ask for, such as penalties and the tokens
    that end a text, is obeyed. ``streamer`` is transformers'.

    Raises UserError for a prompt without tokens or too long, for settings that are none, and for a
    method that is unknown, has yet to be trained, or does not fit the model.
    """
    settings = checked(
        stop,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    prompts, is_list = several(prompt)
    found, _ = texts_by(
        method, model, tokenizer, prompts, settings, corpus=corpus, streamer=streamer
    )
    return found if is_list else found[0]


def texts_by(
    method: DynamicDepthMethod | str,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    corpus: Corpus | str | Path | None = None,
    streamer: Any = None,
) -> tuple[list[Generated], DynamicDepthMethod]:
    """What ``generate`` writes after each prompt, and the method, fitted where it had to be."""
    read = []
    for number, each in enumerate(prompts):
        where = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        ids = tokens_of(tokenizer, each, where)
        check_room(model, ids, settings.max_new_tokens, where)
        read.append(ids)
    method = prepared(method, model, tokenizer, corpus)
    with attach(model, method) as trace:
        found = [
            _written(model, tokenizer, ids, settings, number, method, trace, streamer)
            for number, ids in enumerate(read)
        ]
    return found, method


def _written(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: Settings,
    number: int,
    method: DynamicDepthMethod,
    trace: Trace,
    streamer: Any,
) -> Generated:
    """The text after ``prompt``, token ids, by ``method``, which is attached to ``model`` with
    ``trace``; it is the one of that ``number``."""
    trace.reset()
    trace.documents = [f"prompt/{number}"]
    tokens, seconds = tokens_after(model, tokenizer, prompt, settings, number, streamer)
    text, stopped = settings.cut(text_after(tokenizer, prompt, tokens, skip_special_tokens=True))
    ends = _ends(model, tokenizer)
    finish: Finish = "stop" if stopped else "end" if tokens[-1] in ends else "limit"
    rounds = trace.speculation.rounds if method.speculates else []
    return Generated(
        text=text,
        tokens=tuple(tokens),
        pieces=pieces(tokenizer, prompt, tokens),
        finish=finish,
        prompt="…" * (len(prompt) > _SHOWN) + tokenizer.decode(list(prompt[-_SHOWN:])),
        prompt_tokens=len(prompt),
        method=spec_of(method),
        seconds=seconds,
        totals=trace.totals(),
        speculation=trace.speculation if method.speculates else None,
        proposals=_proposals(tokenizer, prompt, tokens, rounds),
    )


def tokens_after(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    settings: Settings,
    number: int = 0,
    streamer: Any = None,
) -> tuple[list[int], float]:
    """The tokens that ``model``, as it is, writes after ``prompt``, and the seconds it takes."""
    device = model.get_input_embeddings().weight.device
    asked = torch.tensor([list(prompt)], device=device)
    more: dict[str, Any] = {} if streamer is None else {"streamer": streamer}
    if settings.stop:
        said = _Said(tokenizer, list(prompt), settings)
        more["stopping_criteria"] = StoppingCriteriaList([said])
    config = settings.config(model, tokenizer)
    wait = draining(device)
    with torch.no_grad(), seeded(settings.seed + number, device):
        wait()
        started = time.perf_counter()
        written = model.generate(
            asked, attention_mask=torch.ones_like(asked), generation_config=config, **more
        )
        tokens = written[0, len(prompt) :].tolist()
    return tokens, time.perf_counter() - started


class _Said(StoppingCriteria):
    """Ends a text in which one of those to stop at was said."""

    def __init__(self, tokenizer: Any, prompt: list[int], settings: Settings) -> None:
        self.tokenizer, self.prompt, self.settings = tokenizer, prompt, settings

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        written = input_ids[:, len(self.prompt) :].tolist()
        texts = [
            text_after(self.tokenizer, self.prompt, row, skip_special_tokens=True)
            for row in written
        ]
        ended = [self.settings.cut(text)[1] for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    found = model.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, list | tuple) else {found}


def _proposals(
    tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int], rounds: Sequence[Round]
) -> tuple[Proposal, ...]:
    """The rounds of one text in words; its first token is the prompt's, and in none of them."""
    found = []
    before = [*prompt, *tokens[:1]]
    for each in rounds:
        stay = min(each.accepted, len(each.tokens))  # a text may end inside of a draft
        drafted = pieces(tokenizer, before, each.drafted)
        own = pieces(tokenizer, [*before, *each.tokens[:stay]], each.tokens[stay:])
        found.append(
            Proposal(
                drafted,
                each.accepted,
                own[0] if own else None,
                each.probabilities,
                each.accepted - stay,
            )
        )
        before += each.tokens
    return tuple(found)
