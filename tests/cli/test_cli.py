"""The command line: what it takes, what it writes, and one line for every mistake."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from deformable_detr import Config, DeformableDETR
from deformable_detr.cli import main
from deformable_detr.config import presets
from deformable_detr.demo import make_data
from deformable_detr.utils.errors import UserError

TINY = ["--backbone", "test_resnet", "--backbone-weights", "none", "--image-size", "64", "--workers", "0"]
TINY += ["--set", "model.hidden_dim=64", "--set", "model.ffn_dim=32", "--set", "model.num_queries=5"]


@pytest.fixture
def run(capsys):
    """Runs a command; gives its exit code and what it wrote to standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        written = capsys.readouterr()
        return code, written.out, written.err

    return call


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "data"
    make_data(folder, train_images=4, val_images=2)
    return folder


@pytest.fixture(scope="module")
def trained(data):
    """A run folder of two steps, made by the command line."""
    out = data.parent / "run"
    main(["train", str(data), "--out", str(out), "--epochs", "1", "--batch-size", "2", "--device", "cpu", *TINY])
    return out


def is_one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n") and "╭" not in text


# --- mistakes -------------------------------------------------------------------------------------------------------


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
def test_a_mistake_is_one_line_and_code_2(run, data, trained, tmp_path, arguments, words):
    (tmp_path / "FILE").touch()
    (tmp_path / "EMPTY").mkdir()
    places = {"DATA": data, "RUN": trained, "IMAGE": data / "valid" / "00001.jpg"}
    places |= {name: tmp_path / name for name in ("FILE", "EMPTY", "MISSING", "OUT")}

    def placed(argument):
        first, slash, rest = argument.partition("/")
        return f"{places[first]}{slash}{rest}" if first in places else argument

    before = {path: path.stat().st_mtime_ns for path in data.rglob("*.*")}
    arguments = [placed(argument) for argument in arguments.split()]
    code, out, err = run(*arguments, *(TINY if arguments[0] == "train" else []))
    assert code == 2
    assert out == ""
    assert is_one_line(err), err
    for word in words:
        assert (placed(word) if word.split("/")[0] in places else word) in err
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*.*")} == before  # nothing was lost


@pytest.mark.parametrize(("arguments", "place"), [
    ([""], "at the start"),
    (["predict", ""], "after predict"),
    (["predict", "RUN", "--out", ""], "after --out"),
    (["predict", "RUN", "--out="], "after --out"),
])  # fmt: skip
def test_an_empty_argument_is_not_the_current_folder(run, trained, arguments, place):
    arguments = [str(trained) if argument == "RUN" else argument for argument in arguments]
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err == f'error: empty argument ("") {place}: check that the shell variable is set\n'


