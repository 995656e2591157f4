"""What a text is to go on after: words, or a conversation, as tokens that the model can take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import check_tokens, longest

Message = Mapping[str, str]
Prompt = str | Sequence[Message]
"""A text, or the messages of one conversation, each with ``role`` and ``content``."""


def several(prompt: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether it was a list of them."""
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence) or not prompt:
        raise UserError(
            "a prompt is a text, a list of messages with role and content, or a list of these, "
            f"not {prompt!r}"
        )
    if all(isinstance(each, Mapping) for each in prompt):
        return [prompt], False
    for number, each in enumerate(prompt):
        nested, is_list = several(each)
        if is_list:
            raise UserError(
                f"prompt {number} is a list of {len(nested)} prompts; give a text or the messages "
                "of one conversation in each place"
            )
    return list(prompt), True


def tokens_of(tokenizer: Any, prompt: Prompt, where: str) -> list[int]:
    """The token ids of ``prompt``, at least one; ``where`` names it. Raises UserError for a prompt
    without tokens, and for messages that the tokenizer cannot put into words."""
    ids = _ids(tokenizer, prompt, where)
    if not ids:
        raise UserError(f"{where} has no tokens; give at least one word")
    return ids


def check_room(model: Any, ids: Sequence[int], more: int, where: str) -> None:
    """Raises UserError for a prompt that leaves ``model`` no room to write ``more`` tokens, or that
    holds a token which it has no embedding for."""
    most = longest(model)
    if most is not None and len(ids) + more > most:
        raise UserError(
            f"{where} has {len(ids)} tokens, which leaves no room for {more} more in the {most} "
            "that the model takes; give a smaller max_new_tokens or a shorter prompt"
        )
    check_tokens(model, ids, where)


def _ids(tokenizer: Any, prompt: Prompt, where: str) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer([prompt], verbose=False)["input_ids"][0])
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} is a conversation, and the tokenizer has no chat template; give it as a text"
        )
    messages = [dict(each) for each in prompt]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as fault:  # of the template, under many names
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise UserError(
            f"{where}: the tokenizer's chat template does not take these messages ({reason}); give "
            "each a role and a content that it knows"
        ) from fault
    # The template writes the special tokens itself.
    return list(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])
