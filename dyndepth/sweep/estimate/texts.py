"""Which tokens a sweep's tasks are: counted where the documents are here, else assumed.

Groups and tags are their tasks. Nothing is downloaded: of a data set that is not in the cache the
number of documents is taken from ``tasks.json``, and words become tokens by ``TOKENS_A_WORD``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import DENSE, CellSpec
from dyndepth.evaluation.chat import Chat
from dyndepth.models.shapes import is_shape
from dyndepth.sweep.estimate.passes import Pass, alone, checked, scored, written
from dyndepth.sweep.settings import chat_of

if TYPE_CHECKING:
    from dyndepth.evaluation.language_model import DyndepthLM
    from dyndepth.evaluation.scoring import Group
    from dyndepth.sweep.settings import Settings

SAMPLE = 64
"""Documents of a task whose requests are made; of more, a drawn sample stands for all."""
UNKNOWN = {"documents": 2000, "context": 60, "choices": 4, "continuation": 5}
"""Of a task that nothing is known of."""
TOKENS_A_WORD = 1.35
"""Of English text, with its marks."""
LIMIT = 256
"""lm-eval's limit of what a task writes that names none."""


@dataclass(frozen=True)
class Text:
    """What scoring one task reads.

    Attributes:
        task: its name; ``asked`` is what the user named, which may be a group of tasks.
        documents: how many are scored.
        counted: ``data``, ``sample`` (of the data), ``assumed`` (tokens) or ``unknown`` (documents
            as well).
        groups: of scored documents that stand for all; prompts: tokens of those to be completed, up
            to ``limit`` new ones.
        times: documents for each of those.
    """

    task: str
    asked: str
    documents: int
    counted: str
    groups: list[Group] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    limit: int = 0
    times: float = 1.0

    @property
    def tokens(self) -> float:
        """Tokens of all documents, as compute.csv counts them: a document's context once, and all
        continuations but for their last tokens."""
        total = sum(
            len(group.context) + sum(len(tokens) - 1 for tokens in group.continuations)
            for group in self.groups
        )
        passes = written(self.prompts, self.limit, 1, 1) if self.prompts else []
        return self.times * (total + sum(one.tokens for one in passes))

    def passes(self, batch_size: int, budget: int, sharing: bool, pooled: bool) -> list[Pass]:
        """The forwards that score it."""
        rows = 1 if pooled else batch_size
        found = written(self.prompts, self.limit, rows, budget, self.times) if self.prompts else []
        if self.groups and pooled:
            return found + alone(self.groups, self.times)
        if self.groups:
            found += scored(self.groups, batch_size, budget, sharing, self.times)
            found += checked(self.groups, batch_size, budget, sharing)
        return found


def texts_of(
    settings: Settings, limits: Mapping[str, int | None], longest: int | None
) -> list[Text]:
    """What scoring the tasks of ``limits`` reads, groups expanded, each task once.

    Raises:
        UserError: a missing tokenizer, or one that cannot write the conversations that are asked
            for, or documents that cannot be scored.
    """
    reader = _reader(settings, longest)
    found: dict[str, Text] = {}
    for asked, limit in limits.items():
        for place, task in enumerate(members(asked, settings.include_path)):
            if task not in found:
                found[task] = _text(settings, reader, asked, task, limit, place)
    return list(found.values())


def members(name: str, include_path: str | None) -> list[str]:
    """The tasks that a name stands for: of a group or a tag those in it, at any depth."""
    from dyndepth.tasks import OFFLINE, task_manager

    if name in OFFLINE:
        return [name]
    index = task_manager([name], include_path).task_index
    return list(dict.fromkeys(_members(name, index)))


