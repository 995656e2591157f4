"""The model class that lm-eval calls.

It inherits from lm-eval's own ``hf`` model all that decides token ids (pairs, windows, prompts,
chat templates), hands them to dyndepth.evaluation.scoring with the method attached, task by task,
and keeps what each task cost.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from dyndepth.common.errors import UserError
from dyndepth.data.capacity import check_length, check_tokens, check_vocabulary
from dyndepth.data.tokenizers import PROBE
from dyndepth.evaluation import generation, scoring
from dyndepth.evaluation.agreement import agree
from dyndepth.evaluation.chat import PLAIN, Chat, template_of
from dyndepth.evaluation.generation import Prompt
from dyndepth.evaluation.generation_settings import GenerationSettings
from dyndepth.evaluation.rows import Cost
from dyndepth.evaluation.scoring import Group, Scored
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.blocks import Decoder
from dyndepth.models.shapes import refuse_shape
from dyndepth.runtime.attach import attach
from dyndepth.runtime.trace import Backend, Trace

ROWS = 32
"""Most rows in a forward unless told otherwise; the budget of tokens decides first."""

_encoded: WeakKeyDictionary[Any, dict[Any, list[int]]] = WeakKeyDictionary()
"""Token ids by tokenizer, text and how it is read (what the tokenizer makes of a probe included: it
may have been changed): every cell of a sweep reads the same texts."""


class DyndepthLM(HFLM):
    """A causal LM under a dynamic-depth method, as lm-eval's evaluator takes it.

    Args:
        pretrained: a loaded model.
        method: fitted, if it needs that.
        tokenizer: one of transformers.
        batch_size: most contexts in a forward, fewer where they are long; their continuations
            follow in at most four times as many rows. A method that is ``pooled`` runs one sequence
            at a time.
        backend: ``sparse`` or ``masked``.
        revision: of a hub model, which lm-eval records.
        max_length: tokens that a window may hold; the model's own limit by default.
        progress: show progress bars.
        add_bos_token, prefix_token_id, enable_thinking, think_end_token, chat_template_args: as
            lm-eval's ``hf`` takes them.

    Attributes:
        costs: by task, what its requests executed.
        document_index: by task, the index in the task's file of the n-th document scored. lm-eval
            numbers the documents of a sample anew; a task that is missing here was not sampled.
        chat: how prompts are put, for those who have tasks build requests; see ``converse``.

    Raises UserError for a setting that can't be had, and for a tokenizer without a token that could
    stand for an empty context.
    """

    def __init__(
        self,
        pretrained: Any,
        method: DynamicDepthMethod,
        tokenizer: Any,
        batch_size: int | str | None = ROWS,
        *,
        backend: Backend = "sparse",
        revision: str | None = None,
        max_length: int | None = None,
        progress: bool = True,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizer | PreTrainedTokenizerFast):
            raise UserError(
                f"the tokenizer is a {type(tokenizer).__name__}, and lm-eval reads texts with "
                "those of transformers; give a PreTrainedTokenizerFast"
            )
        refuse_shape(pretrained)
        with _without_advice(), _as_it_is(pretrained):
            super().__init__(
                pretrained,
                tokenizer=tokenizer,
                batch_size=_batch_size(batch_size),
                max_length=max_length,
                revision=revision,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
                enable_thinking=enable_thinking,
                think_end_token=think_end_token,
                chat_template_args=chat_template_args,
            )
        if self.prefix_token_id is None:
            raise UserError(
                "the tokenizer has neither a BOS nor an EOS token, one of which stands for an "
                "empty context; give prefix_token_id, or set its eos_token"
            )
        probed = repr(self.tokenizer(list(PROBE))["input_ids"])
        self._reads = (probed, self.add_bos_token, self.prefix_token_id)
        check_vocabulary(pretrained, self.tokenizer)
        record = Decoder.of(pretrained).record
        if not record.rotary and record.bias is None:  # learned: there is none beyond the last one
            check_length(pretrained, max_length, "max_length", "give as many or less")
        self.method = method
        self.execution: Backend = backend
        self.progress = progress
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self.document_index: Mapping[str, Sequence[int]] = {}
        self.chat = PLAIN
        self._own_template_args: dict[str, Any] = dict(vars(self)["chat_template_args"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **settings: Any
    ) -> list[int]:
        """Token ids of a text, lm-eval's own; kept, because every cell reads the same texts."""
        kept = _encoded.setdefault(self.tokenizer, {})
        how = (*self._reads, add_special_tokens, *settings.items())
        if (string, how) not in kept:
            kept[string, how] = super().tok_encode(string, add_special_tokens, **settings)
        return list(kept[string, how])

    def converse(self, chat: Chat) -> None:
        """Put prompts as ``chat`` says. Raises UserError where the tokenizer can't."""
        chat.check(self.tokenizer)
        self.chat = chat
        self.chat_template(chat.apply_chat_template)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template that is asked for, which writes every conversation from now on;
        None where none is.

        lm-eval asks before it has tasks build their requests. Its own ``hf`` then writes with the
        tokenizer's default template, whatever was named; here the named one writes. Raises
        UserError as ``template_of``.
        """
        found = template_of(self.tokenizer, chat_template)
        chosen = {} if found is None else {"chat_template": found}
        self.chat_template_args = chosen | self._own_template_args
        return found

    # --- the three kinds of request -------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether it is greedy."""
        self._refuse_thinking(requests)
        pairs = [self.pair(request) for request in requests]
        results: list[Any] = [None] * len(requests)
        for index, result in self._scored(requests, range(len(requests)), pairs, disable_tqdm):
            results[index] = result
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of at most ``max_length`` tokens; 0 where
        there is no token."""
        owners, windows = self.windows(requests)
        silent = set(self._by_task(requests)) - {
            requests[owner].task_name or "" for owner in owners
        }
        if silent:
            raise UserError(f"task {min(silent)}: none of its texts has a token, so none is scored")
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
                    how = (self.model, trace, self.method, chosen, self.batch_size)
                    for index, tokens in generation.completed(*how):
                        results[places[index]] = self.completion(tokens, stops[places[index]])
                        bar.update()
        return results

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Required by lm-eval's base class, whose callers of it are all replaced here."""
        raise NotImplementedError("requests must come with their documents: call loglikelihood")

    # --- requests as token ids ------------------------------------------------------------------

    def pair(self, request: Instance) -> tuple[list[int], list[int]]:
        """Token ids of a request's context and continuation, neither of them empty.

        As lm-eval reads them: white space at the end of the context goes to the continuation, and
        where a token spans the join, the context keeps its own tokens and the continuation is what
        the whole text has from that place on. An empty context is the prefix token, unless the
        continuation begins with it, and so is a blank one, whose white space goes to the
        continuation. Raises UserError for a continuation without a token.
        """
        context, continuation = request.args
        if context.strip():
            before, after = self._encode_pair(context, continuation)
        else:
            after = self.tok_encode(context + continuation, add_special_tokens=False)
            own = after[:1] == [self.prefix_token_id]
            before, after = ([self.prefix_token_id], after[1:] if own else after)
        if not after:
            raise UserError(
                f"document {self.document(request)}: its continuation {_shortened(continuation)} "
                f"has no token of its own after the context {_shortened(context, end=True)}, so "
                "there is nothing to score"
            )
        return before, after

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
            if len(continuation) > self.max_length:
                raise UserError(
                    f"document {document}: its continuation has {len(continuation)} tokens, and "
                    f"{self.max_length} fit into the model"
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

        A prompt without a token is the prefix token; one that leaves no room for what is to be
        written is cut from the left. Raises UserError where a task or the model asks for more than
        greedy generation can do; see ``GenerationSettings``.
        """
        end = self.eot_token_id
        if end is not None:
            end = self.tok_decode(end, skip_special_tokens=False)
        prompts, stops = [], []
        known: dict[tuple[str, str], GenerationSettings] = {}
        for request in requests:
            context, arguments = request.args
            who = f"task {request.task_name}"
            key = (who, repr(arguments))
            if key not in known:
                known[key] = GenerationSettings.of(self.model, arguments, who, self.max_gen_toks)
                known[key].check_room(self.max_length)
            settings = known[key]
            room = self.max_length - settings.limit
            until = handle_stop_sequences(list(settings.until), eos=end)
            stops.append(until)
            tokens = self._prompt(context)[-room:]
            document, limit = self.document(request), settings.limit
            check_tokens(self.model, tokens, f"document {document}")
            if settings.total is not None:
                limit = settings.total - len(tokens)
                if limit < 1:
                    raise UserError(
                        f"document {document}: its prompt has {len(tokens)} tokens, and the task "
                        f"stops at {settings.total} with the prompt (max_length); give max_gen_toks"
                    )
            rules = settings.rules(tokens, limit, self.device)
            stop = self._stop(until, {*settings.ends, self.eot_token_id})
            prompts.append(Prompt(document, tokens, limit, stop, rules))
        return prompts, stops

    def _prompt(self, context: str) -> list[int]:
        """Token ids of what is to be completed: those of a batch of one, and at least one."""
        kept = _encoded.setdefault(self.tokenizer, {})
        key = (context, (*self._reads, "prompt"))
        if key not in kept:
            ids, _ = self.tok_batch_encode([context])
            kept[key] = [int(token) for token in ids[0]] or [self.prefix_token_id]
        return list(kept[key])

    def completion(self, tokens: Sequence[int], until: list[str]) -> str:
        """The text of generated tokens: what follows the last end of thinking, if one was named,
        cut at the first of its stop sequences."""
        think = self.think_end_token
        if isinstance(think, int) and think in tokens:
            tokens = tokens[len(tokens) - list(tokens)[::-1].index(think) :]
        text = self.tok_decode(tokens)
        if isinstance(think, int):
            text = text.lstrip()
        return postprocess_generated_text(text, until, think if isinstance(think, str) else None)

    def document(self, request: Instance) -> str:
        """The id ``task/index`` of a request's document, by its index in the task's file."""
        task, number = request.task_name or "", request.doc_id or 0
        index = self.document_index.get(task)
        return f"{task}/{number if index is None else index[number]}"

    # --- in between -----------------------------------------------------------------------------

    def _refuse_thinking(self, requests: Sequence[Instance]) -> None:
        """As ``hf``: a model that thinks writes before it answers."""
        if self.enable_thinking and requests:
            names = ", ".join(sorted({request.task_name or "" for request in requests}))
            raise UserError(
                f"enable_thinking goes with generation alone, and {names} scores likelihoods"
            )

    def _stop(self, until: list[str], ends: set[int]) -> Callable[[list[int]], bool]:
        """Whether a list of generated tokens ends its completion."""

        def stop(tokens: list[int]) -> bool:
            if tokens[-1] in ends:
                return True
            text = self.tok_decode(tokens, skip_special_tokens=False)
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
        """Score groups in the way that the method's declared facts allow; see ``scoring.score``.
        Without a draft the whole model runs: what speculates is scored as dense is, bit by bit."""
        drafts = self.method.speculates
        if self.method.pooled and not drafts:
            for index, group in enumerate(groups):
                yield index, scoring.score_alone(self.model, trace, group)
            return
        # Whose keys a shared beginning will have seen at the end is each document's own.
        sharing = drafts or (not self.method.by_document and self.method.kv_policy != "evict")
        yield from scoring.score(self.model, trace, groups, self.batch_size, sharing=sharing)

    def _check(self, task: str, groups: Sequence[Group]) -> None:
        """Refuse to score ``task`` if batches do not give what documents give alone."""
        if self.method.pooled and not self.method.speculates:
            return

        def run(score: Callable[[Trace], Iterable[Scored]]) -> list[Scored]:
            with attach(self.model, self.method, backend=self.execution, warn=False) as trace:
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
        with attach(self.model, self.method, backend=self.execution, warn=False) as trace:
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


def _shortened(text: str, end: bool = False) -> str:
    """A text, quoted, or its beginning or end where it is long."""
    if len(text) <= 40:
        return repr(text)
    return f"... {text[-40:]!r}" if end else f"{text[:40]!r} ..."


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without lm-eval's warnings that the model comes loaded: that is how it always comes here."""
    log = logging.getLogger("lm_eval.models.huggingface")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Without lm-eval's tying of the model's weights: one that was saved with a head of its own
    beside a configuration that says otherwise would become another model here."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


def _batch_size(value: int | str | None) -> int:
    try:
        size = 1 if value is None else int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, not {value!r}")
    return size
