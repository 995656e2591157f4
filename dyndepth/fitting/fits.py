"""What a method's ``fit`` found, kept as safetensors and JSON and bound to the model.

A fit that trained keeps its curve beside it, as a CSV. Training inside ``fit_cached`` that is
killed goes on from its last checkpoint.

A cached fit is addressed by what decides it: method, its code and shipped files, the shared code of
training and calibration, torch and transformers, parameters, fit version, model, its values to the
last bit, dtype, kind of device, attention implementation, corpus and tokenizer. Nothing is ever
unpickled.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dyndepth.common.errors import UserError
from dyndepth.common.files import build_once, cache_root, open_to_readers, read_text, replace_folder
from dyndepth.common.paths import file_part, path_of

if TYPE_CHECKING:
    import torch

    from dyndepth.data.corpus import Corpus
    from dyndepth.method import DynamicDepthMethod

    Method = TypeVar("Method", bound=DynamicDepthMethod)


TENSORS, FACTS, CURVE = "tensors.safetensors", "facts.json", "curve.csv"
_LAYOUT = 1


def fit_cached(
    method: Method, model: torch.nn.Module, corpus: Corpus | None, *, refresh: bool = False
) -> Method:
    """``method`` fitted: from the cache if it is there, else by ``method.fit``; returns it.

    ``refresh`` fits again, also past what comes with the method, and replaces what was kept. A
    kept fit that can't be read is made again. The cache lies under
    ``cache_root()/fits/<name>/<key>``; two processes may fit at once, the second waits and reads.
    """
    from accelerate import PartialState

    from dyndepth.models.fingerprints import at_rest

    alone = PartialState().num_processes == 1
    with at_rest(model):
        folder = cache_root() / "fits" / file_part(method.name) / fit_key(method, model, corpus)
        if alone and not refresh and _is_readable(folder):
            return load_fit(method, model, folder)
    fitted_here = False

    unfinished = folder.with_name(f"{folder.name}.training")

    def build(work: Path) -> None:
        nonlocal fitted_here
        if refresh:
            shutil.rmtree(unfinished, ignore_errors=True)
        _fit(method, model, corpus, unfinished, refresh)
        _write(method, model, work)
        fitted_here = True

    if not alone:
        return _fit_together(method, model, corpus, folder, unfinished, refresh)
    build_once(folder, build, lambda: not refresh and _is_readable(folder))
    shutil.rmtree(unfinished, ignore_errors=True)
    return method if fitted_here else load_fit(method, model, folder)


def _fit(
    method: DynamicDepthMethod,
    model: torch.nn.Module,
    corpus: Corpus | None,
    unfinished: Path,
    refresh: bool,
) -> None:
    """Fit from the method's seed, what was left ``unfinished`` goes on."""
    from dyndepth.fitting.loop import checkpoints
    from dyndepth.models.seeding import seeded

    method.anew, method.bound, method.fit_seconds = refresh, None, None
    started = time.monotonic()
    with seeded(method.seed, next(model.parameters()).device), checkpoints(unfinished):
        method.fit(model, corpus)
    # Of another's fit that this one took from the cache, the method has said the seconds.
    method.fit_seconds = max(time.monotonic() - started, method.fit_seconds or 0.0)


def _fit_together(
    method: Method,
    model: torch.nn.Module,
    corpus: Corpus | None,
    folder: Path,
    unfinished: Path,
    refresh: bool,
) -> Method:
    """As ``fit_cached`` in each process of a distributed run: all train, the first one keeps."""
    from accelerate import PartialState

    kept = not refresh and _is_readable(folder)
    # Nobody may write before everybody has looked.
    PartialState().wait_for_everyone()
    if kept:
        return load_fit(method, model, folder)
    _fit(method, model, corpus, unfinished, refresh)
    if PartialState().is_main_process:
        build_once(folder, lambda work: _write(method, model, work), lambda: False)
        shutil.rmtree(unfinished, ignore_errors=True)
    PartialState().wait_for_everyone()
    return method


