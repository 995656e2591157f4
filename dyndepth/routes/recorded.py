"""A recorded cell's method on its model again, and the documents that it is traced on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from dyndepth.cells.cell import CellSpec, parameters_text
from dyndepth.cells.identity import Row, agrees
from dyndepth.cells.recipe import NONE
from dyndepth.common.errors import UserError
from dyndepth.routes.own_text import own_texts
from dyndepth.sweep.settings import Settings

PASSAGES = "wikipedia_bpb"
"""The evaluation task whose documents are recorded."""


@dataclass(frozen=True)
class Recording:
    """One file to write: ``identity`` is a recorded cell's, None where a plan is run freely."""

    label: str
    file: str
    settings: Settings
    plan: CellSpec | None = None
    identity: Row | None = None

    @property
    def speculates(self) -> bool:
        """Whether its method drafts what the whole model verifies."""
        from dyndepth.common.registry import method_class, methods

        name = self.plan.method if self.plan else str((self.identity or {})["method"])
        return name in methods() and method_class(name).speculates

    def record(self, loaded: Loaded, texts: dict[str, str], options: dict[str, Any]) -> Any:
        """The routes of ``texts``, or of what the method writes after them (``generate``). Raises
        UserError if a cell can't be rebuilt as it was."""
        from dyndepth.routes.own_text import continued
        from dyndepth.routes.trace import record

        identity = self.identity and self.identity | {"cell": self.file}
        with self.ready(loaded) as method:
            on, length = (loaded.model, loaded.tokenizer, method), options["length"]
            if options.get("generate"):
                written, own = continued(*on, texts, length, options["generate"])
                return record(*on, written, own, identity=identity)
            return record(*on, texts, options["prompt_length"], length=length, identity=identity)

    @contextmanager
    def ready(self, loaded: Loaded) -> Iterator[Any]:
        """The method, fitted; inside, ``loaded.model`` has its adapter merged.

        Raises UserError if a cell can't be rebuilt as it was, or if its plans follow the outcomes
        of the documents that were scored: on others it has none.
        """
        from dyndepth.fitting.recovery.adapters import adapted
        from dyndepth.fitting.recovery.kept import fit_and_recover
        from dyndepth.method import DynamicDepthMethod

        method = self.plan.build() if self.plan else rebuilt(self.identity or {})
        if type(method).candidates is not DynamicDepthMethod.candidates:
            raise UserError(
                f"{method.name} chooses plans by the outcomes of the documents that are scored, so "
                "there is nothing to record on others"
            )
        loaded.load(self.settings, self.identity)
        recovery = self.identity["recovery"] if self.identity else NONE
        method, adapter = fit_and_recover(method, loaded.model, loaded.corpus, recovery)
        with adapted(loaded.model, adapter):
            yield method


class Loaded:
    """The model that is loaded, its tokenizer and its corpus."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.loaded: tuple[Any, ...] | None = None

    def load(self, wanted: Settings, identity: Row | None) -> None:
        """Have what ``wanted`` names. Raises UserError where it is not what a cell was run on."""
        from dyndepth.data.corpus import load_corpus
        from dyndepth.models.loading import load_model, load_tokenizer, resolve_device

        key = (wanted.model, wanted.revision, wanted.dtype, wanted.attn_implementation)
        if key != self.loaded:
            print(f"loading {wanted.model}", flush=True)
            self.tokenizer = load_tokenizer(wanted.model, wanted.revision, wanted.trust_remote_code)
            self.corpus = load_corpus(wanted.corpus, self.tokenizer)
            self.model = load_model(
                wanted.model,
                dtype=wanted.dtype,
                device=resolve_device(wanted.device),
                attn_implementation=wanted.attn_implementation,
                revision=wanted.revision,
                trust_remote_code=wanted.trust_remote_code,
            )
            self.loaded = key
        if identity is None:
            return
        found = {
            "model_fingerprint": self.model.dyndepth.fingerprint,
            "tokenizer_fingerprint": self.corpus.tokenizer_fingerprint,
            "corpus_fingerprint": self.corpus.fingerprint,
        }
        for name, remedy in (
            ("model_fingerprint", f"{wanted.model} is another model now"),
            ("tokenizer_fingerprint", f"{wanted.model} has another tokenizer now"),
            ("corpus_fingerprint", "it was fitted on other text; name that by --corpus"),
        ):
            if not agrees(name, identity[name], found[name]):
                raise UserError(f"{remedy} ({name} {found[name]}, recorded {identity[name]})")


def rebuilt(identity: Row) -> Any:
    """The method of a recorded cell, not fitted.

    Raises:
        UserError: this version's method is another one, or has other parameters.
    """
    from dyndepth.common.registry import method_class, parse_methods

    name, text = identity["method"], identity["parameters"]
    ((_, parameters),) = parse_methods(f"{name}({text})" if text else name)
    if any(f.name == "phases" for f in fields(method_class(name))):
        parameters["phases"] = identity["phases"]
    method = CellSpec(name, identity["target_speedup"], identity["seed"], parameters).build()
    found = (parameters_text(method), method.phases, method.fit_version)
    if found != (text, identity["phases"], identity["fit_version"]):
        raise UserError(f"the method {name!r} has changed since this cell was run; sweep again")
    return method


def documents(file: str | None, count: int) -> dict[str, str]:
    """Document id -> text: the first of a file's, or evaluation passages.

    Raises UserError for an unreadable file.
    """
    return dict(list(own_texts(file, None).items())[:count]) if file else passages_of(count)


def passages_of(count: int) -> dict[str, str]:
    """Document id -> text of evaluation passages: those that a sweep with ``--limit`` scores, so
    that rules which depend on the document decide as they did there."""
    return dict(_passages(count))


def _passages(count: int) -> Iterator[tuple[str, str]]:
    from dyndepth.evaluation.evaluate import sample
    from dyndepth.tasks.documents import passages

    texts = passages()
    for index in sample(PASSAGES, len(texts), count, 0):
        yield f"{PASSAGES}/{index}", texts[index]
