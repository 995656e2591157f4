"""Whether somebody else would notice that a module is not called as its model calls it."""

from __future__ import annotations

from torch import nn

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ON_ALL = [vars(nn.modules.module)[f"_global{kind}"] for kind in _KINDS]
"""torch's hooks on every module that there is."""
_HARMLESS = ("transformers.utils.output_capturing", "torch.utils.module_tracker")


def watched(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, forward or backward, or a forward of its own, by others.

    Not those of accelerate, which bring what a module is given to its device, nor those by which
    transformers captures outputs: the runtime sees to these itself. Nor those by which torch knows,
    while it counts FLOPs, which module runs.
    """
    own = vars(module)
    if "forward" in own and "_hf_hook" not in own:
        return True
    hooks = [own[kind] for kind in _KINDS if own[kind]] + [each for each in _ON_ALL if each]
    return bool(hooks) and any(
        getattr(hook, "__module__", None) not in _HARMLESS
        for each in hooks
        for hook in each.values()
    )
