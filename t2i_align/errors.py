"""The base of every error that is the user's to mend: one sentence with what was expected, received, and what to do."""


class T2IError(ValueError):
    """Bad input; the command line prints the message and exits with 2."""
