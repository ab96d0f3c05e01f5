"""Requests made up from the OpenAPI document: none is a fault, and each answer is as it says.

OPENAPI_EXAMPLES=300 makes up more of them, by hand.
"""

from __future__ import annotations

import os
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from memopt.serve.routes import ROUTES, Route

schemathesis = pytest.importorskip("schemathesis", reason="pip install memopt[dev]")
openapi = pytest.importorskip("schemathesis.specs.openapi.checks")
EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def document(served: httpx.Client) -> Any:
    """The document of a server with a model of every task."""
    return schemathesis.openapi.from_url(f"{str(served.base_url).rstrip('/')}/openapi.json")


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_nothing_made_up_is_a_fault(document: Any, route: Route, right: bool) -> None:
    """No 500; status, content type and body are among those that the document names."""
    if not right and not route.takes:
        pytest.skip("takes nothing that could be wrong")
    mode = schemathesis.GenerationMode.POSITIVE if right else schemathesis.GenerationMode.NEGATIVE
    checks = [
        schemathesis.checks.not_a_server_error,
        openapi.status_code_conformance,
        openapi.content_type_conformance,
        openapi.response_schema_conformance,
    ]

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[route.path][route.method].as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        case.validate_response(case.call(timeout=60), checks=checks)

    asked()
