"""Makes the shipped routers again: ``python -m dyndepth.methods.skipgpt.ship``.

Each target is trained by itself, with the default settings. Files appear in ``routers/`` as each is
done. A target whose training is killed goes on from its checkpoint; ``--speedups`` names what is
still to be made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from statistics import mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, calibrate and write the routers of each target; prints a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="as in the sweep (default: embedded)")
    parser.add_argument("--speedups", default="1.1,1.25,1.5,2.0", help="targets, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    import torch

    from dyndepth.common.digests import fitting_code
    from dyndepth.common.files import cache_root
    from dyndepth.common.machine import steady_allocator
    from dyndepth.data.capacity import fitting
    from dyndepth.data.corpus import load_corpus
    from dyndepth.fitting.loop import checkpoints
    from dyndepth.fitting.routers import loss
    from dyndepth.models.fingerprints import fingerprint
    from dyndepth.models.loading import load_model, load_tokenizer
    from dyndepth.runtime.attach import attach

    from . import SkipGPT
    from .shipped import save_shipped
    from .tuning import train

    steady_allocator()
    model = load_model(options.model)
    corpus = load_corpus("embedded", load_tokenizer(options.model))
    length = fitting(model, 256)
    held_out = corpus.windows(length, 24, options.seed + 1, split="calibration", model=model)

    def held_out_loss(method: SkipGPT) -> float:
        with torch.no_grad(), attach(model, method, warn=False):
            return mean(loss(model, rows).item() for rows in held_out.split(4))

    dense_loss = held_out_loss(SkipGPT())
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    for target in (float(part) for part in options.speedups.split(",")):
        method = SkipGPT(target_speedup=target, seed=options.seed)
        began = time.perf_counter()
        # Not the fit's key: that covers the shipped files, which change as targets are done.
        code = fitting_code("dyndepth.fitting.regression", "dyndepth.fitting.routers")
        facts = [repr(method), fingerprint(model), corpus.fingerprint, code]
        facts += [corpus.tokenizer_fingerprint]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        unfinished = cache_root() / "ship" / key
        with checkpoints(unfinished):
            train(method, model, corpus)
        shutil.rmtree(unfinished, ignore_errors=True)
        card = {
            "command": f"python -m dyndepth.methods.skipgpt.ship {given}".strip(),
            "method": repr(method),
            "corpus": corpus.fingerprint,
            "tokenizer": corpus.tokenizer_fingerprint,
            "seconds": round(time.perf_counter() - began),
            "threads": torch.get_num_threads(),
            "training_loss": mean(row["loss"] for row in method.curve[-10:]),
            "training_executed": mean(row["executed"] for row in method.curve[-10:]),
            "held_out_loss": held_out_loss(method),
            "held_out_dense_loss": dense_loss,
            **method.facts,
        }
        save_shipped(method, model, card)
        print(json.dumps(card), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
