"""The command line: options, outputs, and one line per error."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import yaml
from PIL import Image

from deformable_detr import Config, DeformableDETR
from deformable_detr.cli import main
from deformable_detr.config import presets
from deformable_detr.demo import make_data
from deformable_detr.utils.errors import UserError
from tests.support.commands import is_one_line_error, run_command

TINY = ["--backbone", "test_resnet", "--backbone-weights", "none", "--image-size", "64", "--workers", "0"]
TINY += ["--set", "model.hidden_dim=64", "--set", "model.ffn_dim=32", "--set", "model.num_queries=5"]


@pytest.fixture
def run(capsys):
    return partial(run_command, capsys)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "data"
    make_data(folder, train_images=4, val_images=2)
    return folder


@pytest.fixture(scope="module")
def trained(data):
    """A run folder of two steps, created by the command line."""
    out = data.parent / "run"
    main(["train", str(data), "--out", str(out), "--epochs", "1", "--batch-size", "2", "--device", "cpu", *TINY])
    return out


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian DATA", ["trian", "train"]),
        ("train DATA --out OUT --epoch 3", ["--epoch.", "Did you mean --epochs?"]),
        ("train DATA --out OUT --epochs few", ["--epochs", "few"]),
        ("train DATA --out OUT --epochs 0", ["train.epochs", "greater than 0"]),
        ("train DATA --out OUT --preset huge", ["huge", "two-stage"]),
        ("train DATA --out OUT --precision fp8", ["fp8", "bf16"]),
        ("train DATA --out OUT --set lr", ["--set lr", "KEY=VALUE"]),
        ("train DATA --out OUT --set train.lrr=1", ["train.lrr", "did you mean 'lr'?"]),
        ("train DATA --out OUT --config MISSING", ["MISSING", "No such file"]),
        ("train DATA", ["--out"]),
        ("train MISSING --out OUT", ["MISSING"]),
        ("train DATA --out FILE/run", ["FILE/run"]),
        ("train DATA --out OUT --resume", ["OUT", "resume"]),
        ("train DATA --out OUT --device nonsense", ["nonsense"]),
        ("evaluate", ["--model"]),
        ("evaluate MISSING DATA", ["MISSING"]),
        ("evaluate RUN MISSING", ["MISSING"]),
        ("evaluate RUN DATA --split nowhere", ["nowhere"]),
        ("evaluate RUN DATA --batch-size 0", ["--batch-size", "Must be >= 1"]),
        ("evaluate RUN DATA --workers -1", ["--workers", "Must be >= 0"]),
        ("export RUN --to onnx --out OUT/a.onnx --limit 0", ["--limit", "Must be >= 1"]),
        ("evaluate RUN DATA --json FILE/x.json", ["--json", "FILE/x.json"]),
        ("evaluate RUN DATA --json DATA", ["--json", "is a folder"]),
        ("predict RUN", ["nothing to predict: name images"]),
        ("predict MISSING IMAGE", ["MISSING"]),
        ("predict RUN MISSING", ["MISSING"]),
        ("predict RUN EMPTY", ["EMPTY", "contains no images"]),
        ("predict RUN IMAGE --threshold 2", ["--threshold", "Must be <= 1"]),
        ("predict RUN IMAGE --out FILE/pictures", ["--out", "FILE/pictures"]),
        ("predict RUN DATA/train --out DATA/train", ["would overwrite", "00001.jpg"]),
        ("demo --out DATA", ["DATA", "another folder"]),
    ],
)
def test_error_is_one_line_with_exit_code_2(run, data, trained, tmp_path, arguments, words):
    (tmp_path / "FILE").touch()
    (tmp_path / "EMPTY").mkdir()
    paths = {"DATA": data, "RUN": trained, "IMAGE": data / "valid" / "00001.jpg"}
    paths |= {name: tmp_path / name for name in ("FILE", "EMPTY", "MISSING", "OUT")}

    def expand(argument):
        first, slash, rest = argument.partition("/")
        return f"{paths[first]}{slash}{rest}" if first in paths else argument

    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.*")}
    arguments = [expand(argument) for argument in arguments.split()]
    code, out, err = run(*arguments, *(TINY if arguments[0] == "train" else []))
    assert code == 2
    assert out == ""
    assert is_one_line_error(err), err
    for word in words:
        assert (expand(word) if word.split("/")[0] in paths else word) in err
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.*")} == before  # the dataset is unchanged


@pytest.mark.parametrize(("arguments", "position"), [
    ([""], "at the start"),
    (["predict", ""], "after predict"),
    (["predict", "RUN", "--out", ""], "after --out"),
    (["predict", "RUN", "--out="], "after --out"),
])  # fmt: skip
def test_empty_argument_is_rejected(run, trained, arguments, position):
    arguments = [str(trained) if argument == "RUN" else argument for argument in arguments]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err == f'error: empty argument ("") {position}: check that the shell variable is set\n'


@pytest.mark.parametrize(("arguments", "message"), [
    (["--repeats", 0], "--repeats. Must be >= 1"),
    (["--threads", -1], "--threads. Must be >= 1"),
    (["--image-size", "480x640"], "--image-size 480x640: must be H,W"),
    (["--json", "."], "--json"),
])  # fmt: skip
def test_benchmark_options_are_checked_first(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("benchmark", "nowhere", *arguments)
    assert (code, out) == (2, "")
    assert is_one_line_error(err)
    assert message in err


def test_two_outputs_to_one_file_are_rejected(run, data, trained, tmp_path):
    path = str(tmp_path / "r.html")
    image = next(data.rglob("*.jpg"), None) or next(data.rglob("*.png"))
    commands = [
        ["evaluate", trained, data, "--report", path, "--json", path],
        ["explain", trained, image, "--out", path, "--json", path],
    ]
    for command in commands:
        code, _, err = run(*command)
        assert code == 2
        assert "writes the same file; choose another path" in err
        assert not list(tmp_path.iterdir())


def test_second_model_is_checked_before_the_first_is_evaluated(run, data, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("deformable_detr.evaluation.evaluator.detect_images", lambda *_: pytest.fail("evaluated"))
    code, out, err = run("evaluate", trained, data, "--compare", tmp_path / "nothing", "--workers", 0)
    assert (code, out) == (2, "")
    assert "nothing: no such folder or file" in err


def test_invalid_option_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "deformable_detr", "train", str(tmp_path), "--nope", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert is_one_line_error(done.stderr)
    assert "--nope" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_standard_output_ends_quietly(data, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "deformable_detr", "check", str(data)], stdout=writer, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("inherited", [False, True])
def test_sigterm_runs_cleanup(tmp_path, inherited):
    """A forked child just ends."""
    code = f"""
