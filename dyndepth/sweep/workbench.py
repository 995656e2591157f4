"""What a sweep needs to compute cells: the model, its tokenizer, the corpus, fitted methods."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import CellSpec, cell_identity
from dyndepth.cells.identity import Row
from dyndepth.cells.recipe import parse_recovery
from dyndepth.cells.times import Shape
from dyndepth.common.digests import harness_code, task_content, task_files
from dyndepth.common.errors import UserError
from dyndepth.common.provenance import conditions, git_commit, versions
from dyndepth.models.loading import SPREAD, resolve_device
from dyndepth.sweep.grid import asked_level, modes, timeable
from dyndepth.sweep.settings import Settings, chat_of

if TYPE_CHECKING:
    from dyndepth.evaluation.evaluate import Evaluation


def free_memory() -> None:
    """Give back what a failed cell may still hold on the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class Workbench:
    """One model, loaded once, on which every cell of the sweep is computed.

    ``documents`` says how many are scored, by task in their order (None: all). Everything that can
    be wrong besides the weights is looked at before they are read.

    Raises:
        UserError: a missing or unsupported model, a missing corpus, a tampered asset.
    """

    def __init__(self, settings: Settings, documents: dict[str, int | None]) -> None:
        from dyndepth.data.corpus import load_corpus
        from dyndepth.fitting.recovery.adapters import adaptable
        from dyndepth.models.loading import checked_config, load_model, load_tokenizer

        self.settings = settings
        self.tasks, self.limits = list(documents), documents
        self.device = resolve_device(settings.device)
        named = (settings.model, settings.revision, settings.trust_remote_code)
        self.tokenizer = load_tokenizer(*named)
        self.chat = chat_of(settings)
        self.chat.check(self.tokenizer)
        self.corpus = load_corpus(settings.corpus, self.tokenizer)
        loaded = bring_tasks(settings, self.tasks)
        check_room(loaded, checked_config(*named), self.tokenizer)
        self._data = identity_of_data(settings, loaded)
        self.num_fewshot = self._data["num_fewshot"]
        self.model = load_model(
            settings.model,
            dtype=settings.dtype,
            device="auto" if settings.device == SPREAD else self.device,
            attn_implementation=settings.attn_implementation,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
        check_generation(loaded, self.model)
        self._check_modes()
        for recipe in filter(None, map(parse_recovery, settings.recovery)):
            adaptable(self.model, recipe)
        self.batch_size = settings.batch_size
        self._fitted: tuple[CellSpec, Any, Any] | None = None
        self._scored: Any = None

    def _check_modes(self) -> None:
        """Raises UserError for a mode that was asked for and cannot be timed here: before anything
        is scored."""
        from dyndepth.timing.measure import check_recordable

        if self.settings.timing != "off":
            modes(self.settings, self.device)
            check_recordable(self.model, self.settings.mode)

    @property
    def fingerprint(self) -> str:
        """The model's."""
        return self.model.dyndepth.fingerprint

    @cached_property
    def shared_identity(self) -> Row:
        """What the identities of all cells on this workbench share."""
        known = identity_of_weights(self.model) | self._data
        return shared_identity(self.settings, self.limits, self.corpus, self.device, known)

    def identity(self, plan: CellSpec) -> Row:
        """The full identity of the plan's cell on this workbench."""
        return cell_identity(plan, self.shared_identity)

    def provenance(self, plan: CellSpec) -> Row:
        """Conditions of the cell that are recorded beside its identity."""
        method = plan.build()
        adapter = self._fitted[2] if self._fitted is not None and self._fitted[0] == plan else None
        card = adapter.card if adapter is not None else {}
        return conditions(self.device) | {
            "paper": method.paper,
            "granularity": method.granularity,
            "uses_labels": method.uses_labels,
            "speculates": method.speculates,
            "needs_training": method.needs_training,
            "adapter_sha256": card.get("sha256"),
            "recovery_tokens": card.get("tokens"),
            "recovery_seconds": card.get("seconds"),
            "batch_size_used": self.batch_size,
        }

    @contextmanager
    def fitted(self, plan: CellSpec) -> Iterator[Any]:
        """The plan's method, fitted, and inside the block the model with the plan's adapter merged.

        What is scored and then timed is one and the same object.
        """
        from dyndepth.fitting.recovery.adapters import adapted

        if self._fitted is None or self._fitted[0] != plan:
            self._fitted = (plan, *self._fit(plan))
        with adapted(self.model, self._fitted[2]):
            yield self._fitted[1]

    def _fit(self, plan: CellSpec) -> tuple[Any, Any]:
        """The plan's method, and its adapter or None."""
        from dyndepth.fitting.recovery.kept import fit_and_recover

        return fit_and_recover(plan.build(), self.model, self.corpus, plan.recovery)

    def evaluate(self, plan: CellSpec) -> Evaluation:
        """Score the plan's cell.

        Where the device has no room for a batch, this cell and those after it are scored in
        batches of half the size: how a score is computed changes with it, what it is does not.
        """
        from accelerate.utils.memory import should_reduce_batch_size

        with self.fitted(plan) as method:
            self._scored = method
            while True:
                try:
                    return self._evaluate(method)
                except RuntimeError as fault:
                    if self.batch_size == 1 or not should_reduce_batch_size(fault):
                        raise
                # Here, where the failed forward's tensors are no longer held by its traceback.
                self.batch_size //= 2
                free_memory()

    def _evaluate(self, method: Any) -> Evaluation:
        from dyndepth.evaluation.evaluate import Evaluation, evaluate

        return Evaluation.joined(
            evaluate(self.model, self.tokenizer, method, tasks, **how)
            for tasks, how in self._tasks_by_limit()
        )

    def _tasks_by_limit(self) -> list[tuple[list[str], dict[str, Any]]]:
        """Tasks that are scored with one limit, and how ``evaluate`` is to score them."""
        by_limit: dict[int | None, list[str]] = {}
        for task, limit in self.limits.items():
            by_limit.setdefault(limit, []).append(task)
        shared = {
            "seed": self.settings.sample_seed,
            "num_fewshot": self.num_fewshot,
            "batch_size": self.batch_size,
            "include_path": self.settings.include_path,
            **self.chat.settings(),
        }
        return [(tasks, {"limit": limit} | shared) for limit, tasks in by_limit.items()]

    def measure(
        self, plan: CellSpec, samples: list[Row], mode: str, shapes: Sequence[Shape] = ()
    ) -> list[Row]:
        """Time the plan's method against dense in one ``mode``, both on the weights that were
        scored, on the ``shapes``; if there are none on those that were asked for, or the level's.
        ``samples`` are its scored documents, of which the timed run has to reproduce some. A method
        that foresees has no rows: the clock would see it look ahead; nor has one that speculates,
        if none of the shapes that were asked for is of one sequence."""
        from dyndepth.evaluation.evaluate import let_choose, scored_documents
        from dyndepth.evaluation.language_model import DyndepthLM
        from dyndepth.timing.measure import measure

        with self.fitted(plan) as method:
            asked = shapes or self.settings.timing_shapes
            if method.foresees or (asked and not timeable(asked, method.name)):
                return []
            if self._scored is not method:  # a bound that was scored earlier has yet to choose
                for tasks, how in self._tasks_by_limit():
                    let_choose(self.model, self.tokenizer, method, tasks, progress=False, **how)
                self._scored = method
            reader = DyndepthLM(self.model, method, self.tokenizer, progress=False)
            reader.converse(self.chat)
            check = scored_documents(samples, reader, self.num_fewshot, self.settings.include_path)
            return measure(
                self.model,
                method,
                self.corpus,
                level=asked_level(self.settings, self.device, shapes),
                mode=mode,
                compiled_dense=self.settings.compiled_dense,
                seed=self.settings.sample_seed,
                check=check,
            )


def identity_of_weights(model: Any) -> Row:
    """What a loaded model gives to the identities of its cells."""
    return {
        "model_fingerprint": model.dyndepth.fingerprint,
        "revision": model.dyndepth.revision or "",
        "attn_implementation": model.config._attn_implementation,
    }


def identity_of_data(settings: Settings, tasks: Mapping[str, Any]) -> Row:
    """What the ``tasks``, which are those of ``bring_tasks``, give to the identities of cells."""
    own = {task.get_config("num_fewshot") or 0 for task in tasks.values()}
    return {
        "num_fewshot": shots(settings, own),
        "data_fingerprint": data_fingerprint(settings, tasks),
    }


def shared_identity(
    settings: Settings, documents: dict[str, int | None], corpus: Any, device: str, known: Row
) -> Row:
    """What the identities of all cells of a sweep share. ``known`` has what follows from weights
    (``identity_of_weights``) and from the tasks (``identity_of_data``)."""
    return {
        "model": settings.model,
        "tokenizer_fingerprint": corpus.tokenizer_fingerprint,
        "dtype": settings.dtype,
        "device": device.partition(":")[0],
        "tasks": list(documents),
        "limit": documents,
        "sample_seed": settings.sample_seed,
        **chat_of(settings).identity(corpus.tokenizer),
        "batch_size": settings.batch_size,
        "corpus_fingerprint": corpus.fingerprint,
        **versions(),
        "harness_code": harness_code(),
        "git_commit": git_commit(),
        **known,
    }


def bring_tasks(settings: Settings, tasks: Sequence[str]) -> dict[str, Any]:
    """Get the evaluation data here before the first cell needs it: lm-eval's tasks by name.

    Raises:
        UserError: it cannot be had.
    """
    from dyndepth.data import wheels
    from dyndepth.tasks import OFFLINE, task_manager

    if set(tasks) & set(OFFLINE):
        wheels.asset("data")
    found: dict[str, Any] = {}
    for name in tasks:
        try:
            found |= task_manager([name], settings.include_path).load([name])["tasks"]
        except Exception as fault:
            reason = " ".join(str(fault).split())
            raise UserError(f"task {name} cannot be loaded: {reason}") from fault
    return found


def shots(settings: Settings, own: set[int]) -> int | None:
    """The examples before each question: what the user asked for, else what the tasks' files say;
    None where these say different numbers (``own``), so that each task keeps its own."""
    if settings.num_fewshot is not None:
        return settings.num_fewshot
    return next(iter(own)) if len(own) == 1 else None


def check_room(tasks: Mapping[str, Any], config: Any, tokenizer: Any) -> None:
    """Raises UserError for a task that generates as many tokens as the model takes, or more: there
    would be no room for a prompt."""
    from lm_eval.models.utils import resolve_max_length

    most = resolve_max_length(config, tokenizer)
    for asked in _generating(tasks, None):
        asked.check_room(most)


def check_generation(tasks: Mapping[str, Any], model: Any) -> None:
    """Raises UserError for a task that asks for more than greedy generation by ``model`` can do,
    or a model that does by itself; see ``GenerationSettings``."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for asked in _generating(tasks, model):
        asked.check_rules(vocabulary, model.device)


def _generating(tasks: Mapping[str, Any], model: Any) -> Iterator[Any]:
    """The ``GenerationSettings`` of the tasks that are answered by writing."""
    from dyndepth.evaluation.generation_settings import GenerationSettings

    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            given = task.get_config("generation_kwargs") or {}
            yield GenerationSettings.of(model, given, f"task {name}")


def data_fingerprint(settings: Settings, tasks: Mapping[str, Any]) -> str:
    """What pins the evaluation data: that of the offline suite, the files of ``--include_path``,
    and the contents of all other ``tasks``, which are those of ``bring_tasks``, one by one; see
    ``identity.same_data``."""
    from dyndepth.data import wheels
    from dyndepth.tasks import OFFLINE

    parts = []
    if set(tasks) & set(OFFLINE):
        parts.append(wheels.data_fingerprint("data"))
    if settings.include_path:
        parts.append(task_files(settings.include_path))
    contents: dict[str, str] = {}
    for name, task in tasks.items():
        if name not in OFFLINE:
            contents |= task_content(task, settings.num_fewshot)
    if contents:
        parts.append(",".join(f"{name}={digest}" for name, digest in sorted(contents.items())))
    return "+".join(parts)
