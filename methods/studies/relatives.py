"""The relatives of the methods that came first: scaled skipping, prompt routers, eviction, token
routers of whole blocks, and layer significance, each against what it has to beat.

Prompt routers, their controls and the block routers have three seeds; SkipGPT's shipped routers and
what is recovered by LoRA have one. Routers that are trained here read as many tokens as SkipGPT's
regression did (``TOKENS``); its search for an order of removal, on 1,024 tokens, comes on top of
that. Documents a task are chosen for the embedded model on two slow cores; no task writes texts,
for what these methods write at such budgets is of no use there.
"""

from __future__ import annotations

from collections.abc import Iterable

from dyndepth.studies.study import Claim, Kind, Pick, Study

WHOLE = ("wikipedia_bpb", "bits_per_byte")
CONTINUATION = ("wikipedia_continuation", "bits_per_byte")
WORD = ("last_word", "acc")
METRICS = (WHOLE, CONTINUATION, WORD)

SEEDS = (0, 1, 2)
BUDGETS = (1.1, 1.25, 1.5)
AROUND = (*BUDGETS, 1.75)
"""Of opponents: what a plan of sublayers executes follows from a text's length, and may lie beyond
the last budget."""
NEAR = (1.2, 1.35)
"""Of opponents that leave out whole blocks, around a target of 1.25."""
TOKENS = "steps=48, batch=2, length=256"
"""24,576 of them: three rounds of 32 windows of 256, as the routers of ``skipgpt`` read."""
PROMPT_TOKENS = "steps=48, batch=4, length=128"
"""As many; half of each window is a prompt."""

PLANS = {
    "evenly spaced": "uls(spacing=even{})",
    "the paper's spacing": "uls({})",
    "block influence": "static_pruning({})",
    "greedy": "static_pruning(criterion=greedy{})",
}
"""Static plans; the braces take a further parameter."""


def scaled(plan: str, scale: str | None = None) -> Pick:
    """A static plan whose skipped sublayers are scaled so."""
    given = plan.endswith("({})")
    named = "" if scale is None else f"{'' if given else ', '}scale={scale}"
    return Pick(plan.format(named).replace("()", ""))


def generating(pick: Pick) -> Pick:
    """The method with prompts at full depth."""
    name, _, given = pick.method.rstrip(")").partition("(")
    return Pick(f"{name}({', '.join(filter(None, (given, 'phases=generation')))})")


def significant(keep: float) -> Pick:
    """Block influence, and LoRA on this share of the modules, those whose change matters most."""
    return Pick(INFLUENCE.method, recovery=f"lora(modules=ila, keep={keep:g})")


ADASKIP = Pick("adaskip")
EVEN, GREEDY = (scaled(PLANS[name], "token") for name in ("evenly spaced", "greedy"))
LAST = Pick("static_pruning(criterion=last, scale=token)")
INFLUENCE = scaled(PLANS["block influence"])
READS, CONSTANT, FREQUENT = (
    Pick(f"prompt_router({given}{PROMPT_TOKENS})")
    for given in ("", "reads=constant, ", "reads=frequent, ")
)
MASK, MASK_EVICTS = (Pick(f"random_mask(rates=uniform{kv})") for kv in ("", ", kv=evict"))
ROUTERS, ROUTERS_EVICT = Pick("skipgpt"), Pick("skipgpt(kv=evict)")
DEPTHS, DECISIONS = Pick(f"mod({TOKENS})"), Pick(f"d_llm({TOKENS})")
ALL, MOST, FEWEST = significant(1), significant(0.3), significant(0.1)

FLOPS: tuple[tuple[str, Kind], ...] = (
    ("block FLOPs", "equal_flops"),
    ("all FLOPs", "equal_total_flops"),
)


def methods(picks: Iterable[Pick]) -> str:
    """As a sweep takes them, each once."""
    return ",".join(dict.fromkeys(pick.method for pick in picks))


def of_routers(name: str, pick: Pick) -> Iterable[Claim]:
    """Claims (e) for one router, by either count of FLOPs."""
    for counted, kind in FLOPS:
        yield Claim(
            name=f"e: {name}, {counted}",
            text="Routers of whole blocks that evict lose less than SkipGPT's, at equal "
            f"{counted} and equal training tokens.",
            source="this project's comparison of the two, whose papers do not compare them",
            a=pick,
            b=(ROUTERS,),
            kind=kind,
            metrics=METRICS,
        )


