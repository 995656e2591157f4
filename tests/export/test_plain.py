"""Plain checkpoints: every family without some of its blocks, with adapters merged in, as another
process reads them; and what has none, with the reason."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DEVICE, make_tiny
from exporting import here  # noqa: F401
from gating import GivenPlan, RandomMask, plan_without
from test_recovery import random_adapter

from dyndepth.common.errors import RunFailed, UserError
from dyndepth.export import agreement, plain, reader
from dyndepth.fitting.recovery.adapters import adapted
from dyndepth.models.blocks import Decoder
from dyndepth.models.families import FAMILIES
from dyndepth.runtime.attach import attach

pytestmark = pytest.mark.skipif(
    DEVICE.type == "standin", reason="another process has no stand-in to load a model on"
)
WITHOUT_1 = GivenPlan(plan=plan_without(4, (1, 0), (1, 1)))
WITHOUT_3 = GivenPlan(plan=plan_without(4, (3, 0), (3, 1)))
BY_PLACE = {"scale_attn_by_inverse_layer_idx": True}


def job(model, fresh, dtype="float32"):
    """How a checkpoint of ``fresh`` is to be read; windows longer than any tiny sliding window."""
    windows = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(3))
    parts = Decoder.of(fresh)
    return {
        "windows": windows.tolist(),
        "steps": 6,
        "dtype": dtype,
        "device": "cpu",
        "attn_implementation": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
        "tokenizer": False,
        "settings": plain.per_layer_settings(parts.config, parts.record),
    }


class Written:
    """Checkpoints that are written one by one and read together: a process takes seconds."""

    def __init__(self, folder):
        self.folder, self.folders, self.jobs, self.wanted = folder, [], [], []

    def add(self, name, model, method, adapter=None, dtype="float32"):
        with adapted(model, adapter):
            given = job(model, model, dtype)
            with attach(model, method) as trace:
                wanted = reader.computed(model, given["windows"], given["steps"])
                kept, reason = plain.kept_blocks(method, trace.executed())
            assert kept, reason
            fresh = plain.shortened(model, kept)
            plain.write_checkpoint(fresh, None, self.folder / name)
        self.folders.append(self.folder / name)
        self.jobs.append(job(model, fresh, dtype))
        self.wanted.append(wanted)

    def check(self):
        found = agreement.read_elsewhere(self.folders, self.jobs)
        for folder, given, ours, theirs in zip(
            self.folders, self.jobs, found, self.wanted, strict=True
        ):
            tolerance = agreement.TOLERANCE[given["dtype"]]
            agreed = agreement.compared(ours, theirs, tolerance)
            assert agreed.tokens == 2 * given["steps"], folder.name
            if given["dtype"] == "float32":
                assert float((ours["logits"] - theirs["logits"]).abs().max()) <= 1e-5, folder.name


def test_every_family_computes_in_another_process_what_it_did_attached(tmp_path):
    written = Written(tmp_path)
    for family in FAMILIES:
        written.add(family, make_tiny(family), WITHOUT_1)
        tied = make_tiny(family, seed=1, tie_word_embeddings=True)
        adapter = random_adapter(tmp_path / f"adapter-{family}", tied)
        written.add(f"{family}-adapted", tied, WITHOUT_1, adapter)
    written.add("dense-adapted", tied, GivenPlan(plan=plan_without(4)), adapter)
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    for family in ("qwen2", "qwen3"):
        written.add(f"{family}-windows", make_tiny(family, **window), WITHOUT_1)
    written.add("gpt2-last", make_tiny("gpt2", **BY_PLACE), WITHOUT_3)
    eager = make_tiny("llama", "eager")
    written.add("eager", eager, WITHOUT_1)
    written.add("bfloat16", make_tiny().to(torch.bfloat16), WITHOUT_1, dtype="bfloat16")
    written.check()


def test_settings_of_single_blocks_go_with_their_blocks():
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    fresh = plain.shortened(make_tiny("qwen2", **window), [0, 2, 3])
    assert fresh.config.layer_types == ["full_attention", *["sliding_attention"] * 2]
    assert (fresh.config.max_window_layers, fresh.config.num_hidden_layers) == (1, 3)
    assert [block.index for block in Decoder.of(fresh).blocks] == [0, 1, 2]
    fresh = plain.shortened(make_tiny("smollm3"), [0, 1, 3])
    assert fresh.config.no_rope_layers == [1, 0, 1]
    assert plain.irregular(fresh.config, FAMILIES["smollm3"]) == ["no_rope_layers"]
    fresh = plain.shortened(make_tiny("gemma2"), [0, 2, 3])
    assert plain.irregular(fresh.config, FAMILIES["gemma2"]) == ["layer_types"]
    assert plain.irregular(make_tiny("gemma2").config, FAMILIES["gemma2"]) == []


def test_blocks_that_depend_on_their_place_are_not_renumbered():
    model = make_tiny("gpt2", **BY_PLACE)
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx=True.*its place"):
        plain.shortened(model, [0, 2, 3])
    assert plain.shortened(model, [0, 1]).config.n_layer == 2


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (RandomMask(), "decides by token"),
        (GivenPlan(plan=WITHOUT_1.plan, phases="generation"), "in generation only"),
        (GivenPlan(plan=plan_without(4, (1, 0), (2, 0), (2, 1))), "leaves 1 sublayers out"),
        (GivenPlan(plan=plan_without(4, *((n, s) for n in range(4) for s in (0, 1)))), "every"),
    ],
)
def test_what_no_plain_checkpoint_can_hold_is_said_with_its_reason(method, reason):
    model = make_tiny()
    with attach(model, method) as trace:
        reader.computed(model, [[5, 6, 7]], 3)
        kept, said = plain.kept_blocks(method, trace.executed())
    assert kept == []
    assert reason in said


def _wrapped(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def _quantised(model):
    model.config.quantization_config = {"quant_method": "any"}
    return model


def _brought_along(model):
    own = type(type(model).__name__, (type(model),), {"__module__": "transformers_modules.x"})
    model.__class__ = own
    return model


def _offloaded(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (_wrapped, "wrapped by peft"),
        (_quantised, "quantised"),
        (_brought_along, "code that came with it"),
        (_offloaded, "offloaded"),
    ],
)
def test_a_model_that_cannot_be_written_is_refused_with_the_reason(spoiled, reason):
    with pytest.raises(UserError, match=reason):
        plain.check_exportable(spoiled(make_tiny()))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("spoiled", ["wrong layer", "config", "missing"])
def test_a_checkpoint_that_is_another_is_seen(tmp_path, spoiled):
    model = make_tiny("qwen2")
    given = job(model, plain.shortened(model, [0, 2, 3]))
    with attach(model, WITHOUT_1):
        wanted = reader.computed(model, given["windows"], given["steps"])
    fresh = plain.shortened(model, [2, 0, 3] if spoiled == "wrong layer" else [0, 2, 3])
    plain.write_checkpoint(fresh, None, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    facts = json.loads(config.read_text())
    if spoiled == "config":
        facts["max_window_layers"] = 1
    if spoiled == "missing":
        facts |= {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    config.write_text(json.dumps(facts))
    says = {"wrong layer": "logits differ", "config": "read as", "missing": "missing_keys"}
    with pytest.raises(RunFailed, match=says[spoiled]):
        agreement.compared(agreement.read_elsewhere([tmp_path / "out"], [given])[0], wanted, 1e-5)