import os, pathlib, signal, sys, time
from deformable_detr import cli
def work(*_, **__):
    partial_file = pathlib.Path({str(tmp_path)!r}, "partial_file")
    try:
        partial_file.touch()
        reader, writer = os.pipe()
        if {inherited} and (child := os.fork()):
            os.read(reader, 1)  # a signal during the fork would be lost
            os.kill(child, signal.SIGTERM)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        {"os.write(writer, b'1')" if inherited else "os.kill(os.getpid(), signal.SIGTERM)"}
        time.sleep(60)
    finally:
        partial_file.unlink()
        print("cleaned up")
sys.modules["deformable_detr.cli.app"].app = work
cli.main(["export"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")
    assert not (tmp_path / "partial_file").exists()


def test_ctrl_c_exits_with_code_130(run, monkeypatch):
    def interrupted(out):
        raise KeyboardInterrupt

    monkeypatch.setattr("deformable_detr.demo.run", interrupted)
    assert run("demo") == (130, "", "")


@pytest.mark.parametrize("error", [ZeroDivisionError, BrokenPipeError])
def test_internal_errors_keep_their_traceback(run, monkeypatch, error):
    def broken(out):
        raise error  # such as a broken pipe other than standard output

    monkeypatch.setattr("deformable_detr.demo.run", broken)
    with pytest.raises(error):
        run("demo")


# --- help, version, config ------------------------------------------------------------------------------------------


def test_help_lists_commands_and_options(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("train", "evaluate", "predict", "demo"))
    code, out, _ = run("train", "--help")
    assert code == 0
    options = "out preset epochs minutes image-size batch-size backbone backbone-weights config set resume print-config"
    for option in options.split():
        assert f"--{option}" in out


def test_models(run, tmp_path):
    code, out, _ = run("models", "--family", "d-fine", "--json", tmp_path / "models.json")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 14
    assert lines[2].split()[:4] == ["dfine-s", "D-FINE", "640×640", "48.5"]
    assert {line.index(word) for line, word in ((lines[0], "family"), (lines[1], "D-FINE"), (lines[13], "D-FINE"))} == {
        18
    }
    saved = json.loads((tmp_path / "models.json").read_text())
    assert [row["name"] for row in saved] == [line.split()[0] for line in lines[1:]]
    assert len(run("models")[1].splitlines()) > 40
    code, _, err = run("models", "--family", "YOLO")
    assert code == 2
    assert "choose from Deformable DETR, DINO, RT-DETR" in err


def test_version(run):
    from deformable_detr import __version__

    assert run("--version") == (0, f"{__version__}\n", "")


def test_preset_option_selects_each_preset(run):
    for name in presets.PRESETS:
        code, out, _ = run("train", "--print-config", "--preset", name)
        assert code == 0
        assert Config.from_dict(yaml.safe_load(out)) == presets.config(name)


def test_options_reach_the_config(run):
    options = "--epochs 3 --minutes 2.5 --image-size 320 --batch-size 7 --backbone resnet18 --backbone-weights none"
    options += " --lr 1e-3 --precision bf16 --device cpu --workers 0 --seed 5"
    _, out, _ = run("train", "--print-config", *options.split())
    config = Config.from_dict(yaml.safe_load(out))
    model = {"image_size": 320, "backbone": "resnet18", "backbone_weights": "none"}
    train = {"epochs": 3, "minutes": 2.5, "batch_size": 7, "lr": 1e-3, "precision": "bf16", "device": "cpu", "seed": 5}
    assert config == presets.config("small").updated({"model": model, "train": train, "data": {"workers": 0}})


def test_printed_config_can_be_reused_and_overridden(run, tmp_path):
    _, out, _ = run("train", "--print-config", "--preset", "refine", "--set", "train.lr=1", "--set", "train.seed=1")
    (tmp_path / "mine.yaml").write_text(out)
    _, reprinted, _ = run("train", "--print-config", "--config", tmp_path / "mine.yaml")
    assert reprinted == out
    options = ["--set", "train.lr=2", "--set", "train.seed=2", "--seed", "3"]
    _, changed, _ = run("train", "--print-config", "--config", tmp_path / "mine.yaml", *options)
    config = Config.from_dict(yaml.safe_load(changed))
    assert (config.preset, config.train.lr, config.train.seed) == ("refine", 2, 3)


# --- commands -------------------------------------------------------------------------------------------------------


def test_trained_run_can_be_loaded_and_resumed(run, data, trained, tmp_path):
    config = Config.from_dict(yaml.safe_load((trained / "config.yaml").read_text()))
    assert (config.model.image_size, config.model.hidden_dim, config.model.num_classes) == (64, 64, 10)
    assert DeformableDETR.from_pretrained(trained).config.class_names == tuple("0123456789")
    code, _, err = run("train", data, "--out", trained)
    assert code == 2
    assert "--resume" in err
    code, out, _ = run("train", data, "--out", trained, "--resume", "--epochs", 2)
    assert code == 0
    assert re.search(rf"at the end; the model with the best AP, [\d.]+, is in {re.escape(str(trained))}\n", out)
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4


def test_resumed_run_keeps_its_preset(run, data, trained):
    before = (trained / "config.yaml").read_text()
    code, _, err = run("train", data, "--out", trained, "--resume", "--preset", "refine")
    assert code == 2
    assert "--preset refine: the run in" in err
    assert "uses small; leave --preset out to resume it" in err
    assert run("train", data, "--out", trained, "--resume", "--preset", "small")[0] == 0  # same as at the start
    assert (trained / "config.yaml").read_text() == before


def test_evaluate_prints_a_table_and_writes_json(run, data, trained, tmp_path):
    file = tmp_path / "new" / "metrics.json"
    code, out, _ = run("evaluate", trained, data, "--json", file, "--workers", 0, "--device", "cpu")
    assert code == 0
    metrics = json.loads(file.read_text())
    assert {"AP", "AP50", "AR100"} <= metrics.keys()
    assert list(metrics["per_class"]) == list("0123456789")
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert float(lines["AP50"]) == pytest.approx(metrics["AP50"], abs=5e-4)
    assert "AP of 7" in lines


def test_evaluate_uses_files_set_by_options(run, data, trained, tmp_path):
    import shutil

    shutil.copytree(next(data.glob("val*")), tmp_path / "set" / "photos")
    (tmp_path / "set" / "photos" / "_annotations.coco.json").rename(tmp_path / "set" / "labels.json")
    paths = ["--set", "data.val_images=photos", "--set", "data.val_annotations=labels.json"]
    common = ["--workers", 0, "--device", "cpu"]
    _, expected, _ = run("evaluate", trained, data, *common)
    code, out, _ = run("evaluate", trained, tmp_path / "set", *paths, *common)
    metrics = [[line for line in text.splitlines() if line.startswith("A")] for text in (out, expected)]
    assert (code, metrics[0]) == (0, metrics[1])
    code, _, error = run("evaluate", trained, tmp_path / "set", "--set", "model.image_size=64", *common)
    assert code == 2
    assert "--set model.image_size=64" in error


def test_malformed_exif_gives_no_warning(trained, tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    command = [sys.executable, "-m", "deformable_detr", "predict", str(trained), str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_results_are_saved_if_images_cannot_be_written(run, data, trained, tmp_path, monkeypatch):
    def disk_full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr("deformable_detr.structures.Detections.save", disk_full)
    monkeypatch.setattr("deformable_detr.evaluation.report.write_report", disk_full)
    file, image = tmp_path / "detections.json", data / "train" / "00001.jpg"
    code, _, err = run("predict", trained, image, "--out", tmp_path / "pictures", "--json", file, "--device", "cpu")
    assert (code, err) == (2, "error: the disk is full\n")
    assert [record["image"] for record in json.loads(file.read_text())] == [str(image)]
    code, _, err = run("evaluate", trained, data, "--report", tmp_path / "a.html", "--json", file, "--device", "cpu")
    assert (code, err) == (2, "error: the disk is full\n")
    assert "AP" in json.loads(file.read_text())


def test_predict_continues_after_invalid_images(run, data, trained, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (80, 60)).save(folder / "a.png")
    Image.new("L", (60, 80)).save(folder / "c.jpg")
    jpeg = (data / "train" / "00001.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "notes.txt").touch()
    other = tmp_path / "a.png"
    Image.new("RGB", (50, 50)).save(other)

    out, file = tmp_path / "pictures", tmp_path / "detections.json"
    arguments = [trained, folder, other, "--out", out, "--json", file, "--threshold", 0, "--device", "cpu"]
    code, stdout, err = run("predict", *arguments)
    assert code == 2
    assert is_one_line_error(err)
    assert "b.jpg" in err
    assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a.png", "c.jpg"]
    records = json.loads(file.read_text())
    assert [record["image"] for record in records] == [str(folder / "a.png"), str(folder / "c.jpg"), str(other)]
    assert len(stdout.splitlines()) == 3
    assert max(len(line) for line in stdout.splitlines()) < len(str(folder)) + 80
    boxes = [detection["box"] for detection in records[0]["detections"]]
    assert boxes
    assert all(0 <= x1 <= x2 <= 80 and 0 <= y1 <= y2 <= 60 for x1, y1, x2, y2 in boxes)

    (folder / "b.jpg").unlink()
    assert run("predict", *arguments)[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("command", ["train", "predict", "check"])
def test_early_ctrl_c_has_no_traceback(data, trained, tmp_path, command):
    arguments = {
        "train": ["train", data, "--out", tmp_path / "run", *TINY],
        "predict": ["predict", trained, data / "valid"],
        "check": ["check", data],
    }[command]
    words = [sys.executable, "-m", "deformable_detr", *map(str, arguments)]
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    python_start = 2 * (time.monotonic() - start)  # before it, Python itself would print a traceback
    for delay in (0.1, 0.25, 0.5, 1.0, 1.5, 2.0):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(python_start + delay)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors, (delay, errors)
        finished = process.returncode in (0, -signal.SIGINT) and command != "train" and out  # also as Python ends
        assert process.returncode == 130 or finished, (delay, process.returncode, errors)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("option", [["--set", "train.lrr=1"], ["--nope", "3"], ["--device", "cuda:0"]])
def test_torchrun_prints_an_error_of_all_processes_once(run, data, tmp_path, monkeypatch, option):
    for rank in range(2):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        code, _, errors = run("train", data, "--out", tmp_path / "run", *TINY, *option)
        assert code == 2
        assert is_one_line_error(errors) if rank == 0 else errors == ""
