"""Whether somebody else would notice that a module is not called as its model calls it."""

from __future__ import annotations

from torch import nn

_CAPTURE = "transformers.utils.output_capturing"


def watched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, forward or backward, or a forward of its own, by others.

    Not those of accelerate, which bring what a module is given to its device, nor those by which
    transformers captures outputs: the runtime sees to these itself.
    """
    own = vars(module)
    if "forward" in own and "_hf_hook" not in own:
        return True
    return any(
        getattr(hook, "__module__", None) != _CAPTURE
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
        for hook in own[kind].values()
    )
