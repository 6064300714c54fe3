"""Python imports this at its start wherever tests run: what takes long to import is forked from what has imported it.

A zygote imports for 4 s of processor time and more, a Jupyter server or what renders chat templates for two, a kernel for
half of one, and the suite starts hundreds of them. The process that was started as one hands its descriptors, environment and
arguments to the `mother` of its kind, which forks it, and then only stands for it: it ends when that ends, with its
status, that ends with it, and signals go through. What matters to imports must be the same as the mother's, else it
goes on by itself, as a user's does. Tests of the start itself set ORDINARY.

Nor does a Jupyter server parse the grammar by which jsonschema checks IRIs: 3 s of processor time at each start.
"""

import os
import sys

FOLDER = "LLMCLOUD_TEST_PRELOADED"  # of the mothers' sockets; without it everything starts as usual
ORDINARY = "LLMCLOUD_TEST_ORDINARY"


def _hasten() -> None:
    sys.modules.setdefault("rfc3987_syntax", None)
    sys.path.insert(0, os.path.dirname(__file__))
    try:
        import kinds

        kind, place = kinds.kind_of(sys.orig_argv)
        if kind:
            import stand_in

            stand_in.be_forked(os.environ[FOLDER], kind, place)
    finally:
        sys.path.pop(0)
        for name in ("kinds", "stand_in"):  # names that a program may have for modules of its own
            sys.modules.pop(name, None)


if os.environ.get(FOLDER) and not os.environ.get(ORDINARY):
    _hasten()
