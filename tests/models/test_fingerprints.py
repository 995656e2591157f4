"""Identities: whatever changes a number changes them, and what cannot does not."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from conftest import make_tiny
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from dyndepth.cells.identity import FORMER, agrees
from dyndepth.data.tokenizers import tokenizer_fingerprint
from dyndepth.models.families import FAMILIES
from dyndepth.models.fingerprints import IMMATERIAL, checksum, fingerprint, known_as, values_digest
from dyndepth.models.loading import load_model

TEXT = torch.randint(3, 96, (2, 90), generator=torch.Generator().manual_seed(0))
"""Longer than the tiny models' sliding windows."""

OTHER = {
    "model_type": None,  # another architecture
    "hidden_act": "tanh",
    "hidden_activation": "tanh",
    "activation_function": "tanh",
    "architectures": ["OtherForCausalLM"],
    "dtype": "bfloat16",
    "id2label": {0: "yes"},
    "label2id": {"yes": 0},
    "problem_type": "regression",
    "layer_types": ["full_attention", "full_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "no_rope_layers": [1, 1, 0, 1],
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "use_bidirectional_attention": True,
    "summary_activation": "tanh",
    "summary_type": "last",
    "_name_or_path": "elsewhere",
    "transformers_version": "5.0.0",
}
"""A plausible other value of settings that are neither numbers nor truth values."""

ROPES = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    {"rope_theta": 500.0},
    {"partial_rotary_factor": 0.75},
)
"""Entries that change rotary embeddings, no two alike."""


def other(name, value):
    """Another value of a setting. Fails for one that nobody has considered."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value + 0.25
    pytest.fail(f"the setting {name}={value!r} is new here: give it another value in OTHER")


def settings_of(family):
    """Every setting of a family's configuration that can be set to something else."""
    config = make_tiny(family).config
    named = config.to_dict()
    hidden = {"_output_attentions", "_attn_implementation_internal", "_post_init_done"}
    hidden |= {"_experts_implementation_internal", "_commit_hash"}
    assert set(vars(config)) <= set(named) | hidden  # what else a configuration says is in its dict
    return named


@pytest.mark.parametrize("family", FAMILIES)
def test_each_setting_that_moves_logits_moves_the_fingerprint(family):
    """A fingerprint that stays is of a setting that leaves the logits alone."""
    model = make_tiny(family)
    before, logits = fingerprint(model), model(TEXT).logits
    stayed = set()
    for name, value in settings_of(family).items():
        if name == "rope_parameters":
            continue  # below, entry by entry
        changed = copy.copy(model)
        changed.config = copy.deepcopy(model.config)
        set_plainly(changed.config, name, other(name, value))
        if fingerprint(changed) == before:
            stayed.add(name)
    assert stayed <= set(IMMATERIAL)
    for name in stayed - {"return_dict", "dtype"}:
        config = copy.deepcopy(model.config)
        set_plainly(config, name, other(name, getattr(config, name, None)))
        again = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(TEXT).logits, logits), name


def set_plainly(config, name, value):
    """Past checks of what fits together."""
    if name == "model_type":
        type_ = type(config)
        config.__class__ = type(type_.__name__, (type_,), {"model_type": "other"})
    else:
        config.__dict__[config.attribute_map.get(name, name)] = value


@pytest.mark.parametrize("family", FAMILIES)
def test_each_entry_of_the_rotary_settings_counts(family):
    model = make_tiny(family)
    own = model.config.to_dict().get("rope_parameters")
    if own is None:
        assert not FAMILIES[family].rotary
        return
    nested = all(isinstance(each, dict) for each in own.values())  # by type of layer
    found = [fingerprint(model)]
    for rope in ROPES:
        for entry in {**dict.fromkeys(own if nested else ()), None: None}:
            if nested:
                given = {key: each | (rope if key == entry else {}) for key, each in own.items()}
            else:
                given = own | rope
            if given != own:
                changed = copy.copy(model)
                changed.config = copy.deepcopy(model.config)
                set_plainly(changed.config, "rope_parameters", given)
                found.append(fingerprint(changed))
    assert len(set(found)) == len(found) > len(ROPES)


