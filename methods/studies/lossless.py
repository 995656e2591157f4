"""Lossless depth: how much of what each kind of draft proposes the whole model accepts.

Every text is the dense model's, so nothing is compared but what is accepted and what that would
save: on the embedded model, whose LM head alone is a fifth of the bytes that a step reads, no time;
on other shapes, what is predicted of the acceptances measured here. Drafts have four tokens each,
whatever their probabilities, so that shares of accepted tokens compare.
"""

from __future__ import annotations

from collections.abc import Iterable

from dyndepth.studies.acceptance import IDENTICAL, of
from dyndepth.studies.study import Claim, Kind, Pick, Study

BUDGETS = (1.1, 1.25, 1.5)
LIMIT = {"wikipedia_bpb": 12, "socialiqa": 12, "quartz": 12}
SHARES = of(LIMIT)
ALL_ALIKE = "length=4, stop=0"
"""Every draft has as many tokens, but for the last of a text."""


def draft(by: str) -> Pick:
    """Self-speculation with drafts by this method."""
    return Pick(f"self_speculation(draft={by}, {ALL_ALIKE})")


GREEDY = draft("static_pruning(criterion=greedy)")
INFLUENCE = draft("static_pruning")
EVEN = draft("uls(spacing=even)")
EXIT = draft("early_exit(confidence=fixed)")
ROUTERS = draft("skipgpt")
SEARCHED = Pick(f"swift({ALL_ALIKE}, tries=200, misses=100)")
"""Fewer tries than by default, and at one budget: on two slow cores a try takes a second or two,
and a search is made on each task's texts, too."""
IN_CONTEXT = Pick(f"clasp({ALL_ALIKE}, every=1)")


def claim(
    name: str, text: str, source: str, a: Pick, b: Iterable[Pick], kind: Kind = "acceptance"
) -> Claim:
    """A claim on what is accepted, by task."""
    return Claim(name=name, text=text, source=source, a=a, b=tuple(b), kind=kind, metrics=SHARES)


STUDY = Study(
    name="lossless",
    title="Lossless depth: drafts by part of the model, verified by all of it",
    limit=dict(LIMIT),
    sweeps=(
        {"methods": SEARCHED.method, "speedups": (1.25,)},
        {"methods": f"{IN_CONTEXT.method},{ROUTERS.method}", "speedups": BUDGETS},
        {
            "methods": ",".join(each.method for each in (GREEDY, INFLUENCE, EVEN, EXIT)),
            "speedups": BUDGETS,
        },
    ),
    claims=(
        Claim(
            name="texts",
            text="What is written is what the whole model writes, token by token.",
            source="arXiv 2309.08168, 2404.16710, 2410.06916, 2505.24196: all of them",
            a=SEARCHED,
            b=(IN_CONTEXT, ROUTERS, GREEDY, INFLUENCE, EVEN, EXIT),
            kind="identical",
            metrics=of(LIMIT, IDENTICAL),
        ),
        claim(
            "searched",
            "Sets searched for what the whole model accepts are accepted more, at equal depth of "
            "the draft, than sets by a rule.",
            "arXiv 2410.06916, main results; greedy removal and block influence are this project's "
            "controls",
            SEARCHED,
            (EVEN, INFLUENCE, GREEDY),
        ),
        claim(
            "in context",
            "Blocks chosen anew after each verification are accepted more than one searched set.",
            "arXiv 2505.24196, main results",
            IN_CONTEXT,
            (SEARCHED, EVEN),
        ),
        claim(
            "exits",
            "Without training for it, an exit is accepted less than as much depth spread over the "
            "model.",
            "arXiv 2404.16710, which trains for exits; this project's form of the claim",
            EXIT,
            (EVEN, INFLUENCE),
        ),
        claim(
            "tokens",
            "A draft that looks at each token is accepted more than one fixed set.",
            "this project's comparison; arXiv 2506.04179 trains the routers, for other ends",
            ROUTERS,
            (GREEDY, SEARCHED),
        ),
        claim(
            "other text",
            "A set searched on texts of the task itself is accepted more than one searched on "
            "other text.",
            "arXiv 2410.06916, which searches for each task anew",
            SEARCHED,
            (SEARCHED,),
            "transfer",
        ),
    ),
)
