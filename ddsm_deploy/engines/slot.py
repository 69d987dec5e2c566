"""One execution context of a TensorRT engine, with a stream and memory of its own: what a call gets to itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ddsm_deploy.enginefile import Profile
from ddsm_deploy.engines import cuda
from ddsm_deploy.engines.base import Array, TensorInfo
from ddsm_deploy.engines.buffers import Plan, Shape, byte_count, plan
from ddsm_deploy.engines.devicearray import DeviceArray, DeviceView, check_fit, view
from ddsm_deploy.errors import BackendError


class Slot:
    """One execution context with its own stream and its own memory on both sides."""

    def __init__(
        self,
        context: Any,
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
        profiles: Mapping[str, Profile],
        last_error: Callable[[], str],
    ) -> None:
        self.context = context
        self.graph: cuda.Graph | None = None
        self._inputs, self._all_outputs = inputs, outputs
        self._last_error = last_error
        with contextlib.ExitStack() as stack:
            self.stream = cuda.Stream()
            stack.callback(self.stream.close)
            self._plan = self._planned(profiles)
            self._device = cuda.DeviceMemory(self._plan.total)
            stack.callback(self._device.close)
            self._host = cuda.PinnedMemory(self._plan.total)
            stack.callback(self._host.close)
            for name, place in self._plan.places.items():
                if not context.set_tensor_address(name, self._device.address + place.offset):
                    raise BackendError(f"the engine takes no memory for {name!r}")
            self._cleanup = stack.pop_all()

    def _planned(self, profiles: Mapping[str, Profile]) -> Plan:
        """A plan for the largest shapes; those of the outputs follow from the inputs', and the context knows how."""
        largest: dict[str, Shape] = {}
        for info in self._inputs:
            profile = profiles.get(info.name)
            largest[info.name] = profile.max if profile else tuple(size or 0 for size in info.shape)
            if profile and not self.context.set_input_shape(info.name, profile.max):
                raise BackendError(f"the engine refuses its own largest shape {profile.max} for {info.name!r}")
        for info in self._all_outputs:
            largest[info.name] = tuple(self.context.get_tensor_shape(info.name))
        return plan((*self._inputs, *self._all_outputs), largest)

    def execute(self) -> None:
        """Puts the engine's work into the stream."""
        if self.graph is not None:
            self.stream.launch(self.graph)
        elif not self.context.execute_async_v3(self.stream.handle):
            raise BackendError(f"the engine failed to start: {self._last_error()}")

    def run(self, feeds: Mapping[str, Array], outputs: tuple[TensorInfo, ...]) -> dict[str, Array]:
        """From arrays in host memory to arrays in host memory."""
        for info in self._inputs:
            array = feeds[info.name]
            self._set_shape(info, array.shape)
            np.copyto(self._host_array(info, array.shape), array)
            self._copy(info, array.shape, to_device=True)
        self.execute()
        shapes = {info.name: self._output_shape(info) for info in outputs}
        for info in outputs:
            self._copy(info, shapes[info.name], to_device=False)
        self.stream.wait()
        # copied, because the slot goes back to the pool and its memory is overwritten by the next call
        return {info.name: self._host_array(info, shapes[info.name]).copy() for info in outputs}

    def run_device(
        self, feeds: Mapping[str, DeviceView], given: Mapping[str, Any], outputs: tuple[TensorInfo, ...]
    ) -> dict[str, Any]:
        """From arrays on the GPU to arrays on the GPU; copied there, so that alignment and graphs are no concern."""
        for info in self._inputs:
            found = feeds[info.name]
            self._set_shape(info, found.shape)
            if found.stream is not None:
                self.stream.follow(found.stream)
            self.stream.copy(self._address(info), found.address, byte_count(info, found.shape))
        results: dict[str, Any] = {}
        targets: dict[str, DeviceView] = {}
        for info in outputs:
            shape = self._output_shape(info)
            results[info.name] = given[info.name] if info.name in given else DeviceArray(shape, info.dtype)
            target = view(results[info.name], name=info.name, stream=self.stream.handle, writable=True)
            check_fit(target, info, shape)
            targets[info.name] = target
            if target.stream is not None:
                self.stream.follow(target.stream)
        self.execute()
        for info in outputs:
            target = targets[info.name]
            self.stream.copy(target.address, self._address(info), byte_count(info, target.shape))
        self.stream.wait()
        return results

    def close(self) -> None:
        """Gives context and memory back."""
        if self.graph is not None:
            self.graph.close()
        self.context = None
        self._cleanup.close()

    def _set_shape(self, info: TensorInfo, shape: Shape) -> None:
        if None not in info.shape or tuple(self.context.get_tensor_shape(info.name)) == shape:
            return
        if not self.context.set_input_shape(info.name, shape):
            raise BackendError(f"the engine refuses {shape} for {info.name!r}: {self._last_error()}")

    def _output_shape(self, info: TensorInfo) -> Shape:
        return tuple(self.context.get_tensor_shape(info.name))

    def _address(self, info: TensorInfo) -> int:
        return self._device.address + self._plan.places[info.name].offset

    def _host_array(self, info: TensorInfo, shape: Shape) -> Array:
        offset = self._plan.places[info.name].offset
        return self._host.array[offset : offset + byte_count(info, shape)].view(info.dtype).reshape(shape)

    def _copy(self, info: TensorInfo, shape: Shape, *, to_device: bool) -> None:
        device, host = self._address(info), self._host.address + self._plan.places[info.name].offset
        target, source = (device, host) if to_device else (host, device)
        self.stream.copy(target, source, byte_count(info, shape))
