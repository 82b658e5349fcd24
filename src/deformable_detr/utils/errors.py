"""The exception for mistakes that a user can fix."""


class UserError(Exception):
    """A mistake in the user's input.

    The message is one line: the file, record or option, what is wrong, and how to fix it. The command line prints it
    without a traceback and exits with code 2.

    Attributes:
        one_process: Set if only this process of several has the error, so that it must print it itself.
    """

    one_process = False


def first_line(error: object, limit: int = 200) -> str:
    """Return the first line of an error's message, cut to `limit` characters; its type if it has no message.

    If it ends with a colon, the second line follows it.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])[:limit]
