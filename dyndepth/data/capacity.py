"""What a model can take: how many tokens in a row, and which.

A length that stands in a cell's identity is kept or refused; one that is the code's own choice is
cut to what fits (``fitting``). A tokenizer with more tokens than the model has embeddings is
refused; added tokens beyond them are no matter until a text holds one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dyndepth.common.errors import UserError

_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
"""Entries of a configuration that say how many positions there are, in lm-eval's order."""


def longest(model_or_config: Any) -> int | None:
    """Tokens that fit into a model or one of its configuration; None where nothing bounds them.

    Rotary models compute beyond it as well, but were not trained to: it holds for them alike.
    """
    config = _config(model_or_config)
    given = (getattr(config, name, None) for name in _LENGTHS)
    return next((int(length) for length in given if length is not None), None)


def fitting(model: Any, length: int) -> int:
    """``length`` tokens, or as many as fit into ``model`` where those are fewer."""
    most = longest(model)
    return length if most is None else min(length, most)


def check_length(model_or_most: Any, length: int | None, what: str, remedy: str = "") -> None:
    """Raises UserError, in the name of ``what``, for windows of more tokens than fit.

    ``model_or_most`` is a model, its configuration, or what ``longest`` says of them.
    """
    most = model_or_most if isinstance(model_or_most, int | None) else longest(model_or_most)
    if most is not None and length is not None and length > most:
        raise UserError(
            f"{what}: {length} tokens are too long for this model of {most}; "
            f"{remedy or f'give length={most} or less'}"
        )


def embeddings(model_or_config: Any) -> int:
    """How many tokens a model knows, those that only pad its vocabulary included. Raises UserError
    for a configuration that does not say."""
    known = _known(model_or_config)
    if known is None:
        raise UserError("the model's configuration has no vocab_size; give that of a text model")
    return known


def _known(model_or_config: Any) -> int | None:
    if hasattr(model_or_config, "get_input_embeddings"):
        return int(model_or_config.get_input_embeddings().weight.shape[0])
    return getattr(_config(model_or_config), "vocab_size", None)


def check_vocabulary(model_or_config: Any, tokenizer: Any, name: str = "") -> None:
    """Raises UserError for a tokenizer whose vocabulary, or a token that is put into texts (BOS,
    EOS), the model has no embeddings for. ``name`` is the model's, for the message."""
    known = _known(model_or_config)
    put_in = (getattr(tokenizer, f"{each}_token_id", None) for each in ("bos", "eos"))
    most = max(getattr(tokenizer, "vocab_size", 0), *(1 + (token or 0) for token in put_in))
    if known is not None and most > known:
        count = len(tokenizer) if hasattr(tokenizer, "__len__") else most
        raise UserError(
            f"the tokenizer has {max(most, count)} tokens, the model{f' {name}' if name else ''} "
            f"{known}: they do not belong together; give the model its own tokenizer"
        )


def check_tokens(model: Any, tokens: Iterable[int], where: str) -> None:
    """Raises UserError, naming ``where`` they stand, for tokens that ``model`` has no embedding
    for."""
    known, most = embeddings(model), max(tokens, default=0)
    if most >= known:
        raise UserError(
            f"{where} holds the token {most}, and the model has embeddings for 0 to {known - 1}: "
            "the tokenizer has tokens that the model was not given; take them out of the text"
        )


def _config(model_or_config: Any) -> Any:
    """The configuration of the text model."""
    config = getattr(model_or_config, "config", model_or_config)
    return getattr(config, "text_config", None) or config
