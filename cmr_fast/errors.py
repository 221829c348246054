"""The one exception that every public function raises for bad input."""


class InputError(ValueError):
    """What was wrong, what was expected, and the shape or value that was seen.

    The command line prints it as one line; anything else that escapes is a bug and keeps its traceback.
    """
