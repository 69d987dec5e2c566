"""What the real Triton server of these tests runs in place of its ONNX Runtime backend, which no package brings.

Triton takes a file like this for a backend (a "python-based backend") where it lies in a folder of the backend's name.
So repository, configuration, warm-up, batching, scheduling and protocol are Triton's own; here, ONNX Runtime opens the
very file that was deployed, plainly, without this package and its kernels, and runs a whole batch at once.

Source: docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/backend/docs/python_based_backends.html
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = json.loads(os.environ["DDSM_TESTS_PATH"])  # Triton's interpreter knows no virtual environment

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402


class TritonPythonModel:
    """One instance of one model; the name is Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        file = config["default_model_filename"]
        options = onnxruntime.SessionOptions()
        threads = config["parameters"].get("intra_op_thread_count", {"string_value": "1"})
        options.intra_op_num_threads = int(threads["string_value"])
        options.log_severity_level = 3
        path = Path(args["model_repository"], args["model_version"], file)
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.batched = config["max_batch_size"] > 0

    def execute(self, requests: list) -> list:
        if not self.batched:
            return [self.answer(self.run(self.images(request))) for request in requests]
        images = [self.images(request) for request in requests]
        results = self.run(np.concatenate(images))
        ends = np.cumsum([len(image) for image in images])[:-1]
        return [self.answer(parts) for parts in zip(*(np.split(result, ends) for result in results), strict=True)]

    def images(self, request: object) -> np.ndarray:
        # DLPack both ways: this Triton's own way was compiled for numpy 1, and with numpy 2 gives zeros
        return np.from_dlpack(triton.get_input_tensor_by_name(request, "image"))

    def run(self, image: np.ndarray) -> list[np.ndarray]:
        print("ran a batch of", len(image), flush=True)
        return self.session.run(self.outputs, {"image": image})

    def answer(self, results: object) -> object:
        tensors = [
            triton.Tensor.from_dlpack(name, np.array(array)) for name, array in zip(self.outputs, results, strict=True)
        ]
        return triton.InferenceResponse(tensors)
