"""``python -m dyndepth.fit``: what it writes, resuming after a kill, wrong input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import sweeping
from folders import tiny_folder

from dyndepth import fit

SMALL = ("--length", "24", "--batch", "2", "--rounds", "2", "--windows", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with ``model`` and ``corpus.txt``."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    """Runs the command in this process, with a cache of its own; returns status, out, err."""
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str):
        base = ("--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt"))
        given = ("--output_path", str(tmp_path / "out"))
        status = fit.main([*arguments, *(base if "--model" not in arguments else ()), *given])
        return status, *capsys.readouterr()

    return run


def test_trains_and_writes_fit_curve_and_summary(command, tmp_path):
    status, out, _ = command("skipgpt", "--target-speedup", "1.5", "--steps", "5", *SMALL)
    assert status == 0
    summary = json.loads(out.splitlines()[-1])["fit"]
    assert summary["facts"]["achieved_speedup"] == pytest.approx(1.5, rel=0.05)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    rows = list(csv.DictReader((tmp_path / "out" / "fit" / "curve.csv").open()))
    # Two rounds of four windows in batches of two, then the steps.
    assert [row["step"] for row in rows] == list("123456789")
    assert set(rows[0]) == {"step", "loss", "executed", "wanted", "tokens"}
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "cache" / "fits" / "skipgpt").glob("*.training"))
    again, out, _ = command("skipgpt", "--target-speedup", "1.5", "--steps", "5", *SMALL)
    assert again == 0, "a second call takes what is there"
    assert json.loads(out.splitlines()[-1])["fit"]["facts"] == summary["facts"]


def test_routers_that_were_trained_serve_another_target(command, tmp_path):
    assert command("skipgpt", "--target_speedup", "1.5", "--steps", "0", *SMALL)[0] == 0
    routers = ("--routers", str(tmp_path / "out" / "fit"))
    status, out, err = command("skipgpt", "--target_speedup", "1.3", *routers, *SMALL)
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])["fit"]["facts"]["achieved_speedup"]
    assert found == pytest.approx(1.3, rel=0.05)


def test_methods_without_training_are_fitted_and_recovered(command, tmp_path):
    recipe = "lora(steps=3, batch=1, length=24)"
    status, out, err = command(
        "uls", "--target_speedup", "2", "--phases", "both", "--recovery", recipe
    )
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["fit"]["recovery"].startswith("lora(rank=4")
    assert (tmp_path / "out" / "recovery" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "recovery.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("skipgtp",), "unknown method 'skipgtp'; did you mean skipgpt"),
        (("skipgpt", "--router", "cubic"), "must be one of linear, mlp or none"),
        (("skipgpt", "--steps", "many"), "'steps' of method 'skipgpt' must be an integer"),
        (("skipgpt", "--stepz", "1"), "--stepz"),
        (("skipgpt", "--speedups", "0.5"), "--speedups takes one number of at least 1"),
        (("uls", "--target_speedup", "9"), "reaches at most 2x"),
        (("uls", "--recovery", "lore"), "unknown recovery 'lore'; did you mean lora or none?"),
        (("uls", "--recovery", "joint"), "uls trains nothing"),
        (("skipgpt", "--routers", "nowhere"), "no folder with fitted routers"),
        (("uls", "--model", "./nowhere"), "no model folder at './nowhere'"),
        ((), "METHOD"),
    ],
)
def test_wrong_input_is_one_sentence_and_writes_nothing(command, tmp_path, arguments, told):
    status, _, err = command(*arguments)
    assert status == 2
    assert told in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_names_the_methods_parameters(capsys):
    with pytest.raises(SystemExit, match="0"):
        fit.main(["skipgpt", "--help"])
    text = capsys.readouterr().out
    for flag in ("--speedups", "--preset", "--estimator", "--penalty", "--recovery"):
        assert flag in text


def test_killed_and_resumed_gives_the_same_curve(tiny, tmp_path):
    arguments = ["skipgpt", "--target_speedup", "1.5", "--steps", "60", *SMALL]
    arguments += ["--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt")]

    def start(name: str, folder: str):
        return sweeping.start(
            tmp_path / "said",
            *(*arguments, "--output_path", str(tmp_path / folder)),
            door="dyndepth.fit",
            DYNDEPTH_CACHE=str(tmp_path / name),
            DYNDEPTH_CHECKPOINT_SECONDS="0",
        )

    calm = start("calm", "calm-out")
    assert calm.wait() == 0, calm.err
    killed = start("stormy", "stormy-out")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "stormy").glob("fits/skipgpt/*.training/*.checkpoint")):
        assert killed.process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.process.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "stormy-out").exists()
    resumed = start("stormy", "stormy-out")
    assert resumed.wait() == 0, resumed.err
    for name in ("fit/curve.csv", "fit/tensors.safetensors"):
        calm, stormy = (tmp_path / folder / name for folder in ("calm-out", "stormy-out"))
        assert calm.read_bytes() == stormy.read_bytes()


@pytest.mark.slow
def test_several_processes_train_one_fit(tiny, tmp_path):
    """As `accelerate launch` starts it: gradients averaged, files written once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "dyndepth.fit", "skipgpt", "--target_speedup", "1.5", "--steps", "6", *SMALL]
    command += ["--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt")]
    command += ["--precision", "bf16", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"DYNDEPTH_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    summaries = [line for line in done.stdout.splitlines() if line.startswith('{"fit"')]
    assert len(summaries) == 1
    assert json.loads(summaries[0])["fit"]["facts"]["tokens"] == (4 + 6 * 2) * 2 * 24
