"""The page of validation frames: its pictures, and that the sampling shown is the network's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

REPO = Path(__file__).parent.parent


def test_page(tiny_checkpoint: Path, scenes: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    command = [sys.executable, str(REPO / "tools" / "val_page.py"), "--data", str(scenes), "--dataset", "folder"]
    command += ["--split", "", "--model", str(tiny_checkpoint), "--frames", "3", "-o", str(page), "--worst"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    frames = [line for line in done.stdout.splitlines() if line.endswith("wrong")]
    wrong = [float(line.split()[1]) for line in frames]
    assert len(wrong) == 3 and wrong == sorted(wrong, reverse=True)
    text = (page / "index.html").read_text(encoding="utf-8")
    for line in frames:
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
    sampled = val_page.sampling(network, spec, image)
    assert list(sampled)[-2:] == ["fusions.0.channel", "fusions.0.spatial"] and len(sampled) == 6
    offsets, shares = sampled["fusions.0.spatial"]
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


def test_samples_that_have_not_moved_are_said_not_to_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPO / "tools")
    import val_page

    from ddsm_deploy.model.network import build_network
    from ddsm_deploy.spec import ModelSpec, NetworkConfig

    config = NetworkConfig(backbone="test_efficientnet", fusion="spatial", channels=16, sample_channels=8, detail=8)
    network = build_network(config, 2).eval()
    spec = ModelSpec(name="new", classes=("a", "b"), height=64, width=96, network=config)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    sampled = val_page.sampling(network, spec, image)
    assert list(sampled) == ["fusions.2.spatial", "fusions.1.spatial", "fusions.0.spatial"]
    assert sampled["fusions.0.spatial"][1].shape == (9, 16, 24)
    rows = [line.split() for line in val_page.table([sampled], spec).splitlines()[1:]]
    assert [row[:4] for row in rows] == [[name, "9", "0.00", "0.00"] for name in sampled]
    with torch.no_grad():
        network.fusions[0].spatial.offset.bias[:2] += torch.tensor([3.0, 4.0])  # the first of nine, by five cells
    moved = val_page.table([val_page.sampling(network, spec, image)], spec).splitlines()[3].split()
    assert moved[:4] == ["fusions.0.spatial", "9", "0.56", "5.00"]
