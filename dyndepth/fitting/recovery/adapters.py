"""Adapters on the disk, and merged into a model for evaluation and timing.

A folder holds peft's own two files (``adapter_config.json``, ``adapter_model.safetensors``: peft
loads them as they are) and a card that binds them to a model, a method and a recipe. Nothing is
ever unpickled. ``adapted`` merges: no wrapper, no FLOPs and no time are added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dyndepth.cells.identity import today
from dyndepth.cells.recipe import ALL, RANKED, Recipe, parse_recovery
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.models.blocks import causal_lm, projections
from dyndepth.models.fingerprints import at_rest, fingerprint, known_as, values_digest

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "recovery.json"
_LAYOUT = 1
_PREFIX = "base_model.model."
_MARK = "dyndepth_adapter"
_CARD_KEYS = ("model", "sha256", "recipe", "method", "corpus", "tokens", "seed")

SIGNIFICANCE = "significance"
"""Entry of the card of an adapter whose modules were ranked: see ``significance.Scores``."""

Targets = dict[str, nn.Linear | Conv1D]
"""Name of a projection in the causal LM -> its module."""
Factors = dict[str, tuple[Tensor, Tensor]]
"""Name of a projection in the causal LM -> A ``[rank, in]``, B ``[out, rank]``."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank change of some of a model's projections: ``W + scale * B @ A``.

    Attributes:
        folder: where it lies.
        factors: of each projection.
        scale: alpha / rank.
        card: what it was made from: ``model`` (fingerprint), ``sha256`` of the weights, ``recipe``,
            ``method`` (repr), ``corpus`` (fingerprint), ``tokens`` trained on, ``seed`` and more.
    """

    folder: Path
    factors: Factors
    scale: float
    card: dict[str, Any]


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    recipe: Recipe,
    card: dict[str, Any],
    *,
    transposed: bool = False,
) -> None:
    """Write an adapter into ``folder``, its weights in bfloat16; ``card`` is completed.

    ``transposed``: as the function of that name says of the adapted projections, for peft.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": factor.detach().cpu().bfloat16().contiguous()
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # "branch.projection" of every block: what peft matches at the end of a module's name.
    targets = sorted({".".join(name.split(".")[-2:]) for name in factors})
    if recipe.modules == RANKED:
        targets = list(factors)
    LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))
    card = {
        "layout": _LAYOUT,
        **card,
        "recipe": str(recipe),
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of the adapter in ``folder``. Raises UserError if there is none to be read."""
    path = path_of(folder)
    if not (path / WEIGHTS).is_file() and (path / "adapter_model.bin").exists():
        raise _refused(path, f"its weights are a pickle; save them as {WEIGHTS}")
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8-sig"))
        if card["layout"] != _LAYOUT:
            raise ValueError(f"its layout is {card['layout']}, this version reads {_LAYOUT}")
        for key in _CARD_KEYS:
            card[key]
    except KeyError as fault:
        raise _refused(path, f"{CARD} has no entry {fault}") from fault
    except (OSError, ValueError, TypeError) as fault:
        raise _refused(path, fault) from fault
    return dict(card)


def load_adapter(folder: str | Path, model: nn.Module) -> Adapter:
    """The adapter in ``folder``, for ``model`` (not adapted).

    Raises UserError if it was made for another model, does not fit its projections, or can't be
    read: missing, garbled, changed since it was written, pickled, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = path_of(folder)
    card = read_card(path)
    if today(card["model"]) != (here := fingerprint(model)):
        raise UserError(
            f"the adapter in {str(path)!r} was made for another model ({card['model']}, not "
            f"{here}); recover this one"
        )
    try:
        content = (path / WEIGHTS).read_bytes()
        if hashlib.sha256(content).hexdigest() != card["sha256"]:
            raise ValueError(f"{WEIGHTS} does not have the content that was saved")
        recipe = parse_recovery(card["recipe"])
        if recipe is None:
            raise ValueError("its card names no recipe")
        _check_config(json.loads((path / CONFIG).read_text(encoding="utf-8-sig")), recipe)
        factors = _factors(load(content), trained(card, adaptable(model, recipe)), recipe)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as fault:
        raise _refused(path, fault) from fault
    return Adapter(path, factors, recipe.scale, card)


@contextmanager
def adapted(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """``model`` with ``adapter`` merged into its weights inside the ``with`` block.

    On exit, also by an exception, the very tensors that were there before are back. None changes
    nothing. Raises UserError if the model is adapted already, is another one than the adapter's,
    or has a projection that can't be merged into.
    """
    if adapter is None:
        yield
        return
    if hasattr(model, _MARK):
        raise UserError("the model is adapted already; leave that adapter first")
    with at_rest(model):
        # Merged values depend on the model's type; what was merged does not.
        here, merged = fingerprint(model), f"{values_digest(model)} {adapter.card['sha256']}"
    if today(adapter.card["model"]) != here:
        raise UserError(f"the adapter in {str(adapter.folder)!r} was made for another model")
    linears = {n: linear(n, causal_lm(model).get_submodule(n)) for n in adapter.factors}
    kept = {name: module.weight.data for name, module in linears.items()}
    try:
        for name, module in linears.items():
            first, second = (f.to(module.weight.device).float() for f in adapter.factors[name])
            change = adapter.scale * (second @ first)
            change = change.T if transposed(module) else change
            module.weight.data = (kept[name].float() + change).to(kept[name].dtype)
        setattr(model, _MARK, adapter.card["sha256"])
        with known_as(model, merged, here):
            yield
    finally:
        for name, module in linears.items():
            module.weight.data = kept[name]
        if hasattr(model, _MARK):
            delattr(model, _MARK)


def linear(name: str, module: nn.Module) -> nn.Linear | Conv1D:
    """``module`` if it is a plain linear map whose weights lie in memory; else UserError."""
    weight = getattr(module, "weight", None)
    if hasattr(module, "base_layer"):
        matter, remedy = "it carries an adapter already", "merge or unload that one"
    elif isinstance(weight, nn.Parameter) and weight.is_meta:
        raise UserError(f"{name} is offloaded, so no adapter can be merged into it; load it whole")
    elif type(weight) is not nn.Parameter or not weight.is_floating_point():
        matter, remedy = "it is quantised", "load the model in float32 or bfloat16"
    elif isinstance(module, nn.Linear | Conv1D) and type(module) in (nn.Linear, Conv1D):
        return module
    else:
        matter, remedy = "its class is somebody's own", "name other targets"
    raise UserError(
        f"{name} is no plain linear map ({matter}: {type(module).__name__}), so no adapter can be "
        f"merged into it; {remedy}"
    )


def transposed(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as ``[in, out]``, as those of GPT-2 do."""
    return isinstance(module, Conv1D)


def adaptable(model: nn.Module, recipe: Recipe) -> Targets:
    """The projections that ``recipe`` adapts, by name in the causal LM. Raises UserError, with the
    cause, if an adapter cannot sit on one of them."""
    found = projections(model, None if recipe.targets == ALL else recipe.roles).items()
    return {name: linear(name, module) for name, module in found}


def trained(card: Mapping[str, Any], targets: Targets) -> Targets:
    """Those of ``targets`` that were trained in the end: all, or what ``card`` says was kept of
    them. Raises KeyError, TypeError or ValueError for a card that is of other targets."""
    if SIGNIFICANCE not in card:
        return targets
    rows = card[SIGNIFICANCE]["modules"]
    if [row["module"] for row in rows] != list(targets):
        raise ValueError(f"{CARD} ranks other modules than this model has")
    return {row["module"]: targets[row["module"]] for row in rows if row["kept"]}


def _factors(tensors: dict[str, Tensor], targets: Targets, recipe: Recipe) -> Factors:
    """The tensors of a file as factors of ``targets``, each one's shape checked. Raises
    ValueError."""
    found: Factors = {}
    for name, module in targets.items():
        shape_of = module.weight.shape
        rows, columns = reversed(shape_of) if transposed(module) else shape_of
        pair = []
        for letter, shape in (("A", (recipe.rank, columns)), ("B", (rows, recipe.rank))):
            tensor = tensors.pop(f"{_PREFIX}{name}.lora_{letter}.weight", None)
            if tensor is None:
                raise ValueError(f"it has no factor {letter} for {name}")
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"factor {letter} of {name} is {tensor.dtype} {list(tensor.shape)}, not "
                    f"floating {list(shape)}"
                )
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"factor {letter} of {name} holds something that is no number")
            pair.append(tensor)
        found[name] = (pair[0], pair[1])
    if tensors:
        raise ValueError(f"it holds {next(iter(tensors))}, which the recipe does not name")
    return found


def _check_config(config: dict[str, Any], recipe: Recipe) -> None:
    """That peft would merge as ``adapted`` does. Raises ValueError."""
    wanted = {
        "peft_type": "LORA",
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "bias": "none",
    }
    # Not fan_in_fan_out: peft goes by the module, whatever that says.
    wanted |= dict.fromkeys(("use_rslora", "use_dora"), False)
    wanted |= dict.fromkeys(("rank_pattern", "alpha_pattern"), {})
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value:
            raise ValueError(f"{CONFIG} says {key}={found!r} where the card says {value!r}")


def _refused(folder: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split())
    return UserError(f"the adapter in {str(folder)!r} can't be read ({text}); recover again")
