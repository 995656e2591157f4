"""The estimate of a dry run: what it counts, what it assumes, and how near it comes."""

from __future__ import annotations

import json
import re

import pytest
from folders import tiny_folder
from rich.console import Console

from dyndepth.cells.cell import CellSpec
from dyndepth.common import commands
from dyndepth.common.errors import UserError
from dyndepth.method import Reading
from dyndepth.sweep import __main__ as sweep
from dyndepth.sweep.estimate import costs, machines, memory, plan, report, texts
from dyndepth.sweep.estimate.machines import BANDWIDTH_SHARE, COMPUTE_SHARE, GIB, Machine
from dyndepth.sweep.estimate.models import Shape, skeleton
from dyndepth.sweep.estimate.passes import Pass, written
from dyndepth.sweep.settings import MACHINES, Settings, read

LLAMA = "shape:llama-3-8b"
PLANNED = ["--model", LLAMA, "--dry_run", "--assume", "h100"]


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """What a dry run on an assumed machine prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, model: str = LLAMA) -> str:
        given = ["--model", model, "--dry_run", "--assume", "h100", "--tasks", "wikipedia_bpb"]
        assert sweep.main([*given, "--limit", "3", *words]) == 0
        return capsys.readouterr().out

    return run


class TestMachines:
    def test_each_that_can_be_assumed_has_its_figures_and_their_source(self):
        assert tuple(machines.known()) == MACHINES == commands.CHOICES["assume"]
        for sheet in machines.known().values():
            assert sheet["half_tflops"] > 0
            assert sheet["single_tflops"] > 0
            assert len(sheet["source"]) > 20

    def test_precision_decides_the_peak(self):
        def rate(dtype: str) -> float:
            return machines.assumed(Settings(assume="h100", dtype=dtype)).rate

        assert rate("bfloat16") == COMPUTE_SHARE * 989e12
        assert rate("float32") == COMPUTE_SHARE * 67e12

    def test_a_machine_may_be_described(self):
        found = machines.assumed(Settings(tflops=10.0, bandwidth=100.0, memory_gib=5.0))
        assert (found.rate, found.bandwidth) == (COMPUTE_SHARE * 1e13, BANDWIDTH_SHARE * 1e11)
        assert found.memory == 5 * GIB

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--assume", "h100"], "--assume says which machine to plan for; add --dry_run"),
            (["--tflops", "9", "--dry_run"], "--tflops and --bandwidth together"),
            (["--assume", "b9", "--dry_run"], "one of h100, h200, a100, rtx4090, cpu, not 'b9'"),
            (["--model", LLAMA], "has random weights"),
        ],
    )
    def test_what_goes_with_a_dry_run_alone_is_refused(self, words, says):
        with pytest.raises(UserError, match=re.escape(says)):
            read(words)

    def test_a_device_that_is_not_here_is_a_sentence_with_the_remedy(self, monkeypatch):
        def missing(device: str) -> None:
            raise UserError(f"device {device!r} is not usable here; use 'cpu' or 'auto'")

        monkeypatch.setattr("dyndepth.models.loading.check_device", missing)
        with pytest.raises(UserError, match="'cuda' is not usable here.*--assume h100"):
            machines.check_here("cuda")

    def test_two_forwards_give_rate_and_bandwidth_back(self, monkeypatch):
        took = {machines.FEW: (0.5 + 16 * 0.01,) * 2, machines.MANY: (0.5 + 256 * 0.01, 30.0)}
        monkeypatch.setattr(machines, "_least", lambda run, tokens, device: took[tokens])
        found = machines.measured("cpu", 1e9, 2e9, None, "it runs")
        assert found.rate == pytest.approx(1e11 / machines.ODD)
        assert found.bandwidth == pytest.approx(4e9 / machines.ODD)
        assert found.seconds(256e9, 2e9, 30) == pytest.approx((0.5 + 2.56) * machines.ODD)
        assert any("9.8 times as long" in line for line in found.said)


class TestTexts:
    def test_groups_are_their_tasks(self):
        found = texts.members("mmlu", None)
        assert len(found) == len(set(found)) == 57
        assert "mmlu_abstract_algebra" in found
        assert texts.members("quartz", None) == ["quartz"]

    def test_a_group_whose_data_is_not_here_has_the_documents_of_its_card(self, monkeypatch):
        monkeypatch.setattr(texts, "_loaded", lambda task, folder: None)
        monkeypatch.setattr(texts, "_reader", lambda settings, longest: None)
        found = texts.texts_of(Settings(), {"mmlu": None, "gsm8k": 10}, 8192)
        assert len(found) == 58
        assert sum(text.documents for text in found if text.asked == "mmlu") == 14042
        assert {text.counted for text in found} == {"assumed"}
        shots = found[-1]
        assert (shots.task, shots.documents) == ("gsm8k", 10)
        assert shots.prompts[0] > 5 * 48  # five examples stand before each question

    def test_a_beginning_that_all_share_is_read_once(self):
        from dyndepth.evaluation.scoring import Group
        from dyndepth.sweep.estimate.passes import scored

        shared = [Group(str(n), [*range(100), 200 + n], [[1, 2, 3], [4]]) for n in range(4)]
        together = scored(shared, 32, 1024, True, times=10)
        apart = scored(shared, 32, 1024, False, times=10)
        prompt = [sum(p.tokens for p in each if not p.generation) for each in (together, apart)]
        assert prompt == [100 + 10 * 4, 10 * 4 * 101]
        more = [sum(p.tokens for p in each if p.generation) for each in (together, apart)]
        assert more == [10 * 4 * 2] * 2  # of three tokens two are read, of one none

    def test_what_is_written_runs_a_token_a_forward(self):
        passes = written([10, 8], 5, 32, 1024)
        assert sum(one.times for one in passes if one.generation) == 4
        assert sum(one.tokens for one in passes if not one.generation) == 2 * 10


class TestAgainstArithmetic:
    """Llama-3-8B on an H100, against a few lines that share no code with the estimate."""

    LAYERS, WIDTH, INNER, KEYS, VOCABULARY = 32, 4096, 14336, 1024, 128256
    WEIGHTS = LAYERS * (2 * WIDTH**2 + 2 * WIDTH * KEYS + 3 * WIDTH * INNER)

    def machine(self) -> tuple[Machine, Shape]:
        settings = Settings(model=LLAMA, assume="h100", dtype="bfloat16")
        return machines.assumed(settings), Shape.of(skeleton(LLAMA), "bfloat16")

    def test_prompts(self):
        machine, shape = self.machine()
        found = costs.run(machine, shape, [Pass(8, 2048, 2048, 8, False)]).seconds
        flops = 8 * 2048 * (2 * self.WEIGHTS + self.LAYERS * 2 * 2 * self.WIDTH * 2048)
        assert 0.5 < found / (flops / (0.5 * 989e12)) < 2

    def test_decoding(self):
        machine, shape = self.machine()
        found = costs.run(machine, shape, [Pass(32, 1, 2048, 32, True)]).seconds
        cache = 32 * 2048 * self.LAYERS * 2 * self.KEYS
        read = 2 * (self.WEIGHTS + self.WIDTH * self.VOCABULARY + cache)
        # In eager mode the host is the limit where the bytes are not.
        limit = max(read / (0.5 * 3350e9), self.LAYERS * 0.65e-3)
        assert 0.5 < found / limit < 2
        bound = costs.run(machine, shape, [Pass(32, 1, 16384, 32, True)]).seconds
        assert 0.5 < bound / ((read + 2 * 7 * cache) / (0.5 * 3350e9)) < 2

    def test_a_whole_sweep(self, monkeypatch):
        settings = read([*PLANNED, "--dtype", "bfloat16", "--timing", "off"])
        shape = Shape.of(skeleton(LLAMA), "bfloat16")
        cells = plan.Fits(machines.assumed(settings), shape, [], None, None, False)
        word, work = cells.of(
            CellSpec("dense", recovery="lora(steps=1000, batch=1, accumulate=8, length=4096)"),
            CellSpec("dense").build(),
            CellSpec("dense").build().expenses(32),
        )
        tokens = 1000 * 8 * 4096
        # Forward, and as much again for the states' gradients: the weights are frozen.
        arithmetic = 2 * tokens * (2 * self.WEIGHTS + self.LAYERS * 4 * self.WIDTH * 4096)
        assert word == "trains"
        assert 0.5 < work.seconds / (arithmetic / (0.5 * 989e12)) < 2

    def test_ranking_modules_takes_three_trainings(self):
        machine, shape = self.machine()

        def flops(recovery):
            fits = plan.Fits(machine, shape, [], None, None, False)
            cell = CellSpec("dense", recovery=recovery)
            return fits.of(cell, cell.build(), cell.build().expenses(32))[1].flops

        once = flops("lora(steps=40)")
        ranking = "lora(steps=40, modules=ila, score_steps=20, keep={})"
        assert flops(ranking.format(0.3)) == pytest.approx(2.5 * once)
        # What keeps all does not train it again.
        assert flops(ranking.format(1)) == pytest.approx(1.5 * once)
        # What ranks them is done once for every share of them.
        fits = plan.Fits(machine, shape, [], None, None, False)
        cells = [CellSpec("dense", recovery=ranking.format(keep)) for keep in (0.1, 0.3, 1)]
        found = [fits.of(each, each.build(), each.build().expenses(32))[1] for each in cells]
        assert sum(work.flops for work in found) == pytest.approx(3.5 * once)

    def test_weights_and_cache(self):
        _, shape = self.machine()
        assert shape.in_blocks == pytest.approx(self.WEIGHTS, rel=1e-3)
        assert shape.parameters == pytest.approx(8.03e9, rel=1e-3)
        assert shape.cache == self.LAYERS * 2 * self.KEYS
        need = memory.need(shape, [Pass(8, 2048, 2048, 8, False)], [], 0)
        assert need.weights == pytest.approx(16.06e9, rel=1e-3)
        assert need.training == 0
        trains = [Reading(windows=4, length=4096, backwards=1.0)]
        more = memory.need(shape, [], trains, 1e8)
        assert 15 * GIB < more.training < 40 * GIB


class TestCells:
    @pytest.mark.parametrize(
        ("method", "word"),
        [
            ("dense", "none"),
            ("uls", "none"),
            ("static_pruning", "calibrates"),
            ("early_exit", "calibrates"),
            ("skipgpt", "trains"),
            ("layer_controller", "trains"),
            ("random_mask", "trains"),
        ],
    )
    def test_fits_are_included(self, method, word):
        cell = CellSpec(method, target_speedup=1.0 if method == "dense" else 1.5)
        machine, shape = TestAgainstArithmetic().machine()
        fits = plan.Fits(machine, shape, [], None, None, False)
        built = cell.build()
        found, work = fits.of(cell, built, built.expenses(shape.layers))
        assert (found, work.seconds > 0) == (word, word != "none")

    def test_the_published_training_is_counted_step_by_step(self):
        cell = CellSpec("skipgpt", target_speedup=1.5, parameters={"preset": "paper"})
        read_by = cell.build().expenses(32).fit
        trained = sum(one.windows * one.length for one in read_by if one.backwards)
        assert trained == 10_000 * 16 * 4096

    def test_what_serves_all_targets_is_counted_once(self):
        machine, shape = TestAgainstArithmetic().machine()
        fits = plan.Fits(machine, shape, [], None, None, False)
        spent = []
        for target in (1.25, 1.5):
            cell = CellSpec("static_pruning", target_speedup=target)
            built = cell.build()
            spent.append(fits.of(cell, built, built.expenses(32))[1].seconds)
        assert spent[0] > 0
        assert spent[1] == 0

    def test_readouts_cost_more_than_the_depth_they_save(self):
        machine, shape = TestAgainstArithmetic().machine()
        passes = [Pass(8, 512, 512, 8, False)]
        margin = CellSpec("early_exit", target_speedup=1.5, parameters={"phases": "both"}).build()
        depth = costs.Depth.of(margin, margin.expenses(32).readouts)
        less = costs.Depth.of(margin, 0.0)
        with_readouts, without = (costs.run(machine, shape, passes, d) for d in (depth, less))
        assert with_readouts.flops > 1.1 * without.flops
        prompt = costs.Depth(0.5, prompt=False)
        whole = costs.run(machine, shape, passes)
        assert costs.run(machine, shape, passes, prompt).flops == whole.flops

    def test_routes_are_tried_once_for_all_targets(self):
        machine, shape = TestAgainstArithmetic().machine()
        fits = plan.Fits(machine, shape, [Pass(8, 128, 128, 8, False)], None, None, False)
        spent = []
        for target in (1.5, 2.0):
            cell = CellSpec("oracle", target_speedup=target)
            built = cell.build()
            spent.append(fits.of(cell, built, built.expenses(32))[1].seconds)
        assert spent[0] > 20 * costs.run(machine, shape, fits.passes).seconds
        assert spent[1] == 0

    def test_shipped_and_cached_fits_cost_nothing(self, monkeypatch):
        machine, shape = TestAgainstArithmetic().machine()
        cell = CellSpec("skipgpt", target_speedup=1.5)
        built = cell.build()
        fits = plan.Fits(machine, shape, [], object(), None, True)
        monkeypatch.setattr(plan.Fits, "_kept", lambda self, method: True)
        assert fits.of(cell, built, built.expenses(32))[0] == "cached"
        from dataclasses import replace

        shipped = replace(built.expenses(32), shipped=True)
        assert fits.of(cell, built, shipped) == ("shipped", costs.Work())


class TestReport:
    def test_hours_and_days(self):
        said = [report.duration(x) for x in (0.2, 40, 100, 7200, 3600 * 72, 4321 * 60)]
        assert said == ["0.2 s", "40 s", "1.7 min", "2.0 h", "3.0 days", "3.0 days"]

    def test_what_does_not_fit_names_the_remedy(self, printed):
        out = printed("--dtype", "bfloat16", "--memory_gib", "12", "--timing", "off")
        assert re.search(r"14\.\d GiB|15\.\d GiB", out)
        assert "does not fit into 12.0 GiB: take --device spread" in out
        out = printed("--memory_gib", "24", "--timing", "off")
        assert "take --dtype bfloat16" in out
        assert "fits into 79.6 GiB" in printed("--timing", "off")

    def test_lines_of_a_table_fit_into_80_columns(self, printed, monkeypatch):
        narrow = Console(width=80, force_terminal=True, color_system=None)
        monkeypatch.setattr(commands, "console", lambda: narrow)
        methods = ["--methods", "static_pruning,early_exit,skipgpt", "--dtype", "bfloat16"]
        out = printed(*methods)
        lines = out.partition("What is scored")[2].splitlines()
        assert any(line.startswith("skipgpt") for line in lines)
        assert len(lines) > 12
        assert max(map(len, lines)) <= 80
        assert "left out at this width: TFLOPs, scoring, timing" in " ".join(out.split())
        assert re.search(r"about [\d.]+ (s|min|h|days) in all on NVIDIA H100", out)

    def test_many_cells_are_grouped(self, printed):
        more = ["--speedups", "1.1,1.2,1.3,1.4,1.5", "--seed", "0", "1", "2", "3", "4"]
        out = printed("--methods", "uls,random_skip", *more)
        assert "uls: 25 cells" in out

    def test_everything_assumed_is_said(self, printed):
        out = printed("--methods", "oracle", "--speedups", "1.5")
        for said in ("50% of that rate", "a shape has no tokenizer", "trying a plan of a bound"):
            assert f"assumed: {said}" in out

    def test_the_page_states_the_efficiencies(self):
        page = (commands.Path(__file__).parents[2] / "docs/commands.md").read_text()
        assert f"{COMPUTE_SHARE:.0%} of the peak" in page
        assert f"{BANDWIDTH_SHARE:.0%} of the bandwidth" in page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_tokens_are_those_of_the_run(folder):
    from dyndepth.evaluation.evaluate import evaluate
    from dyndepth.models.loading import load_model, load_tokenizer

    name, tasks = str(folder / "model"), ("quartz", "last_word", "socialiqa")
    model, tokenizer = load_model(name), load_tokenizer(name)
    settings = Settings(model=name, num_fewshot=1)
    dense = CellSpec("dense").build()
    found = evaluate(model, tokenizer, dense, tasks, limit=3, num_fewshot=1, progress=False)
    ran = {row["task"]: row["tokens"] for row in found.compute if row["phase"] == "all"}
    counted = texts.texts_of(settings, dict.fromkeys(tasks, 3), 2048)
    assert {text.task: text.tokens for text in counted} == ran
    assert {text.counted for text in counted} == {"data"}
    # Of many documents a sample stands for all.
    (many,) = texts.texts_of(settings, {"quartz": 300}, 2048)
    assert (many.documents, many.counted, len(many.groups)) == (300, "sample", texts.SAMPLE)
    assert many.tokens / 300 == pytest.approx(ran["quartz"] / 3, rel=0.4)


def test_a_model_that_is_here_is_loaded_and_measured(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt"), "--dry_run"]
    # Windows that no other test asks for: nobody left such a fit in the cache.
    words += ["--methods", "static_pruning(windows=3, length=17)", "--tasks", "quartz"]
    words += ["--limit", "3", "--device", "cpu", "--speedups", "1.3", "--timing", "off"]
    assert sweep.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"the model runs on cpu at [\d,]+ GFLOP/s and [\d.]+ GB/s \(measured\)", out)
    assert "before that the model is loaded" in out
    assert "calibrates" in out


def test_sizes_of_known_tasks_have_a_source():
    text = machines.Path(texts.__file__).with_name("tasks.json").read_text()
    facts = json.loads(text)
    assert facts["source"]
    for one in facts["tasks"].values():
        assert one["documents"] > 0
        assert one["choices"] >= 1
