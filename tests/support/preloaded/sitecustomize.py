"""Python imports this at its start wherever tests run: a zygote is forked from one that has imported all already.

A zygote imports for 4 s of processor time and more, and the suite starts a hundred. The process that was started as one
hands its descriptors, environment and arguments to the `mother` of this session's tests, which forks the zygote, and then only stands for it:
it ends when that ends, with its status, and that ends with it. Its environment decides: what matters to imports must be
the same as the mother's, else it goes on by itself, as a user's does. Tests of the start itself set ORDINARY.

Nor does a Jupyter server parse the grammar by which jsonschema checks IRIs: 3 s of processor time at each start.
"""

import os
import sys

FOLDER = "LLMCLOUD_TEST_PRELOADED"  # of the mother's socket; without it everything starts as usual
ORDINARY = "LLMCLOUD_TEST_ORDINARY"
MODULE = "jupyter_llmcloud.training.zygote"

IS_HASTENED = bool(os.environ.get(FOLDER) and not os.environ.get(ORDINARY))

if IS_HASTENED:
    sys.modules.setdefault("rfc3987_syntax", None)
if IS_HASTENED and sys.orig_argv[1:3] == ["-m", MODULE]:
    sys.path.insert(0, os.path.dirname(__file__))
    import stand_in

    sys.path.pop(0)
    stand_in.be_forked(os.environ[FOLDER], sys.orig_argv[3:])
