"""What must be shown of SkipGPT before its published claims count as reproduced or refuted.

Costs: 38 cells. Documents a task are chosen for the embedded model on two slow cores; by dense
scoring with one thread a document takes about 1.2 s (bits per byte), 0.75 s (last word), 0.15 s
(Social IQa) and 0.14 s (QuaRTz), so a cell takes a minute or two.
"""

from __future__ import annotations

from dyndepth.studies.study import Claim, Pick, Study

SKIPGPT = Pick("skipgpt")
BLIND = Pick("skipgpt(reads=constant, windows=16)")
GREEDY = Pick("skipgpt(reads=constant, initial=order, steps=0)")
"""The sublayers that a greedy joint removal takes first: no router is trained, none reads a token.
The strongest training-free static rule at hand."""
MASK = Pick("random_mask")
RECOVERED = Pick("skipgpt", recovery="lora")
DENSE_RECOVERED = Pick("dense", recovery="lora")
UNTRAINED = (
    GREEDY,
    Pick("uls"),
    Pick("uls(spacing=even)"),
    Pick("early_exit(confidence=fixed)"),
)

BUDGETS = (1.1, 1.25, 1.5, 2.0)
WIDE = (1.25, 1.5, 2.0)
"""Budgets of the controls that need several seeds or a fit of their own."""

METRICS = (
    ("wikipedia_bpb", "bits_per_byte"),
    ("last_word", "acc"),
    ("socialiqa", "acc"),
    ("quartz", "acc"),
)
PAPER = "arXiv 2506.04179"

STUDY = Study(
    name="skipgpt",
    title="SkipGPT: routers against static depth, against blind controls, and with LoRA",
    limit={"wikipedia_bpb": 24, "last_word": 32, "socialiqa": 100, "quartz": 100},
    sweeps=(
        {"methods": SKIPGPT.method, "speedups": BUDGETS, "recovery": ("none", "lora")},
        {"methods": BLIND.method, "speedups": WIDE},
        {"methods": ",".join(pick.method for pick in UNTRAINED), "speedups": BUDGETS},
        {"methods": MASK.method, "speedups": WIDE, "seed": (0, 1, 2)},
    ),
    claims=(
        Claim(
            name="static",
            text="Routers lose less than methods that choose depth without training.",
            source=f"{PAPER}, main results: router tuning against static pruning",
            a=SKIPGPT,
            b=UNTRAINED,
            metrics=METRICS,
        ),
        Claim(
            name="tokens",
            text="The gain comes from looking at each token, not from a better fixed rate by "
            "sublayer.",
            source=f"{PAPER}, motivation: horizontal dynamics; the controls are this project's",
            a=SKIPGPT,
            b=(BLIND, MASK),
            metrics=METRICS,
        ),
        Claim(
            name="recovery",
            text="With LoRA after the routers, quality is that of the dense model with the same "
            "LoRA, up to about 40 % skipped at 7B.",
            source=f"{PAPER}, stage 2",
            published="average 69.50 against 69.98 on Llama-2-7B",
            a=RECOVERED,
            b=(DENSE_RECOVERED,),
            kind="full_depth",
            metrics=METRICS,
        ),
        Claim(
            name="sublayers",
            text="Attention is more redundant than the MLPs: routers execute less of it.",
            source=f"{PAPER}, analysis",
            published="at a target of 30 %, 33.19 % of attention and 26.33 % of MLPs are skipped",
            a=SKIPGPT,
            kind="sublayers",
        ),
        Claim(
            name="position",
            text="With position in the context, attention is executed more and the MLPs less.",
            source=f"{PAPER}, analysis",
            published="attention from 0.5 to 0.75, MLPs from 0.7 to 0.5",
            a=SKIPGPT,
            kind="position",
        ),
    ),
)
