"""The exception that every public function raises for bad input, and its kind for trainings that diverge."""


class InputError(ValueError):
    """What was wrong, what was expected, and the shape or value that was seen.

    The command line prints it as one line; anything else that escapes is a bug and keeps its traceback.
    """


class DivergedError(InputError):
    """A training's losses or weights are no longer finite: its settings do not fit the data."""
