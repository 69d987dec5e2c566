"""OpenVINO's module without its telemetry, which otherwise reports the import over the network (seen in 2026.4).

With the telemetry package out of sight while it loads, OpenVINO takes the stub that it carries for that case. A process
that imported openvino before us has made that choice already.
"""

from __future__ import annotations

import sys
from typing import Any


def _import_quietly() -> Any:
    hide = "openvino_telemetry" not in sys.modules
    if hide:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
        import openvino.frontend.onnx
    finally:
        if hide:
            del sys.modules["openvino_telemetry"]
    return openvino


ov = _import_quietly()
