"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake in the user's input: its message is one line that names the file, record or option, and the mend.

    The command line prints it without a traceback and exits with code 2.
    """
