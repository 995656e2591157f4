"""Methods by name, or as somebody saved them: a folder, or a repository of the hub.

What is saved is a fit, in the one format of ``dyndepth.fitting.fits``: safetensors and JSON, never
a pickle. The code of the method is not in it: that comes with the package that offers the method.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod

METHOD = "method"
"""Folder of the method inside of an export."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = re.compile(r"\s*([\w.-]+)\s*(\(.*)?", re.DOTALL)


def load_method(
    spec: str | Path, *, revision: str | None = None, **parameters: Any
) -> DynamicDepthMethod:
    """The method that ``spec`` names.

    A name, or a spec with parameters (``"name(parameter=value)"``), is of an installed method,
    which is yet to be fitted; ``parameters`` win over those of the spec. Anything else is a fitted
    method that was saved: a folder that ``method.save`` or ``python -m dyndepth.export`` wrote, or
    the hub id of a repository that holds one, ``revision`` its branch, tag or commit. It has the
    parameters it was saved with, and can be attached to the model that it was fitted on, no other.
    A name of an installed method wins over a folder of that name.

    Raises UserError for what cannot be read or had, a method that is not installed, an unknown
    parameter or a value of the wrong kind.
    """
    text = str(spec)
    if not _is_saved(text):
        if revision is not None:
            raise UserError(
                f"revision={revision!r} is of repositories of the hub, and {text!r} names an "
                "installed method; leave it out"
            )
        return registry.load_method(text, **parameters)
    if parameters:
        raise UserError(
            f"the saved method {text!r} has the parameters it was fitted with; leave "
            f"{', '.join(sorted(parameters))} out, or load the method by its name and fit it"
        )
    return _load(_folder(text, revision), text)


def _is_saved(text: str) -> bool:
    named = _NAME.fullmatch(text)
    if named is not None and named[1] in registry.methods():
        return False
    return path_of(text).is_dir() or "/" in text.partition("(")[0] or "\\" in text


def _folder(text: str, revision: str | None) -> Path:
    """Where the saved method lies; brought from the hub where it is there."""
    from dyndepth.fitting.fits import FACTS

    folder, local = path_of(text), True
    if not folder.is_dir() and _REPOSITORY.fullmatch(text) and not text.startswith("."):
        folder, local = _downloaded(text, revision), False
    if revision is not None and local:
        raise UserError(f"the folder {text!r} has no revisions, which are the hub's; leave it out")
    for each in (folder, folder / METHOD):
        if (each / FACTS).is_file():
            return each
    if (folder / "config.json").is_file():
        raise UserError(
            f"{text!r} is a model and no method: what was left out is gone from it; load it by "
            "load_model"
        )
    raise UserError(
        f"there is no saved method in {text!r}: neither {FACTS} nor {METHOD}/{FACTS}; give a "
        "folder that method.save or `python -m dyndepth.export` wrote, a hub id, or a method's name"
    )


def _downloaded(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    from dyndepth.data.wheels import say
    from dyndepth.fitting.fits import CURVE, FACTS, TENSORS

    files = [each for name in (TENSORS, FACTS, CURVE) for each in (name, f"{METHOD}/{name}")]
    say(f"looking for the method {repository} on the hub")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as fault:  # of the network, the hub and the disk, under many names
        reason = " ".join(str(fault).split()) or type(fault).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise UserError(
            f"{repository!r}{at} is neither an installed method, a folder, nor a repository that "
            f"the hub gives ({reason}); give one of these"
        ) from fault


def _load(folder: Path, source: str) -> DynamicDepthMethod:
    from dyndepth.cells.identity import today
    from dyndepth.fitting.fits import CURVE, read_curve, read_fit
    from dyndepth.runtime.binding import Bound

    record, tensors = read_fit(folder)
    method = _built(record, source)
    if record["fit_version"] != method.fit_version:
        raise UserError(
            f"the method in {source!r} was fitted by version {record['fit_version']} of "
            f"{method.name}'s fitting, and version {method.fit_version} is installed; fit it again"
        )
    method.tensors, method.facts = tensors, record["facts"]
    method.curve = read_curve(folder / CURVE)
    method.bound = Bound(today(record["model"]), source, tuple(record["on_model_device"]))
    return method


def _built(record: dict[str, Any], source: str) -> DynamicDepthMethod:
    """The method of a fit's record, with its parameters and nothing found."""
    name = str(record["name"])
    if name not in registry.methods():
        package = record.get("package")
        raise UserError(
            f"the method in {source!r} is {name!r}, which is not installed; "
            + (
                f"install the package that offers it (pip install {package!r})"
                if package
                else f"its class was {record.get('class', 'of a name that is not known')}: install "
                f"the package that has it, with an entry point {name!r} in the group "
                f"{registry.GROUP!r}"
            )
        )
    cls = registry.method_class(name)
    hints, given = get_type_hints(cls), dict(record["parameters"])
    for field, value in given.items():
        # JSON has no tuples.
        if isinstance(value, list) and get_origin(hints.get(field)) is not list:
            given[field] = tuple(value)
    checked = registry.check_parameters(name, given)
    try:
        return cls(**checked)
    except (ValueError, TypeError) as fault:
        raise UserError(f"the method {name!r} in {source!r}: {fault}") from fault
