"""ModelSpec: what a model is, in one record that travels inside every artefact.

The spec is written as JSON text into the metadata of a checkpoint (safetensors) and of an ONNX file. One reader and one
writer, here, so that a model can be rebuilt, fed and shown from the artefact alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy.errors import ArtifactError, ConfigError

FORMAT = 1
"""Version of the record; a reader refuses a newer one and says so."""

METADATA_KEY = "ddsm.spec"
"""Metadata key of the JSON text, in safetensors and in ONNX alike."""

MAX_CLASSES = 255
"""Masks are uint8 and 255 means "no label", so 255 classes are the most."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8+fp16", "int8+bf16")
"""What a graph is written in, or what an engine computes in. The pairs are INT8 convolutions with the rest in a float
of half the width."""

FUSIONS = ("ddsm", "spatial", "channel", "add")
CHANNEL_ORDERS = ("bgr", "rgb")


def default_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The PASCAL VOC colour map: `count` distinct RGB triples, 0..255."""
    colours = []
    for index in range(count):
        rgb = [0, 0, 0]
        value = index + 1  # skips VOC's black, which reads as "no label"
        for bit in range(7, -1, -1):
            for channel in range(3):
                rgb[channel] |= ((value >> channel) & 1) << bit
            value >>= 3
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The flat numbers from which `ddsm_deploy.model.build_network` makes a network.

    Attributes:
        backbone: name of a timm model that has ``features_only``.
        fusion: what joins a low layer with the next higher one: ``ddsm`` (both branches), ``spatial``, ``channel``, or
            ``add`` (none: the plain feature pyramid, the baseline of every comparison).
        channels: C, width of the pyramid; a square number wherever the channel branch is used.
        sample_channels: K of the spatial branch: width of its query and key maps.
        samples: N, sampled positions a pixel; a square number, 1 to 25.
        dilation: spacing, in pixels of the low layer, of the regular grid from which offsets are counted.
        pooled: a, side of the pooled map that describes a channel in the channel branch.
        detail: width of a last level at stride 2, which draws what is thin; 0: classes are told at stride 4.
        enlarge: by how much the network enlarges an image before anything else, 1 to 4: more time for what is small.
    """

    backbone: str = "efficientnet_lite0"
    fusion: str = "ddsm"
    channels: int = 64
    sample_channels: int = 32
    samples: int = 9
    dilation: int = 1
    pooled: int = 8
    detail: int = 0
    enlarge: float = 1.0

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ConfigError(f"fusion is {self.fusion!r}; expected one of {', '.join(FUSIONS)}")
        for name in ("channels", "sample_channels", "dilation", "pooled"):
            if not _is_integer(value := getattr(self, name), least=1):
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1")
        if not re.fullmatch(r"[\w.-]*", self.backbone, re.ASCII):  # timm would fetch "hf-hub:USER/NAME" from a network
            raise ConfigError(f"backbone is {self.backbone!r}; expected the name of one of timm's own models")
        if not _is_integer(self.samples, least=1) or self.samples > 25 or not _is_square(self.samples):
            raise ConfigError(f"samples (N) is {self.samples!r}; expected a square number from 1 to 25")
        if self.fusion in ("ddsm", "channel") and not _is_square(self.channels):
            raise ConfigError(
                f"channels (C) is {self.channels}; the channel branch lays channels out as a square plane, so take a "
                "square number such as 64, 144 or 256"
            )
        if not _is_integer(self.detail, least=0):
            raise ConfigError(f"detail is {self.detail!r}; expected an integer of at least 0")
        if isinstance(self.enlarge, bool) or not isinstance(self.enlarge, int | float) or not 1 <= self.enlarge <= 4:
            raise ConfigError(f"enlarge is {self.enlarge!r}; expected a number from 1 to 4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Classes, colours, input, normalisation, precision and provenance of one model.

    Attributes:
        name: the model's name, for people.
        classes: names, in the order of their ids; 1 to 255.
        palette: one RGB triple (0..255) a class, same order.
        height: rows of the network's input, pixels.
        width: columns of the network's input, pixels.
        mean: per channel **in RGB order**, in units of a 0..255 pixel value.
        std: likewise; the network sees ``(pixel - mean) / std``.
        channel_order: order of the deployed input's three channels, ``bgr`` (OpenCV's) or ``rgb``.
        precision: any of `PRECISIONS`: of the weights and arithmetic in this artefact's graph.
        network: the numbers from which the network is built.
        provenance: free text facts: versions, data, schedule, sha256 of what it was made from.
    """

    name: str = "ddsm"
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] = ()
    height: int = 360
    width: int = 480
    mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    channel_order: str = "bgr"
    precision: str = "fp32"
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ConfigError(f"got {len(self.classes)} classes; expected 1 to {MAX_CLASSES}")
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError("two classes have the same name; classes are told apart by their names")
        if not self.palette:
            object.__setattr__(self, "palette", default_palette(len(self.classes)))
        if len(self.palette) != len(self.classes):
            raise ConfigError(f"got {len(self.palette)} colours for {len(self.classes)} classes")
        if any(len(c) != 3 or not all(0 <= v <= 255 for v in c) for c in self.palette):
            raise ConfigError("a palette entry is not an RGB triple of 0..255")
        if self.height < 1 or self.width < 1:
            raise ConfigError(f"input size is {self.height}x{self.width}; expected at least 1x1")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ConfigError("mean and std need three values each, std above zero")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ConfigError(f"mean is {self.mean} and std {self.std}; expected finite numbers")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.channel_order not in CHANNEL_ORDERS:
            raise ConfigError(f"channel order is {self.channel_order!r}; expected bgr or rgb")

    def replace(self, **changes: Any) -> ModelSpec:
        """A copy with the named fields changed."""
        return dataclasses.replace(self, **changes)

    def with_provenance(self, **facts: str) -> ModelSpec:
        """A copy with facts added to its provenance."""
        return dataclasses.replace(self, provenance={**self.provenance, **facts})

    def to_json(self) -> str:
        """The record as JSON text: sorted keys, so that equal specs give equal bytes."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, source: str = "model") -> ModelSpec:
        """Reads `to_json`'s text.

        Raises:
            ArtifactError: the text is not such a record; `source` names the file in the message.
        """
        try:
            fields = json.loads(text)
            form = fields.pop("format")
            if form > FORMAT:
                raise ArtifactError(
                    f"{source}: its record has format {form}, this version reads up to {FORMAT}; update ddsm-deploy"
                )
            numbers = fields.pop("network")
            if numbers.get("detail_samples") == 0:  # development versions wrote it; only 0 is a network of today
                del numbers["detail_samples"]
            if unknown := numbers.keys() - {field.name for field in dataclasses.fields(NetworkConfig)}:
                raise ArtifactError(
                    f"{source}: its model record can't be read (it has {', '.join(sorted(unknown))}, which this "
                    "version does not know; use the version of ddsm-deploy that wrote it)"
                )
            network = NetworkConfig(**numbers)
            for key in ("classes", "mean", "std"):
                fields[key] = tuple(fields[key])
            fields["palette"] = tuple(tuple(c) for c in fields["palette"])
            return cls(network=network, **fields)
        except ArtifactError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as exc:
            raise ArtifactError(f"{source}: its model record can't be read ({exc})") from exc


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def parse_size(text: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` in pixels, as in ``360x480``.

    Raises:
        ConfigError: it is not of that form.
    """
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip())
    if match is None or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"size is {text!r}; expected HEIGHTxWIDTH, for instance 360x480")
    return int(match[1]), int(match[2])


def _is_integer(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
