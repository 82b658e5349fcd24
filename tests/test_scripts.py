"""The README's Python lines as a plain script, and training in threads and child processes."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training import write_dataset

OPTIONS = """preset="small", epochs=1, image_size=64, backbone="test_resnet", backbone_weights="none",
    num_feature_levels=2, hidden_dim=32, num_heads=4, encoder_layers=1, decoder_layers=1, ffn_dim=32, num_queries=12,
    workers=1, device="cpu", batch_size=4"""
README = (Path(__file__).parents[1] / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("scripts") / "DATA", train=4, val=2)


def run_script(data, tmp_path, text):
    """Run a script in a new folder; return its exit code and its whole output."""
    (tmp_path / "script.py").write_text(text.replace('"DATA', f'"{data}'))
    command = [sys.executable, "-W", "ignore", "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    return result.returncode, result.stdout + result.stderr


def short_readme():
    """The first lines of the README's Python section, with a model that trains in seconds."""
    lines = README.partition("\n\nmodel = ")[0]
    assert 'preset="small", minutes=10' in lines
    lines = lines.replace('preset="small", minutes=10', OPTIONS)
    return lines.replace('"table.jpg"', '"DATA/valid/0.png"') + "\n"


SLOW = {"spawn", "forkserver"}  # each worker imports PyTorch


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in multiprocessing.get_all_start_methods()]
)
def test_readme_without_a_guard(data, tmp_path, method):
    text = f"import multiprocessing\nmultiprocessing.set_start_method({method!r})\nprint('started')\n{short_readme()}"
    code, output = run_script(data, tmp_path, text + "print('finished')\n")
    assert code == 0, output
    assert "Traceback" not in output
    assert output.count("started") == output.count("finished") == 1
    assert "without worker processes" not in output
    assert (tmp_path / "table.png").exists()


@pytest.mark.slow
def test_datasets_of_the_script_are_found(data, tmp_path):
    """A dataset class of the script itself needs the import of the script, behind a guard."""
    text = """
import multiprocessing
from deformable_detr.data.dataloader import LoaderOptions, build_dataloader
from deformable_detr.data.dataset import open_dataset

class Mine:
    def __init__(self): self.data = open_dataset("DATA")
    def __len__(self): return len(self.data)
    def __getitem__(self, index): return self.data[index]

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    print(sum(len(targets) for _, targets in build_dataloader(Mine(), LoaderOptions(2, 1))), "images")
"""
    code, output = run_script(data, tmp_path, text)
    assert (code, output) == (0, "4 images\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("threading.Thread(target=work)", "this thread is not the main one"),
        ("multiprocessing.get_context('spawn').Process(target=work, daemon=True)", "a daemonic process cannot start"),
    ],
    ids=["thread", "daemon"],
)
def test_threads_and_daemonic_processes(data, tmp_path, start, reason):
    text = f"""
import multiprocessing, threading
from deformable_detr import train

def work():
    train("DATA", "runs/cards", {OPTIONS})
    print("finished")

if __name__ == "__main__":
    task = {start}
    task.start()
    task.join()
"""
    code, output = run_script(data, tmp_path, text)
    assert code == 0, output
    assert "Traceback" not in output
    assert "finished" in output
    assert output.count("images are loaded without worker processes") == output.count(reason) == 1


@pytest.mark.slow
def test_script_that_a_child_process_runs_again(data, tmp_path):
    """The script itself starts a process without a guard: what the child runs again needs no processes of its own."""
    text = f"""
import multiprocessing
from deformable_detr import train

multiprocessing.set_start_method("spawn", force=True)
name = multiprocessing.current_process().name
train("DATA", "runs/" + name, {OPTIONS})
if name == "MainProcess":
    task = multiprocessing.Process(target=print, args=("in the child",))
    task.start()
    task.join()
"""
    code, output = run_script(data, tmp_path, text)
    assert code == 0, output
    assert "Traceback" not in output
    assert output.count('put its calls under `if __name__ == "__main__":`') == 1
    assert "in the child" in output