@pytest.mark.parametrize(("arguments", "message"), [
    (["--repeats", 0], "--repeats. Must be >= 1"),
    (["--threads", -1], "--threads. Must be >= 1"),
    (["--image-size", "480x640"], "--image-size 480x640: must be H,W"),
    (["--json", "."], "--json"),
])  # fmt: skip
def test_a_benchmark_refuses_at_once(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("benchmark", "nowhere", *arguments)
    assert (code, out) == (2, "")
    assert is_one_line(err)
    assert message in err


def test_two_outputs_are_not_one_file(run, data, trained, tmp_path):
    both = str(tmp_path / "r.html")
    image = next(data.rglob("*.jpg"), None) or next(data.rglob("*.png"))
    commands = [
        ["evaluate", trained, data, "--report", both, "--json", both],
        ["explain", trained, image, "--out", both, "--json", both],
    ]
    for command in commands:
        code, _, err = run(*command)
        assert code == 2
        assert "writes the same file; choose another path" in err
        assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_the_second_model_is_said_before_the_first_is_evaluated(
    run, data, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("deformable_detr.evaluation.evaluator.detect_images", lambda *_: pytest.fail("evaluated"))
    code, out, err = run("evaluate", trained, data, "--compare", tmp_path / "nothing", "--workers", 0)
    assert (code, out) == (2, "")
    assert "nothing: no such folder or file" in err


def test_a_bad_option_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "deformable_detr", "train", str(tmp_path), "--nope", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert is_one_line(done.stderr)
    assert "--nope" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_quietly(data, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "deformable_detr", "check", str(data)], stdout=writer, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("inherited", [False, True])
def test_sigterm_lets_the_program_tidy_up(tmp_path, inherited):
    """As an error would; a process forked from it just ends."""
    code = f"""
import os, pathlib, signal, sys, time
from deformable_detr import cli
def work(*_, **__):
    half = pathlib.Path({str(tmp_path)!r}, "half")
    try:
        half.touch()
        reader, writer = os.pipe()
        if {inherited} and (child := os.fork()):
            os.read(reader, 1)  # a signal in the middle of a fork is lost
            os.kill(child, signal.SIGTERM)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        {"os.write(writer, b'1')" if inherited else "os.kill(os.getpid(), signal.SIGTERM)"}
        time.sleep(60)
    finally:
        half.unlink()
        print("tidied")
sys.modules["deformable_detr.cli.app"].app = work
cli.main(["export"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "tidied\n", "")
    assert not (tmp_path / "half").exists()


def test_ctrl_c_is_code_130(run, monkeypatch):
    def interrupted(out):
        raise KeyboardInterrupt

    monkeypatch.setattr("deformable_detr.demo.run", interrupted)
    assert run("demo") == (130, "", "")


@pytest.mark.parametrize("mistake", [ZeroDivisionError, BrokenPipeError])
def test_our_own_mistakes_keep_their_traceback(run, monkeypatch, mistake):
    def broken(out):
        raise mistake  # a broken pipe that is not standard output's, for one

    monkeypatch.setattr("deformable_detr.demo.run", broken)
    with pytest.raises(mistake):
        run("demo")


# --- help, version, config ------------------------------------------------------------------------------------------


def test_help_lists_the_verbs_and_their_options(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(verb in out for verb in ("train", "evaluate", "predict", "demo"))
    code, out, _ = run("train", "--help")
    assert code == 0
    options = "out preset epochs minutes image-size batch-size backbone backbone-weights config set resume print-config"
    for option in options.split():
        assert f"--{option}" in out


def test_version(run):
    from deformable_detr import __version__

    assert run("--version") == (0, f"{__version__}\n", "")


def test_every_preset_of_the_command_line_is_one(run):
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


def test_print_config_there_and_back_with_the_later_winning(run, tmp_path):
    _, out, _ = run("train", "--print-config", "--preset", "refine", "--set", "train.lr=1", "--set", "train.seed=1")
    (tmp_path / "mine.yaml").write_text(out)
    _, again, _ = run("train", "--print-config", "--config", tmp_path / "mine.yaml")
    assert again == out
    options = ["--set", "train.lr=2", "--set", "train.seed=2", "--seed", "3"]
    _, changed, _ = run("train", "--print-config", "--config", tmp_path / "mine.yaml", *options)
    config = Config.from_dict(yaml.safe_load(changed))
    assert (config.preset, config.train.lr, config.train.seed) == ("refine", 2, 3)


# --- the verbs ------------------------------------------------------------------------------------------------------


def test_train_leaves_a_run_that_can_be_loaded_and_resumed(run, data, trained, tmp_path):
    config = Config.from_dict(yaml.safe_load((trained / "config.yaml").read_text()))
    assert (config.model.image_size, config.model.hidden_dim, config.model.num_classes) == (64, 64, 10)
    assert DeformableDETR.from_pretrained(trained).config.class_names == tuple("0123456789")
    code, _, err = run("train", data, "--out", trained)
    assert code == 2
    assert "--resume" in err
    code, out, _ = run("train", data, "--out", trained, "--resume", "--epochs", 2)
    assert code == 0
    assert f"the model is in {trained}" in out
    steps = [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4


def test_a_run_keeps_its_preset(run, data, trained):
    before = (trained / "config.yaml").read_text()
    code, _, err = run("train", data, "--out", trained, "--resume", "--preset", "refine")
    assert code == 2
    assert "--preset refine: the run in" in err
    assert "uses small; leave --preset out to resume it" in err
    assert run("train", data, "--out", trained, "--resume", "--preset", "small")[0] == 0  # as the command was
    assert (trained / "config.yaml").read_text() == before


def test_evaluate_prints_a_table_and_writes_json(run, data, trained, tmp_path):
    file = tmp_path / "new" / "figures.json"
    code, out, _ = run("evaluate", trained, data, "--json", file, "--workers", 0, "--device", "cpu")
    assert code == 0
    figures = json.loads(file.read_text())
    assert {"AP", "AP50", "AR100"} <= figures.keys()
    assert list(figures["per_class"]) == list("0123456789")
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert float(lines["AP50"]) == pytest.approx(figures["AP50"], abs=5e-4)
    assert "AP of 7" in lines


def test_evaluate_finds_files_that_only_options_name(run, data, trained, tmp_path):
    import shutil

    shutil.copytree(next(data.glob("val*")), tmp_path / "set" / "photos")
    (tmp_path / "set" / "photos" / "_annotations.coco.json").rename(tmp_path / "set" / "labels.json")
    places = ["--set", "data.val_images=photos", "--set", "data.val_annotations=labels.json"]
    common = ["--workers", 0, "--device", "cpu"]
    _, expected, _ = run("evaluate", trained, data, *common)
    code, out, _ = run("evaluate", trained, tmp_path / "set", *places, *common)
    figures = [[line for line in text.splitlines() if line.startswith("A")] for text in (out, expected)]
    assert (code, figures[0]) == (0, figures[1])
    code, _, error = run("evaluate", trained, tmp_path / "set", "--set", "model.image_size=64", *common)
    assert code == 2
    assert "--set model.image_size=64" in error


def test_broken_exif_is_no_news(trained, tmp_path):
    Image.new("RGB", (80, 60)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    command = [sys.executable, "-m", "deformable_detr", "predict", str(trained), str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_what_is_found_is_kept_where_no_picture_can_be_written(run, data, trained, tmp_path, monkeypatch):
    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr("deformable_detr.structures.Detections.save", full)
    monkeypatch.setattr("deformable_detr.evaluation.report.write_report", full)
    file, image = tmp_path / "found.json", data / "train" / "00001.jpg"
    code, _, err = run("predict", trained, image, "--out", tmp_path / "pictures", "--json", file, "--device", "cpu")
    assert (code, err) == (2, "error: the disk is full\n")
    assert [record["image"] for record in json.loads(file.read_text())] == [str(image)]
    code, _, err = run("evaluate", trained, data, "--report", tmp_path / "a.html", "--json", file, "--device", "cpu")
    assert (code, err) == (2, "error: the disk is full\n")
    assert "AP" in json.loads(file.read_text())


def test_predict_draws_and_writes_and_goes_on_after_bad_images(run, data, trained, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (80, 60)).save(folder / "a.png")
    Image.new("L", (60, 80)).save(folder / "c.jpg")
    whole = (data / "train" / "00001.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").touch()
    other = tmp_path / "a.png"
    Image.new("RGB", (50, 50)).save(other)

    out, file = tmp_path / "pictures", tmp_path / "found.json"
    arguments = [trained, folder, other, "--out", out, "--json", file, "--threshold", 0, "--device", "cpu"]
    code, printed, err = run("predict", *arguments)
    assert code == 2
    assert is_one_line(err)
    assert "b.jpg" in err
    assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a.png", "c.jpg"]
    records = json.loads(file.read_text())
    assert [record["image"] for record in records] == [str(folder / "a.png"), str(folder / "c.jpg"), str(other)]
    assert len(printed.splitlines()) == 3
    assert max(len(line) for line in printed.splitlines()) < len(str(folder)) + 80
    boxes = [found["box"] for found in records[0]["detections"]]
    assert boxes
    assert all(0 <= x1 <= x2 <= 80 and 0 <= y1 <= y2 <= 60 for x1, y1, x2, y2 in boxes)

    (folder / "b.jpg").unlink()
    assert run("predict", *arguments)[0] == 0
