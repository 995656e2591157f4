"""Routing traces: what is read off a forward, the tables, the file, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cells import identity
from conftest import CharacterTokenizer
from folders import tiny_folder
from gating import GivenPlan, RandomMask, plan_without
from safetensors.numpy import load_file, save_file

from dyndepth.cells.cell import Cell, CellSpec, method_identity
from dyndepth.cells.recipe import parse_recovery
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.routes import __main__ as door
from dyndepth.routes import recorded
from dyndepth.routes.trace import Routes, record
from dyndepth.runtime.attach import attach

TEXTS = {"first": "to be or not to be", "second": "that is the question, is it not?"}


class Characters(CharacterTokenizer):
    """One token a character, and back."""

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


@pytest.fixture
def routes(tiny) -> Routes:
    return record(tiny(), Characters(), RandomMask(rate=0.6), TEXTS, prompt_length=4)


class TestTraceGates:
    @pytest.mark.parametrize("backend", ["sparse", "masked"])
    def test_are_what_the_method_said(self, tiny, backend):
        model, method = tiny(), RandomMask(rate=0.5)
        tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), attach(model, method, backend=backend) as trace:
            model(tokens)
            gates = trace.gates()
            assert torch.equal(gates, method.table[:12].expand(2, -1, -1, -1))
            torch.testing.assert_close(gates.double().mean((0, 1)), trace.executed())

    def test_are_false_on_padding_and_one_plan_wide_otherwise(self, tiny):
        model, method = tiny(), GivenPlan(plan=plan_without(4, (1, 0), (2, 1)))
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        with torch.no_grad(), attach(model, method) as trace:
            model(torch.full((2, 5), 7), attention_mask=mask)
            gates = trace.gates()
        assert not gates[0, :2].any()
        assert torch.equal(gates[1, 0], torch.tensor(method.plan))
        assert (gates[1] == gates[1, :1]).all()
        assert torch.equal(gates[0, 2:], gates[1, 2:])

    def test_are_those_of_the_last_forward(self, tiny):
        model = tiny()
        with torch.no_grad(), attach(model, RandomMask()) as trace:
            with pytest.raises(RuntimeError, match="needs a forward"):
                trace.gates()
            model(torch.full((1, 9), 7))
            model(torch.full((3, 2), 7))
            assert trace.gates().shape == (3, 2, 4, 2)


class TestRecord:
    def test_keeps_gates_tokens_and_phases(self, tiny, routes):
        method = RandomMask(rate=0.6)
        with attach(tiny(), method):
            pass
        assert routes.documents == ("first", "second")
        assert routes.lengths == tuple(len(text) for text in TEXTS.values())
        assert routes.prompt_lengths == (4, 4)
        assert routes.gates.shape == (sum(routes.lengths), 4, 2)
        generator = torch.Generator().manual_seed(0)
        table = (torch.rand(1024, 4, 2, generator=generator) < 0.6).numpy()
        for document in TEXTS:
            rows = routes.document(document)
            assert (routes.gates[rows] == table[: rows.stop - rows.start]).all()
        ids = Characters()([TEXTS["second"]])["input_ids"][0]
        assert routes.token_ids[routes.document("second")].tolist() == ids
        assert routes.strings(slice(0, 1)) == [f"<{routes.token_ids[0]}>"]
        assert routes.identity["method"] == "random_mask"
        assert routes.identity["spec"] == "random_mask(rate=0.6)"
        assert routes.label == "random_mask(rate=0.6) at 1×"

    def test_generation_methods_keep_the_prompt(self, tiny):
        method = GivenPlan(plan=plan_without(4, (1, 0)), phases="generation")
        routes = record(tiny(), Characters(), method, TEXTS, prompt_length=6)
        table = routes.by_sublayer("prompt")
        assert (table["executed"] == 1).all()
        table = routes.by_sublayer("generation").set_index(["layer", "sublayer"])["executed"]
        assert table[1, "attention"] == 0
        assert table.sum() == 7
        everything = record(tiny(), Characters(), method, TEXTS)
        assert everything.prompt_lengths == everything.lengths
        assert everything.gates.all()

    def test_long_documents_are_cut(self, tiny):
        routes = record(tiny(), Characters(), RandomMask(), TEXTS, prompt_length=50, length=10)
        assert routes.lengths == routes.prompt_lengths == (10, 10)

    def test_nothing_to_record_is_told(self, tiny):
        with pytest.raises(UserError, match="no documents"):
            record(tiny(), Characters(), RandomMask(), {})
        with pytest.raises(UserError, match="document 'empty' has no tokens"):
            record(tiny(), Characters(), RandomMask(), {"empty": ""})


class TestTables:
    def test_by_sublayer(self, routes):
        table = routes.by_sublayer()
        assert list(table.columns) == ["layer", "sublayer", "executed", "tokens"]
        assert len(table) == 8
        one = table[(table["layer"] == 2) & (table["sublayer"] == "mlp")].iloc[0]
        assert one["executed"] == routes.gates[:, 2, 1].mean()
        assert one["tokens"] == len(routes.token_ids)
        parts = [routes.by_sublayer(phase)["tokens"].iloc[0] for phase in ("prompt", "generation")]
        assert parts == [8, len(routes.token_ids) - 8]

    def test_by_position(self, routes):
        table = routes.by_position(bins=4)
        assert table["first"].unique().tolist() == [0, 8, 16, 24]
        assert table["last"].unique().tolist() == [7, 15, 23, 31]
        last = table[(table["first"] == 24) & (table["sublayer"] == "attention")].iloc[0]
        second = routes.gates[routes.document("second")]
        assert last["executed"] == second[24:, :, 0].mean()
        assert last["tokens"] == 8
        assert table[table["sublayer"] == "mlp"]["tokens"].sum() == len(routes.token_ids)
        assert routes.by_position(1)["tokens"].tolist() == [len(routes.token_ids)] * 2
        with pytest.raises(UserError, match="at least 1 bin, not 0"):
            routes.by_position(0)

    def test_by_token(self, routes):
        table = routes.by_token(minimum=3)
        blank = 3 + ord(" ") % 93
        rows = table[table["token_id"] == blank].set_index("sublayer")
        chosen = routes.token_ids == blank
        assert rows.loc["mlp", "count"] == chosen.sum() == 11
        assert rows.loc["mlp", "executed"] == pytest.approx(routes.gates[chosen][:, :, 1].mean())
        assert rows.loc["mlp", "token"] == f"<{blank}>"
        assert table["count"].min() >= 3
        means = table.groupby("token_id", sort=False)["executed"].mean()
        assert means.is_monotonic_decreasing
        assert len(routes.by_token(1)) == 2 * len(set(routes.token_ids.tolist()))
        assert routes.by_token(1000).empty

    def test_unknown_document_is_told(self, routes):
        with pytest.raises(UserError, match="no document 'third'; they hold first, second"):
            routes.document("third")


class TestFile:
    def test_comes_back_as_it_was_at_one_bit_a_gate(self, routes, tmp_path):
        routes.save(tmp_path / "deep" / "a.safetensors")
        found = Routes.load(tmp_path / "deep" / "a.safetensors")
        assert (found.gates == routes.gates).all()
        assert (found.token_ids == routes.token_ids).all()
        for name in ("documents", "lengths", "prompt_lengths", "vocabulary", "identity"):
            assert getattr(found, name) == getattr(routes, name)
        stored = load_file(tmp_path / "deep" / "a.safetensors")
        assert stored["gates"].nbytes == len(routes.token_ids) * 4 * 2 / 8
        assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]

    def test_gates_that_fill_no_whole_byte(self, tmp_path):
        gates = np.random.default_rng(0).random((3, 5, 2)) < 0.5
        ids = np.array([4, 5, 4])
        one = Routes(gates, ids, ("a",), (3,), (0,), {4: "x", 5: "y"})
        one.save(tmp_path / "odd.safetensors")
        assert (Routes.load(tmp_path / "odd.safetensors").gates == gates).all()

    def test_parts_that_do_not_fit_are_refused(self, routes):
        with pytest.raises(ValueError, match="do not fit together"):
            Routes(routes.gates, routes.token_ids, ("a",), (3,), (0,), routes.vocabulary)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda t, f: t.pop("gates"), "gates"),
            (lambda t, f: t.update(gates=t["gates"][:-1]), "31 bytes|bytes of gates, not"),
            (lambda t, f: f.update(layout=9), "its layout is 9, this version reads 1"),
            (lambda t, f: f.pop("documents"), "no entry 'documents'"),
            (lambda t, f: f.update(lengths=[1, 2]), "do not fit together"),
            (lambda t, f: f.update(vocabulary={}), "do not fit together"),
            (lambda t, f: f.update(vocabulary=3), "can't be read as routes"),
        ],
    )
    def test_a_tampered_file_is_told(self, routes, tmp_path, change, sentence):
        from safetensors import safe_open

        file = tmp_path / "a.safetensors"
        routes.save(file)
        with safe_open(file, framework="numpy") as opened:
            facts = json.loads(opened.metadata()["routes"])
        tensors = load_file(file)
        change(tensors, facts)
        save_file(tensors, file, metadata={"routes": json.dumps(facts)})
        with pytest.raises(UserError, match=sentence) as told:
            Routes.load(file)
        assert "\n" not in str(told.value)

    def test_other_files_are_told(self, tmp_path):
        with pytest.raises(UserError, match="no routes at"):
            Routes.load(tmp_path / "absent.safetensors")
        (tmp_path / "text").write_text("hello")
        with pytest.raises(UserError, match="can't be read as routes"):
            Routes.load(tmp_path / "text")
        save_file({"gates": np.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="holds no routes"):
            Routes.load(tmp_path / "other.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``model`` (a byte-level tiny model), ``corpus.txt`` and ``text.txt``."""
    path = tiny_folder(tmp_path_factory.mktemp("routes"))
    (path / "text.txt").write_text("One document.\n\nAnother: naïve.\n\nA third.\n")
    return path


