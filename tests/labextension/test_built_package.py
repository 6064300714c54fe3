"""What a wheel brings for the front end: everything built, so that installing it needs no node."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
WITHOUT_NODE = "/nowhere"


def test_a_wheel_holds_the_labextension_and_the_modules_of_the_widgets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    environment = {**os.environ, "PATH": WITHOUT_NODE}  # what is built already is taken as it is
    done = subprocess.run(
        [*build, str(REPOSITORY)], check=False, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("jupyter_llmcloud-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        module = archive.read("jupyter_llmcloud/widgets/static/run-monitor.js").decode()
    assert any("share/jupyter/labextensions/jupyter-llmcloud/static/remoteEntry" in name for name in sizes)
    assert sizes["jupyter_llmcloud/widgets/static/panels.css"] > 5_000
    assert len(module) > 50_000
    # All of it is in the one file: nothing is imported, from here or from the network.
    assert "import(" not in module and not module.lstrip().startswith("import")
    assert not any("node_modules" in name for name in sizes)
