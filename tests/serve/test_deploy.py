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
    labels: dict[str, set[str]] = {}
    for line in served.get("/metrics").text.splitlines():
        if not line.startswith("#"):
            name, _, told = line.rpartition(" ")[0].partition("{")
            labels.setdefault(name, set()).update(re.findall(r'(\w+)="', told))
    panels = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))["panels"]
    targets = [target for panel in panels for target in panel["targets"]]
    assert len(targets) > 8
    for target in targets:
        query = target["expr"]
        by = {
            label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")
        }
        words = re.sub(r"by \([^)]*\)|\[\w+\]", "", query)
        # What is neither a function nor a number is a metric.
        names = [word for word in re.findall(r"\b[a-z]\w+\b(?! ?\()", words) if word != "sum"]
        assert len(names) == 1, query
        assert names[0] in labels, query
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert by | shown <= labels[names[0]], query


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
