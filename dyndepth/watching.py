"""Whether somebody else would notice that a module is not called as its model calls it."""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURE = "transformers.utils.output_capturing"


def watched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, forward or backward, or a forward of its own, by others.

    Not those of accelerate, which bring what a module is given to its device, nor those by which
    transformers captures outputs: the runtime sees to these itself.
    """
    own = vars(module)
    if "forward" in own and "_hf_hook" not in own:
        return True
    hooks = [own[kind] for kind in _KINDS]
    return any(hooks) and any(
        getattr(hook, "__module__", None) != _CAPTURE for each in hooks for hook in each.values()
    )
