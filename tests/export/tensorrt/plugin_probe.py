"""Run by `test_plugin`: defines the plugin with NVIDIA's bindings, asks it for a kernel, and prints what came of it.

Without NVIDIA's libraries, stubs of theirs that give nothing (the argument names the folder) let the bindings load. All
that is asked here is Python of the bindings' own.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from ddsm_deploy.export.tensorrt import plugin


def main() -> None:
    if len(sys.argv) > 1:
        for stub in sorted(Path(sys.argv[1]).glob("*.so.*")):
            ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
        trt = sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
        trt.__name__ = "tensorrt"
    else:
        trt = importlib.import_module("tensorrt")
    plugin.register(trt, "86", lazy=True)
    plugins = importlib.import_module("tensorrt.plugin")
    library = importlib.import_module("tensorrt.plugin._lib")
    defined = library.QDP_REGISTRY[plugin.PLUGIN]
    said: dict[str, Any] = {
        "version": trt.__version__,
        "inputs": defined.input_tensor_names,
        "outputs": defined.num_outputs,
        "attributes": list(defined.input_attrs),
    }

    def tensor(kind: Any, shape: tuple[int, ...] | None = None) -> Any:
        made = plugins.TensorDesc()
        made.dtype = kind
        made.shape_expr = plugins.ShapeExprs(4, _is_dummy=True)
        if shape:  # TensorRT makes them known once it asks for the kernel
            made.shape = plugins.Shape(shape)
        return made

    def kernel(kinds: tuple[Any, Any, Any], samples: int) -> dict[str, Any]:
        element, value_kind, offset_kind = kinds
        query, value = tensor(element, (2, 64, 8, 8)), tensor(value_kind, (2, 96, 8, 8))
        offset = tensor(offset_kind, (2, 2 * samples, 8, 8))
        try:
            name, ptx, grid, numbers = defined.aot_impl_func(query, query, value, offset, (value,), 0)
        except Exception as exc:  # noqa: BLE001  its text is what the test looks at
            return {"error": f"{type(exc).__name__}: {exc}"}
        return {
            "name": name,
            "entry": f".visible .entry {name}(" in ptx.decode(),
            "grid": isinstance(grid, plugins.KernelLaunchParams),
            "numbers": [isinstance(number, plugins.SymInt32) for number in numbers],
        }

    single, half = trt.float32, trt.float16
    # what NVIDIA's ONNX parser does with a node that has the attribute `aot`
    namespace, name = plugin.PLUGIN.split("::")
    creator = library._TemplatePluginCreator(name, namespace, {})
    fields, phase = trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD
    made = creator.create_plugin(name, namespace, fields, phase, trt.QuickPluginCreationRequest.STRICT_AOT)
    said["creator"] = [creator.name, creator.plugin_namespace, creator.plugin_version]
    said["made"] = [type(made).__name__, made.get_output_data_types([half, half, half, single], [4] * 4) == [half]]

    result = defined.register_func(*[tensor(half)] * 3, tensor(single))
    said["result"] = [result.dtype == half, len(result.shape_expr)]
    said["kernels"] = [kernel(kinds, 9) for kinds in ((single,) * 3, (half, half, single), (half,) * 3)]
    said["mixed"] = kernel((half, single, single), 9)
    said["integers"] = kernel((trt.int32,) * 3, 9)
    said["many"] = kernel((single,) * 3, 26)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
