"""Checkpoints: what is read back is what was written, and everything else is refused in one line."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddsm_deploy.errors import ArtifactError, InputError
from ddsm_deploy.model.checkpoint import absorb_norms, load_checkpoint, read_spec, save_checkpoint, start_from
from ddsm_deploy.model.network import build_network
from ddsm_deploy.spec import ModelSpec, NetworkConfig

CONFIG = NetworkConfig(backbone="resnet10t", channels=16, sample_channels=8)
SPEC = ModelSpec(classes=("road", "sky", "tree"), network=CONFIG, height=64, width=96)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_network(CONFIG, 3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics such as training leaves
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 0.5, 0.5)  # some negative: a rescaled norm must keep the sign
    return network.eval()


def test_round_trip(tmp_path: Path, network: torch.nn.Module) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, network, SPEC)
    loaded, spec = load_checkpoint(path)
    x = torch.randn(1, 3, 64, 96)
    assert spec == SPEC == read_spec(path)
    assert torch.equal(loaded(x), network(x))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_half_storage_keeps_the_function(tmp_path: Path, network: torch.nn.Module) -> None:
    save_checkpoint(tmp_path / "full.safetensors", network, SPEC)
    save_checkpoint(tmp_path / "half.safetensors", network, SPEC, half=True)
    loaded, _ = load_checkpoint(tmp_path / "half.safetensors")
    x = torch.randn(1, 3, 64, 96)
    exact = network(x)
    # float16 rounds weights by 2^-11 at most; over some twenty layers that stays below one percent of the spread
    assert (loaded(x) - exact).abs().max() < 0.01 * exact.std()
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size


@pytest.mark.parametrize("training", [False, True])
def test_absorbed_norms_compute_the_same(network: torch.nn.Module, training: bool) -> None:
    other = build_network(CONFIG, 3)
    other.load_state_dict(absorb_norms(network, network.state_dict()))
    mine = build_network(CONFIG, 3)
    mine.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 96)
    outputs = []
    for net in (mine, other):
        torch.manual_seed(1)  # dropout's
        outputs.append(net.train(training)(x))
    # in training only eps differs: it is added to a variance of another scale
    allowed = 0.05 if training else 1e-4
    assert (outputs[0] - outputs[1]).abs().max() < allowed * outputs[0].std()


@pytest.mark.parametrize("backbone", ["densenet121", "resnetv2_50", "regnety_002"])
def test_norms_are_absorbed_by_what_feeds_them(backbone: str) -> None:
    """densenet's norms come before convolutions, and resnetv2's have a residual beside them."""
    torch.manual_seed(0)
    network, other = (build_network(dataclasses.replace(CONFIG, backbone=backbone), 3).eval() for _ in range(2))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 0.5, 0.5)
    state = absorb_norms(network, network.state_dict())
    other.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        want, got = network(x), other(x)
    assert (got - want).abs().max() < 1e-4 * want.std()
    assert sum(not torch.equal(state[name], tensor) for name, tensor in network.state_dict().items()) > 100


def test_another_architecture_is_refused(tmp_path: Path, network: torch.nn.Module) -> None:
    wider = NetworkConfig(backbone="resnet10t", channels=64, sample_channels=8)
    save_checkpoint(tmp_path / "a.safetensors", network, SPEC.replace(network=wider))
    with pytest.raises(ArtifactError, match="another architecture"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_a_start_takes_what_fits(tmp_path: Path, network: torch.nn.Module) -> None:
    save_checkpoint(tmp_path / "a.safetensors", network, SPEC)
    other = build_network(dataclasses.replace(SPEC.network, fusion="spatial", samples=4), len(SPEC.classes) + 1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    new, unused = start_from(other, tmp_path / "a.safetensors")
    theirs = network.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name] if name in new else theirs[name]), name
    assert {name.rpartition(".")[0] for name in new} == {"head.1", *(f"fusions.{i}.spatial.offset" for i in range(3))}
    assert {name.split(".")[2] for name in unused if name not in new} == {"channel"}


def test_a_start_wants_the_same_backbone(tmp_path: Path, network: torch.nn.Module) -> None:
    save_checkpoint(tmp_path / "a.safetensors", network, SPEC)
    other = build_network(dataclasses.replace(SPEC.network, backbone="resnet18"), len(SPEC.classes))
    before = [tensor.clone() for tensor in other.state_dict().values()]
    with pytest.raises(ArtifactError, match="another backbone"):
        start_from(other, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, other.state_dict().values(), strict=True))


def test_foreign_and_damaged_files_are_refused(tmp_path: Path, network: torch.nn.Module) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_checkpoint(good, network, SPEC)
    for content in (b"", good.read_bytes()[:1000], pickle.dumps({"weights": [1]})):
        bad.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"bad\.safetensors"):
            load_checkpoint(bad)
    safetensors.torch.save_file({"x": torch.zeros(1)}, str(bad))
    with pytest.raises(ArtifactError, match="not a ddsm checkpoint"):
        load_checkpoint(bad)
    with pytest.raises(ArtifactError, match="missing"):
        load_checkpoint(tmp_path / "missing.safetensors")


def test_unwritable_target_leaves_nothing(tmp_path: Path, network: torch.nn.Module) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="can't be written"):
        save_checkpoint(tmp_path / "file" / "a.safetensors", network, SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
