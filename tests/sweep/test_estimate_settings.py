"""What a dry run makes of the settings of other parts: prompts, shapes, cells that are there,
workers, recovery, text, shards; and that what a run refuses is refused by it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
from folders import tiny_folder

from dyndepth.cells.cell import CellSpec
from dyndepth.cells.times import Shape as Timed
from dyndepth.evaluation.chat import Chat
from dyndepth.sweep import __main__ as sweep
from dyndepth.sweep.estimate import costs, machines, plan, texts, workers
from dyndepth.sweep.estimate.models import Shape, skeleton
from dyndepth.sweep.settings import Settings, read

LLAMA = "shape:llama-3-8b"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("estimated"))
    shutil.copytree(folder / "model", folder / "instruct")
    (folder / "instruct" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """A sweep of the tiny model; its exit status and what it prints."""
    monkeypatch.chdir(tmp_path)

    def swept(*more: str, model: str = "model") -> tuple[int, str, str]:
        given = ["--model", str(folder / model), "--corpus", str(folder / "corpus.txt")]
        given += ["--tasks", "quartz", "--limit", "2", "--device", "cpu", "--output_path", "run"]
        given += ["--methods", "uls(spacing=even)", "--speedups", "1.3"]
        timing = [] if "--timing" in more else ["--timing", "off"]
        status = sweep.main([*given, *timing, *more])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return swept


def planned(*words: str) -> plan.Estimate:
    """The estimate of a sweep of Llama-3-8B's shape on an H100."""
    from dyndepth.models.loading import longest_window
    from dyndepth.sweep.grid import grid

    given = ["--model", LLAMA, "--dry_run", "--assume", "h100", "--dtype", "bfloat16"]
    given += ["--tasks", "quartz", "--limit", "2"]
    settings = read([*given, *words])
    return plan.estimate(settings, grid(settings), longest_window(LLAMA))


class TestPrompts:
    @pytest.mark.parametrize("shots", [0, 2])
    def test_those_of_the_run_are_counted(self, folder, shots):
        from dyndepth.evaluation.evaluate import evaluate
        from dyndepth.models.loading import load_model, load_tokenizer

        name = str(folder / "instruct")
        chat = Chat("default", None, "answer in one word")
        dense = CellSpec("dense").build()
        how = {"limit": 2, "num_fewshot": shots, "progress": False, **chat.settings()}
        found = evaluate(load_model(name), load_tokenizer(name), dense, ["quartz"], **how)
        (ran,) = [row["tokens"] for row in found.compute if row["phase"] == "all"]
        settings = Settings(
            model=name,
            num_fewshot=shots,
            apply_chat_template="default",
            system_instruction="answer in one word",
        )
        (counted,) = texts.texts_of(settings, {"quartz": 2}, 2048)
        assert counted.tokens == ran
        plain = replace(settings, apply_chat_template=None, system_instruction=None)
        assert texts.texts_of(plain, {"quartz": 2}, 2048)[0].tokens < ran

    def test_of_tasks_whose_data_is_not_here_too(self, folder, monkeypatch):
        monkeypatch.setattr(texts, "_loaded", lambda task, folder: None)
        base = Settings(model=str(folder / "instruct"), num_fewshot=1)
        system = replace(base, system_instruction="x" * 100)
        chat = replace(system, apply_chat_template="default")
        plain, longer, longest = (
            texts.texts_of(each, {"gsm8k": 1}, 2048)[0].prompts[0] for each in (base, system, chat)
        )
        assert longer == plain + 100  # a token a letter
        assert longest > longer + len("<system><user><assistant><user>")

    def test_a_model_without_a_template_is_refused_as_by_the_run(self, run):
        status, _, refused = run("--apply_chat_template")
        dry, out, said = run("--apply_chat_template", "--dry_run")
        assert (dry, said) == (status, refused)
        assert dry == 2
        assert "has no chat template" in said
        assert "What is scored" not in out

    def test_a_shape_has_none_and_says_what_is_counted(self, monkeypatch, tmp_path, capsys):
        monkeypatch.chdir(tmp_path)
        words = ["--model", LLAMA, "--dry_run", "--assume", "h100", "--tasks", "quartz"]
        words += ["--limit", "2", "--timing", "off", "--apply_chat_template"]
        assert sweep.main(words) == 0
        assert "prompts are counted as plain text" in capsys.readouterr().out
        settings = Settings(model=LLAMA, system_instruction="a word " * 50)
        longer = texts.texts_of(settings, {"quartz": 2}, 8192)[0].tokens
        plain = texts.texts_of(Settings(model=LLAMA), {"quartz": 2}, 8192)[0].tokens
        assert longer > plain + 2 * 50


