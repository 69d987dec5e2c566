"""Every error this package raises on purpose.

    DdsmError                 what happened, got versus expected, what to do      exit 1
    ├── ConfigError           an option or a combination of options is wrong
    ├── InputError            an image, a label, a folder or an array is wrong
    │   └── ImageTooLarge     an image has more pixels than are allowed
    ├── ArtifactError         a model file is wrong: damaged, foreign, of another architecture
    ├── BackendError          a runtime failed, or can't do what was asked for
    │   └── BackendMissing    it is not installed; the message holds the pip line
    └── GateError             a stated budget (parity, accuracy, latency) fails      exit 3

The command line prints the message in one line. Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations


class DdsmError(Exception):
    """Base of all errors raised on purpose; its text is one line that a user can act on."""

    exit_code = 1


class ConfigError(DdsmError):
    """An option, or a combination of options, is wrong."""


class InputError(DdsmError):
    """An image, a label, a folder or an array is not what it should be."""


class ImageTooLarge(InputError):
    """An image has more pixels than are allowed; told by its header, before it is decoded."""


class ArtifactError(DdsmError):
    """A model file is damaged, not ours, or of another architecture."""


class BackendError(DdsmError):
    """A runtime failed, or can't do what was asked of it."""


class BackendMissing(BackendError):
    """A runtime is not installed.

    Args:
        backend: the word used for it everywhere, for instance ``openvino``.
        extra: the pip extra that brings it.
        why: what importing it said.
        where: into which environment, where not any will do.
    """

    def __init__(self, backend: str, *, extra: str, why: str = "", where: str = "") -> None:
        self.backend = backend
        self.extra = extra
        detail = f" ({why})" if why else ""
        place = f", {where}," if where else ""
        super().__init__(
            f"{backend} is not usable here{detail}; install it{place} with: pip install 'ddsm-deploy[{extra}]'"
        )


class GateError(DdsmError):
    """A stated budget (parity, accuracy, latency) does not hold."""

    exit_code = 3