STUDY = Study(
    name="relatives",
    title="Relatives: scaled skipping, prompt routers, eviction, layer significance",
    limit={"wikipedia_bpb": 24, "wikipedia_continuation": 16, "last_word": 32},
    sweeps=(
        {
            "methods": methods(
                scaled(plan, scale) for plan in PLANS.values() for scale in (None, "token")
            ),
            "speedups": BUDGETS,
        },
        {"methods": methods(scaled(p, "tensor") for p in PLANS.values()), "speedups": BUDGETS},
        {"methods": methods((ADASKIP, generating(ADASKIP))), "speedups": BUDGETS},
        {
            "methods": methods((EVEN, LAST, GREEDY, *map(generating, (EVEN, LAST, GREEDY)))),
            "speedups": AROUND,
        },
        {"methods": methods((MASK, MASK_EVICTS)), "speedups": (1.25, 1.5, 2.0), "seed": SEEDS},
        {"methods": methods((ROUTERS, ROUTERS_EVICT)), "speedups": BUDGETS},
        {"methods": methods((READS,)), "speedups": (1.25,), "seed": SEEDS},
        {"methods": methods((CONSTANT, FREQUENT)), "speedups": NEAR, "seed": SEEDS},
        {"methods": methods((DEPTHS, DECISIONS)), "speedups": (1.25,), "seed": SEEDS},
        {
            "methods": INFLUENCE.method,
            "speedups": (1.25,),
            "recovery": tuple(pick.recovery for pick in (ALL, MOST, FEWEST)),
        },
    ),
    claims=(
        *(
            Claim(
                name=f"a: {name}",
                text="Scaling the stream where a sublayer is left out lowers the loss of a "
                "static plan.",
                source="arXiv 2501.02336, its scale, here on every static plan",
                a=scaled(plan, "token"),
                b=(scaled(plan),),
                metrics=METRICS,
            )
            for name, plan in PLANS.items()
        ),
        *(
            Claim(
                name=f"a: by token, {name}",
                text="A scale that is a mean over tokens, as the paper says, loses less than one "
                "of whole windows, as its code has it.",
                source="arXiv 2501.02336, equation and code",
                a=scaled(plan, "token"),
                b=(scaled(plan, "tensor"),),
                metrics=(WHOLE, CONTINUATION),
            )
            for name, plan in PLANS.items()
        ),
        *(
            Claim(
                name=f"b: {name}",
                text="AdaSkip's sets lose less than evenly spaced ones, than the last blocks and "
                f"than greedy removal, all of them with its scale ({name}).",
                source="arXiv 2501.02336, main results; that all are scaled, and greedy removal, "
                "are this project's controls",
                a=pick(ADASKIP),
                b=tuple(map(pick, (EVEN, LAST, GREEDY))),
                metrics=metrics,
            )
            for name, pick, metrics in (
                ("prompt thinned", lambda pick: pick, METRICS),
                # Answers of a few words leave nothing to skip where prompts are kept.
                ("prompt kept", generating, (CONTINUATION,)),
            )
        ),
        Claim(
            name="c: the prompt is read",
            text="A router that reads the prompt loses less than its fixed-input twin and than "
            "the blocks that it chooses most often.",
            source="arXiv 2410.12513, abstract; the controls are this project's",
            a=READS,
            b=(CONSTANT, FREQUENT),
            # A text without a context has no prompt to be read.
            metrics=(CONTINUATION, WORD),
        ),
        *(
            Claim(
                name=f"d: {name}",
                text="Where as many sublayers are executed, evicting the keys of skipped tokens "
                f"costs quality against projecting them{more}.",
                source="this project's comparison; arXiv 2404.02258 evicts, 2506.04179 projects",
                a=evicts,
                b=(projects,),
                kind="equal_modules",
                metrics=METRICS,
            )
            for name, evicts, projects, more in (
                ("random masks", MASK_EVICTS, MASK, ""),
                (
                    "routers",
                    ROUTERS_EVICT,
                    ROUTERS,
                    ", with routers fitted for the latter",
                ),
            )
        ),
        *of_routers("mixture of depths", DEPTHS),
        *of_routers("decision networks", DECISIONS),
        Claim(
            name="f: a part of the modules",
            text="LoRA on the 30 % of the modules whose change matters most recovers as much as "
            "LoRA on all of them.",
            source="arXiv 2410.17875, abstract and main results",
            a=MOST,
            b=(ALL, FEWEST),
            kind="full_depth",
            metrics=METRICS,
        ),
        Claim(
            name="f: against none",
            text="LoRA on those 30 % lowers the loss.",
            source="this project's control",
            a=MOST,
            b=(INFLUENCE,),
            metrics=METRICS,
        ),
    ),
)
