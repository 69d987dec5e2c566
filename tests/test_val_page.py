"""The page of validation frames: its pictures, and that the sampling shown is the network's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

REPO = Path(__file__).parent.parent


def test_page(tiny_checkpoint: Path, scenes: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    command = [sys.executable, str(REPO / "tools" / "val_page.py"), "--data", str(scenes), "--dataset", "folder"]
    command += ["--split", "", "--model", str(tiny_checkpoint), "--frames", "3", "-o", str(page), "--worst"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    wrong = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(wrong) == 3 and wrong == sorted(wrong, reverse=True)
    text = (page / "index.html").read_text(encoding="utf-8")
    for line in done.stdout.splitlines():
        name = line.split(":")[0]
        assert f"src='{name}.png'" in text and f"src='{name}.sampling.png'" in text
        image = cv2.imread(str(scenes / "images" / f"{name}.png"))
        panels = cv2.imread(str(page / f"{name}.png"))
        assert panels.shape == (2 * image.shape[0], 2 * image.shape[1], 3)
        assert (panels[: image.shape[0], : image.shape[1]] == image).all()
        assert cv2.imread(str(page / f"{name}.sampling.png")).shape == panels.shape


def test_what_is_shown_of_sampling_gives_the_branchs_result(
    tiny_checkpoint: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets and shares, summed up over the values by hand, are the operator's output."""
    import torch
    import torch.nn.functional as F

    monkeypatch.syspath_prepend(REPO / "tools")
    import val_page

    from ddsm_deploy.model import blocks
    from ddsm_deploy.model.checkpoint import load_checkpoint

    network, spec = load_checkpoint(tiny_checkpoint)
    network.eval()
    calls = []
    original = blocks.dynamic_sample_attention

    def watch(*inputs):
        calls.append((inputs[2], original(*inputs)))
        return calls[-1][1]

    monkeypatch.setattr(blocks, "dynamic_sample_attention", watch)
    image = cv2.imread(str(next((scenes / "images").iterdir())))
    offsets, shares = val_page.sampling(network, spec, image)
    assert blocks.dynamic_sample_attention is watch
    value, wanted = calls[-1]
    rows, columns = value.shape[-2:]
    assert shares.shape == (spec.network.samples, rows, columns)
    np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-5)
    at_y = np.arange(rows)[:, None] + offsets[:, 0]
    at_x = np.arange(columns) + offsets[:, 1]
    grid = torch.from_numpy(np.stack([(2 * at_x + 1) / columns - 1, (2 * at_y + 1) / rows - 1], -1)).float()
    sampled = F.grid_sample(value.expand(len(shares), -1, -1, -1), grid, align_corners=False)
    got = (sampled * torch.from_numpy(shares).unsqueeze(1)).sum(0)
    torch.testing.assert_close(got, wanted[0], rtol=1e-3, atol=1e-4)
