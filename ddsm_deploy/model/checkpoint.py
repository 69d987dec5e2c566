"""Checkpoints: safetensors with the ModelSpec inside. Nothing is ever unpickled."""

from __future__ import annotations

import collections
import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from ddsm_deploy.errors import ArtifactError, InputError
from ddsm_deploy.model.blocks import ConvNorm
from ddsm_deploy.model.network import SegmentationNetwork, build_network
from ddsm_deploy.spec import METADATA_KEY, ModelSpec


def save_checkpoint(path: str | Path, network: nn.Module, spec: ModelSpec, *, half: bool = False) -> None:
    """Writes a network's tensors and its spec, atomically (temporary name, then rename).

    Args:
        path: the file, usually ``*.safetensors``.
        network: the network; its `state_dict` is stored.
        spec: stored as JSON in the file's metadata.
        half: halve the file: the network is put into the form of `absorb_norms`, and convolution and linear weights are
            stored as float16. Reading gives float32 again, so every artefact made from this file has the same weights.

    Raises:
        InputError: the file can't be written.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if half:
        state = {
            name: tensor.half() if tensor.dim() >= 2 and tensor.is_floating_point() else tensor
            for name, tensor in absorb_norms(network, state).items()
        }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(state, str(temporary), metadata={METADATA_KEY: spec.to_json()})
        temporary.chmod(0o644)  # safetensors makes its files private
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as exc:
        raise InputError(f"{path}: can't be written ({exc})") from exc
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or its folder can't even be entered
            temporary.unlink()


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a checkpoint, without its tensors.

    Raises:
        ArtifactError: missing, damaged, or not one of this project's checkpoints.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as exc:
        raise ArtifactError(f"{path}: not a readable safetensors file ({exc})") from exc
    if METADATA_KEY not in metadata:
        raise ArtifactError(
            f"{path}: a safetensors file, but not a ddsm checkpoint (no {METADATA_KEY} in its metadata)"
        )
    return ModelSpec.from_json(metadata[METADATA_KEY], source=str(path))


def load_checkpoint(path: str | Path) -> tuple[SegmentationNetwork, ModelSpec]:
    """Rebuilds the network of a checkpoint: float32, on the CPU, in evaluation mode.

    Raises:
        ArtifactError: unreadable, or its tensors do not fit the architecture that its spec names.
    """
    spec = read_spec(path)
    network = build_network(spec.network, len(spec.classes))
    load_weights(network, path)
    return network.eval(), spec


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Copies a checkpoint's tensors into a network of the same architecture.

    Raises:
        ArtifactError: unreadable, or the tensors do not fit.
    """
    state = _read_tensors(path)
    try:
        network.load_state_dict(state)  # casts float16 storage to the network's float32
    except RuntimeError as exc:
        first = next((line.strip() for line in str(exc).splitlines()[1:]), str(exc))
        raise ArtifactError(f"{path}: a checkpoint of another architecture ({first})") from exc


def start_from(network: nn.Module, path: str | Path) -> tuple[list[str], list[str]]:
    """Copies what a checkpoint shares with a network, by name and shape; the rest of the network stays as it is.

    For training that goes on with other classes, other branches or another number of samples. The backbone has to fit
    as a whole.

    Returns:
        Names of the network's tensors that the checkpoint has not, and of the checkpoint's that were not used.

    Raises:
        ArtifactError: unreadable, or of another backbone.
    """
    state, own = _read_tensors(path), network.state_dict()
    shared = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    new, unused = sorted(own.keys() - shared.keys()), sorted(state.keys() - shared.keys())
    if misfit := next((name for name in [*new, *unused] if name.startswith("backbone.")), None):
        raise ArtifactError(f"{path}: a checkpoint of another backbone ({misfit})")
    network.load_state_dict(shared, strict=False)
    return new, unused


def _read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = safetensors.torch.load_file(str(path))
    except (OSError, safetensors.SafetensorError) as exc:
        raise ArtifactError(f"{path}: not a readable safetensors file ({exc})") from exc
    return state


def absorb_norms(network: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rescales each convolution and the batch norm behind it so that, at inference, the norm only adds a bias.

    The function computed is the same; in training too, up to the norm's eps (batch statistics follow the scale of what
    they normalise). The use: an exporter that folds such a norm finds weights that are already final, so weights
    rounded to float16 here stay exactly those weights in every graph made from them.
    """
    state = dict(state)
    for conv, norm in _pairs(network):
        mean, var = state[f"{norm}.running_mean"].double(), state[f"{norm}.running_var"].double()
        gamma = state[f"{norm}.weight"].double()
        eps = network.get_submodule(norm).eps
        scale = gamma / (var + eps).sqrt()
        weight = state[f"{conv}.weight"]
        state[f"{conv}.weight"] = (weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        new_var = (var * scale**2).float()
        state[f"{norm}.running_mean"] = (mean * scale).float()
        state[f"{norm}.running_var"] = new_var
        state[f"{norm}.weight"] = (new_var + eps).sqrt()
    return state


def _pairs(network: nn.Module) -> list[tuple[str, str]]:
    """Names of (bias-free convolution, batch norm) where the norm, at inference, is all that reads the convolution.

    Read off the graph that autograd records: in order of registration, a norm that belongs to the next convolution, or
    a convolution with a residual beside the norm, look the same. `ConvNorm` is such a pair by itself, and is not
    always called as one.
    """
    probe = copy.deepcopy(network).cpu().float().eval().requires_grad_()
    with torch.enable_grad():
        output = probe(torch.zeros(1, 3, 64, 64))
    names = {parameter: name.rpartition(".")[0] for name, parameter in probe.named_parameters()}
    readers: dict[Any, list[Any]] = {}
    seen, found = {output.grad_fn}, [output.grad_fn]
    while found:
        node = found.pop()
        for source, _ in node.next_functions:
            readers.setdefault(source, []).append(node)
            if source is not None and source not in seen:
                seen.add(source)
                found.append(source)

    def module(node: Any, kind: type[nn.Module]) -> str | None:
        """The module of that kind whose weight a node reads."""
        for source, _ in node.next_functions:
            name = names.get(getattr(source, "variable", None))
            if name is not None and isinstance(probe.get_submodule(name), kind):
                return name
        return None

    pairs = []
    for node in seen:
        conv = module(node, nn.Conv2d)
        if conv is None or probe.get_submodule(conv).bias is not None or len(readers.get(node, [])) != 1:
            continue
        norm = module(readers[node][0], nn.BatchNorm2d)
        if norm is not None:
            pairs.append((conv, norm))
    # one module may be called twice: then it has more than one node, and rescaling it for one would spoil the other
    calls = collections.Counter(name for pair in pairs for name in pair)
    used = collections.Counter(
        name for node in seen for name in {module(node, nn.Conv2d), module(node, nn.BatchNorm2d)}
    )
    once = {pair for pair in pairs if all(calls[name] == used[name] == 1 for name in pair)}
    own = {(f"{name}.0", f"{name}.1") for name, module in network.named_modules() if isinstance(module, ConvNorm)}
    return sorted(once | own)