def _members(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    entry = index.get(name)
    kind = entry.kind.name if entry is not None else "TASK"
    if entry is not None and kind == "TAG":
        for each in sorted(entry.tags):
            yield from _members(each, index)
    elif entry is not None and kind == "GROUP":
        yield from _listed((entry.cfg or {}).get("task"), name, index)
    else:
        yield name


def _listed(task: Any, group: str, index: Mapping[str, Any]) -> Iterator[str]:
    for each in [task] if isinstance(task, str) else task or []:
        if isinstance(each, dict) and isinstance(each.get("task"), list):
            yield from _listed(each["task"], str(each.get("group", group)), index)
            continue
        named = each if isinstance(each, str) else each.get("task") or each.get("group")
        if isinstance(named, str):
            yield from _members(named, index)


def _reader(settings: Settings, longest: int | None) -> DyndepthLM:
    """What makes token ids of requests; of a shape, which has no tokenizer, the embedded one's."""
    from dyndepth.common.paths import EMBEDDED
    from dyndepth.evaluation.language_model import DyndepthLM
    from dyndepth.models.loading import load_tokenizer
    from dyndepth.sweep.estimate.models import skeleton

    named = (settings.model, settings.revision, settings.trust_remote_code)
    named = (EMBEDDED, None, False) if is_shape(settings.model) else named
    method = CellSpec(DENSE).build()
    reader = DyndepthLM(
        skeleton(*named), method, load_tokenizer(*named), max_length=longest, progress=False
    )
    reader.converse(chat_counted(settings))
    return reader


def chat_counted(settings: Settings) -> Chat:
    """How prompts are put that are counted: as in the run; but a shape has no chat template."""
    asked = chat_of(settings)
    return Chat(system_instruction=asked.system_instruction) if is_shape(settings.model) else asked


def _text(
    settings: Settings, reader: DyndepthLM, asked: str, task: str, limit: int | None, place: int
) -> Text:
    from dyndepth.evaluation.evaluate import quiet_lm_eval

    with offline(), quiet_lm_eval():
        loaded = _loaded(task, settings.include_path)
        if loaded is None:
            return _assumed(settings, reader, asked, task, limit, place)
        return _counted(settings, reader, loaded, asked, limit)


@contextmanager
def offline() -> Iterator[None]:
    """Without the network: what is not in the cache is not there."""
    import datasets
    from huggingface_hub import constants

    kept = datasets.config.HF_DATASETS_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_DATASETS_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_OFFLINE, constants.HF_HUB_OFFLINE = kept


def _loaded(task: str, include_path: str | None) -> Any:
    """The task with its documents; None where they are not here."""
    from dyndepth.data import wheels
    from dyndepth.tasks import OFFLINE, task_manager

    if task in OFFLINE:
        wheels.asset("data")
        return task_manager([task], include_path).load([task])["tasks"][task]
    try:
        return task_manager([task], include_path).load([task])["tasks"][task]
    # Whatever a data set's own code raises: the run says what is wrong with it.
    except Exception:
        return None


def _counted(
    settings: Settings, reader: DyndepthLM, task: Any, asked: str, limit: int | None
) -> Text:
    from dyndepth.evaluation.evaluate import sample, set_shots

    name = task.task_name
    set_shots(task, settings.num_fewshot)
    size = len(task.eval_docs)
    documents = size if limit is None else min(size, limit)
    drawn = sample(name, size, min(documents, SAMPLE), settings.sample_seed)
    task.build_all_requests(samples=drawn, **reader.chat.building(reader))
    reader.document_index = {name: drawn}
    requests = task.instances
    counted = "data" if documents <= SAMPLE else "sample"
    found: dict[str, Any] = {"times": documents / len(drawn)} if drawn else {}
    if task.OUTPUT_TYPE == "generate_until":
        prompts, _ = reader.prompts(requests)
        found["prompts"] = [len(prompt.tokens) for prompt in prompts]
        found["limit"] = max((prompt.limit for prompt in prompts), default=0)
    else:
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            owners, pairs = reader.windows(requests)
        else:
            owners, pairs = list(range(len(requests))), [reader.pair(one) for one in requests]
        ids = [reader.document(requests[owner]) for owner in owners]
        found["groups"] = reader.groups(ids, pairs)[0]
    return Text(name, asked, documents, counted, **found)


@cache
def _facts() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("tasks.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)["tasks"]
    return found


def _framing(settings: Settings, reader: DyndepthLM, shots: int) -> int:
    """Tokens that a system instruction and a template's marks add to a prompt."""
    chat = chat_counted(settings)
    system = chat.system_instruction
    if not chat.apply_chat_template:
        return len(reader.tok_encode(system)) if system else 0
    turns = [{"role": "system", "content": system}] if system else []
    for role in ("user", "assistant") * (shots if chat.fewshot_as_multiturn else 0) + ("user",):
        turns.append({"role": role, "content": "-"})
    return len(reader.tok_encode(reader.apply_chat_template(turns)))


def _assumed(
    settings: Settings,
    reader: DyndepthLM,
    asked: str,
    task: str,
    limit: int | None,
    place: int,
) -> Text:
    """What is known of a task without its documents; ``place`` is its own in its group."""
    from dyndepth.evaluation.scoring import Group
    from dyndepth.tasks import task_manager

    entry = task_manager([task], settings.include_path).task_index.get(task)
    config = (entry.cfg if entry is not None else None) or {}
    facts = _facts().get(task) or next(
        (one for name, one in _facts().items() if task.startswith(f"{name}_")), None
    )
    known = facts if facts is not None else UNKNOWN
    parts = known.get("parts", 1)
    number = place % parts
    size = known["documents"] * (number + 1) // parts - known["documents"] * number // parts
    documents = size if limit is None else min(size, limit)
    own = config.get("num_fewshot") or 0
    shots = own if settings.num_fewshot is None or own == 0 else settings.num_fewshot
    if settings.num_fewshot is not None and config.get("num_fewshot") is None:
        shots = settings.num_fewshot
    words = known["context"] * (1 + shots) + shots * known["continuation"]
    context = max(1, round(words * TOKENS_A_WORD)) + _framing(settings, reader, shots)
    more = max(1, round(known["continuation"] * TOKENS_A_WORD))
    counted = "assumed" if facts is not None else "unknown"
    if config.get("output_type") == "generate_until":
        most = (config.get("generation_kwargs") or {}).get("max_gen_toks", LIMIT)
        some = min(documents, SAMPLE)
        times = documents / max(1, some)
        return Text(task, asked, documents, counted, [], [context] * some, int(most), times)
    # As many as make usual batches; no two begin alike.
    some = min(documents, SAMPLE)
    contexts = 1 if known.get("shared", True) else known["choices"]
    groups = [
        Group(f"{task}/{n}", [n] * context, [[0] * more] * (known["choices"] // contexts))
        for n in range(some * contexts)
    ]
    return Text(task, asked, documents, counted, groups, [], 0, documents / max(1, some))
