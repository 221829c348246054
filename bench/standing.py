"""asv's environment of this project: the interpreter that runs asv, under a name that does not hold its path.

asv's own existing environment is named after the interpreter's path, so a new virtual environment would begin a new
history. What is measured is what is installed there (`pip install -e ".[bench]"`).
"""

import sys

from asv.environment import ExistingEnvironment


class StandingEnvironment(ExistingEnvironment):
    """Selected by `environment_type` in asv.conf.json."""

    tool_name = "standing"

    @classmethod
    def matches(cls, python: str) -> bool:
        return python == "same"

    @property
    def name(self) -> str:
        return f"standing-py{sys.version_info.major}.{sys.version_info.minor}"
