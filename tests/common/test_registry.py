"""Methods are found by name and built from specs; whatever can't be read is told in a sentence."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy

from dyndepth.cells.cell import parameters_text
from dyndepth.common import registry
from dyndepth.common.errors import UserError
from dyndepth.common.spec import parameters_of, split
from dyndepth.method import DynamicDepthMethod


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two toy methods instead of the installed ones."""
    known = {name: EntryPoint(name, "toys:Toy", registry.GROUP) for name in ("toy", "tray")}
    monkeypatch.setattr(registry, "methods", lambda: known)


def test_the_suites_methods_are_installed():
    assert {"dense", "early_exit", "random_skip", "skipgpt", "uls"} <= set(registry.methods())
    assert registry.load_method("dense").name == "dense"


@pytest.mark.usefixtures("toy")
def test_specs_are_parsed_with_typed_values():
    text = "toy, toy(mode=maximum, layer=3 ,threshold=1, strict=true, label='a, (b)'),tray"
    assert registry.parse_methods(text) == [
        ("toy", {}),
        (
            "toy",
            {
                "mode": "maximum",
                "layer": 3,
                "threshold": 1.0,
                "strict": True,
                "label": "a, (b)",
            },
        ),
        ("tray", {}),
    ]


@pytest.mark.usefixtures("toy")
def test_equal_settings_have_equal_reprs():
    assert repr(registry.load_method("toy(threshold=1)")) == repr(
        registry.load_method("toy", threshold=1.0)
    )
    assert registry.load_method("toy(layer=None)").layer is None
    assert registry.load_method("toy(layer=2)", layer=3, seed=4) == Toy(layer=3, seed=4)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tpy", "unknown method 'tpy'; did you mean toy"),
        (
            "toy(treshold=0.1)",
            "no parameter 'treshold'; did you mean threshold.*label, layer, mode",
        ),
        ("toy(fits=3)", "no parameter 'fits'"),
        ("toy(mode=median)", "'mode' of method 'toy' must be one of mean, maximum, not 'median'"),
        ("toy(layer=1.5)", "'layer' of method 'toy' must be an integer or none, not 1.5"),
        ("toy(threshold=high)", "must be a number, not 'high'"),
        ("toy(threshold=true)", "must be a number, not True"),
        ("toy(strict=1)", "must be true or false, not 1"),
        ("toy(layer=__import__('os'))", "must be an integer or none"),
        ("toy(layer=1, layer=2)", "'layer' is given twice"),
        ("toy(layer)", "write parameter=value"),
        ("toy(layer=)", "write parameter=value"),
        ("toy(layer=1", "unbalanced"),
        ("toy)", "unbalanced"),
        ("toy(label='a)", "unbalanced"),
        ("toy,,toy", "empty entry"),
        ("toy(layer=1) x", "can't be read"),
        ("(layer=1)", "can't be read"),
        ("", "no method given"),
    ],
)
def test_wrong_specs_are_told_in_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        registry.parse_methods(text)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("toy")
def test_values_the_method_refuses_are_user_errors():
    with pytest.raises(UserError, match="method 'toy': layer must not be negative, not -1"):
        registry.load_method("toy(layer=-1)")
    with pytest.raises(UserError, match="target_speedup must be at least 1"):
        registry.load_method("toy", target_speedup=0.5)
    with pytest.raises(UserError, match="names 2 methods; give one"):
        registry.load_method("toy,tray")


def test_two_distributions_with_one_name_are_refused(monkeypatch):
    entries = [EntryPoint("toy", f"{module}:Toy", registry.GROUP) for module in ("toys", "other")]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry.methods.cache_clear()
    try:
        with pytest.raises(UserError, match="two methods are called 'toy'"):
            registry.methods()
    finally:
        registry.methods.cache_clear()


@settings(deadline=None, max_examples=50)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "layer": st.none() | st.integers(0, 99),
            "threshold": st.floats(allow_nan=False, allow_infinity=False),
            "strict": st.booleans(),
            "label": st.text(st.characters(exclude_characters="'\"", codec="utf-8"), min_size=1),
        },
    )
)
def test_what_python_writes_is_read_back(values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            registry, "methods", lambda: {"toy": EntryPoint("toy", "toys:Toy", registry.GROUP)}
        )
        inside = ", ".join(f"{key}={value!r}" for key, value in values.items())
        assert registry.parse_methods(f"toy({inside}),toy") == [("toy", values), ("toy", {})]


@given(
    label=st.text(max_size=20) | st.text("'\"\\\\, ()=\n", max_size=8),
    layer=st.none() | st.integers(0, 99),
    threshold=st.floats(allow_nan=False),
    strict=st.booleans(),
)
def test_parameters_in_a_table_are_read_back(label, layer, threshold, strict):
    """Whatever quotes and escapes a text holds, a recorded cell can be rebuilt."""
    method = Toy(label=label, layer=layer, threshold=threshold, strict=strict)
    (spec,) = split(f"toy({parameters_text(method)})")
    assert Toy(**parameters_of(spec, "method")) == method


@pytest.mark.parametrize("name", ["facts", "tensors", "curve", "anew", "context"])
def test_a_parameter_is_not_called_what_the_contract_keeps(name):
    """It would be overwritten: the user's value would be accepted and not applied."""
    with pytest.raises(TypeError, match=f"Taken: {name} is what the contract keeps on"):
        type("Taken", (DynamicDepthMethod,), {"__annotations__": {name: int}, name: 3})
