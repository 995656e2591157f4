"""Recovered methods: taken from what comes with the project, from the cache, or trained.

A folder holds the adapter, the training curve, and under ``fit`` what the method found when it was
calibrated again under the adapted weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dyndepth.cells.identity import today
from dyndepth.cells.recipe import Recipe, parse_recovery, refuse_drafts
from dyndepth.common.errors import UserError
from dyndepth.common.files import build_once, cache_root
from dyndepth.common.paths import file_part
from dyndepth.data.wheels import say
from dyndepth.models.fingerprints import at_rest, fingerprint

if TYPE_CHECKING:
    import torch

    from dyndepth.data.corpus import Corpus
    from dyndepth.fitting.recovery.adapters import Adapter
    from dyndepth.fitting.recovery.training import Recovered
    from dyndepth.method import DynamicDepthMethod

    Method = TypeVar("Method", bound=DynamicDepthMethod)


FIT = "fit"


def recover_cached(
    method: Method,
    model: torch.nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    seed: int | None = None,
    *,
    refresh: bool = False,
    progress: bool = True,
) -> tuple[Method, Adapter]:
    """``method`` fitted, and an adapter for it by ``recipe``: from the cache if it is there.

    The method holds what it found when calibrated under the adapted weights, so attach it inside
    ``adapted(model, adapter)``. ``seed`` (default: the method's) is of the adapter's start and of
    the order of the text. A folder that the method ships is taken if it was made for this model,
    corpus, recipe, method and seed. The cache lies under ``cache_root()/recovery/<name>/<key>``; a
    training that was killed goes on; ``refresh`` trains again, whatever is kept or shipped. Raises
    UserError as ``training.recover`` does, for a method that speculates, and where several
    processes train.
    """
    from accelerate import PartialState

    from dyndepth.fitting.recovery.adapters import adaptable

    refuse_drafts(method, recipe)
    if PartialState().num_processes > 1:
        raise UserError("recovery trains in one process; start it without `accelerate launch`")
    targets = adaptable(model, recipe)  # said before minutes of training
    seed = method.seed if seed is None else seed
    with at_rest(model):
        shipped = None if refresh else find_shipped(method, model, corpus, recipe, seed)
        if shipped is not None:
            return _load(method, model, shipped)
        folder = cache_root() / "recovery" / file_part(method.name)
        folder /= recovery_key(method, model, corpus, recipe, seed)
        if not refresh and _is_readable(folder, model):
            return _load(method, model, folder)
    unfinished = folder.with_name(f"{folder.name}.training")
    if refresh:
        shutil.rmtree(unfinished, ignore_errors=True)

    def build(work: Path) -> None:
        from dyndepth.fitting.fits import CURVE, fit_cached, save_fit, write_curve
        from dyndepth.fitting.loop import checkpoints
        from dyndepth.fitting.recovery.adapters import (
            SIGNIFICANCE,
            adapted,
            load_adapter,
            transposed,
            write_adapter,
        )
        from dyndepth.fitting.recovery.significance import Scores
        from dyndepth.fitting.recovery.training import recover
        from dyndepth.models.seeding import seeded

        method.anew = refresh
        if not refresh and method.shipped_adapters is not None:
            say(
                f"{method.name} trains an adapter for {method.target_speedup:g}x, which can take "
                f"minutes: {_why_none(method, model)}"
            )
        scores: Scores | None = None
        first: dict[str, Any] = {"tokens": 0, "seconds": 0.0}
        if recipe.keep is not None and recipe.keep < 1:
            # What ranks the modules serves every share of them.
            whole = replace(recipe, keep=1.0)
            asked = {"refresh": refresh, "progress": progress}
            first = recover_cached(method, model, corpus, whole, seed, **asked)[1].card
            scores = Scores.of(first[SIGNIFICANCE], recipe.keep)
        if recipe.kind == "lora":
            fit_cached(method, model, corpus)
        with seeded(seed, next(model.parameters()).device), checkpoints(unfinished):
            found = recover(method, model, corpus, recipe, seed, scores=scores, progress=progress)
        found = replace(
            found, tokens=found.tokens + first["tokens"], seconds=found.seconds + first["seconds"]
        )
        write_adapter(
            work,
            found.factors,
            recipe,
            _card(method, model, corpus, seed, found),
            transposed=any(map(transposed, targets.values())),
        )
        write_curve(work / CURVE, found.curve)
        with adapted(model, load_adapter(work, model)):
            method.calibrate(model, corpus)
        save_fit(method, model, work / FIT)

    build_once(folder, build, lambda: not refresh and _is_readable(folder, model))
    shutil.rmtree(unfinished, ignore_errors=True)
    return _load(method, model, folder)


def fit_and_recover(
    method: Method, model: torch.nn.Module, corpus: Corpus, recovery: str
) -> tuple[Method, Adapter | None]:
    """``method`` ready to be attached inside ``adapted(model, adapter)``; ``none``: no adapter."""
    from dyndepth.fitting.fits import fit_cached

    recipe = parse_recovery(recovery)
    if recipe is None:
        return fit_cached(method, model, corpus), None
    return recover_cached(method, model, corpus, recipe)


def recovery_key(
    method: DynamicDepthMethod, model: torch.nn.Module, corpus: Corpus, recipe: Recipe, seed: int
) -> str:
    """24 hex digits over everything that decides what a recovery finds."""
    from dyndepth.common.digests import method_code
    from dyndepth.fitting.fits import fit_key

    facts = {
        "fit": fit_key(method, model, corpus),
        "recipe": str(recipe),
        "seed": seed,
        "code": method_code(type(method), recovered=True),
        "peft": metadata.version("peft"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def find_shipped(
    method: DynamicDepthMethod, model: torch.nn.Module, corpus: Corpus, recipe: Recipe, seed: int
) -> Path | None:
    """The folder that comes with ``method`` and was made for exactly this; None if there is none.

    Looked for under ``<method.shipped_adapters>/<model's fingerprint>/``, whatever its name.
    """
    from dyndepth.fitting.recovery.adapters import read_card

    if method.shipped_adapters is None:
        return None
    model_print = fingerprint(model)
    wanted = {
        "model": model_print,
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "recipe": str(recipe),
        "fit_version": method.fit_version,
        "seed": seed,
    }
    for folder in sorted((method.shipped_adapters / model_print).glob("*/")):
        card = read_card(folder)
        same = _said(str(card.get("method"))) == _said(repr(method))
        if same and all(card.get(key) == value for key, value in wanted.items()):
            return folder
    return None


def _said(method: str) -> str:
    """A method's repr without fields that are None and say nothing: a card may be older than they
    are."""
    return re.sub(r"\w+=None(, )?", "", method).replace(", )", ")")


def _why_none(method: DynamicDepthMethod, model: torch.nn.Module) -> str:
    """Why ``find_shipped`` finds nothing, for people."""
    model_print = fingerprint(model)
    if method.shipped_adapters is None or not (method.shipped_adapters / model_print).is_dir():
        return f"none is shipped for this model (fingerprint {model_print})"
    return "those shipped for this model are of other settings, text or tokenizer"


def ship(method: DynamicDepthMethod, adapter: Adapter, name: str) -> Path:
    """Copy a recovered folder to where ``find_shipped`` looks, replacing one of that ``name``.

    Raises UserError if the method has no place for it.
    """
    if method.shipped_adapters is None:
        raise UserError(f"{method.name} ships no adapters; give its class shipped_adapters")
    folder = method.shipped_adapters / today(str(adapter.card["model"])) / name
    if folder == adapter.folder:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter.folder, folder, ignore=shutil.ignore_patterns(".*"))
    return folder


def _load(method: Method, model: torch.nn.Module, folder: Path) -> tuple[Method, Adapter]:
    from dyndepth.fitting.fits import load_fit
    from dyndepth.fitting.recovery.adapters import load_adapter

    adapter = load_adapter(folder, model)
    return load_fit(method, model, folder / FIT), adapter


def _is_readable(folder: Path, model: torch.nn.Module) -> bool:
    from dyndepth.fitting.fits import read_fit
    from dyndepth.fitting.recovery.adapters import load_adapter

    try:
        load_adapter(folder, model)
        read_fit(folder / FIT)
    except UserError:
        return False
    return True


def _card(
    method: DynamicDepthMethod,
    model: torch.nn.Module,
    corpus: Corpus,
    seed: int,
    found: Recovered,
) -> dict[str, Any]:
    from dyndepth.fitting.recovery.adapters import SIGNIFICANCE

    last = found.curve[-10:]
    scores = {} if found.scores is None else {SIGNIFICANCE: found.scores.facts()}
    return {
        "model": fingerprint(model),
        "name": method.name,
        "method": repr(method),
        "fit_version": method.fit_version,
        "corpus": corpus.fingerprint,
        "tokenizer": corpus.tokenizer_fingerprint,
        "tokens": found.tokens,
        "parameters": found.parameters,
        "seconds": round(found.seconds, 1),
        "seed": seed,
        "loss_first": found.curve[0]["loss"] if found.curve else None,
        "loss_last": sum(row["loss"] for row in last) / len(last) if last else None,
        **{name: metadata.version(name) for name in ("peft", "torch", "transformers")},
        **scores,
    }