class TestTiming:
    """On the H100's data sheet, timed in eager mode unless said."""

    def seconds(self, *words: str) -> float:
        (one,) = planned(*words).cells
        return one.timing.seconds

    def test_shapes_that_are_asked_for_are_those_that_count(self):
        quick = self.seconds()
        small = self.seconds("--timing_shapes", "1x8+0")
        large = self.seconds("--timing_shapes", "32x4096+64")
        assert small < quick / 2
        assert large > 2 * quick
        both = self.seconds("--timing_shapes", "1x8+0,32x4096+64")
        assert both == pytest.approx(small + large)

    def test_compiled_dense_is_a_third_side(self):
        shapes = ["--timing_shapes", "32x4096+64"]
        without = self.seconds(*shapes)
        assert 1.3 < self.seconds(*shapes, "--compiled_dense") / without < 2.5

    def test_passes_that_are_watched_count_beside_those_that_are_timed(self):
        machine = machines.assumed(read(["--dry_run", "--assume", "cpu"]))
        shape = Shape.of(skeleton(LLAMA), "float32")
        from dyndepth.timing.levels import Level

        level = Level((Timed(1, 512, 0),), 1, 1, 1, 0, 0.0, 0.0)
        one = costs.timing(machine, shape, None, {"eager": level}, costs.DENSE)
        pair = costs.run(machine, shape, [costs.Pass(1, 512, 512, 1, False)] * 2)
        assert one.flops == pytest.approx(2 * pair.flops)  # a round, and one for the memory

    def test_prompts_alone_are_not_timed_by_graphs(self):
        shapes = ["--timing_shapes", "1x2048+0,1x64+8"]
        eager = self.seconds(*shapes)
        both = self.seconds(*shapes, "--mode", "both")
        assert eager < both < 1.9 * eager

    def test_what_is_assumed_of_compiling_is_said(self, run):
        shapes = ["--timing", "quick", "--timing_shapes", "1x8+0", "--compiled_dense"]
        status, out, _ = run(*shapes, "--dry_run")
        assert status == 0
        assert "compiling itself is not counted" in out


class TestCellsThatAreThere:
    def test_they_are_not_charged_again(self, run):
        assert run()[0] == 0
        status, out, _ = run("--dry_run")
        assert status == 0
        assert "all 2 cells are there already in run: nothing is left to compute" in out
        assert "in all on cpu" not in out

        _, more, _ = run("--dry_run", "--speedups", "1.3,1.6")
        assert "2 of 3 cells are there already" in more
        assert len(re.findall(r"\bthere\b", more.partition("about")[0])) >= 3

        _, others, _ = run("--dry_run", "--limit", "1")
        _, never, _ = run("--dry_run", "--resume", "never")
        for out in (others, never):
            assert "already" not in out
            assert "in all on cpu" in out

    def test_what_was_scored_is_left_to_time(self, run):
        assert run()[0] == 0
        _, out, _ = run("--dry_run", "--timing", "quick")
        assert "2 of 2 cells are scored, and left to time" in out
        assert re.search(r"in all on cpu: timing [\d.]+ (s|min)", out)

    def test_a_model_that_is_too_large_to_load_is_known_by_its_name(self, run, monkeypatch):
        assert run()[0] == 0
        monkeypatch.setattr("dyndepth.sweep.estimate.models.LARGEST", 0)
        assert "nothing is left to compute" in run("--dry_run")[1]

    def test_a_failed_cell_is_computed_again(self, run, monkeypatch):
        from dyndepth.sweep.workbench import Workbench

        def fails(self, plan):
            raise ValueError("no")

        with monkeypatch.context() as broken:
            broken.setattr(Workbench, "evaluate", fails)
            assert run()[0] == 1
        assert "already" not in run("--dry_run")[1]
        assert "nothing is left to compute" in run("--dry_run", "--resume", "always")[1]


