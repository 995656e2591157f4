"""The model class that lm-eval calls, under the name ``dyndepth``.

It turns requests into token ids exactly as lm-eval's own ``hf`` model does, hands them to
dyndepth.scoring with the method attached, task by task, and keeps what each task cost.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dyndepth import generation, scoring
from dyndepth.agreement import agree
from dyndepth.blocks import causal_lm, family
from dyndepth.capacity import check_length, check_tokens, check_vocabulary
from dyndepth.costs import Cost
from dyndepth.errors import UserError
from dyndepth.generation import Prompt
from dyndepth.method import DynamicDepthMethod
from dyndepth.runtime import Backend, Trace, attach
from dyndepth.scoring import Group, Scored

ROWS = 32
"""Most rows in a forward unless told otherwise; the budget of tokens decides first."""

_encoded: WeakKeyDictionary[Any, dict[tuple[str, bool | None], list[int]]] = WeakKeyDictionary()
"""Token ids by tokenizer, text and whether special tokens are added: every cell of a sweep reads
the same texts."""


class DyndepthLM(TemplateLM):
    """A causal LM under a dynamic-depth method, for ``lm_eval --model dyndepth``.

    Args:
        pretrained: a loaded model, or what ``dyndepth.models.load_model`` takes: ``embedded``, a
            hub id or a local path.
        method: a method object, or a specification as in ``--methods``. One that is given by name
            is fitted on the embedded corpus (cached) unless it comes fitted.
        tokenizer: a loaded tokenizer or its name; the model's own by default.
        batch_size: most contexts in a forward, fewer where they are long; their continuations
            follow in at most four times as many rows. A method that is ``pooled`` runs one sequence
            at a time.
        device, dtype, attn_implementation, revision, trust_remote_code: as ``load_model`` takes
            them; ignored for a loaded model. lm-eval asks for ``cuda:0`` unless told otherwise;
            without a GPU that means the CPU, with a warning, as it does for its ``hf`` model.
        backend: ``sparse`` or ``masked``.
        max_length: tokens that a window may hold; the model's own limit by default.
        progress: show progress bars.
        parameters: of the method, such as ``target_speedup=1.5``, if it is given by name.

    Attributes:
        costs: by task, what its requests executed.
        document_index: by task, the index in the task's file of the n-th document scored. lm-eval
            numbers the documents of a sample anew; a task that is missing here was not sampled.
    """

    def __init__(
        self,
        pretrained: Any = "embedded",
        method: DynamicDepthMethod | str = "dense",
        tokenizer: Any = None,
        batch_size: int | str | None = ROWS,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        backend: Backend = "sparse",
        max_length: int | None = None,
        progress: bool = True,
        **parameters: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size)
        if isinstance(pretrained, str):
            from dyndepth.models import load_model

            self.model = load_model(
                pretrained,
                dtype="float32" if dtype == "auto" else dtype,
                device=_usable(device),
                attn_implementation=attn_implementation,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        else:
            self.model = pretrained
        if tokenizer is None or isinstance(tokenizer, str):
            from dyndepth.models import load_tokenizer

            name = tokenizer or pretrained
            if not isinstance(name, str):
                name = self.model.dyndepth.name
            tokenizer = load_tokenizer(name, revision, trust_remote_code)
        self.tokenizer = tokenizer
        check_vocabulary(self.model, tokenizer)
        if isinstance(method, str):
            method = _fitted(method, parameters, self.model, tokenizer)
        elif parameters:
            raise UserError(
                f"{', '.join(parameters)}: parameters go with a method's name, and here the method "
                "is an object that has its own"
            )
        self.method = method
        self.backend = backend
        self.progress = progress
        self._device = next(self.model.parameters()).device
        record = family(causal_lm(self.model))
        if not record.rotary and record.bias is None:  # learned: there is none beyond the last one
            check_length(self.model, max_length, "max_length", "give as many or less")
        self._max_length = max_length
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.document_index: Mapping[str, Sequence[int]] = {}

    # --- tokens, as lm-eval's hf model makes them -----------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: beginning of sequence, else end of sequence."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that fit into the model."""
        return self._max_length or resolve_max_length(self.model.config, self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's records."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; no second beginning of sequence where the text brings its own."""
        kept = _encoded.setdefault(self.tokenizer, {})
        key = (string, add_special_tokens)
        if key not in kept:
            if add_special_tokens is None:
                own = string.startswith(self.tokenizer.decode(self.prefix_token_id))
                given = {"add_special_tokens": False} if own else {}
            else:
                given = {"add_special_tokens": add_special_tokens}
            kept[key] = self.tokenizer.encode(string, **given)
        return list(kept[key])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's chat template applied to a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- the three kinds of request -------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether it is greedy."""
        pairs = [self.pair(*request.args) for request in requests]
        results: list[Any] = [None] * len(requests)
        for index, result in self._scored(requests, range(len(requests)), pairs, disable_tqdm):
            results[index] = result
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of at most ``max_length`` tokens."""
        owners, windows = self.windows(requests)
        results = [0.0] * len(requests)
        for index, (log, _) in self._scored(requests, owners, windows, disable_tqdm):
            results[index] += log
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy completions, each cut at the first of its stop sequences; see ``prompts``."""
        prompts, stops = self.prompts(requests)
        results: list[Any] = [None] * len(requests)
        with self.progress_bar(len(requests), "generate_until", disable_tqdm) as bar:
            for task, places in self._by_task(requests).items():
                chosen = [prompts[place] for place in places]
                with self._attached(task) as trace:
                    rows = 1 if self.method.pooled else self.batch_size
                    for index, tokens in generation.generate(self.model, trace, chosen, rows):
                        results[places[index]] = self.completion(tokens, stops[places[index]])
                        bar.update()
        return results

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Required by lm-eval's base class, whose callers of it are all replaced here."""
        raise NotImplementedError("requests must come with their documents: call loglikelihood")

    # --- requests as token ids ------------------------------------------------------------------

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; an empty context is the prefix token, unless the text begins so."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def windows(
        self, requests: Sequence[Instance]
    ) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """Whole texts as (context, continuation) pairs that cover each token once.

        Returns the index of each pair's request, and the pairs.
        """
        owners: list[int] = []
        pairs: list[tuple[list[int], list[int]]] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                owners.append(index)
                pairs.append(make_disjoint_window(window))
        return owners, pairs

    def groups(
        self, documents: Sequence[str], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[list[Group], list[list[int]]]:
        """Pairs of one document with equal contexts, together; ``documents`` has each pair's.

        What does not fit into the model is cut from the left. Returns the groups, and for each
        the places of its continuations among the pairs.
        """
        shared: dict[Any, list[int]] = defaultdict(list)
        for place, (document, pair) in enumerate(zip(documents, pairs, strict=True)):
            context, continuation = pair
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"document {document}: a continuation of {len(continuation)} tokens "
                    f"can't be scored; 1 to {self.max_length} fit"
                )
            check_tokens(self.model, (*context, *continuation), f"document {document}")
            kept = self.max_length + 1 - len(continuation)
            shared[document, tuple(context[-kept:])].append(place)
        groups = [
            Group(document, context, [pairs[place][1] for place in members])
            for (document, context), members in shared.items()
        ]
        return groups, list(shared.values())

    def prompts(self, requests: Sequence[Instance]) -> tuple[list[Prompt], list[list[str]]]:
        """What is to be completed, and the stop sequences of each request.

        Raises UserError where a task asks for sampling or beams: results must not depend on a
        random state, and a beam is not one sequence to be counted.
        """
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        prompts, stops = [], []
        for request in requests:
            context, arguments = request.args
            settings = dict(normalize_gen_kwargs(arguments, default_max_gen_toks=256))
            limit = settings["max_gen_toks"]
            if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
                raise UserError(
                    f"task {request.task_name} generates by sampling or beams; "
                    "only greedy generation is comparable (do_sample: false, num_beams: 1)"
                )
            room = self.max_length - limit
            if room < 1:
                raise UserError(
                    f"task {request.task_name} generates {limit} tokens, which leaves no room in "
                    f"the model's {self.max_length}"
                )
            until = handle_stop_sequences(settings["until"], eos=end)
            stops.append(until)
            tokens = self.tok_encode(context)[-room:]
            check_tokens(self.model, tokens, f"document {self.document(request)}")
            prompts.append(Prompt(self.document(request), tokens, limit, self._stop(until)))
        return prompts, stops

    def completion(self, tokens: Sequence[int], until: list[str]) -> str:
        """The text of generated tokens, cut at the first of its stop sequences."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return postprocess_generated_text(text, until, None)

    def document(self, request: Instance) -> str:
        """The id ``task/index`` of a request's document, by its index in the task's file."""
        task, number = request.task_name or "", request.doc_id or 0
        index = self.document_index.get(task)
        return f"{task}/{number if index is None else index[number]}"

    # --- in between -----------------------------------------------------------------------------

    def _stop(self, until: list[str]) -> Any:
        """Whether a list of generated tokens ends its completion."""
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.eot_token_id}

        def stop(tokens: list[int]) -> bool:
            if tokens[-1] in ends:
                return True
            text = self.tokenizer.decode(tokens)
            return any(word and word in text for word in until)

        return stop

    def _scored(
        self,
        requests: list[Instance],
        owners: Iterable[int],
        pairs: list[tuple[list[int], list[int]]],
        silent: bool,
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Score (context, continuation) pairs; yields (index of the owning request, result)."""
        owners = list(owners)
        with self.progress_bar(len(pairs), "loglikelihood", silent) as bar:
            for task, places in self._by_task([requests[owner] for owner in owners]).items():
                documents = [self.document(requests[owners[place]]) for place in places]
                groups, members = self.groups(documents, [pairs[place] for place in places])
                self._check(task, groups)
                with self._attached(task) as trace:
                    for index, results in self._results(trace, groups):
                        for member, result in zip(members[index], results, strict=True):
                            if math.isnan(result[0]):
                                document = groups[index].document
                                raise FloatingPointError(
                                    f"{self.method!r}: the log-likelihood of document {document} "
                                    "is not a number"
                                )
                            yield owners[places[member]], result
                        bar.update(len(results))

    def _results(self, trace: Trace, groups: Sequence[Group]) -> Iterator[tuple[int, Scored]]:
        """Score groups in the way that the method's declared facts allow; see ``scoring.score``."""
        if self.method.pooled:
            for index, group in enumerate(groups):
                yield index, scoring.score_alone(self.model, trace, group)
            return
        sharing = not self.method.by_document
        yield from scoring.score(self.model, trace, groups, self.batch_size, sharing=sharing)

    def _check(self, task: str, groups: Sequence[Group]) -> None:
        """Refuse to score ``task`` if batches do not give what documents give alone."""
        if self.method.pooled:
            return

        def run(score: Callable[[Trace], Iterable[Scored]]) -> list[Scored]:
            with attach(self.model, self.method, backend=self.backend) as trace:
                return list(score(trace))

        def together(chosen: list[int]) -> list[Scored]:
            some = [groups[index] for index in chosen]
            return run(lambda trace: dict(sorted(self._results(trace, some))).values())

        def alone(some: list[Group]) -> list[Scored]:
            return run(lambda trace: (scoring.score_alone(self.model, trace, one) for one in some))

        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        agree(task, self.method, dtype, groups, together, alone)

    @contextmanager
    def _attached(self, task: str) -> Iterator[Trace]:
        """The method attached to the model; what runs inside is the cost of ``task``."""
        with attach(self.model, self.method, backend=self.backend) as trace:
            yield trace
            if not trace.totals()["tokens"]:
                raise RuntimeError(
                    f"task {task}: nothing was recorded while it was scored, so its results do "
                    f"not come from {self.method!r}"
                )
            self.costs[task].add(trace)

    @staticmethod
    def _by_task(requests: list[Instance]) -> dict[str, list[int]]:
        """Positions of the requests of each task."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[request.task_name or ""].append(place)
        return places

    def progress_bar(self, total: int, kind: str, silent: bool = False) -> tqdm:
        """A bar for ``total`` steps of a ``kind``, named after the method."""
        return tqdm(
            total=total, desc=f"{self.method.name}: {kind}", disable=silent or not self.progress
        )


def forget_tokens() -> None:
    """Have every text tokenised again."""
    _encoded.clear()


def _batch_size(value: int | str | None) -> int:
    try:
        size = 1 if value is None else int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, not {value!r}")
    return size


def _usable(device: str | None) -> str:
    """The device to load on: that asked for, or the CPU if it is a GPU and there is none."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no GPU is usable here: the model runs on the CPU")
        return "cpu"
    return device or "cpu"


def _fitted(
    name: str, parameters: dict[str, Any], model: Any, tokenizer: Any
) -> DynamicDepthMethod:
    """A method by name, fitted to ``model``."""
    from dyndepth.corpus import load_corpus
    from dyndepth.fits import fit_cached
    from dyndepth.registry import load_method

    method = load_method(name, **parameters)
    fitted = fit_cached(method, model, load_corpus("embedded", tokenizer))
    if fitted.candidates() is not None:
        raise UserError(
            f"{name} is a bound, which chooses by the outcomes of the documents that are scored, "
            "and these are not known here; use python -m dyndepth.sweep"
        )
    return fitted
