"""Progress bars: on a terminal, in a notebook, and as lines elsewhere."""

import io
import sys
import types
from contextlib import redirect_stderr, redirect_stdout

from deformable_detr.utils import progress
from deformable_detr.utils.progress import progress_bar, stage_bar, write_line
from deformable_detr.utils.terminal import echo


class Terminal(io.StringIO):
    """Both output streams of a terminal; `rows` are the lines that it shows."""

    def isatty(self):
        return True

    @property
    def rows(self):
        shown = []
        for line in self.getvalue().split("\n"):
            row = ""
            for part in line.split("\r"):  # the cursor returns to the start and overwrites
                row = part + row[len(part) :]
            shown.append(row.rstrip())
        return shown


def on_terminal(work):
    """Return the terminal after some work."""
    terminal = Terminal()
    with redirect_stdout(terminal), redirect_stderr(terminal):
        work(terminal)
    return terminal


def run_bar(say=echo, keep=True):
    with progress_bar(3, "images", "work", keep=keep) as bar:
        for number in range(3):
            bar.update()
            bar.refresh()
            say(f"line {number}")


def test_bar_on_a_terminal():
    rows = on_terminal(lambda _: run_bar()).rows
    assert rows[:3] == ["line 0", "line 1", "line 2"]
    assert rows[3].startswith("work: 100%")
    assert "3/3" in rows[3]


def test_unaware_lines_would_be_mixed_with_the_bar():
    """The control of the test above."""
    assert "line 0" not in on_terminal(lambda _: run_bar(say=print)).rows


def test_bars_that_are_not_kept_leave_no_trace():
    rows = on_terminal(lambda _: run_bar(keep=False)).rows
    assert [row for row in rows if row] == ["line 0", "line 1", "line 2"]


def test_stages_on_a_terminal():
    shown = []

    def work(terminal):
        with stage_bar("export", 2) as bar:
            for name in ("trace", "verify a\x1b[2Jb"):
                bar.stage(name)
                shown.append(terminal.rows[-1])
        with stage_bar("export", None) as bar:
            bar.stage("trace")
            shown.append(terminal.rows[-1])

    terminal = on_terminal(work)
    assert shown == ["export, step 1 of 2, trace", "export, step 2 of 2, verify a\\x1b[2Jb", "export, step 1, trace"]
    assert not any(terminal.rows)


def test_hidden_bars():
    def work(terminal):
        with progress_bar(3, "images", "work", show=False) as bar:
            bar.update()
        with stage_bar("export", 2, show=False) as bar:
            bar.stage("trace")

    assert on_terminal(work).getvalue() == ""


def test_lines_without_a_terminal(monkeypatch, capsys):
    run_bar()
    assert capsys.readouterr().err == ""  # done in less than `FIRST_LINE` seconds
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    run_bar()
    captured = capsys.readouterr()
    assert captured.out == "line 0\nline 1\nline 2\n"
    assert captured.err.splitlines()[-1].startswith("work: 3 of 3 images, 00:00 elapsed")
    assert not set(captured.err) & set("\r\x1b█")
    with stage_bar("export", 2) as bar:
        bar.stage("trace")
    assert capsys.readouterr().err.splitlines()[-1] == "export, step 1 of 2, trace"


def test_lines_become_rare(monkeypatch, capsys):
    clock = types.SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(progress, "time", clock)
    now, times = 0.0, []
    with progress_bar(None, "images", "work") as bar:
        for now in range(1, 3600):
            bar.refresh()
            times += [now] * bool(capsys.readouterr().err)
    assert times == [10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030]


class Kernel:
    """Stands for the module IPython in the kernel of a notebook; `outputs` is what each output area shows."""

    def __init__(self):
        self.outputs = []
        self.get_ipython = lambda: types.SimpleNamespace(config={"IPKernelApp": {}})
        self.display = types.SimpleNamespace(display=self.show)

    def show(self, content, raw, display_id):
        assert raw
        assert display_id
        self.outputs.append(content)
        index = len(self.outputs) - 1
        return types.SimpleNamespace(update=lambda new, raw: self.outputs.__setitem__(index, new))


def test_bar_in_a_notebook(monkeypatch, capsys):
    kernel = Kernel()
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", kernel.display)
    run_bar(keep=False)
    write_line("epoch 1")
    assert len(kernel.outputs) == 1
    (text,) = kernel.outputs[0].values()
    assert text.startswith("work: 100%")
    assert "█| 3/3" in text
    assert len(text) <= progress.NOTEBOOK_WIDTH
    captured = capsys.readouterr()
    assert captured.out == "line 0\nline 1\nline 2\nepoch 1\n"
    assert captured.err == ""  # which a notebook shows in red


def test_write_line_outside_of_notebooks(capsys):
    write_line("epoch \x1b 1")
    assert capsys.readouterr() == ("", "epoch \\x1b 1\n")
