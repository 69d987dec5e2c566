"""Triton, or another server of the Open Inference Protocol: the network runs there, frames and masks cross the wire."""

from __future__ import annotations

import numpy as np
from tritonclient.utils import triton_to_np_dtype

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.endpoint import Connection, read_endpoint
from ddsm_deploy.engines.base import Array, BaseEngine, EngineOptions, TensorInfo, choose_outputs, graph_precision
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError


class TritonEngine(BaseEngine):
    """A served model. `precision` and `sampling` are what its deployed configuration says of it.

    The server batches, and chooses threads and devices: see ``ddsm deploy triton``.
    """

    backend = "triton"

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        options.only(self.backend)
        if options.threads not in (None, 1):
            raise ConfigError(f"triton computes on its server and has no option 'threads' (it is {options.threads})")
        record = read_endpoint(artifact.file("endpoint"))
        self.precision = graph_precision(self.backend, artifact, options)
        self.sampling = record.sampling
        if options.sampling not in (None, self.sampling):
            raise BackendError(f"{record.endpoint} samples {self.sampling}, not {options.sampling}")
        self._connection = Connection(record.endpoint)
        try:
            inputs, outputs = self._connection.tensors()
            self._types = {name: datatype for name, datatype, _ in inputs}
            self.inputs = tuple(_info(*tensor) for tensor in inputs)
            self.outputs = choose_outputs(self.backend, tuple(_info(*tensor) for tensor in outputs), options.outputs)
        except BaseException:
            self.close()
            raise

    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        try:
            return self._connection.infer(
                {name: (self._types[name], array) for name, array in feeds.items()},
                [info.name for info in self.outputs],
            )
        except BackendError as exc:
            if self._closed:  # by another thread, meanwhile
                raise self._closed_error() from exc
            raise

    def _release(self) -> None:
        self._connection.close()


def _info(name: str, datatype: str, shape: tuple[int, ...]) -> TensorInfo:
    dtype = triton_to_np_dtype(datatype)
    if dtype is None:
        raise ArtifactError(f"{name!r} is a {datatype}, which numpy does not have; expected UINT8")
    return TensorInfo(name=name, dtype=np.dtype(dtype), shape=tuple(None if size < 0 else size for size in shape))
