"""A model behind a server that speaks the Open Inference Protocol (KServe v2) over gRPC: Triton, MLServer and others.

    triton://HOST[:PORT]/MODEL[/VERSION][?spec=MODEL&timeout=SECONDS]

`record_endpoint` asks the server what it serves and keeps the answer as a small file, so that everything which takes a
model's file takes a served model too. All that needs tritonclient is here and loads it on use.

Source: the protocol, kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol; Triton's extension of
it by ModelConfig.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ddsm_deploy.cache import cache_folder
from ddsm_deploy.errors import ArtifactError, BackendError, BackendMissing, ConfigError
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.spec import METADATA_KEY, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SCHEME = "triton"
SUFFIX = ".endpoint"
FORM = "triton://HOST[:PORT]/MODEL[/VERSION][?spec=MODEL&timeout=SECONDS]"
PORT = 8001
"""Triton's own for gRPC."""

TIMEOUT = 30.0
"""Seconds that a call may take, retries included, where the URL says nothing."""

SPEC_KEY, SAMPLING_KEY = METADATA_KEY, "ddsm.sampling"
"""Parameters in Triton's model configuration: the spec as JSON text, and how the served file samples."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""What a served model may be called: it is a folder's name and a part of a URL."""

TRIES = 5
"""Of a call for which the server can't be reached, gRPC's most."""

