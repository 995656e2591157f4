"""The model class of ``lm_eval --model dyndepth``: it is built from names.

Importing this module makes lm-eval know the name, whatever was imported before.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method, method_class, parse_methods
from dyndepth.data.corpus import load_corpus
from dyndepth.evaluation.language_model import ROWS, DyndepthLM
from dyndepth.evaluation.rows import Cost
from dyndepth.fitting.fits import fit_cached
from dyndepth.lm_eval_plugin import register
from dyndepth.method import DynamicDepthMethod
from dyndepth.models.loading import load_model, load_tokenizer
from dyndepth.models.shapes import refuse_shape

register()


class NamedLM(DyndepthLM):
    """``DyndepthLM`` of a model, a tokenizer and a method that are given by name, or loaded.

    Args:
        pretrained: a loaded model, or what ``dyndepth.load_model`` takes: ``embedded``, a hub id
            or a local path.
        method: a method object, or a specification as in ``--methods``. One that is given by name
            is fitted on the embedded corpus (cached) unless it comes fitted. It skips in prompt and
            generation, unless it says ``phases=generation``.
        tokenizer: a loaded tokenizer or its name; the model's own by default.
        batch_size: see ``DyndepthLM``.
        max_batch_size: taken, as every model of lm-eval takes it, and not used.
        device, dtype, attn_implementation, revision, trust_remote_code: as ``load_model`` takes
            them; ignored for a loaded model. lm-eval asks for ``cuda:0`` unless told otherwise;
            without a GPU that means the CPU, with a warning, as it does for its ``hf`` model.
        parameters: settings that ``DyndepthLM`` takes; and of the method, such as
            ``target_speedup=1.5``, if it is given by name.

    Raises UserError for a setting that is unknown or can't be had.
    """

    def __init__(
        self,
        pretrained: Any = "embedded",
        method: DynamicDepthMethod | str = "dense",
        tokenizer: Any = None,
        batch_size: int | str | None = ROWS,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        add_bos_token: bool | None = None,
        **parameters: Any,
    ) -> None:
        settings = {name: parameters.pop(name) for name in SETTINGS if name in parameters}
        named = isinstance(method, str)
        if isinstance(method, str):
            method = _named(method, parameters)
        elif parameters:
            raise UserError(
                f"{', '.join(parameters)}: parameters go with a method's name, and here the method "
                "is an object that has its own"
            )
        model = pretrained
        refuse_shape(model)
        if isinstance(pretrained, str):
            model = load_model(
                pretrained,
                dtype=dtype,
                device=_usable(device),
                attn_implementation=attn_implementation,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        if tokenizer is None or isinstance(tokenizer, str):
            name = tokenizer or pretrained
            if not isinstance(name, str):
                name = model.dyndepth.name
            tokenizer = load_tokenizer(
                name, revision, trust_remote_code, add_bos_token=add_bos_token
            )
        super().__init__(
            model,
            method,
            tokenizer,
            batch_size,
            revision=revision,
            add_bos_token=add_bos_token,
            **settings,
        )
        if named:
            self.method = _fitted(method, model, tokenizer)

    def get_model_info(self) -> dict[str, Any]:
        """As lm-eval's, which asks once a run, when all requests are answered; and what was run:
        ``phases``, ``block_speedup`` and ``total_speedup``, which are told on stderr, too."""
        found: dict[str, Any] = super().get_model_info()
        ran = achieved(self.costs.values()) | {"phases": self.method.phases}
        if "block_speedup" in ran:
            print(
                f"dyndepth: {self.method.name} at target {self.method.target_speedup:g}x, "
                f"phases={ran['phases']}: achieved {ran['block_speedup']:.2f}x of dense's block "
                f"FLOPs, {ran['total_speedup']:.2f}x of its total FLOPs{_drafts(ran)}",
                file=sys.stderr,
            )
        return found | ran


def achieved(costs: Iterable[Cost]) -> dict[str, float]:
    """``block_speedup`` and ``total_speedup`` over all that was run, where anything was; and, of
    drafts, ``acceptance`` and ``tokens_per_verify``."""
    costs = list(costs)
    totals = [cost.totals["all"] for cost in costs if "all" in cost.totals]
    found: dict[str, float] = {}
    for kind in ("block", "total"):
        dense, own = (
            sum(each[f"{name}{kind}_flops"] for each in totals) for name in ("dense_", "")
        )
        if own:
            found[f"{kind}_speedup"] = dense / own
    drafts = [cost.drafts for cost in costs if cost.drafts]
    if drafts:
        drafted, accepted, passes, written = (
            sum(each[key] for each in drafts)
            for key in ("drafted", "accepted", "verifications", "written")
        )
        found["tokens_per_verify"] = written / passes
        found |= {"acceptance": accepted / drafted} if drafted else {}
    return found


def _drafts(ran: Mapping[str, Any]) -> str:
    """What became of drafts, as the end of a sentence; empty where there were none."""
    if "tokens_per_verify" not in ran:
        return ""
    share = f"{ran['acceptance']:.0%} of its drafts accepted, " if "acceptance" in ran else ""
    return f"; lossless: {share}{ran['tokens_per_verify']:.2f} tokens a verification"


SETTINGS = (
    "backend",
    "max_length",
    "progress",
    "prefix_token_id",
    "enable_thinking",
    "think_end_token",
    "chat_template_args",
)
"""What ``DyndepthLM`` takes beside its model, method and tokenizer."""


def _named(spec: str, parameters: dict[str, Any]) -> DynamicDepthMethod:
    """A method by name. Raises UserError also for a setting that lm-eval's ``hf`` takes, and
    neither this class nor the method does."""
    own = {field.name for field in fields(method_class(parse_methods(spec)[0][0]))}
    for parameter in parameters:
        if parameter in inspect.signature(HFLM.__init__).parameters and parameter not in own:
            raise UserError(
                f"{parameter} is a setting of lm-eval's hf model that dyndepth does not take; "
                "leave it out, or load the model with it and hand it to dyndepth.evaluate"
            )
    return load_method(spec, **parameters)


def _usable(device: str | None) -> str:
    """The device to load on: that asked for, or the CPU if it is a GPU and there is none."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("no GPU is usable here: the model runs on the CPU")
        return "cpu"
    return device or "cpu"


def _fitted(method: DynamicDepthMethod, model: Any, tokenizer: Any) -> DynamicDepthMethod:
    """``method``, fitted to ``model``."""
    fitted = fit_cached(method, model, load_corpus("embedded", tokenizer))
    if fitted.candidates() is not None:
        raise UserError(
            f"{method.name} is a bound, which chooses by the outcomes of the documents that are "
            "scored, and these are not known here; use python -m dyndepth.sweep"
        )
    return fitted
