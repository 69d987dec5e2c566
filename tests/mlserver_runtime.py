"""A runtime for MLServer, as its documentation asks a user to write one: ONNX Runtime, plainly, on one file."""

from __future__ import annotations

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """`parameters.uri` of its settings names the file."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        uri = self.settings.parameters.uri
        self.session = onnxruntime.InferenceSession(uri, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        image = NumpyCodec.decode_input(payload.inputs[0])
        (mask,) = self.session.run(["mask"], {"image": image})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("mask", mask)])
