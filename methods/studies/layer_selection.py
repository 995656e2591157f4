"""What holds of the layer-selection paper's claims, and of the claims about static pruning.

Claims (i) to (iv) and (vii) are those of arXiv 2410.20022, (v) that of arXiv 2406.15786, (vi) that
of arXiv 2403.03853. Documents a task are chosen for the embedded model on two slow cores.
"""

from __future__ import annotations

from dyndepth.studies.study import Claim, Pick, Study

SKIPPING = ("uls(spacing=even{})", "random_skip{}")
EXITS = ("early_exit(confidence=fixed{})", "early_exit(confidence=saturation{})")

CONTROLLER = Pick("layer_controller(phases=generation)")
BLIND = Pick("layer_controller(phases=generation, reads=constant)")
ORACLE = "oracle(depths=6)"
TWIN = "oracle(depths=6, routes=random)"
FITTED = "oracle(depths=6, cross_fitted=true)"
FITTED_TWIN = "oracle(depths=6, routes=random, cross_fitted=true)"
MATCH = "oracle(depths=6, rule=match)"
MATCH_TWIN = "oracle(depths=6, routes=random, rule=match)"
INFLUENCE = "static_pruning"
GREEDY = "static_pruning(criterion=greedy)"
ATTENTION = "static_pruning(criterion=attention)"
MLP = "static_pruning(criterion=mlp)"
OTHERS = ("last", "random", "angular", "perplexity", "taylor", "joint")

CONTINUATION = ("wikipedia_continuation", "bits_per_byte")
WORD, SOCIAL = ("last_word", "acc"), ("socialiqa", "acc")
TITLE = ("title_generation", "rougeL")
METRICS = (CONTINUATION, WORD, SOCIAL)
SELECTION = "arXiv 2410.20022"


def in_generation(method: str) -> Pick:
    """The method with prompts at full depth."""
    return Pick(_phases(method, "phases=generation"))


def everywhere(method: str) -> Pick:
    """The method with prompts thinned too."""
    return Pick(_phases(method, ""))


def _phases(method: str, named: str) -> str:
    if method.endswith("{})"):
        return method.replace("{}", f", {named}" if named else "")
    return method.replace("{}", f"({named})" if named else "")


def robust(name: str, skipping: str, prompt: str) -> Claim:
    """Claim (i) for one rule of skipping, with prompts thinned or not."""
    pick = in_generation if prompt == "prompt kept" else everywhere
    return Claim(
        name=f"i: {name}, {prompt}",
        text="Layer skipping is more robust than early exit at equal budgets "
        f"({'prompts at full depth' if prompt == 'prompt kept' else 'prompts thinned too'}).",
        source=f"{SELECTION}, abstract",
        a=pick(skipping),
        b=tuple(map(pick, EXITS)),
        # Answers of a few words leave nothing to skip where prompts are kept.
        metrics=METRICS if pick is everywhere else (CONTINUATION,),
    )


