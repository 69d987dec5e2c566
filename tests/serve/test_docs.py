"""The commands that docs/serve.md prints work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
from serving import Server

REPO = Path(__file__).parent.parent.parent
COMMANDS = re.findall(r"^    (curl .*)$", (REPO / "docs" / "serve.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_curl(server: Server, tmp_path: Path, missing) -> None:
    if shutil.which("curl") is None:
        missing("curl", "it is not installed here")
    (tmp_path / "examples").symlink_to(REPO / "examples")
    said = b""
    for command in COMMANDS:
        here = command.replace("localhost:8000", f"127.0.0.1:{server.port}")
        assert here != command
        said = subprocess.run(
            ["curl", "-fsS", *shlex.split(here)[1:]], cwd=tmp_path, capture_output=True, check=True
        ).stdout
    assert json.loads(said)["name"] == "colours"  # the last one's
    size = cv2.imread(str(REPO / "examples" / "frames" / "street_0.jpg")).shape[:2]
    for name in ("mask.png", "overlay.jpg"):
        assert cv2.imread(str(tmp_path / name), cv2.IMREAD_UNCHANGED).shape[:2] == size
    assert json.loads((tmp_path / "all.json").read_text())["polygons"]["features"]
