"""Evaluation of the dense model against lm-eval's own ``HFLM`` on the same requests.

A part of ``python -m dyndepth.bench``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dyndepth.cells.cell import DENSE
from dyndepth.common.registry import load_method
from dyndepth.evaluation import language_model
from dyndepth.evaluation.evaluate import drawn_tasks, quiet_lm_eval
from dyndepth.evaluation.language_model import DyndepthLM
from dyndepth.models.loading import load_tokenizer, loaded, named
from dyndepth.timing.pairing import interleave, ratio

TASKS = {
    "socialiqa": ("socialiqa", 0),
    "quartz": ("quartz", 0),
    "last_word": ("last_word", 0),
    "wikipedia_bpb": ("wikipedia_bpb", 0),
    "socialiqa, 5 shots": ("socialiqa", 5),
}
"""Task and examples before each question, by the name of the line."""
BATCH_SIZES = (1, 8, 32)
"""Of ``HFLM``; the fastest of them is compared with."""


def evaluation(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both on the same documents, in float32; a printed line each.

    ``ratio`` is HFLM's seconds / ours, the median over rounds in which the two alternate; ours
    include the gate, and texts are tokenised anew each time. ``differing`` counts the documents
    whose answer is another (None where there is no answer), ``gap`` is the largest difference of
    two log-likelihoods in nats, ``gap_a_token`` the same divided by the text's tokens.
    """
    model = loaded(vars(options), "float32")
    tokenizer = load_tokenizer(*named(vars(options)))
    lines = {}
    for name, (task, shots) in TASKS.items():
        with quiet_lm_eval():
            requests, index = requests_of(task, shots, options.documents)
            ours = DyndepthLM(model, load_method(DENSE), tokenizer, progress=False)
            ours.document_index = index
            stock = {size: stock_model(model, tokenizer, size) for size in BATCH_SIZES}
            best = min(stock, key=lambda size: seconds(Run(stock[size], requests)))
            runs = {"stock": Run(stock[best], requests), "ours": Run(ours, requests)}
            times = interleave(
                {key: run.run for key, run in runs.items()},
                repeats=options.repeats,
                warmup=1,
                device=options.device,
            )
        found = ratio(times["stock"], times["ours"])
        lines[name] = line = {
            "ratio": found.median,
            "low": found.low,
            "high": found.high,
            "batch_size": best,
            "documents": len({request.doc_id for request in requests}),
            **compared(requests, runs["stock"].found, runs["ours"].found, ours),
        }
        answers = line["differing"]
        print(
            f"evaluation/{name:20} {line['documents']} documents: {line['ratio']:.2f} "
            f"[{line['low']:.2f}, {line['high']:.2f}] times as fast as HFLM at batch size {best}; "
            f"{'no answers' if answers is None else f'{answers} answers differ'}, log-likelihoods "
            f"by at most {line['gap']:.1e} nats, {line['gap_a_token']:.1e} a token",
            flush=True,
        )
    return lines


def requests_of(task: str, shots: int, documents: int) -> tuple[list[Any], dict[str, list[int]]]:
    """lm-eval's requests of a sample of a task's documents, and which documents these are."""
    loaded, drawn = drawn_tasks(task, documents, 0, shots, None)
    loaded[task].build_all_requests(samples=drawn.get(task))
    return loaded[task].instances, drawn


def stock_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's own model class on the same model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@dataclass
class Run:
    """One model class on the requests; ``found`` holds its last answers."""

    language_model: Any
    requests: Sequence[Any]

    def run(self) -> None:
        """What is timed."""
        language_model.forget_tokens()
        score: Callable[..., list[Any]] = getattr(
            self.language_model, self.requests[0].request_type
        )
        self.found = score(list(self.requests), disable_tqdm=True)


def seconds(run: Run) -> float:
    """Of one run."""
    started = time.perf_counter()
    run.run()
    return time.perf_counter() - started


def compared(
    requests: Sequence[Any], stock: Sequence[Any], ours: Sequence[Any], reader: DyndepthLM
) -> dict[str, Any]:
    """``differing``, ``gap`` and ``gap_a_token`` of two lists of answers; see ``evaluation``."""
    gaps, sizes = [], []
    answers: dict[int, list[tuple[Any, Any]]] = {}
    for request, one, other in zip(requests, stock, ours, strict=True):
        whole = isinstance(one, float)
        gaps.append(abs(one - other) if whole else abs(one[0] - other[0]))
        sizes.append(len(reader.tok_encode(request.args[-1])))
        if not whole:
            answers.setdefault(request.doc_id, []).append((one, other))
    return {
        "differing": sum(_answer(pairs, 0) != _answer(pairs, 1) for pairs in answers.values())
        if answers
        else None,
        "gap": max(gaps),
        "gap_a_token": max(gap / size for gap, size in zip(gaps, sizes, strict=True)),
    }


def _answer(pairs: list[tuple[Any, Any]], which: int) -> Any:
    """The likeliest choice; where there is one alone, whether it is what would be written."""
    responses = [pair[which] for pair in pairs]
    if len(responses) == 1:
        return responses[0][1]
    return max(range(len(responses)), key=lambda place: responses[place][0])
