"""What a run on Ray writes beside its products: the manifest, wherever the outputs lie."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ddsm_deploy.listing import MANIFEST_NAME, PRODUCT_FOLDERS
from ddsm_deploy.ray.places import Place, local_path, reaching
from ddsm_deploy.runtime.manifest import Identity, Manifest
from ddsm_deploy.runtime.pipeline import clear, make_folder

_SECONDS = 30.0
"""At least so long between two uploads of the manifest, and so many times as long as one takes."""
_TIMES = 20


def open_manifest(output: Place, identity: Identity, *, overwrite: bool) -> Manifest:
    """The manifest in the output folder; what killed workers left there is removed.

    Raises:
        ConfigError: the folder was made by another model or with other settings, or another run has it open.
        InputError: the folder can't be written.
    """
    if not output.local:
        return _UploadedManifest(output, identity, overwrite=overwrite)
    folder = local_path(output)
    make_folder(folder)
    manifest = Manifest(folder / MANIFEST_NAME, identity=identity, overwrite=overwrite)
    try:
        clear(folder)
    except BaseException:
        manifest.close()
        raise
    return manifest


def remove_halves(output: Place) -> None:
    """Removes what workers that were killed in this run left half-written."""
    if output.local:
        clear(local_path(output))


def existing(output: Place) -> Callable[[Iterable[str]], bool]:
    """A test whether files, relative to the output folder, are all there; elsewhere by one listing, made now.

    Raises:
        InputError: the place can't be listed.
    """
    if output.local:
        root = local_path(output)
        return lambda files: all((root / file).is_file() for file in files)
    from pyarrow.fs import FileSelector, FileType

    assert output.filesystem is not None
    there: set[str] = set()
    for folder in PRODUCT_FOLDERS:
        selector = FileSelector(output.below(folder).path, recursive=True, allow_not_found=True)
        with reaching(output):
            listed = output.filesystem.get_file_info(selector)
        there.update(info.path[len(output.path) + 1 :] for info in listed if info.type == FileType.File)
    return there.issuperset


class _UploadedManifest(Manifest):
    """A manifest in a file system that can't append: kept in a file of this machine, and uploaded now and then.

    What was not uploaded when the run is killed is segmented anew by the next one, to the same bytes.
    """

    def __init__(self, output: Place, identity: Identity, *, overwrite: bool) -> None:
        from pyarrow.fs import FileType

        assert output.filesystem is not None
        self._output = output
        self._folder = tempfile.TemporaryDirectory(prefix="ddsm-")
        self._next = 0.0  # when the next upload is due; 0 is never
        try:
            there = output.below(MANIFEST_NAME)
            copy = Path(self._folder.name, MANIFEST_NAME)
            with reaching(there):
                if output.filesystem.get_file_info(there.path).type == FileType.File:
                    copy.write_bytes(there.read())
            super().__init__(copy, identity=identity, overwrite=overwrite, place=str(output))
            with reaching(there):  # a place that can't be written is told before anything is segmented
                self._upload()
        except BaseException:
            self.close()
            raise

    def add(self, record: dict[str, Any]) -> None:
        """As `Manifest.add`.

        Raises:
            OSError: it could not be written, or not be uploaded.
        """
        super().add(record)
        if self._next and time.monotonic() >= self._next:
            self._upload()

    def close(self) -> None:
        """Uploads the last records.

        Raises:
            InputError: it failed.
        """
        due, self._next = self._next, 0.0
        try:
            if due:
                with reaching(self._output.below(MANIFEST_NAME)):
                    self._upload()
                self._next = 0.0
        finally:
            if hasattr(self, "_file"):
                super().close()
            self._folder.cleanup()

    def _upload(self) -> None:
        begin = time.monotonic()
        self._output.write({MANIFEST_NAME: self.path.read_bytes()})
        now = time.monotonic()
        self._next = now + max(_SECONDS, _TIMES * (now - begin))