_RETRIES = {
    "maxAttempts": TRIES,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],  # inference changes nothing on the server: it may be asked for twice
}
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": _RETRIES}]})),
    ("grpc.initial_reconnect_backoff_ms", 100),  # otherwise a second, longer than all the tries take
    ("grpc.max_reconnect_backoff_ms", 2000),
]
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a served model is.

    Attributes:
        host: name or address.
        port: of the server's gRPC service.
        model: its name there.
        version: of the model; empty for the server's choice, which is the newest.
        timeout: seconds that a call may take, retries included.
        spec: MODEL from which to take the spec; empty where the server tells it.
    """

    host: str
    port: int = PORT
    model: str
    version: str = ""
    timeout: float = TIMEOUT
    spec: str = ""

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Reads a URL of the form `FORM`.

        Raises:
            ConfigError: it is of another form.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            query = dict(urllib.parse.parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
            model, _, version = parts.path.removeprefix("/").partition("/")
            timeout = float(query.pop("timeout", TIMEOUT))
            spec = query.pop("spec", "")
            host, port = parts.hostname or "", PORT if parts.port is None else parts.port
        except ValueError as exc:
            raise ConfigError(f"{url}: {exc}; expected {FORM}") from exc
        wrong = (
            parts.scheme != SCHEME or not host or not port or "@" in parts.netloc or parts.fragment or query
        ) or not (NAME.fullmatch(model) and re.fullmatch(r"|[1-9]\d{0,8}", version))
        if wrong or not (math.isfinite(timeout) and timeout > 0) or spec.startswith(f"{SCHEME}://"):
            raise ConfigError(f"{url}: expected {FORM}")
        return cls(host=host, port=port, model=model, version=version, timeout=timeout, spec=spec)

    @property
    def address(self) -> str:
        """Host and port, as gRPC takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        version = f"/{self.version}" if self.version else ""
        timeout = "" if self.timeout == TIMEOUT else f"?timeout={self.timeout:g}"
        return f"{SCHEME}://{self.address}/{self.model}{version}{timeout}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointRecord:
    """A served model as a file: where it is, and what it is.

    Attributes:
        endpoint: where.
        spec: of the model.
        sampling: how the served file samples: ``portable`` or ``gather``; a server without our kernels knows no other.
    """

    endpoint: Endpoint
    spec: ModelSpec
    sampling: str = "portable"

    def to_json(self) -> str:
        """The record as JSON text: sorted keys, so that equal records give equal bytes."""
        fields = {"url": str(self.endpoint), "sampling": self.sampling, "spec": json.loads(self.spec.to_json())}
        return json.dumps({"format": _FORMAT, **fields}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def is_url(model: object) -> bool:
    """Whether a model's name is a served model's URL."""
    return isinstance(model, str) and model.startswith(f"{SCHEME}://")


def record_endpoint(endpoint: Endpoint, *, spec: ModelSpec | None = None) -> Path:
    """Asks a server for a model's record and keeps it in the user's cache, in a file named by its content.

    Args:
        endpoint: where the model is.
        spec: of the model; None asks the server, which knows it where ``ddsm deploy triton`` wrote its configuration.

    Raises:
        ArtifactError: the server does not know the spec.
        BackendMissing: tritonclient is not installed.
        BackendError: no answer, or the server has no such model.
        InputError: the cache can't be written.
    """
    with Connection(endpoint) as connection:
        parameters = connection.parameters()
    if spec is None and SPEC_KEY not in parameters:
        raise ArtifactError(
            f"{endpoint}: the server's configuration of it has no {SPEC_KEY}; deploy it with `ddsm deploy triton`, or "
            f"name the model from which it was made: {endpoint}{'&' if '?' in str(endpoint) else '?'}spec=MODEL"
        )
    spec = spec or ModelSpec.from_json(parameters[SPEC_KEY], source=str(endpoint))
    spec = spec.with_provenance(target=SCHEME)  # whatever the served file was written for
    sampling = parameters.get(SAMPLING_KEY, "portable")
    text = EndpointRecord(endpoint=endpoint, spec=spec, sampling=sampling).to_json()
    folder = cache_folder() / "endpoints" / hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"{endpoint.model}{SUFFIX}"
    with replacing(path) as temporary, writing(path):
        temporary.write_text(text, encoding="utf-8")
    return path


def read_endpoint(path: str | Path) -> EndpointRecord:
    """The record of a served model; the server is not asked.

    Raises:
        ArtifactError: missing, or no such record.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise ArtifactError(f"{path}: format {fields['format']}; this version reads {_FORMAT}; update ddsm-deploy")
        spec = ModelSpec.from_json(json.dumps(fields["spec"]), source=str(path))
        endpoint = Endpoint.parse(fields["url"])
        return EndpointRecord(endpoint=endpoint, spec=spec, sampling=str(fields["sampling"]))
    except OSError as exc:
        raise ArtifactError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as exc:
        raise ArtifactError(f"{path}: not an endpoint's record ({exc})") from exc


class Connection:
    """A gRPC channel to one served model. Any number of threads may use it; it reconnects by itself."""

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            import tritonclient.grpc
        except ImportError as exc:
            raise BackendMissing(SCHEME, extra=SCHEME, why=str(exc).splitlines()[0]) from exc
        self.endpoint = endpoint
        self._grpc: Any = tritonclient.grpc
        self._client: Any = tritonclient.grpc.InferenceServerClient(endpoint.address, channel_args=_CHANNEL)
        self._model = {"model_name": endpoint.model, "model_version": endpoint.version}
        self._limit = {"client_timeout": endpoint.timeout}

    def parameters(self) -> dict[str, str]:
        """The parameters of the model's configuration; none where the server is no Triton and has no such thing."""
        with self._errors():
            try:
                config = self._client.get_model_config(**self._model, **self._limit).config
            except self._grpc.InferenceServerException as exc:
                if str(exc.status()) != "StatusCode.UNIMPLEMENTED":
                    raise
                return {}
        return {name: value.string_value for name, value in config.parameters.items()}

    def tensors(self) -> tuple[list[tuple[str, str, tuple[int, ...]]], list[tuple[str, str, tuple[int, ...]]]]:
        """Inputs and outputs: name, type in the protocol's words (``UINT8``), and shape with -1 for what is open."""
        with self._errors():
            answer = self._client.get_model_metadata(**self._model, **self._limit)
        inputs, outputs = ([(t.name, t.datatype, tuple(t.shape)) for t in g] for g in (answer.inputs, answer.outputs))
        return inputs, outputs

    def infer(
        self, feeds: Mapping[str, tuple[str, npt.NDArray[Any]]], outputs: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """One inference.

        Args:
            feeds: input name -> type in the protocol's words, and array.
            outputs: names of those wanted.

        Returns:
            Output name -> array, owned by the caller.

        Raises:
            BackendError: no answer, or the server's words against it.
        """
        tensors = []
        for name, (datatype, array) in feeds.items():
            tensors.append(self._grpc.InferInput(name, array.shape, datatype))
            tensors[-1].set_data_from_numpy(array)
        wanted = [self._grpc.InferRequestedOutput(name) for name in outputs]
        with self._errors():
            answer = self._client.infer(inputs=tensors, outputs=wanted, **self._model, **self._limit)
            found: dict[str, np.ndarray | None] = {name: answer.as_numpy(name) for name in outputs}
        return {name: self._own(name, array) for name, array in found.items()}

    def close(self) -> None:
        """Ends the channel; calls that are under way fail."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _own(self, name: str, array: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        if array is None:
            raise BackendError(f"{self.endpoint}: the server's answer has no output {name!r}")
        return array.copy()  # it lies in the message, which is read-only

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what gRPC or the server says against a call into one line."""
        try:
            yield
        except self._grpc.InferenceServerException as exc:
            said = " ".join(str(exc.message()).split())
            match str(exc.status()).rpartition(".")[2]:
                case "DEADLINE_EXCEEDED":
                    problem = f"no answer within {self.endpoint.timeout:g} s; allow more with ?timeout=SECONDS"
                case "UNAVAILABLE":
                    problem = f"not available, retries included ({said}); are server and model up, on this gRPC port?"
                case _:
                    problem = f"the server says: {said}"
            raise BackendError(f"{self.endpoint}: {problem}") from exc
        except ValueError as exc:  # gRPC's, of a channel that another thread has closed
            raise BackendError(f"{self.endpoint}: {exc}") from exc
