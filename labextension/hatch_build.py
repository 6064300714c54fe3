"""Before the front end is built: which Python describes the API, from which its types are made (`jlpm run types`)."""

import os
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NamePython(BuildHookInterface):  # type: ignore[type-arg]
    """The one that builds, which has what `build-system.requires` lists; `python` may be any other, or none."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """For the hooks that follow."""
        os.environ["BUILD_PYTHON"] = sys.executable
