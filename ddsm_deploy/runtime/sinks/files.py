"""One file a frame and product, as `ddsm segment` writes them for images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy.listing import JOURNAL_NAME, PRODUCT_FOLDERS
from ddsm_deploy.runtime.outputs import Products, remove_temporaries, write_files
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.streams.frames import Frame


class FilesSink:
    """Writes ``masks/NAME.png`` and what else `products` asks for; NAME is the frame's index, eight digits.

    A frame that is written again after a kill takes its own file's place, so of a run that goes on nothing has to be
    taken back. Where a stream is made anew, files of the one before it are deleted: it may have had more frames.

    Attributes:
        products: the kinds of file that are made of a frame.
    """

    def __init__(self, folder: Path, products: Products) -> None:
        self._folder = folder
        self._products = products
        self.products = " ".join(file.replace("/", "") for file in sorted(products.files("").values()))
        self.targets = tuple(folder / name for name in products.files(""))
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
        return {"begun": True}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`; what no journal tells of is nobody's to delete."""
        remove_temporaries(self._folder)
        if not state and (self._folder / JOURNAL_NAME).exists():
            for kind in PRODUCT_FOLDERS:
                for path in (self._folder / kind).glob("[0-9]" * 8 + ".*"):
                    path.unlink()

    def finish(self) -> None:
        """See `Sink.finish`."""

    def close(self) -> None:
        """See `Sink.close`."""
