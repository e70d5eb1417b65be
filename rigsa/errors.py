"""The one error that the command line shows as a message."""


class RigsaError(Exception):
    """Something the user can mend. The message says what was given, what was expected and what to do."""