def fit_key(method: DynamicDepthMethod, model: torch.nn.Module, corpus: Corpus | None) -> str:
    """24 hex digits over everything that decides what ``fit`` finds."""
    from dyndepth.common.digests import ground_code, method_code
    from dyndepth.common.provenance import versions
    from dyndepth.models.blocks import causal_lm
    from dyndepth.models.fingerprints import at_rest, checksum, fingerprint

    with at_rest(model):
        digests = {"model": fingerprint(model), "values": checksum(model)}
    facts = {
        "layout": _LAYOUT,
        "class": f"{type(method).__module__}.{type(method).__qualname__}",
        "method": repr(method),
        "fit_version": method.fit_version,
        "code": [method_code(type(method)), ground_code()],
        "libraries": [versions()[name] for name in ("torch", "transformers")],
        "device": next(model.parameters()).device.type,
        **digests,
        "dtype": str(next(model.parameters()).dtype),
        "attention": causal_lm(model).config._attn_implementation,
        "corpus": corpus.fingerprint if corpus is not None else None,
        "tokenizer": corpus.tokenizer_fingerprint if corpus is not None else None,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def save_fit(method: DynamicDepthMethod, model: torch.nn.Module, path: str | Path) -> None:
    """Write what ``method`` found on ``model`` into the folder ``path``, all of it or nothing.

    A fit that is already there is replaced. Raises UserError if the folder holds something
    else, TypeError if ``method.facts`` is not plain JSON.
    """
    folder = path_of(path)
    if folder.exists() and not _is_fit_or_empty(folder):
        raise UserError(f"{str(folder)!r} holds something other than a fit; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(method, model, work)
        open_to_readers(work)
        replace_folder(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load_fit(method: Method, model: torch.nn.Module, path: str | Path) -> Method:
    """Restore what ``save_fit`` wrote to ``path`` into ``method``; returns it.

    Tensors go to the model's device if they were on the model's device when saved, else to the
    CPU. Raises UserError if files are missing or garbled, or if the fit belongs to another
    model, method, fit version or parameters.
    """
    from dyndepth.cells.identity import today
    from dyndepth.models.fingerprints import fingerprint

    record, tensors = read_fit(path)
    _check_same(path, "model", today(record["model"]), fingerprint(model))
    _check_same(path, "method", record["name"], method.name)
    _check_same(path, "fit version", record["fit_version"], method.fit_version)
    kept, current = record["parameters"], _parameters(method)
    for field in dataclasses.fields(method):
        default = json.loads(json.dumps(field.default, default=repr))
        if field.name in current:
            expected = kept.get(field.name, default)
            _check_same(path, f"parameter {field.name}", expected, current[field.name])
    device = next(model.parameters()).device
    method.tensors = {
        name: tensor.to(device) if name in record["on_model_device"] else tensor
        for name, tensor in tensors.items()
    }
    method.facts, method.fit_seconds = record["facts"], record.get("seconds")
    method.curve = read_curve(path_of(path) / CURVE)
    method.bound = None
    return method


def _write(method: DynamicDepthMethod, model: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    from dyndepth.common.registry import distribution
    from dyndepth.models.fingerprints import fingerprint

    if json.loads(json.dumps(method.facts, default=repr)) != method.facts:
        raise TypeError(f"{method.name}: facts must be plain JSON values, not {method.facts!r}")
    device = next(model.parameters()).device
    if method.curve:
        write_curve(folder / CURVE, method.curve)
    file = folder / TENSORS
    save_file({k: v.detach().cpu().contiguous() for k, v in method.tensors.items()}, file)
    record = {
        "layout": _LAYOUT,
        "name": method.name,
        "method": repr(method),
        "class": f"{type(method).__module__}.{type(method).__qualname__}",
        "package": distribution(method.name),
        "fit_version": method.fit_version,
        "parameters": _parameters(method),
        "model": fingerprint(model),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "on_model_device": sorted(
            name for name, tensor in method.tensors.items() if tensor.device == device
        ),
        "facts": method.facts,
        "seconds": method.fit_seconds,
    }
    (folder / FACTS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_fit(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors of the fit in the folder ``path``, of whatever it is.

    The record has the keys ``name``, ``fit_version``, ``parameters``, ``model``, ``facts``. Raises
    UserError if files are missing or garbled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = path_of(path)

    def refuse(reason: object) -> UserError:
        return UserError(f"the fit in {str(folder)!r} can't be read ({reason}); fit again")

    try:
        record = json.loads((folder / FACTS).read_text(encoding="utf-8-sig"))
        content = (folder / TENSORS).read_bytes()
        if record["layout"] != _LAYOUT:
            raise refuse(f"its layout is {record['layout']}, this version reads {_LAYOUT}")
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise refuse(f"{TENSORS} does not have the content that was saved")
        for key in ("name", "fit_version", "parameters", "model", "on_model_device", "facts"):
            record[key]
        return record, load(content)
    except KeyError as error:
        raise refuse(f"{FACTS} has no entry {error}") from error
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise refuse(error) from error


def _is_readable(folder: Path) -> bool:
    try:
        read_fit(folder)
    except UserError:
        return False
    return True


def write_curve(file: Path, curve: list[dict[str, float]]) -> None:
    """Write a training curve as CSV, a row a step, counted from 1."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["step", *(curve[0] if curve else ())], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"step": n} | row for n, row in enumerate(curve, start=1))


def read_curve(file: Path) -> list[dict[str, float]]:
    """The rows of a training curve kept as CSV, without their step; empty where there is none."""
    if not file.is_file():
        return []
    found = csv.DictReader(io.StringIO(read_text(file)))
    rows = [{key: float(value) for key, value in row.items()} for row in found]
    return [{key: value for key, value in row.items() if key != "step"} for row in rows]


def _is_fit_or_empty(folder: Path) -> bool:
    return folder.is_dir() and {x.name for x in folder.iterdir()} <= {TENSORS, FACTS, CURVE}


def _parameters(method: DynamicDepthMethod) -> dict[str, Any]:
    """The fields that make up the method's repr, as JSON values."""
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.repr}
    parsed: dict[str, Any] = json.loads(json.dumps(values, default=repr))
    return parsed


def _check_same(path: str | Path, what: str, kept: Any, wanted: Any) -> None:
    if kept != wanted:
        raise UserError(
            f"the fit in {str(path)!r} was made for another {what} ({kept!r}, not {wanted!r}); "
            "fit again"
        )
