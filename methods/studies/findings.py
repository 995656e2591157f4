"""What the committed runs show, in sentences: the findings of ``embedded`` and ``bounds``.

Each function yields one paragraph of results/README.md after another. Numbers are looked up in the
run's tables when the page is written (``python -m dyndepth.pages``), so that none is typed here but
budgets and what the text itself explains. Line breaks are free.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dyndepth.results.numbers import Numbers

# Methods as tables call them.
ROUTERS = "skipgpt"
ROUTERS_LORA = "skipgpt + lora"
ROUTERS_CONSTANT = "skipgpt(reads=constant, windows=16)"
RANDOM_MASKS = "random_mask"
CONTROLLERS = "layer_controller"
CONTROLLERS_CONSTANT = "layer_controller(reads=constant)"
INFLUENCE = "static_pruning"
GREEDY = "static_pruning(criterion=greedy)"
ULS = "uls"
ULS_EVEN = "uls(spacing=even)"
MARGIN = "early_exit"
SATURATION = "early_exit(confidence=saturation)"
RANDOM_BLOCKS = "random_skip"
ORACLE = "oracle(depths=6)"
EXIT_ORACLE = "exit_oracle"


class EqualFlops:
    """Numbers of equal_flops.csv: methods at equal achieved FLOPs, on one metric of one task.

    ``flops``: ``block``, or ``total`` for all FLOPs.
    """

    def __init__(self, numbers: Numbers, task: str, metric: str, flops: str = "block") -> None:
        self.numbers = numbers
        self.rows: dict[str, Any] = {"task": task, "metric": metric, "flops": flops}

    def value(self, method: str, speedup: float) -> str:
        """The metric itself."""
        return self._of("value", method, speedup)

    def from_dense(self, method: str, speedup: float) -> str:
        """The paired difference from dense without LoRA; of bits per byte, the loss."""
        return self._of("difference", method, speedup)

    def from_best(self, method: str, speedup: float) -> str:
        """The paired difference from the best of the other methods."""
        return self._of("competitor_difference", method, speedup)

    def best(self, speedup: float) -> str:
        """The best value of any method without LoRA."""
        return self.numbers.of(
            "equal_flops", "value", rank=1, recovery="none", reference_speedup=speedup, **self.rows
        )

    def times(self, verdict: str, method: str) -> int:
        """At how many budgets the verdict on a method against the best of the others is this."""
        return self.numbers.count("equal_flops", label=method, verdict=verdict, **self.rows)

    def times_of_any(self, verdict: str) -> int:
        """In how many comparisons of any method with the best of the others it is this."""
        return self.numbers.count("equal_flops", verdict=verdict, **self.rows)

    def _of(self, show: str, method: str, speedup: float) -> str:
        return self.numbers.of(
            "equal_flops", show, label=method, reference_speedup=speedup, **self.rows
        )


def embedded(numbers: Numbers) -> Iterator[str]:
    """The methods and controls on the embedded model."""
    bits = EqualFlops(numbers, "wikipedia_bpb", "bits_per_byte")
    yield f"""
        **Bits per byte tell the methods apart.** Of all methods without LoRA the routers lose least
        at every budget: {bits.from_dense(ROUTERS, 1.1)} at 1.1x, {bits.from_dense(ROUTERS, 1.25)}
        at 1.25x, {bits.from_dense(ROUTERS, 1.5)} at 1.5x and {bits.from_dense(ROUTERS, 1.9)} at
        1.9x. Their paired differences from the next best are {bits.from_best(ROUTERS, 1.1)},
        {bits.from_best(ROUTERS, 1.25)}, {bits.from_best(ROUTERS, 1.5)} and
        {bits.from_best(ROUTERS, 1.9)}, shown at {bits.times("better", ROUTERS)} of these 4 budgets.
    """

    by_all = EqualFlops(numbers, "wikipedia_bpb", "bits_per_byte", flops="total")
    yield f"""
        **By all FLOPs the routers lead, too, as far as they were measured.** Routers and the keys
        and values of skipped tokens cost FLOPs that block FLOPs leave out. At equal total FLOPs the
        paired differences from the next best are {by_all.from_best(ROUTERS, 1.1)} at 1.1x,
        {by_all.from_best(ROUTERS, 1.25)} at 1.25x and {by_all.from_best(ROUTERS, 1.5)} at 1.5x,
        shown at {by_all.times("better", ROUTERS)} of these 3 budgets. No cell of the routers
        reaches 1.9x by all FLOPs.
    """

    yield f"""
        **Without training, removing one block at a time loses least from 1.25x on:**
        {bits.from_dense(GREEDY, 1.25)} at 1.25x, {bits.from_dense(GREEDY, 1.5)} at 1.5x and
        {bits.from_dense(GREEDY, 1.9)} at 1.9x; block influence ranked once loses
        {bits.from_dense(INFLUENCE, 1.25)}, {bits.from_dense(INFLUENCE, 1.5)} and
        {bits.from_dense(INFLUENCE, 1.9)}. At 1.1x the two are level
        ({bits.from_dense(GREEDY, 1.1)} and {bits.from_dense(INFLUENCE, 1.1)}). The table pairs each
        method with the best one only, so these two are not tested here; of the budgets in
        `layer_selection/` only 1.5x shows a difference.
    """

    yield f"""
        **Looking at tokens pays for the routers.** At 1.5x fixed-input routers lose
        {bits.from_best(ROUTERS_CONSTANT, 1.5)} more than they do, random masks at the routers' own
        rates {bits.from_best(RANDOM_MASKS, 1.5)} more (both paired); each is shown to be worse at
        {bits.times("worse", ROUTERS_CONSTANT)} and {bits.times("worse", RANDOM_MASKS)} of 4
        budgets. Controllers of whole blocks lose {bits.from_dense(CONTROLLERS, 1.5)},
        fixed-input controllers {bits.from_dense(CONTROLLERS_CONSTANT, 1.5)}; the table does not
        test these two against each other.
    """

    dense = numbers.of("leaderboard", "bits_per_byte", label="dense")
    dense_lora = numbers.of("leaderboard", "bits_per_byte", label="dense + lora")
    yield f"""
        **LoRA lowers the bits per byte of the routers, and of dense too.** With LoRA the routers
        have {bits.value(ROUTERS_LORA, 1.5)} bits per byte at 1.5x (without
        {bits.value(ROUTERS, 1.5)}) and {bits.value(ROUTERS_LORA, 1.9)} at 1.9x (without
        {bits.value(ROUTERS, 1.9)}). Dense with the same LoRA has {dense_lora}, without {dense}. The
        paired differences from dense with the same LoRA are those of `skipgpt/` below.
    """

    all_flops = numbers.of(
        "leaderboard", "total_speedup", digits=2, label=MARGIN, target_speedup=1.5
    )
    yield f"""
        **Early exit fails here.** At 1.25x it loses {bits.from_dense(MARGIN, 1.25)} by margin and
        {bits.from_dense(SATURATION, 1.25)} by saturation, random blocks lose
        {bits.from_dense(RANDOM_BLOCKS, 1.25)}. Nothing was trained for exits. The LM head that the
        margin reads at each exit costs more than the exits save: at a target of 1.5, all FLOPs
        counted, its speedup is {all_flops}.
    """

    yield f"""
        **ULS with the paper's set has the largest loss of all at 1.25x**,
        {bits.from_dense(ULS, 1.25)}: below 2x the set leaves out one run of neighbours just before
        the last block. Evenly spaced it loses {bits.from_dense(ULS_EVEN, 1.25)}.
    """

    yield from _tasks(numbers)
    yield from _times(numbers)

    yield f"""
        **No method keeps dense's quality in bits per byte at any of these budgets.** The least loss
        at 1.1x is {bits.from_dense(ROUTERS, 1.1)}; with LoRA it is
        {bits.from_dense(ROUTERS_LORA, 1.1)}, against dense without. One model of 135M parameters
        and one set of trained routers: intervals do not cover another training.
    """


def _tasks(numbers: Numbers) -> Iterator[str]:
    """Of ``embedded``: accuracies and titles."""

    def dense(task: str, metric: str = "acc") -> str:
        return numbers.of("accuracy", "value", label="dense", task=task, metric=metric)

    social = EqualFlops(numbers, "socialiqa", "acc")
    quartz = EqualFlops(numbers, "quartz", "acc")
    none = "no difference shown"
    yield f"""
        **Multiple choice tells nothing apart.** After Holm's correction,
        {social.times_of_any("worse")} comparisons with the best of the other methods on Social IQa
        show a method to be worse and {social.times_of_any("better")} to be better,
        {social.times_of_any(none)} show no difference; on QuaRTz it is
        {quartz.times_of_any("worse")}, {quartz.times_of_any("better")} and
        {quartz.times_of_any(none)}. Dense is at {dense("socialiqa")} and {dense("quartz")}, chance
        at a third and a half.
    """

    words = EqualFlops(numbers, "last_word", "acc")
    yield f"""
        **Last words fall fast.** Dense finds {dense("last_word")} of them. The routers differ from
        dense by {words.from_dense(ROUTERS, 1.25)} at 1.25x and by {words.from_dense(ROUTERS, 1.9)}
        at 1.9x; they are shown to be better than the next best method at
        {words.times("better", ROUTERS)} of 4 budgets.
    """

    titles = EqualFlops(numbers, "title_generation", "rougeL")
    yield f"""
        **Titles break early, and no method leads at every budget.** Dense has a ROUGE-L of
        {dense("title_generation", "rougeL")}. At 1.1x controllers of whole blocks have the most,
        {titles.value(CONTROLLERS, 1.1)}; the routers have {titles.value(ROUTERS, 1.1)}, a paired
        difference of {titles.from_best(ROUTERS, 1.1)}. At 1.25x the routers have the most,
        {titles.value(ROUTERS, 1.25)}, which is {titles.from_best(ROUTERS, 1.25)} from the next
        best. At 1.5x and 1.9x the best values of any method are {titles.best(1.5)} and
        {titles.best(1.9)}: nothing of use is written any more. With LoRA the routers have
        {titles.value(ROUTERS_LORA, 1.25)} at 1.25x: it does not help here (no paired test).
    """


def _times(numbers: Numbers) -> Iterator[str]:
    """Of ``embedded``: wall-clock at a target of 1.5."""

    def timed(method: str, show: str, phase: str, batch: int) -> str:
        return numbers.of(
            "timing", show, digits=2, label=method, phase=phase, batch=batch, target_speedup=1.5
        )

    def prompt(method: str, show: str = "wall_speedup") -> str:
        return timed(method, show, "prefill", 1)

    def one(method: str, show: str = "wall_speedup") -> str:
        return timed(method, show, "decode", 1)

    def eight(method: str, show: str = "wall_speedup") -> str:
        return timed(method, show, "decode", 8)

    saved = "total_speedup"  # of the FLOPs
    yield f"""
        **Where whole blocks go for all tokens, saved arithmetic is saved time.** At a target of
        1.5, one thread, block removal reads a prompt of 512 tokens {prompt(INFLUENCE)} times as
        fast as dense (all FLOPs counted: {prompt(INFLUENCE, saved)}), decodes one sequence
        {one(INFLUENCE)} times (saved: {one(INFLUENCE, saved)}) and eight at once
        {eight(INFLUENCE)} times ({eight(INFLUENCE, saved)}) as fast; evenly spaced ULS
        {prompt(ULS_EVEN)}, {one(ULS_EVEN)} and {eight(ULS_EVEN)} times.
    """

    yield f"""
        **Where tokens skip one by one, prompts gain and batches do not.** The routers read the
        prompt {prompt(ROUTERS)} times (saved: {prompt(ROUTERS, saved)}) and decode one sequence
        {one(ROUTERS)} times ({one(ROUTERS, saved)}) as fast, but eight at once only
        {eight(ROUTERS)} times: a forward of fewer than 64 tokens is never gathered, so each step
        computes a sublayer for all eight sequences unless all eight skip it. Controllers of whole
        blocks have {prompt(CONTROLLERS)}, {one(CONTROLLERS)} and {eight(CONTROLLERS)}, exits by
        saturation {prompt(SATURATION)}, {one(SATURATION)} and {eight(SATURATION)}. Exits by margin
        are slower than dense: {prompt(MARGIN)}, {one(MARGIN)} and {eight(MARGIN)}.
    """


def bounds(numbers: Numbers) -> Iterator[str]:
    """Methods against bounds that choose by the answers."""
    numbers = numbers.within("results/bounds")

    def board(show: str, method: str) -> str:
        return numbers.of("leaderboard", show, label=method)

    oracle = numbers.of("leaderboard", "mean_acc", label=ORACLE, target_speedup=1.5)
    social = EqualFlops(numbers, "socialiqa", "acc")
    quartz = EqualFlops(numbers, "quartz", "acc")
    words = EqualFlops(numbers, "last_word", "acc")
    yield f"""
        **Accuracies chosen by the answers say little.** At a target of 1.5 the oracle scores a mean
        accuracy of {oracle}, dense {board("mean_acc", "dense")}, guessing
        {board("chance", "dense")}: with 33 tries at a question of two or three answers, some try is
        right. From the best method at 1.5x it differs by {social.from_best(ORACLE, 1.5)} on Social
        IQa, {quartz.from_best(ORACLE, 1.5)} on QuaRTz and {words.from_best(ORACLE, 1.5)} on last
        words.
    """

    bits = EqualFlops(numbers, "wikipedia_bpb", "bits_per_byte")
    yield f"""
        **In bits per byte the best of these routes is no bound for other rules.** At 1.25x the
        oracle has {bits.value(ORACLE, 1.25)}, at 1.5x {bits.value(ORACLE, 1.5)}:
        {bits.from_best(ORACLE, 1.25)} and {bits.from_best(ORACLE, 1.5)} more than the routers,
        which look at tokens and at sublayers; the first is not shown after Holm's correction, the
        second is. One set of blocks for all documents, removed greedily, has
        {bits.value(GREEDY, 1.25)} and {bits.value(GREEDY, 1.5)} (these two are not tested against
        each other).
    """

    def passages(show: str, **cell: Any) -> str:
        return numbers.of("compute", show, digits=2, task="wikipedia_bpb", phase="all", **cell)

    exits = numbers.of("leaderboard", "bits_per_byte", label=SATURATION, target_speedup=1.25)
    yield f"""
        **An exit that keeps the likeliest token does not keep its likelihood.** Leaving after the
        first block whose likeliest token is the whole model's makes Wikipedia
        {passages("block_speedup", label=EXIT_ORACLE)} times as cheap in block FLOPs
        ({passages("total_speedup", label=EXIT_ORACLE)} in all FLOPs) at
        {board("bits_per_byte", EXIT_ORACLE)} bits per byte, dense
        {board("bits_per_byte", "dense")}; exits by saturation have {exits} at
        {passages("block_speedup", label=SATURATION, target_speedup=1.25)} times.
    """
