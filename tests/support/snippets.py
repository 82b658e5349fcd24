"""The shell and Python snippets of README and docs: find them, check their commands, run them.

`<!-- not run: REASON -->` above a snippet keeps it from running. Its commands are checked all the same.
"""

import contextlib
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.run import get_args_parser

from deformable_detr.cli import app, main
from deformable_detr.config.detector import AdapterConfig
from deformable_detr.config.schema import DataConfig, ModelConfig, TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = {"model": (ModelConfig, AdapterConfig), "data": (DataConfig,), "train": (TrainConfig,)}
_FENCE = re.compile(r"^```(\w*)(.*)$")
_REASON = re.compile(r"^<!-- not run: (\S.*) -->$")
_OPERATORS = {"|", "||", "&", "&&", ";", ">", ">>"}


class Snippet(NamedTuple):
    """A code block. `reason` says why it is not run; None: it is."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def read_snippets(page: Path) -> list[Snippet]:
    """Return the shell and Python code of a page: fenced, or indented as in the README."""
    name, lines = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").splitlines()
    snippets, reason, number = [], None, 0
    while number < len(lines):
        line, start = lines[number], number + 1
        fence = _FENCE.match(line)
        if fence:
            number = end = lines.index("```", start)
            language, text, quoted = fence[1], "\n".join(lines[start:end]), "title=" in fence[2]
            if language in ("bash", "python") and not quoted:  # code with a title is quoted from the package
                snippets.append(Snippet(name, start, language, text, reason))
        elif line.startswith("    ") and not lines[number - 1].strip() and not _in_list(lines[:number]):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            text = "\n".join(code[4:] for code in lines[start - 1 : number + 1])
            snippets.append(Snippet(name, start, "bash", text, reason))
        if line.strip():
            matched = _REASON.match(line)
            reason = matched[1] if matched else None
        number += 1
    return snippets


def _in_list(lines: list[str]) -> bool:
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.startswith(("- ", "  ", "1. "))


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a shell script: without comments, assignments and redirections."""
    result: list[list[str]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in _OPERATORS:
                result.append(words)
                words = []
            elif words or not re.match(r"^\w+=", word):
                words.append(word)
        result.append(words)
    return [words for words in result if words]


def check_commands(text: str) -> None:
    """Check the programs of this repository: commands and options, extras, scripts and make targets."""
    text = text.replace("$resume", "--resume").replace("$SLURM_NNODES", "4").replace("$first", "node0")
    for words in commands(text):
        program, *rest = words[1:] if words[0] == "srun" else words
        if program == "deformable-detr":
            parse_command(rest)
        elif program == "torchrun":
            launcher = get_args_parser().parse_args(rest)
            assert (launcher.module, launcher.training_script) == (True, "deformable_detr")
            parse_command(launcher.training_script_args)
        elif program == "pip" and rest[0] == "install":
            _check_extras(" ".join(rest))
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in rest if "=" not in word} <= set(targets), rest
        elif program == "python" and rest[:2] == ["-m", "deformable_detr"]:
            parse_command(rest[2:])
        elif program == "python":
            _check_script(rest)


def parse_command(words: list[str]) -> Any:
    """Parse a command of deformable-detr as it does itself, and its --set; return the command and its options."""
    command, bound, _ = app.parse_args(
        [word for word in words if word != "--verbose"], exit_on_error=False, print_error=False
    )
    for override in bound.arguments.get("set_") or ():
        section, name = override.partition("=")[0].split(".")[:2]
        assert any(name in group.model_fields for group in SECTIONS[section]), f"--set {override}: no such key"
    return command, bound.arguments


def _check_extras(words: str) -> None:
    extras = re.findall(r"(?:\.|deformable-detr)\[([\w,-]+)\]", words)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(",".join(extras).split(",")) - {""} <= set(project["optional-dependencies"]), words


def _check_script(words: list[str]) -> None:
    """Check that a script or module of this repository exists and names the options."""
    if words[:1] == ["-m"]:
        file = ROOT / f"{words[1].replace('.', '/')}.py"
        if not words[1].startswith("tests."):
            return
    else:
        file = ROOT / words[0]
        if file.suffix != ".py":
            return
    source = file.read_text() + (ROOT / "benchmarks/common.py").read_text()
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{file.name} has no option {option}"


class Runner:
    """Runs the snippets of a page in this process and the current folder. Servers run beside it until `close`."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.port = free_port()  # instead of 8000

    def run(self, snippet: Snippet) -> None:
        if snippet.language == "python":
            exec(compile(snippet.text, snippet.name, "exec"), self.namespace)
            return
        for line in re.sub(r"\\\n\s*", "", snippet.text).splitlines():
            command, _, file = line.partition(" > ")
            for words in commands(command):
                with contextlib.ExitStack() as stack:
                    if file:
                        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(file.strip(), "w"))))
                    self._command([word.replace(":8000", f":{self.port}") for word in words], snippet.name)

    def _command(self, words: list[str], name: str) -> None:
        if words[:3] == ["python", "-m", "deformable_detr"]:
            words = ["deformable-detr", *words[3:]]
        if words[:2] == ["deformable-detr", "serve"]:
            self._serve(words[1:])
        elif words[0] == "deformable-detr":
            code: Any = 0
            try:
                main(words[1:])
            except SystemExit as stop:
                code = stop.code
            assert not code, f"{name}: {shlex.join(words)}: exit code {code}"
        elif words[:2] == ["python", "-c"]:
            exec(words[2], {})
        elif words[0] == "curl":
            done = subprocess.run([*words, "--fail", "--silent"], check=False)
            assert done.returncode == 0, f"{name}: {shlex.join(words)}"
        else:
            assert words[0] == "pip", f"{name}: {words[0]} is not run; mark the snippet"  # its extras are checked

    def _serve(self, words: list[str]) -> None:
        port = self.port if "--port" not in words else free_port()
        words = [str(port) if previous == "--port" else word for previous, word in pairwise(["", *words])]
        words += [] if "--port" in words else ["--port", str(port)]
        self.servers.append(subprocess.Popen([sys.executable, "-m", "deformable_detr", *words]))
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz"):
                return
            assert self.servers[-1].poll() is None, f"{shlex.join(words)} ended"
            time.sleep(0.2)
        raise AssertionError(f"{shlex.join(words)} is not ready after two minutes")

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
