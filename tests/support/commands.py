"""Run the command line in the test process."""

from deformable_detr.cli import main


def run_command(capsys, *arguments):
    """Return exit code, standard output and standard error of a command."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def is_one_line_error(text):
    """Return whether standard error is a single error line, not a box."""
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n") and "╭" not in text
