"""One file a frame and product, as `ddsm segment` writes them for images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy.runtime.outputs import Products, remove_temporaries, write_files
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.streams.frames import Frame


class FilesSink:
    """Writes ``masks/NAME.png`` and what else `products` asks for; NAME is the frame's index, eight digits.

    A frame that is written again after a kill takes its own file's place, so nothing has to be taken back.
    """

    def __init__(self, folder: Path, products: Products) -> None:
        self._folder = folder
        self._products = products
        self.outputs: tuple[str, ...] = ("confidence",) if products.confidence else ()

    def encode(self, frame: Frame, result: Segmentation) -> dict[str, bytes]:
        """See `Sink.encode`."""
        assert frame.image is not None
        name = f"{frame.index:08d}"
        files = self._products.files(name)
        encoded = self._products.encode(result, frame.image, file_name=frame.name)
        return {files[product]: data for product, data in encoded.items()}

    def write(self, frame: Frame, encoded: dict[str, bytes]) -> None:
        """See `Sink.write`."""
        write_files(self._folder, encoded)

    def commit(self) -> dict[str, Any]:
        """See `Sink.commit`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`."""
        remove_temporaries(self._folder)

    def finish(self) -> None:
        """See `Sink.finish`."""

    def close(self) -> None:
        """See `Sink.close`."""
