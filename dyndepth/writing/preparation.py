"""The method that a text is written under, ready to be attached."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.common.errors import UserError
from dyndepth.common.paths import EMBEDDED
from dyndepth.common.spec import parameters_of

if TYPE_CHECKING:
    from dyndepth.data.corpus import Corpus
    from dyndepth.method import DynamicDepthMethod


def prepared(
    method: DynamicDepthMethod | str,
    model: Any,
    tokenizer: Any,
    corpus: Corpus | str | Path | None = None,
) -> DynamicDepthMethod:
    """``method``, or the one that a spec names, fitted to ``model``: by itself, from the cache of
    fits, or now on ``corpus``, or the one of that name (by default the embedded text), and kept.

    Raises UserError for a method that has yet to be trained, which takes longer than somebody waits
    for a text, and for one that chooses by outcomes that a text yet to be written has not.
    """
    from dyndepth.fitting.saved import load_method
    from dyndepth.method import DynamicDepthMethod

    if isinstance(method, str):
        method = load_method(method)
    if not isinstance(method, DynamicDepthMethod):
        raise UserError(f"method takes a method or the name of one, not {method!r}")
    if type(method).candidates is not DynamicDepthMethod.candidates:
        raise UserError(
            f"{method.name} chooses plans by the outcomes of the documents that are scored, so it "
            "can write no text; take another method"
        )
    if method.fitted:
        return method
    from dyndepth.data.corpus import Corpus, load_corpus
    from dyndepth.fitting.fits import fit_cached

    if corpus is None or isinstance(corpus, str | Path):
        corpus = load_corpus(corpus or EMBEDDED, tokenizer)
    if not isinstance(corpus, Corpus):
        raise UserError(f"corpus takes what load_corpus gives, or a name for it, not {corpus!r}")
    if _has_to_train(method, model, corpus):
        raise UserError(
            f"{method.name} has not been trained on this model yet; train it by `python -m "
            "dyndepth.fit` with the same model, parameters and corpus, or give a method on which "
            ".fit(model, corpus) was called"
        )
    return fit_cached(method, model, corpus)


def _has_to_train(method: DynamicDepthMethod, model: Any, corpus: Corpus) -> bool:
    """Whether ``fit`` would train now: what it finds neither comes with the method nor is kept."""
    from dyndepth.common.files import cache_root
    from dyndepth.common.paths import file_part
    from dyndepth.fitting.fits import fit_key
    from dyndepth.models.blocks import Decoder

    expenses = method.expenses(len(Decoder.of(model).blocks), model, corpus)
    if expenses.shipped or not any(reading.backwards for reading in expenses.fit):
        return False
    key = fit_key(method, model, corpus)
    return not (cache_root() / "fits" / file_part(method.name) / key).is_dir()


def spec_of(method: DynamicDepthMethod) -> str:
    """The method with those parameters that are not its defaults, as a spec that names it again."""
    own = [field for field in dataclasses.fields(method) if field.repr]
    given = {field.name: getattr(method, field.name) for field in own}
    told = [
        f"{field.name}={_word(given[field.name])}"
        for field in own
        if given[field.name] != field.default
    ]
    return f"{method.name}({', '.join(told)})" if told else method.name


def _word(value: Any) -> str:
    """A value as a spec has it: bare where that reads as the same."""
    bare = str(value).lower() if value in (True, False, None) else str(value)
    try:
        return bare if parameters_of(f"x(a={bare})", "method") == {"a": value} else repr(value)
    except UserError:
        return repr(value)
