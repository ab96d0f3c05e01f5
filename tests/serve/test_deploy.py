"""What deploy/ names is what the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import yaml

from memopt import metrics

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


def test_every_metric_of_the_dashboard_is_there(served: httpx.Client) -> None:
    """A panel of a name that /metrics does not give would stay empty for ever."""
    served.post("/embed", json={"inputs": "a cat"}).raise_for_status()
    assert served.post("/embed", json={"inputs": "a", "model": "none"}).status_code == 404
    metrics.fallback("cuda", "cpu", "test")
    lines = served.get("/metrics").text.splitlines()
    given = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    panels = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    named = set(re.findall(r"\b(?:te|memopt|inference|memory)_\w+", " ".join(queries)))
    assert len(named) > 8
    assert named <= given


def test_compose_opens_ports_to_this_machine_only() -> None:
    """Loopback, no root, a root that cannot be written to, and keys that are secrets."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    server = compose["services"]["memopt"]
    assert server["read_only"]
    assert set(server["secrets"]) <= set(compose["secrets"])
    assert re.search(r"^USER \d+$", (DEPLOY / "Dockerfile").read_text(), flags=re.M)
