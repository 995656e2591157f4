"""The route of a text of one's own: read from anywhere, told in a terminal, drawn, continued."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch
from folders import LAYERS, tiny_folder

from dyndepth import plots
from dyndepth.common.errors import UserError
from dyndepth.plots.texts import RANGES, ROW, ROWS
from dyndepth.routes import __main__ as door
from dyndepth.routes.__main__ import WHOLE
from dyndepth.routes.own_text import PLAIN_SHADES, SHADES, own_texts, shaded, usable_shades
from dyndepth.routes.trace import Routes


def make_routes(tokens: int, prompt: int = 1, layers: int = 6) -> Routes:
    generator = np.random.default_rng(0)
    return Routes(
        gates=generator.random((tokens, layers, 2)) < 0.6,
        token_ids=np.arange(tokens) % 7,
        documents=("text/0",),
        lengths=(tokens,),
        prompt_lengths=(prompt,),
        vocabulary={n: f" word{n}" for n in range(7)},
        identity={"method": "one", "target_speedup": 1.5},
    )


def texts(figure) -> str:
    import matplotlib.text

    return "\n".join(each.get_text() for each in figure.findobj(matplotlib.text.Text))


class TestPicture:
    @pytest.mark.parametrize("tokens", [1, 20, ROW, ROW + 1, ROWS * ROW])
    def test_each_token_is_where_its_text_is(self, tokens):
        routes = make_routes(tokens)
        figure = plots.text_route(routes, "text/0")
        rows = -(-tokens // ROW)
        assert len(figure.axes) == 2 * rows
        for index in range(2):
            panels = [axis.images[0].get_array() for axis in figure.axes[index::2]]
            assert (np.concatenate(panels, 1) == routes.gates[:, :, index].T).all()
        labels = [t.get_text() for axis in figure.axes[1::2] for t in axis.get_xticklabels()]
        assert labels == [plots.readable(text) for text in routes.strings()]
        shown = texts(figure)
        assert f"one at 1.5× on text/0, {tokens} tokens: {routes.gates.mean():.0%}" in shown
        assert f"MLP {routes.gates[:, :, 1].mean():.0%}" in shown
        assert {"executed", "skipped"} <= set(shown.splitlines())
        assert "prompt ends" not in shown

    def test_a_longer_text_is_means_over_ranges(self):
        routes = make_routes(ROWS * ROW + 44)
        figure = plots.text_route(routes, "text/0")
        width = -(-len(routes.gates) // RANGES)
        image = figure.axes[0].images[0].get_array()
        assert image.shape == (6, -(-len(routes.gates) // width))
        assert np.asarray(image[:, 0]) == pytest.approx(routes.gates[:width, :, 0].mean(0))
        last = (image.shape[1] - 1) * width
        assert np.asarray(image[:, -1]) == pytest.approx(routes.gates[last:, :, 0].mean(0))
        assert f"means over {width} tokens" in texts(figure)

    def test_the_end_of_the_prompt_is_marked(self, tmp_path):
        routes = make_routes(30, prompt=12)
        figure = plots.text_route(routes, "text/0", tmp_path / "a.svg")
        assert "prompt ends" in texts(figure)
        assert figure.axes[0].lines[0].get_xdata()[0] == 11.5
        assert "<svg" in (tmp_path / "a.svg").read_text()
        with pytest.raises(UserError, match="no document 'x'"):
            plots.text_route(routes, "x")


class TestTerminal:
    def test_marks_say_what_executed(self):
        routes = make_routes(10, layers=5)
        gates = routes.gates.copy()
        for layer, tokens in enumerate((0, 2, 5, 8, 10)):
            gates[:, layer, 0] = np.arange(10) < tokens
            gates[:, layer, 1] = True
        lines = shaded(
            Routes(gates, routes.token_ids, ("text/0",), (10,), (1,), routes.vocabulary), "text/0"
        )
        assert lines[0] == "text/0: 10 tokens, 75% of sublayers executed"
        assert lines[1] == f"  attention {SHADES}  50%"
        assert lines[2] == f"  mlp       {SHADES[-1] * 5} 100%"
        assert lines[3].startswith("  least     ' word")
        assert lines[4].startswith("  most      ' word")

    def test_lines_fit_a_narrow_terminal(self):
        for line in shaded(make_routes(40, layers=126), "text/0"):
            assert len(line) <= 80
        assert usable_shades("utf-8") == SHADES
        assert usable_shades("ascii") == usable_shades(None) == PLAIN_SHADES


def test_of_drafts_it_says_that_they_are_not_recorded(command):
    status, out, _ = command("--prompt", "to be", methods="self_speculation(draft=uls),uls")
    assert status == 0
    (said,) = [line for line in out if line.endswith(WHOLE)]
    assert "self_speculation" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def command(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, methods: str = "random_mask(rates=uniform, length=32)"):
        common = ("--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt"))
        status = door.main(["--methods", methods, "--speedups", "1.5", *common, *arguments])
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err

    return call


class TestCommand:
    def test_one_line_gives_record_picture_and_summary(self, tmp_path, command, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            "dyndepth.plots.texts.written",
            lambda figure, path: drawn.append(figure) or plots.written(figure, path),
        )
        (tmp_path / "my.txt").write_text("To be or not.")
        status, out, _ = command("--text", "my.txt", "--plot")
        assert status == 0
        told = json.loads(out[-1])["routes"]
        (picture,) = told["plots"]
        (record,) = (tmp_path / "routes").glob("*.safetensors")
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / picture) == record.with_suffix(".png")
        routes = Routes.load(record)
        assert "".join(routes.strings()) == "To be or not."
        assert not routes.gates.all()
        for index in range(2):
            image = drawn[0].axes[index].images[0].get_array()
            assert (image == routes.gates[:, :, index].T).all()
        assert f"my.txt/0: 13 tokens, {routes.gates.mean():.0%} of sublayers executed" in out
        assert any(line.startswith("from left to right blocks 0 to 3; executed") for line in out)

    def test_what_is_drawn_is_what_the_trace_executed(self, folder, tmp_path, command):
        from dyndepth.models.loading import load_model, load_tokenizer
        from dyndepth.routes.trace import record
        from dyndepth.runtime.attach import attach

        command("--prompt", "to be", "--output_path", "out", methods="uls(spacing=even)")
        (file,) = (tmp_path / "out").glob("*.safetensors")
        kept = Routes.load(file)
        model, reads = (load(str(folder / "model")) for load in (load_model, load_tokenizer))
        from dyndepth import load_method

        method = load_method("uls(spacing=even, phases=both)", target_speedup=1.5).fit(model)
        again = record(model, reads, method, {"prompt/0": "to be"}, 1)
        assert (kept.gates == again.gates).all()
        with torch.no_grad(), attach(model, method, prompt_length=1) as trace:
            model(**reads(["to be"], return_tensors="pt"))
            executed = trace.executed().numpy()
        assert kept.gates.mean(0) == pytest.approx(executed)

    def test_several_texts_and_methods_have_a_picture_each(self, tmp_path, command):
        (tmp_path / "my.txt").write_text("One.\n\nTwo.\n\nThree.")
        words = "--text", "my.txt", "--limit", "2", "--speedups", "1.3", "2"
        status, out, err = command(*words, "--plot", "pictures/a.svg")
        assert status == 0
        assert "the text has 3 documents, with an empty line between them; the first 2" in err
        made = sorted(path.name for path in (tmp_path / "pictures").iterdir())
        assert made == ["a-0.svg", "a-1.svg", "a-2.svg", "a-3.svg"]
        status, out, _ = command(*words, "--plot", methods="uls(spacing=even)")
        assert len({path.name for path in (tmp_path / "routes").glob("*.png")}) == 4

    def test_standard_input_and_words(self, tmp_path, command, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("piped words"))
        status, out, _ = command("--text", "-")
        assert status == 0
        assert any(line.startswith("stdin/0: 11 tokens, ") for line in out)
        status, out, _ = command("--prompt", "said words", "--plot", "a.pdf")
        assert status == 0
        assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")

    def test_what_is_cut_is_told(self, command):
        status, out, err = command("--prompt", "x" * 90, "--length", "40")
        assert status == 0
        assert err.endswith("prompt/0 has 90 tokens; the first 40 are recorded\n")
        status, out, err = command("--prompt", "x" * 3000)
        assert err.endswith("prompt/0 has 3000 tokens; the first 2048 are recorded\n")

    def test_what_the_method_writes_is_recorded_after_the_prompt(self, folder, tmp_path, command):
        from dyndepth import attach, load_method, load_model, load_tokenizer

        spec = "uls(spacing=even, phases=generation)"
        status, _, _ = command("--prompt", "to be", "--generate", "6", methods=spec)
        assert status == 0
        (file,) = (tmp_path / "routes").glob("*.safetensors")
        found = Routes.load(file)
        model, reads = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
        method = load_method(spec, target_speedup=1.5).fit(model)
        with attach(model, method):
            asked = reads("to be", return_tensors="pt")
            written = model.generate(**asked, max_new_tokens=6, do_sample=False)[0].tolist()
        assert found.token_ids.tolist() == written
        assert found.prompt_lengths == (5,)
        assert found.by_sublayer("prompt")["executed"].mean() == 1
        assert found.by_sublayer("generation")["executed"].mean() < 1
        assert found.gates.shape[1] == LAYERS
        status, _, err = command("--prompt", "x" * 2045, "--generate", "6")
        assert status == 2
        assert "leaves no room for 6 more in the 2048 that the model takes" in err

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--prompt", "a", "--text", "b"], "--prompt and --text both say what is recorded"),
            (["--prompt", " "], "--prompt holds no text"),
            (["--text", "absent"], "--text absent can't be read: No such file"),
            (["--text", "empty.txt"], "--text empty.txt holds no text"),
            (["--prompt", "a", "--plot", "a.gif"], "ends in .png, .svg, .pdf, not 'a.gif'"),
            (["--prompt", "a", "--generate", "0"], "--generate takes a whole number of at least 1"),
        ],
    )
    def test_wrong_input_is_one_sentence(self, tmp_path, command, arguments, sentence):
        (tmp_path / "empty.txt").write_text(" \n\n ")
        status, _, err = command(*arguments)
        assert status == 2
        assert sentence in err
        assert err.count("\n") == 1
        assert not (tmp_path / "routes").exists()

    def test_an_unknown_method_is_one_sentence(self, command):
        status, _, err = command("--prompt", "a", methods="skipgtp")
        assert status == 2
        assert "unknown method 'skipgtp'; did you mean skipgpt" in err


def test_what_is_no_text_is_told(monkeypatch):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"na\xefve"), encoding="utf-8", errors="strict")
    )
    with pytest.raises(UserError, match="--text - is not UTF-8 text"):
        own_texts("-", None)