def test_functions_that_differ_have_other_fingerprints():
    """What was seen to move logits by one number in a configuration."""
    for family, changes in (
        ("granite", {"residual_multiplier": 0.3}),
        ("granite", {"embedding_multiplier": 2.0}),
        ("granite", {"logits_scaling": 3.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma2", {"query_pre_attn_scalar": 4}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"layer_norm_epsilon": 0.1}),
    ):
        first, second = make_tiny(family), make_tiny(family, **changes)
        second.load_state_dict(first.state_dict())
        assert not torch.equal(first(TEXT).logits, second(TEXT).logits), changes
        assert fingerprint(first) != fingerprint(second), changes


def test_every_generation_setting_counts():
    model = make_tiny()
    before = fingerprint(model)
    plain = GenerationConfig().to_dict()
    free = {name for name in IMMATERIAL if name in plain}
    assert {"use_cache", "pad_token_id", "transformers_version"} <= free
    seen = set()
    for name in plain:
        own = copy.copy(model)
        own.generation_config = copy.deepcopy(model.generation_config)
        setattr(own.generation_config, name, 0.5)
        if fingerprint(own) == before:
            seen.add(name)
    assert seen == free


def test_what_is_stored_beside_parameters_counts():
    model = make_tiny()
    before = fingerprint(model)
    model.register_buffer("scales", torch.ones(3))
    stored = fingerprint(model)
    assert stored != before
    model.scales[1] = 2
    assert fingerprint(model) not in (stored, before)
    model.register_buffer("scales", torch.ones(3), persistent=False)
    # Such as inverse frequencies: they follow from the configuration.
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_change_of_one_value_anywhere_counts(dtype):
    model = make_tiny(num_hidden_layers=1).to(dtype)
    before = fingerprint(model)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for place in (1, flat.numel() - 1):
            kept = flat[place].clone()
            flat[place] += 0.5
            assert fingerprint(model) != before, (name, place)
            flat[place] = kept
        assert fingerprint(model) == before
        if parameter.ndim > 1:
            for axis in (0, 1):
                rolled = parameter.data.roll(1, axis)
                rolled, parameter.data = parameter.data, rolled
                assert fingerprint(model) != before, (name, axis)
                parameter.data = rolled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_trade_places_are_others(dtype):
    """Their sums by row and by column stay."""
    model = make_tiny(hidden_size=32, num_hidden_layers=2).to(dtype)
    first, second = (model.model.layers[n].self_attn.q_proj.weight for n in (0, 1))
    eye = torch.eye(32, dtype=dtype)
    rectangle = eye + 1
    rectangle[3, 4] += 0.5
    rectangle[9, 20] += 0.5
    swapped = eye + 1
    swapped[3, 20] += 0.5
    swapped[9, 4] += 0.5
    summed = [each.float().sum(axis) for axis in (0, 1) for each in (rectangle, swapped)]
    assert torch.equal(summed[0], summed[1])
    assert torch.equal(summed[2], summed[3])
    signs = torch.ones(32, 32, dtype=dtype)
    signs[0, 0] = signs[4, 8] = -1
    turned = torch.ones(32, 32, dtype=dtype)
    turned[0, 8] = turned[4, 0] = -1
    found, logits = [], []
    for one, two in (
        *((eye, eye.roll(k, 0)) for k in range(4)),
        *((eye.roll(k, 0), eye) for k in range(1, 4)),
        *((eye, each) for each in (rectangle, swapped, signs, turned)),
        (eye, eye.flip(0)),
        (eye.flip(0), eye),
    ):
        first.data, second.data = one.clone(), two.clone()
        found.append((checksum(model), fingerprint(model)))
        logits.append(model(TEXT).logits)
    for position in (0, 1):
        assert len({each[position] for each in found}) == len(found)
    assert len({each.float().numpy().tobytes() for each in logits}) > len(found) // 2


def test_the_checksum_of_a_large_tensor_is_of_all_its_parts(monkeypatch):
    from dyndepth.models import fingerprints

    model = make_tiny()
    before = checksum(model)
    monkeypatch.setattr(fingerprints, "_PART", 70)
    assert checksum(model) == before


def test_values_known_by_another_digest():
    model = make_tiny()
    before, digest = fingerprint(model), values_digest(model)
    with known_as(model, "other"):
        assert fingerprint(model) != before
        model.lm_head.weight.data[0, 0] += 1
        assert values_digest(model) not in (digest, "other")  # these are other values
        model.lm_head.weight.data[0, 0] -= 1
    assert values_digest(model) == digest
    assert fingerprint(copy.deepcopy(model)) == before


def test_what_is_kept_is_taken_with_one_look_at_the_values(tiny_corpus, tmp_path, monkeypatch):
    from dyndepth.cells.recipe import Recipe
    from dyndepth.common.registry import load_method
    from dyndepth.fitting.fits import fit_cached
    from dyndepth.fitting.recovery.adapters import adapted
    from dyndepth.fitting.recovery.kept import recover_cached
    from dyndepth.models import fingerprints

    looks, read = [], fingerprints._stored

    def stored(model):
        looks.append(model)
        return read(model)

    def kept(function, *given):
        function(*given)
        looks.clear()
        found = function(*given)
        return found, len(looks)

    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    model, recipe = make_tiny(), Recipe(rank=2, steps=1, batch=1, length=24)
    method = load_method("uls", target_speedup=2.0)
    monkeypatch.setattr(fingerprints, "_stored", stored)
    assert kept(fit_cached, method, model, tiny_corpus)[1] == 1
    (_, adapter), count = kept(recover_cached, method, model, tiny_corpus, recipe)
    assert count == 1
    looks.clear()
    with adapted(model, adapter):
        assert len(looks) == 2  # before and after
        inside = fingerprint(model)
    model.lm_head.weight.data[0, 0] += 1
    assert len({fingerprint(model), inside, adapter.card["model"]}) == 3


def test_an_offloaded_model_is_the_same_model():
    from accelerate import cpu_offload

    model = make_tiny()
    before = fingerprint(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    assert fingerprint(model) == before


def test_code_that_comes_along_counts(tmp_path, monkeypatch):
    """As transformers lays it into a package of its own: whatever class uses it."""
    from importlib.util import module_from_spec, spec_from_file_location

    found = set()
    for content in ("FIRST = 1", "FIRST = 2"):
        (tmp_path / "modeling_own.py").write_text("class Own: pass\n")
        (tmp_path / "parts.py").write_text(content)
        name = "transformers_modules.own.modeling_own"
        spec = spec_from_file_location(name, tmp_path / "modeling_own.py")
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        for owner in ("model", "config"):
            model = make_tiny()
            brought = model if owner == "model" else model.config
            brought.__class__ = type("Own", (type(brought),), {"__module__": name})
            found.add(fingerprint(model))
    assert len({*found, fingerprint(make_tiny())}) == 5


# --- one model in each type ---------------------------------------------------------------------

TYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module", params=TYPES)
def stored(request, tmp_path_factory):
    """A folder with a model whose file has the type; some values are too small for float16."""
    model = make_tiny()
    model.model.layers[1].mlp.down_proj.weight[:4] *= 1e-6
    model.model.layers[2].mlp.up_proj.weight.mul_(1 + 2**-9 + 2**-12)
    folder = tmp_path_factory.mktemp(request.param)
    model.to(getattr(torch, request.param)).save_pretrained(folder)
    return folder


def test_one_model_has_one_fingerprint_in_every_type(stored):
    loaded = {dtype: load_model(str(stored), dtype=dtype) for dtype in TYPES}
    assert len({model.dyndepth.fingerprint for model in loaded.values()}) == 1
    for dtype, model in loaded.items():
        assert model.dtype == getattr(torch, dtype)
        assert fingerprint(model) == model.dyndepth.fingerprint
        model.model.norm.weight.data[3] += 0.5
        assert fingerprint(model) != model.dyndepth.fingerprint


def test_an_edited_file_is_another_model(stored, tmp_path):
    folder = tmp_path / "edited"
    load_model(str(stored)).save_pretrained(folder)
    before = load_model(str(folder)).dyndepth.fingerprint
    assert before == load_model(str(stored)).dyndepth.fingerprint
    for file, changes in (
        ("config.json", {"max_position_embeddings": 64}),
        ("config.json", {"rms_norm_eps": 1e-3}),
        ("generation_config.json", {"repetition_penalty": 1.3}),
        ("generation_config.json", {"eos_token_id": [2, 5]}),
    ):
        kept = (folder / file).read_text()
        (folder / file).write_text(json.dumps(json.loads(kept) | changes))
        assert load_model(str(folder)).dyndepth.fingerprint != before, changes
        (folder / file).write_text(kept)
    assert load_model(str(folder)).dyndepth.fingerprint == before


# --- tokenizers ---------------------------------------------------------------------------------


def rules(**parts):
    """A small tokenizer of words; ``parts`` replace parts of the backend."""
    words = ["<unk>", "<s>", "</s>", "hello", "world", "Hello", ",", "it", "a", "b", "c"]
    own = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(own, name, part)
    return own


def fast(own=None, **settings):
    given = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | settings
    return PreTrainedTokenizerFast(tokenizer_object=own or rules(), **given)


ADDS_BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def test_a_tokenizer_is_known_by_what_it_does(tmp_path):
    before = tokenizer_fingerprint(fast())
    assert len(before) == 16
    found = {
        "normaliser": fast(rules(normalizer=normalizers.Lowercase())),
        "pre-tokenizer": fast(rules(pre_tokenizer=pre_tokenizers.WhitespaceSplit())),
        "BOS": fast(rules(post_processor=ADDS_BOS)),
        "end": fast(eos_token="<s>"),
        "template": fast(chat_template="{{ messages }}"),
        "word": fast(rules(model=models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))),
        "longest": fast(model_max_length=128),
    }
    added = fast()
    added.add_tokens(["sentence"])
    found["added token"] = added
    digests = {name: tokenizer_fingerprint(each) for name, each in found.items()}
    assert len({before, *digests.values()}) == len(found) + 1, digests


def test_what_is_asked_of_a_tokenizer_is_no_part_of_it(tmp_path):
    tokenizer = fast()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
    for name in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
        assert tokenizer_fingerprint(loaded) == before


def test_slow_tokenizers_have_a_fingerprint(tmp_path):
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        """One token a letter, in Python."""

        def __init__(self, first=3, **settings):
            self.first = first
            super().__init__(**settings)

        @property
        def vocab_size(self):
            return 96

        def get_vocab(self):
            return {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(97 + n): 3 + n for n in range(26)}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.first + ord(token) % 90

        def _convert_id_to_token(self, index):
            return chr(index)

        def save_vocabulary(self, directory, filename_prefix=None):
            return ()

    one, same, other_one = Letters(), Letters(), Letters(first=4)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(same)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other_one)


def test_fits_are_kept_by_tokenizer_attention_and_text(tiny_corpus):
    from dyndepth.common.registry import load_method
    from dyndepth.data.corpus import Corpus
    from dyndepth.fitting.fits import fit_key

    method, texts = load_method("uls", target_speedup=2.0), tiny_corpus.texts
    spaced = [text.replace(" ", "  ") for text in texts]
    keys = {
        fit_key(method, model, corpus)
        for model, corpus in (
            (make_tiny(), tiny_corpus),
            (make_tiny(), Corpus(texts, fast())),
            (make_tiny(), Corpus(texts, fast(rules(normalizer=normalizers.Lowercase())))),
            # White space is text: it makes other tokens.
            (make_tiny(), Corpus(spaced, tiny_corpus.tokenizer)),
            (make_tiny(attn="eager"), tiny_corpus),
            (make_tiny(max_position_embeddings=128), tiny_corpus),
        )
    }
    assert len(keys) == 6


def test_digests_of_before_are_those_of_today():
    for before, today in FORMER.items():
        assert agrees("model_fingerprint", before, today)
        assert not agrees("model_fingerprint", today, before)
    assert agrees("model_fingerprint", "a", "a")
    assert not agrees("model_fingerprint", "", "a")
    # Cells of before say nothing of their tokenizer.
    assert agrees("tokenizer_fingerprint", "", "a")
    assert not agrees("tokenizer_fingerprint", "b", "a")


def test_the_embedded_model_is_the_one_that_results_were_made_with(embedded_model, corpus):
    """By the definition of before: some facts, and 256 values of each parameter as bfloat16."""
    import hashlib

    config = embedded_model.config.to_dict()
    names = (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
        *("rope_parameters", "sliding_window", "layer_types", "tie_word_embeddings"),
    )
    facts = {name: config.get(name) for name in names}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in sorted(embedded_model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 256)].bfloat16().view(torch.int16)
        digest.update(values.numpy().astype("<i2").tobytes())
    digest.update(b"")
    text = "1 " + " ".join(
        hashlib.sha256(" ".join(each.split()).encode("utf-8", "surrogatepass")).hexdigest()
        for each in corpus.texts
    )
    assert {
        digest.hexdigest()[:16]: embedded_model.dyndepth.fingerprint,
        hashlib.sha256(text.encode()).hexdigest()[:16]: corpus.fingerprint,
    } == FORMER


