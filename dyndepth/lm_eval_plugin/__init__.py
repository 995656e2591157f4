"""Makes ``lm_eval --model dyndepth`` work as soon as the distribution is installed.

lm-eval looks for models in its own table only. torch, which lm-eval imports before it looks a
model up, calls the entry points of the group ``torch.backends``; ours does nothing at all
unless lm-eval is what is running, and then adds one lazy line to that table. A program that
imports torch before lm-eval calls ``register`` itself.
"""

import sys


def register() -> None:
    """Announce the model class ``dyndepth`` to lm-eval, if lm-eval is loaded; else do nothing."""
    if "lm_eval" not in sys.modules:
        return
    try:
        # Brings lm-eval's own models into the table: it does so itself only if the table is empty.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry
    except ImportError:
        # An lm-eval outside of the supported range: torch, whose import this is, must not fail.
        return
    if "dyndepth" not in model_registry:
        model_registry.register("dyndepth", target="dyndepth.lm_eval_plugin.model:NamedLM")