STUDY = Study(
    name="layer_selection",
    title="Layer selection: skipping against exits, controllers, oracles, static pruning",
    limit={"wikipedia_continuation": 16, "last_word": 24, "socialiqa": 100, "title_generation": 10},
    sweeps=(
        {
            "methods": ",".join(
                pick(m).method for m in SKIPPING + EXITS for pick in (everywhere, in_generation)
            ),
            "speedups": (1.1, 1.25, 1.5, 2.0),
        },
        {"methods": f"{INFLUENCE},{GREEDY}", "speedups": (1.1, 1.25, 1.5)},
        # As far as dropping 22 of 30 MLPs, as many as attentions at 1.25.
        {"methods": MLP, "speedups": (1.1, 1.25, 1.5, 2.2)},
        {"methods": ATTENTION, "speedups": (1.1, 1.25)},
        {
            "methods": ",".join(f"static_pruning(criterion={name})" for name in OTHERS),
            "speedups": (1.25,),
        },
        {"methods": f"{ORACLE},{TWIN}", "speedups": (1.5, 2.0, 3.0, 5.0)},
        {"methods": f"{FITTED},{FITTED_TWIN}", "speedups": (1.5, 2.0, 3.0)},
        {"methods": f"{MATCH},{MATCH_TWIN}", "speedups": (2.0,)},
        {"methods": f"{CONTROLLER.method},{BLIND.method}", "speedups": (1.25,)},
    ),
    claims=(
        robust("uniform", SKIPPING[0], "prompt thinned"),
        robust("uniform", SKIPPING[0], "prompt kept"),
        robust("random", SKIPPING[1], "prompt thinned"),
        robust("random", SKIPPING[1], "prompt kept"),
        Claim(
            name="ii: controllers",
            text="Per-token controllers that see the hidden state do no better than controls that "
            "do not.",
            source=f"{SELECTION}, abstract; the fixed-input controller is the paper's control",
            a=CONTROLLER,
            b=(BLIND, *map(in_generation, SKIPPING)),
            metrics=(CONTINUATION,),
        ),
        Claim(
            name="iii: depth that full quality takes",
            text="An oracle that chooses a route for each sequence reaches the full model's "
            "quality with a fraction of its layers.",
            source=f"{SELECTION}, abstract; there ROUGE-L of a fine-tuned OPT with prompts at full "
            "depth, here block FLOPs with prompts thinned too",
            a=Pick(ORACLE),
            b=tuple(map(Pick, (TWIN, FITTED, FITTED_TWIN, MATCH, MATCH_TWIN))),
            kind="reach",
            metrics=(SOCIAL, WORD, TITLE, CONTINUATION),
            published="23.3 % of the layers",
        ),
        Claim(
            name="iii: without the luck of single routes",
            text="The oracle keeps the full model's quality when a document executes another route "
            "of the depth that its evidence chose.",
            source="this project's control of the claim before; a document's own answer still "
            "chooses the depth",
            a=Pick(FITTED),
            b=(Pick("dense"),),
            kind="full_depth",
            metrics=(SOCIAL, WORD, TITLE, CONTINUATION),
        ),
        Claim(
            name="iv: uniform over random",
            text="Final hidden states stay nearer to the full model's under uniform skipping than "
            "under random skipping.",
            source=f"{SELECTION}, comparison of hidden states",
            a=everywhere(SKIPPING[0]),
            b=(everywhere(SKIPPING[1]),),
            kind="similarity",
        ),
        Claim(
            name="iv: random over exit",
            text="Final hidden states stay nearer to the full model's under random skipping than "
            "under early exit.",
            source=f"{SELECTION}, comparison of hidden states",
            a=everywhere(SKIPPING[1]),
            b=(everywhere(EXITS[0]),),
            kind="similarity",
        ),
        Claim(
            name="v: attention, by number",
            text="Dropping attention sublayers costs less than dropping as many MLPs.",
            source="arXiv 2406.15786, main results",
            a=Pick(ATTENTION),
            b=(Pick(MLP),),
            kind="equal_modules",
            metrics=METRICS,
            published="Llama-2-13B, 8 of 40 dropped: attention 68.1, MLP 61.9 of 68.2 points",
        ),
        Claim(
            name="v: attention, by FLOPs",
            text="Dropping attention sublayers costs less than dropping MLPs of equal FLOPs.",
            source="this project's form of the claim before",
            a=Pick(ATTENTION),
            b=(Pick(MLP),),
            metrics=METRICS,
        ),
        Claim(
            name="v: greedy over one-shot",
            text="Choosing again after each removal loses less than ranking once.",
            source="arXiv 2402.09025, abstract",
            a=Pick(GREEDY),
            b=tuple(Pick(f"static_pruning(criterion={name})") for name in OTHERS)
            + (Pick(INFLUENCE),),
            metrics=METRICS,
        ),
        *(
            Claim(
                name=f"vi: {name}",
                text="Multiple-choice scores hide what static pruning does to likelihoods: they "
                "stay while bits per byte rise.",
                source="arXiv 2403.03853, table 4",
                a=Pick(method),
                b=(Pick("dense"),),
                kind="full_depth",
                metrics=(SOCIAL, WORD, CONTINUATION),
                published="Llama2-7B, 27.1 % of blocks removed: MMLU 43.17 to 43.35, perplexity "
                "8.03 to 40.78",
            )
            for name, method in (("block influence", INFLUENCE), ("greedy", GREEDY))
        ),
        *(
            Claim(
                name=f"vii: {name}",
                text="At equal FLOPs, skipping in the prompt as well hurts more than skipping in "
                "the generation alone.",
                source=f"{SELECTION}, which never skips in the prompt; arXiv 2404.06954 likewise",
                a=in_generation(method),
                b=(everywhere(method),),
                metrics=(CONTINUATION,),
            )
            for name, method in (("uniform", SKIPPING[0]), ("random", SKIPPING[1]))
        ),
    ),
)
