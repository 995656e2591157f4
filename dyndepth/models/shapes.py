"""Shapes: models of a public configuration with random weights, to be timed without a download.

``shape:NAME`` is one of ``shapes.json``, where the fields of public models stand with the id of the
model that they describe; ``shape:PATH`` is any config.json, or a folder that holds one. How
long a forward takes follows from the shape; what it says means nothing, so nothing is scored.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from dyndepth.common.digests import facts_digest
from dyndepth.common.errors import UserError
from dyndepth.common.paths import check_path, path_of
from dyndepth.common.spec import nearest

SHAPE = "shape:"
"""What the name of such a model begins with."""
SEED = 0
"""Of the weights."""


def is_shape(name: Any) -> bool:
    """Whether ``name`` is that of a model with random weights."""
    return isinstance(name, str) and name.startswith(SHAPE)


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Known shapes by name: ``source``, the id of a model card, ``config``, its fields, and of some
    their ``use``, see ``shape_for``."""
    text = Path(__file__).with_name("shapes.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def shape_for(use: str) -> str:
    """The shape that stands for many in one ``use``: ``bench``, ``training`` or ``trial``."""
    return next(SHAPE + name for name, one in shapes().items() if one.get("use") == use)


def refuse_shape(model_or_name: Any) -> None:
    """Raises UserError, for whoever scores or trains, where the weights are random."""
    name = getattr(getattr(model_or_name, "dyndepth", None), "name", model_or_name)
    if is_shape(name):
        raise UserError(
            f"{name} has random weights: it can be timed (bench, timing), not scored; give a model "
            "with weights"
        )


def shape_config(name: str) -> Any:
    """The configuration of the shape ``name``. Raises UserError for a name that is not known, or a
    file that is no configuration."""
    from transformers import AutoConfig

    wanted = name.removeprefix(SHAPE)
    if wanted in shapes():
        return AutoConfig.for_model(**deepcopy(shapes()[wanted]["config"]))
    check_path("model", wanted)
    file = path_of(wanted)
    file = file / "config.json" if wanted and file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"no shape {wanted!r}; {nearest(wanted, shapes())}known are {', '.join(shapes())}, or "
            "give the path of a config.json, or of a folder that holds one"
        )
    try:
        # Not given, transformers would ask on the terminal about code that a model brings.
        return AutoConfig.from_pretrained(str(file), revision=None, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"{name} can't be read as a configuration: {said}") from error


def random_model(config: Any, dtype: str, device: str, attn_implementation: str | None) -> Any:
    """A causal LM of ``config`` with the weights that its class begins training with.

    Made where it will run, in its precision: nothing is copied, and no memory is taken twice. The
    weights follow from ``SEED``, the precision and the kind of device, and leave the random
    numbers of others alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dyndepth.models.seeding import seeded

    place = torch.device(device)
    with seeded(SEED, place), place:
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )


def random_fingerprint(model: Any) -> str:
    """16 hex digits over all that random weights follow from, in place of the weights: these may
    be 16 GB, and nobody shares them."""
    given = model.config.to_dict()
    facts = {name: value for name, value in given.items() if name not in _OF_THE_FILE}
    made = {"seed": SEED, "dtype": str(model.dtype), "device": model.device.type}
    return facts_digest({"config": facts, "random": made})[:16]


_OF_THE_FILE = ("_name_or_path", "transformers_version", "architectures", "dtype")
"""Fields that say where a configuration lay and what wrote it."""
