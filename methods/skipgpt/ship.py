"""Makes the shipped routers: ``python -m dyndepth.methods.skipgpt.ship --speedups 1.25,1.5``.

Targets are trained in the order given. The first starts as ``fit`` does; each other goes on from
the nearest one already trained, for which fewer steps do (``--steps``). With ``--go_on`` the files
that are already there count as trained. Files appear in ``routers/`` as each target is done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import mean


def main(arguments: list[str] | None = None) -> int:
    """Train, calibrate and write the routers of each target; prints a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="as in the sweep (default: embedded)")
    parser.add_argument("--speedups", default="1.25,1.5,2.0,1.25", help="targets, comma-separated")
    parser.add_argument("--steps", type=int, default=100, help="training steps a target")
    parser.add_argument("--go_on", action="store_true", help="start from the nearest file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    import torch

    from dyndepth.corpus import load_corpus
    from dyndepth.machine import steady_allocator
    from dyndepth.models import load_model, load_tokenizer
    from dyndepth.runtime import attach
    from dyndepth.training import loss

    from . import SkipGPT
    from .shipped import load_all_shipped, save_shipped
    from .tuning import train

    steady_allocator()
    model = load_model(options.model)
    corpus = load_corpus("embedded", load_tokenizer(options.model))
    held_out = corpus.windows(256, 8, options.seed + 1, split="calibration")

    def held_out_loss(method: SkipGPT) -> float:
        with torch.no_grad(), attach(model, method):
            return mean(loss(model, rows).item() for rows in held_out.split(4))

    dense_loss = held_out_loss(SkipGPT())
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    trained = load_all_shipped(model) if options.go_on else []
    for target in (float(part) for part in options.speedups.split(",")):
        method = SkipGPT(target_speedup=target, seed=options.seed, steps=options.steps)
        nearest = min(
            (other for other in trained if other.target_speedup != target),
            key=lambda other: abs(other.target_speedup - target),
            default=None,
        )
        began = time.perf_counter()
        curve = train(method, model, corpus, nearest)
        seconds = round(time.perf_counter() - began)
        card = {
            "command": f"python -m dyndepth.methods.skipgpt.ship {given}".strip(),
            "method": repr(method),
            "corpus": corpus.fingerprint,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "training_loss": mean(row["loss"] for row in curve[-10:]),
            "training_executed": mean(row["executed"] for row in curve[-10:]),
            "held_out_loss": held_out_loss(method),
            "held_out_dense_loss": dense_loss,
            **method.facts,
        }
        save_shipped(method, model, card)
        print(json.dumps(card), flush=True)
        trained.append(method)
    return 0


if __name__ == "__main__":
    sys.exit(main())
