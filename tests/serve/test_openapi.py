"""The OpenAPI document is true: what it allows is taken, what it rules out is refused, and every answer is declared."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Server, encoded

for module in ("fastapi", "prometheus_client", "python_multipart"):
    pytest.importorskip(module, reason=f"{module}: it is not installed here")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis: it is not installed here")

from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance  # noqa: E402

from ddsm_deploy.serve.app import make_api  # noqa: E402
from ddsm_deploy.serve.limits import Limits  # noqa: E402
from ddsm_deploy.serve.service import Service  # noqa: E402

EXAMPLES = int(os.environ.get("DDSM_FUZZ_EXAMPLES", "20"))
"""Of each test; set it higher to look harder."""

PICTURE = encoded(np.random.default_rng(1).integers(0, 256, (9, 14, 3), dtype=np.uint8))


IMAGES = st.just(PICTURE)
DAMAGED = st.one_of(
    st.builds(
        lambda at, value: PICTURE[:at] + bytes([value]) + PICTURE[at + 1 :],
        st.integers(0, len(PICTURE) - 1),
        st.integers(0, 255),
    ),
    st.integers(0, len(PICTURE)).map(lambda length: PICTURE[:length]),
    st.binary(max_size=200),
)

# the document can't say that the bytes are an image
schemathesis.openapi.media_type("image/png", IMAGES, aliases=["image/jpeg", "image/*"])
schemathesis.openapi.format("binary", IMAGES)


def document() -> dict[str, Any]:
    service = Service(Limits(workers=1))
    service.close()
    return make_api(service).openapi()


schema = schemathesis.openapi.from_dict(document())
OPERATIONS = [found.ok() for found in schema.get_all_operations()]


def test_the_service_gives_this_document(server: Server) -> None:
    assert json.loads(server.ask("GET", "/openapi.json").body) == document()
    assert {operation.path for operation in OPERATIONS} >= {"/v1/segment", "/v1/model", "/healthz"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_requests(server: Server, operation: Any, data: st.DataObject) -> None:
    """Those that the document allows are taken, others are refused, and every answer is one that it declares."""
    mode = data.draw(st.sampled_from(list(schemathesis.GenerationMode)))
    data.draw(operation.as_strategy(generation_mode=mode)).call_and_validate(base_url=server.url)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_images(server: Server, data: st.DataObject) -> None:
    """An answer that is declared, whatever the bytes."""
    operation = schema["/v1/segment"]["POST"]
    case = data.draw(operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
    case.body = data.draw(DAMAGED)
    case.media_type = "image/png"
    case.call_and_validate(base_url=server.url, excluded_checks=[positive_data_acceptance, negative_data_rejection])
