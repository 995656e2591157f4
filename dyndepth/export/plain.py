"""A model without some of its blocks, as an ordinary model of its family with fewer."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dyndepth.common.errors import UserError
from dyndepth.method import ATTENTION, DynamicDepthMethod
from dyndepth.models.blocks import Decoder


def check_exportable(model: Any) -> None:
    """Raises UserError for a model that no plain checkpoint can be made of: one that is wrapped,
    quantised, not in memory, or of a class that it brought along."""
    parts = Decoder.of(model)
    if hasattr(model, "get_base_model"):
        raise UserError("the model is wrapped by peft; merge and unload that adapter first")
    if getattr(parts.config, "quantization_config", None) is not None:
        raise UserError(
            "the model's weights are quantised, and what they stand for would be written; load it "
            "in float32 or bfloat16"
        )
    if type(model).__module__.partition(".")[0] == "transformers_modules":
        raise UserError(
            "the model's class is code that came with it, which a plain checkpoint does not hold; "
            "give a model whose class is in transformers"
        )
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UserError("some of the model's weights are offloaded; load it whole, on one device")


def kept_blocks(method: DynamicDepthMethod, executed: torch.Tensor) -> tuple[list[int], str]:
    """Indices of the blocks that a plain checkpoint of ``method`` has, and why there is none.

    ``executed`` is the fraction of tokens that executed each sublayer, ``[layers, 2]``, over a
    prompt and generated tokens. One of the two results is empty.
    """
    if method.granularity != "static":
        return [], (
            f"{method.name} decides by {method.granularity}, and a plain checkpoint runs the same "
            "blocks for everything that it reads"
        )
    if method.substitutes or method.weighs:
        return [], (
            f"{method.name} puts something in the place of what it leaves out, or weighs what is "
            "left, and a plain checkpoint does neither"
        )
    if method.phases == "generation":
        return [], (
            f"{method.name} leaves blocks out in generation only, and a plain checkpoint runs the "
            "same blocks for the prompt"
        )
    runs = executed > 0.5
    if not bool(((executed == 0) | (executed == 1)).all()):
        return [], f"{method.name} executed some sublayers for a part of the tokens only"
    apart = (runs[:, ATTENTION] != runs.all(1)) | (runs.any(1) != runs.all(1))
    if bool(apart.any()):
        return [], (
            f"{method.name} leaves {int((~runs)[apart].sum())} sublayers out whose block keeps the "
            "other one, and each block of a plain checkpoint has an attention and an MLP"
        )
    kept = torch.nonzero(runs.all(1)).flatten().tolist()
    if not kept:
        return [], f"{method.name} leaves out every block"
    return kept, ""


def shortened(model: Any, kept: Sequence[int]) -> Any:
    """A causal LM of the blocks ``kept`` of ``model``, renumbered. It shares the weights that are
    in ``model`` now; buffers that no checkpoint holds are not made: it is to be written, not run.

    Raises UserError where a block's arithmetic depends on its index and an index changes.
    """
    parts = Decoder.of(model)
    config = shortened_config(parts.config, parts.record, len(parts.layers), kept)
    with torch.device("meta"):
        fresh = type(parts.model)(config)
    stem = re.escape(f"{parts.record.decoder}.{parts.record.layers}.")
    place, new = re.compile(rf"{stem}(\d+)\."), {old: index for index, old in enumerate(kept)}
    weights = {}
    for name, tensor in parts.model.state_dict().items():
        found = place.match(name)
        if found is None:
            weights[name] = tensor
        elif int(found[1]) in new:
            begin, end = found.span(1)
            weights[f"{name[:begin]}{new[int(found[1])]}{name[end:]}"] = tensor
    fresh.load_state_dict(weights, strict=True, assign=True)
    fresh.tie_weights()
    generation = getattr(parts.model, "generation_config", None)
    if generation is not None:
        fresh.generation_config = copy.deepcopy(generation)
    return fresh.eval().requires_grad_(False)


def shortened_config(config: Any, record: Any, layers: int, kept: Sequence[int]) -> Any:
    """``config`` of a model of ``layers`` blocks, for ``kept`` of them. Raises UserError as
    ``shortened`` does."""
    if list(kept) != list(range(len(kept))):
        for name, value, matter in record.indexed:
            if getattr(config, name, value) != value:
                raise UserError(
                    f"this {config.model_type} has no plain checkpoint without its inner blocks "
                    f"({name}={getattr(config, name)}): {matter}; leave out its last blocks only, "
                    "or export a method that stays one, such as phases=generation"
                )
    own = copy.deepcopy(config)
    for name in record.per_layer:
        entries = getattr(config, name, None)
        if entries is not None:
            if len(entries) < layers:
                raise UserError(f"{name} has {len(entries)} entries for {layers} blocks")
            setattr(own, name, [entries[index] for index in kept])
    for name in record.first_layers:
        count = getattr(config, name, None)
        if count is not None:
            setattr(own, name, sum(index < count for index in kept))
    own.num_hidden_layers = len(kept)
    return own


def per_layer_settings(config: Any, record: Any) -> dict[str, Any]:
    """What ``config`` says of its number of blocks and of single ones, by name."""
    names = ("num_hidden_layers", *record.per_layer, *record.first_layers)
    return {
        name: getattr(config, name) for name in names if getattr(config, name, None) is not None
    }


def irregular(config: Any, record: Any) -> list[str]:
    """Settings of single blocks that a configuration of as many blocks would not have by itself.

    Programs that work these out from a block's index, in place of reading them, get them wrong.
    """
    said = {name: getattr(config, name, None) for name in record.per_layer}
    given = {k: v for k, v in config.to_dict().items() if k not in record.per_layer}
    usual = type(config)(**given)
    return [
        name for name, value in said.items() if value and list(value) != getattr(usual, name, None)
    ]


def write_checkpoint(fresh: Any, tokenizer: Any, folder: Path) -> None:
    """Write what ``shortened`` made, and the tokenizer, in Hugging Face format."""
    from transformers.utils import logging

    generation = getattr(fresh, "generation_config", None)
    if generation is not None:
        # Some that are published do not pass the check that saving makes: they are copied.
        fresh.generation_config = type(generation)()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        fresh.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    if generation is not None:
        fresh.generation_config = generation
        generation.to_json_file(folder / "generation_config.json", use_diff=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
