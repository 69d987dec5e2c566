"""What the Rerun sink writes, read back by Rerun's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from recordings import SIZE, mask_of, picture, stamp_of

from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.sinks.rerun import RerunSink
from ddsm_deploy.streams.frames import Frame

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def write(sink: RerunSink, index: int) -> None:
    image = picture(index)
    result = Segmentation(mask=mask_of(image).astype(np.uint8), classes=("red", "green", "blue"), palette=PALETTE)
    frame = Frame(index=index, stamp=stamp_of(index), name=str(index), image=image)
    sink.write(frame, sink.encode(frame, result))


def column(rows: Any, name: str) -> list:
    return rows.column(name).to_pylist()


def test_parts_hold_each_frame_once(tmp_path: Path, need) -> None:
    need("rerun")
    from rerun.chunk import RrdReader

    sink = RerunSink(tmp_path / "rerun", name="drive")
    write(sink, 0)
    write(sink, 1)
    state = sink.commit()
    write(sink, 2)  # and killed
    sink.close()
    sink = RerunSink(tmp_path / "rerun", name="drive")
    sink.restore(state)
    write(sink, 2)
    sink.commit()
    sink.finish()
    files = sorted((tmp_path / "rerun").glob("*.rrd"))
    assert [file.name for file in files] == ["000000.rrd", "000001.rrd"]
    stamps, masks, images = [], [], []
    for file in files:
        for chunk in RrdReader(file).stream():
            rows = chunk.to_record_batch()
            if "SegmentationImage:buffer" in rows.schema.names:
                stamps += [stamp.value for stamp in rows.column("stamp")]
                masks += [
                    np.array(cell[0], np.uint8).reshape(SIZE) for cell in column(rows, "SegmentationImage:buffer")
                ]
            elif "EncodedImage:blob" in rows.schema.names:
                blobs = [np.array(cell[0], np.uint8) for cell in column(rows, "EncodedImage:blob")]
                images += [cv2.imdecode(blob, cv2.IMREAD_COLOR) for blob in blobs]
    assert stamps == [stamp_of(i) for i in range(3)]
    for index in range(3):
        assert np.array_equal(masks[index], mask_of(picture(index)))
        # JPEG at 85: colours in the wrong order would differ by some 70
        assert np.abs(images[index].astype(int) - picture(index)).mean() < 20