@pytest.fixture
def command(folder, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls the command with the corpus given; returns status, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        common = ("--corpus", str(folder / "corpus.txt"), "--text", str(folder / "text.txt"))
        status = door.main([*arguments, *common])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


class TestCommand:
    def test_records_methods(self, folder, tmp_path, command):
        status, out, _ = command(
            *("--model", str(folder / "model"), "--methods", "uls(spacing=even),"),
            *("random_mask(rates=uniform, length=32)", "--speedups", "1.5,2", "--documents", "2"),
            *("--length", "12", "--prompt-length", "3", "--output-path", str(tmp_path / "out")),
        )
        assert status == 0
        assert "[2/4] uls(spacing=even, phases=both) at 2x, seed 0: recording" in out
        assert json.loads(out.splitlines()[-1])["routes"]["recorded"] == 4
        files = {path.name: Routes.load(path) for path in (tmp_path / "out").iterdir()}
        assert len(files) == 4
        one = next(each for name, each in files.items() if name.startswith("uls-x2-seed0-"))
        assert one.documents == ("text.txt/0", "text.txt/1")
        assert one.lengths == (12, 12)
        assert "".join(one.strings(slice(0, 12))) == "One document"
        assert one.prompt_lengths == (3, 3)
        assert one.by_sublayer()["executed"].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
        assert one.identity["model"] == str(folder / "model")

    def test_records_a_run_again(self, folder, tmp_path, command):
        from dyndepth.data.corpus import load_corpus
        from dyndepth.models.loading import load_model, load_tokenizer

        model = load_model(str(folder / "model"))
        corpus = load_corpus(folder / "corpus.txt", load_tokenizer(str(folder / "model")))
        common = {
            "model": str(folder / "model"),
            "model_fingerprint": model.dyndepth.fingerprint,
            "tokenizer_fingerprint": corpus.tokenizer_fingerprint,
            "corpus_fingerprint": corpus.fingerprint,
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "revision": "",
        }
        common["recovery"] = "none"
        store = Store(tmp_path / "run")

        def add(plan: CellSpec, status: str = "done", **changes) -> str:
            cell = Cell(identity(**(common | method_identity(plan.build()) | changes)), status)
            return store.write(cell).key

        kept = add(CellSpec("uls", 2.0, 0, {"spacing": "even", "phases": "generation"}))
        masked = add(CellSpec("random_mask", 1.5, 3, {"source": "uls(spacing=even)", "length": 32}))
        add(CellSpec("dense"), status="error")
        changed = add(CellSpec("uls", 1.5), parameters="spacing='paper', nothing=3")
        other = add(CellSpec("uls", 1.5), corpus_fingerprint="elsewhere")
        recipe = "lora(rank=2, steps=2, batch=1, length=24)"
        recovered = add(CellSpec("uls", 2.0), recovery=str(parse_recovery(recipe)))
        status, out, err = command(str(tmp_path / "run"), "--prompt_length", "2")
        assert status == 1
        found = {p.stem: Routes.load(p) for p in (tmp_path / "run" / "routes").iterdir()}
        assert set(found) == {kept, masked, recovered}
        assert found[kept].identity["cell"] == kept
        assert found[kept].by_sublayer("prompt")["executed"].mean() == 1
        assert found[kept].by_sublayer("generation")["executed"].mean() == 0.5
        assert (found[masked].identity["seed"], found[masked].identity["method"]) == (
            3,
            "random_mask",
        )
        assert "dense at 1x" in err
        assert "left out, for it failed" in err
        assert f"{changed}: failed: method 'uls' has no parameter 'nothing'" in err
        assert f"{other}: failed: it was fitted on other text; name that by --corpus" in err
        summary = json.loads(out.splitlines()[-1])["routes"]
        assert (summary["recorded"], summary["failed"]) == (3, 2)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ([], "nothing to record: give --methods, or a sweep's output folder"),
            (
                ["--methods", "uls", "--plot", "a.txt"],
                "--plot takes a file that ends in .png, .svg",
            ),
            (["--methods", "ulz", "--output_path", "x"], "unknown method 'ulz'; did you mean uls"),
            (["--methods", "uls", "--output_path", "x", "--speedups", "99"], "out of its reach"),
            (["--methods", "uls", "--limit", "0"], "--limit takes a whole number"),
            (
                ["--methods", "uls", "--length", "none"],
                "--length takes a whole number of at least 1",
            ),
            (["nowhere"], "nowhere holds no cells; give the --output_path of a sweep"),
            (["nowhere", "--methods", "uls"], "--methods can't be given with a run's folder"),
            (["--nothing"], "--nothing"),
        ],
    )
    def test_wrong_input_is_one_sentence(self, command, folder, arguments, sentence):
        if "--output_path" in arguments:
            arguments = [*arguments, "--model", str(folder / "model")]
        status, out, err = command(*arguments)
        assert status == 2
        assert sentence in err
        assert err.count("\n") == 1

    def test_unreadable_text_is_told(self, tmp_path):
        with pytest.raises(UserError, match="can't be read: No such file"):
            recorded.documents(str(tmp_path / "absent"), 3)
        (tmp_path / "empty").write_text(" \n\n ")
        with pytest.raises(UserError, match="holds no text"):
            recorded.documents(str(tmp_path / "empty"), 3)
        (tmp_path / "latin").write_bytes(b"na\xefve")
        with pytest.raises(UserError, match="not UTF-8"):
            recorded.documents(str(tmp_path / "latin"), 3)

    def test_passages_are_those_that_are_scored(self):
        from dyndepth.evaluation.evaluate import sample
        from dyndepth.tasks.documents import passages

        found = recorded.documents(None, 5)
        drawn = sample("wikipedia_bpb", len(passages()), 5, 0)
        assert list(found) == [f"wikipedia_bpb/{index}" for index in drawn]
        assert list(found.values()) == [passages()[index] for index in drawn]
