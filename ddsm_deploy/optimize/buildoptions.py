"""The options of a build, and which target and version has which."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.enginefile import TARGETS, Profile
from ddsm_deploy.errors import ConfigError
from ddsm_deploy.export.onnxgraph import Graph
from ddsm_deploy.export.tensorrt.known import parts
from ddsm_deploy.spec import ModelSpec

PRECISIONS = ("fp32", "fp16", "int8", "int8+fp16")

PORTABLE = ("80", "86", "89", "120")
"""What TensorRT-RTX builds for where nothing else is said: one engine for all is as large as one for each."""

_CHANNELS = 3

SAMPLINGS = ("portable", "fused")

_NOT_IN_RTX = {
    "sampling": "fused sampling is a plugin, and its parser can't take one from Python (tried with 1.7.1)",
    "timing_cache": "it times nothing while it builds",
    "version_compatible": "its package has no lean runtime, which that needs",
    "hardware_compatible": "its engines run on every GPU that --compute-capability names",
    "dla_core": "it runs on RTX GPUs, and those have no DLA",
    "builder_optimization_level": "the level changes nothing there (tried with 1.7.1)",
}
_NOT_IN_TENSORRT = {
    "compute_capabilities": "it builds for the GPU on which it runs; build there, or with --hardware-compatible for "
    "all from Ampere on",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built. An option that the target does not have is an error, never ignored.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        precision: ``fp32``, ``fp16``, ``int8`` or ``int8+fp16``; None is the model's own.
        sampling: ``portable``: standard operators, into which a fused model is written out; or, tensorrt only,
            ``fused``: the project's own CUDA kernel as a plugin for a fused model's sampling nodes. Experimental.
        compute_capabilities: tensorrt-rtx only: of the GPUs, as ``86``; none means `PORTABLE`.
        workspace: most scratch memory of a layer, GiB; None leaves it to the library.
        profile: sizes of the input, N×H×W×3, for a model with open axes.
        timing_cache: tensorrt only: file of measured times, read and written; makes later builds quick and alike.
        version_compatible: tensorrt only: later versions of the same major one run the engine too.
        hardware_compatible: tensorrt only: every GPU from Ampere on runs the engine; slower.
        dla_core: tensorrt only: the DLA core of a Jetson that takes what layers it can.
        builder_optimization_level: tensorrt only: 0 (quick build) to 5 (quick engine).
        verify: compare the graph with the float32 one, and where the GPU is there the engine too.
        images: files or folders to compare on; none means synthetic images.
        max_changed: most per cent of the pixels whose class may differ; None is `evaluate.verify.MAX_CHANGED`.
        force: write the engine even if that is exceeded.
    """

    target: str
    precision: str | None = None
    sampling: str = "portable"
    compute_capabilities: tuple[str, ...] = ()
    workspace: float | None = None
    profile: Profile | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla_core: int | None = None
    builder_optimization_level: int | None = None
    verify: bool = True
    images: tuple[Path, ...] = ()
    max_changed: float | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"target is {self.target!r}; expected {' or '.join(TARGETS)}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.sampling not in SAMPLINGS:
            raise ConfigError(f"sampling is {self.sampling!r}; expected {' or '.join(SAMPLINGS)}")
        lacking = _NOT_IN_RTX if self.target == "tensorrt-rtx" else _NOT_IN_TENSORRT
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, why in lacking.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{self.target} has no option {name.replace('_', ' ')!r}: {why}")
        self._check_numbers()
        if self.sampling == "fused" and (self.version_compatible or self.hardware_compatible):
            raise ConfigError(
                "fused sampling is compiled for the version and the GPU that build the engine, and nobody has tried it "
                "on others; leave out --version-compatible and --hardware-compatible, or ask for sampling portable"
            )
        if self.images and not self.verify:
            raise ConfigError("images to verify on were given, but verification is off; drop one of the two")
        if self.target == "tensorrt-rtx":
            numbers = tuple(sorted({_capability(text) for text in self.compute_capabilities}, key=int))
            object.__setattr__(self, "compute_capabilities", numbers or PORTABLE)

    def _check_numbers(self) -> None:
        if self.workspace is not None and not self.workspace > 0:
            raise ConfigError(f"workspace is {self.workspace} GiB; expected more than 0")
        for name, most in (("builder_optimization_level", 5), ("dla_core", 15)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; expected 0 to {most}")


def parse_profile(text: str) -> Profile:
    """``MIN:OPT:MAX``, each N×HEIGHT×WIDTH, as in ``1x360x480:1x360x480:4x1024x2048``.

    Raises:
        ConfigError: it is not of that form, or does not grow.
    """
    form = r"(\d+)[x×](\d+)[x×](\d+)"
    shapes = [re.fullmatch(form, part.strip()) for part in text.split(":")]
    if len(shapes) != 3 or not all(shapes):
        raise ConfigError(
            f"profile is {text!r}; expected MIN:OPT:MAX of NxHEIGHTxWIDTH, as in 1x360x480:1x360x480:4x360x480"
        )
    low, best, high = ((*map(int, shape.groups()), _CHANNELS) for shape in shapes if shape)
    return Profile(min=low, opt=best, max=high)


def check_options(options: BuildOptions, version: str) -> None:
    """Refuses what an installed version of the target does not have.

    Raises:
        ConfigError: it lacks an option.
    """
    if options.dla_core is None:
        return
    number = parts(version)
    if number[:2] > (10, 7) and number[:3] < (11, 4, 1):
        raise ConfigError(
            f"TensorRT {version} has no DLA: 10.7 was the last version with one, and 11.4.1 brings it back, for Jetson "
            "AGX Orin on JetPack 7.2.2 or later"
        )
    if options.precision in (None, "fp32"):
        raise ConfigError("a DLA computes in fp16 and int8 only; add --precision fp16, int8 or int8+fp16")


def check_profile(model: Graph, spec: ModelSpec, options: BuildOptions) -> dict[str, Profile]:
    """The profile of each input with open axes.

    Raises:
        ConfigError: one is needed and none was given, or the other way round, or it does not fit the graph.
    """
    image = model.graph.input[0]
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in image.type.tensor_type.shape.dim]
    profile = options.profile
    if None not in sizes:
        if profile is not None:
            raise ConfigError(
                f"a profile was given, but the model's size is fixed to {'x'.join(map(str, sizes[:3]))}; "
                "leave it out, or export the model with --dynamic"
            )
        return {}
    if profile is None:
        size = f"{spec.height}x{spec.width}"
        raise ConfigError(
            f"the model takes {'x'.join('?' if s is None else str(s) for s in sizes[:3])} (? is open), and TensorRT "
            f"wants to know the sizes; for instance: --profile 1x{size}:1x{size}:4x{size}"
        )
    for axis, fixed in enumerate(sizes):
        for shape in (profile.min, profile.opt, profile.max):
            if fixed is not None and shape[axis] != fixed:
                raise ConfigError(
                    f"the profile says {shape[axis]} on axis {axis}, where the model is fixed to {fixed}; export it "
                    "with --dynamic batch,size to open height and width"
                )
    return {image.name: profile}


def _capability(text: str) -> str:
    number = text.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not re.fullmatch(r"\d{2,3}", number):
        raise ConfigError(f"compute capability is {text!r}; expected a number such as 86 or 8.6")
    return number


def engine_name(artifact: Artifact, options: BuildOptions) -> str:
    """The file name of an engine for which none was given, as ``ddsm-lite0.fp16.tensorrt.engine``."""
    precision = options.precision or artifact.spec.precision
    fused = ".fused" if options.sampling == "fused" else ""
    return f"{artifact.name}.{precision}{fused}.{options.target}.engine"