# --- cells --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, its tokenizer, a corpus, and a task of one's own whose settings
    and documents lie elsewhere."""
    from folders import tiny_folder

    folder = tiny_folder(tmp_path_factory.mktemp("cells"))
    (folder / "elsewhere").mkdir()
    rows = [{"question": f"to be {n}", "answer": "or not"} for n in range(4)]
    text = "\n".join(map(json.dumps, rows))
    (folder / "elsewhere" / "rows.jsonl").write_text(text)
    (folder / "elsewhere" / "base.yaml").write_text(
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/elsewhere/rows.jsonl}}}}\n"
        "test_split: test\n"
        "output_type: loglikelihood\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_target: ' {{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(
        f"task: own\ninclude: {folder}/elsewhere/base.yaml\n"
    )
    return folder


def identity(place):
    """What all cells of a sweep there share."""
    from dyndepth import tasks
    from dyndepth.sweep.settings import settings
    from dyndepth.sweep.workbench import Workbench

    tasks._manager.cache_clear()
    given = {"model": str(place / "model"), "corpus": str(place / "corpus.txt"), "methods": "uls"}
    given |= {"tasks": "own", "include_path": str(place / "tasks"), "device": "cpu"}
    return Workbench(settings(given), {"own": None}).shared_identity


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "key"),
    [
        ("model/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1', "model_fingerprint"),
        ("model/tokenizer.json", '"normalizer": null', '"normalizer": {"type": "Lowercase"}',
         "tokenizer_fingerprint"),
        ("model/tokenizer_config.json", "{", '{"chat_template": "{{ messages }}",',
         "tokenizer_fingerprint"),
        ("elsewhere/rows.jsonl", "to be 3", "to be 4", "data_fingerprint"),
        ("elsewhere/base.yaml", "'{{question}}'", "'Q: {{question}}'", "data_fingerprint"),
        ("corpus.txt", "text 7: to", "text 7:  to", "corpus_fingerprint"),
    ],
)  # fmt: skip
def test_an_edited_file_makes_other_cells(place, file, old, new, key, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
    before = identity(place)
    kept = (place / file).read_text()
    edit(place / file, old, new)
    try:
        after = identity(place)
    finally:
        (place / file).write_text(kept)
    assert {name for name in before if before[name] != after[name]} == {key}
    again = identity(place)
    assert again == before


def test_a_change_that_bfloat16_does_not_show_makes_other_cells(place, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    before = identity(place)
    for name in ("model", "corpus.txt", "tasks"):
        copied = shutil.copytree if (place / name).is_dir() else shutil.copy
        copied(place / name, tmp_path / name)
    file = tmp_path / "model" / "model.safetensors"
    same = identity(tmp_path)
    assert {name for name in before if before[name] != same[name]} == {"model"}
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16().float()
    save_file(tensors, file, metadata={"format": "pt"})
    rounded = identity(tmp_path)
    tensors["model.norm.weight"] *= 1.0001
    save_file(tensors, file, metadata={"format": "pt"})
    nudged = identity(tmp_path)
    assert {name for name in rounded if rounded[name] != nudged[name]} == {"revision"}
    for dtype in TYPES:
        own = load_model(str(tmp_path / "model"), dtype=dtype).dyndepth
        assert own.revision == nudged["revision"]


def test_what_a_run_leaves_beside_its_tasks_makes_no_other_cells(place, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
    tasks = place / "tasks"
    before = identity(place)
    for name in (
        *("runs/first/cells/uls-1.json", "runs/first/config.yaml", "runs/first/wandb/meta.yaml"),
        *("runs/sweep.log", "models/tiny/config.json", "models/tiny/model.safetensors"),
        *("fits.training/step.safetensors", ".venv/lib/some.py", ".git/config.yaml", "notes.md"),
    ):
        (tasks / name).parent.mkdir(parents=True, exist_ok=True)
        (tasks / name).write_text("learning_rate: 1\n")
    assert identity(place) == before
    found = {before["data_fingerprint"]}
    for name in ("utils.py", "deep/er/utils.py", "shared.yml"):
        (tasks / name).parent.mkdir(parents=True, exist_ok=True)
        (tasks / name).write_text("")
        found.add(identity(place)["data_fingerprint"])
    edit(tasks / "own.yaml", "task: own", "task: own\ndescription: Answer.")
    found.add(identity(place)["data_fingerprint"])
    edit(tasks / "own.yaml", "\ndescription: Answer.", "")
    assert len(found) == 5
    for name in ("utils.py", "deep/er/utils.py", "shared.yml"):
        (tasks / name).unlink()
    assert identity(place) == before


def test_cells_of_before_are_read_as_they_were_written(tmp_path):
    from cells import cell

    from dyndepth.cells.identity import cell_hash, setting
    from dyndepth.cells.store import Store

    store = Store(tmp_path)
    old, new = cell(tokenizer_fingerprint=""), cell(tokenizer_fingerprint="abc")
    without = {k: v for k, v in old.identity.items() if k != "tokenizer_fingerprint"}
    assert cell_hash(without) == old.key != new.key
    assert setting(without) == setting(old.identity) != setting(new.identity)
    file = store.file(store.write(old).identity)
    body = json.loads(file.read_text())
    del body["identity"]["tokenizer_fingerprint"]
    file.write_text(json.dumps(body))
    (found,) = store.all()
    assert (found.key, found.identity["tokenizer_fingerprint"]) == (old.key, "")
    former, today = next(iter(FORMER.items()))
    store.write(cell(model_fingerprint=former))
    file.unlink()
    store.check_model("tiny", today)  # that is the same model


# --- what comes with a method -------------------------------------------------------------------


def test_what_is_not_shipped_is_said_before_training(tiny_corpus, monkeypatch, capsys, tmp_path):
    from dyndepth.cells.recipe import Recipe
    from dyndepth.common.registry import load_method
    from dyndepth.fitting.recovery.kept import recover_cached
    from dyndepth.methods.skipgpt import tuning

    monkeypatch.setattr(tuning, "train", lambda *_: print("training", file=sys.stderr))
    model = make_tiny()
    load_method("skipgpt", target_speedup=1.5).fit(model, tiny_corpus)
    said, training = capsys.readouterr().err.splitlines()
    assert training == "training"
    assert said == (
        "dyndepth: skipgpt trains routers for 1.5x, which can take minutes: "
        f"none are shipped for this model (fingerprint {fingerprint(model)})"
    )
    load_method("skipgpt", target_speedup=1.5, steps=3).fit(model, tiny_corpus)
    assert "none are shipped for steps=3" in capsys.readouterr().err
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    method = load_method("uls", target_speedup=2.0)
    monkeypatch.setattr(type(method), "shipped_adapters", tmp_path / "shipped")
    recipe = Recipe(rank=2, steps=1, batch=1, length=24)
    recover_cached(method, model, tiny_corpus, recipe, progress=False)
    assert (
        "uls trains an adapter for 2x, which can take minutes: none is" in capsys.readouterr().err
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_shipped_is_found_in_each_type(dtype, corpus, monkeypatch):
    from dyndepth.cells.recipe import parse_recovery
    from dyndepth.common.registry import load_method
    from dyndepth.fitting.recovery.adapters import adapted, load_adapter
    from dyndepth.fitting.recovery.kept import find_shipped
    from dyndepth.methods.skipgpt import tuning

    monkeypatch.setattr(tuning, "train", None)
    model = load_model("embedded", dtype=dtype)
    for target in (1.1, 1.25, 1.5, 2.0):
        method = load_method("skipgpt", target_speedup=target).fit(model, corpus)
        assert method.tensors
        folder = find_shipped(method, model, corpus, parse_recovery("lora"), 0)
        assert folder is not None
    adapter = load_adapter(folder, model)
    assert adapter.card["model"] == fingerprint(model) == model.dyndepth.fingerprint
    with adapted(model, adapter):
        inside = fingerprint(model)
    assert inside != fingerprint(model) == model.dyndepth.fingerprint
    other_type = load_model("embedded")
    with adapted(other_type, load_adapter(folder, other_type)):
        assert fingerprint(other_type) == inside