class TestWorkers:
    def test_machines_of_their_own_divide_the_time_of_scoring(self):
        cells = ["--methods", "uls", "--speedups", "1.1,1.2,1.3,1.4,1.5"]
        alone = planned(*cells)
        six = planned(*cells, "--executor", "processes", "--workers", "3")
        timing = sum(each.timing.seconds for each in alone.cells)
        assert six.seconds - timing == pytest.approx((alone.seconds - timing) / 3)
        assert "3 workers has such a machine to itself" in six.workers.said

    def test_those_here_share_the_cores(self, monkeypatch):
        import torch

        machine = machines.assumed(read(["--dry_run", "--assume", "cpu"]))
        settings = Settings(executor="processes", workers=2, device="cpu")
        monkeypatch.setattr(workers, "cores", lambda: 2)
        monkeypatch.setattr(workers, "shares", lambda *_: (2, 1))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        found = {}
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            found[threads] = workers.workers_of(settings, machine, 4, True).speed
        assert found == {1: 2.0, 2: 1.0}

    def test_each_holds_the_model(self, run):
        _, out, _ = run("--dry_run", "--executor", "processes", "--workers", "2")
        assert "2 times over, for each worker holds the model" in out
        assert "scored and fitted by 2 workers at once" in out


def test_steps_that_adapters_alone_need_are_counted():
    machine = machines.assumed(Settings(model=LLAMA, assume="h100", dtype="bfloat16"))
    shape = Shape.of(skeleton(LLAMA), "bfloat16")
    spent = {}
    fits = plan.Fits(machine, shape, [], None, None, False)
    for recovery in ("none", "joint"):  # nothing that the first keeps serves the second
        cell = CellSpec("skipgpt", target_speedup=1.5, recovery=recovery)
        built = cell.build()
        spent[recovery] = fits.of(cell, built, built.expenses(shape.layers))[1].flops
    recipe = CellSpec("skipgpt", target_speedup=1.5).build().recipe
    assert recipe.steps == 0
    tokens = 60 * recipe.batch * recipe.accumulate * recipe.length
    least = tokens * 2 * shape.flops(recipe.length)
    assert least < spent["joint"] - spent["none"] < 2 * least


class TestRefusals:
    @pytest.mark.parametrize("model", ["model", LLAMA])
    def test_a_missing_text(self, run, folder, model):
        words = ["--dry_run", "--corpus", "/nonexistent"]
        if model == LLAMA:
            words += ["--model", LLAMA, "--assume", "h100"]
        status, out, said = run(*words)
        assert status == 2
        assert "no corpus file at '/nonexistent'" in said
        assert "What is scored" not in out

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("corpus: /nonexistent", "no corpus file at '/nonexistent'"),
            ("include_path: /nonexistent", "--include_path /nonexistent is no folder"),
            ("apply_chat_template: true", "has no chat template"),
        ],
    )
    def test_of_a_file_as_of_flags(self, folder, tmp_path, monkeypatch, capsys, line, says):
        monkeypatch.chdir(tmp_path)
        known = {"corpus": str(folder / "corpus.txt"), "model": str(folder / "model")}
        lines = [f"{key}: {value}" for key, value in known.items() if not line.startswith(key)]
        lines += [line, "tasks: quartz", "limit: 2", "timing: off", "dry_run: true", "device: cpu"]
        (tmp_path / "sweep.yaml").write_text("\n".join(lines))
        assert sweep.main(["--config", "sweep.yaml"]) == 2
        assert says in capsys.readouterr().err


def test_a_shard_counts_its_own_cells_and_says_so(run):
    words = ["--speedups", "1.1,1.2,1.3,1.4,1.5", "--dry_run", "--shard"]
    _, out, _ = run(*words, "2/3")
    assert "shard 2 of 3: its 2 cells alone" in out
    assert "1.1x" in out
    assert "1.2x" not in out
