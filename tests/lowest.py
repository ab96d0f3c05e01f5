"""Print constraints that take the lowest version pyproject.toml allows of everything it names.

python tests/lowest.py > FILE; see `make test-lowest`. torch stays what constraints.txt pins: no
other build is at hand.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What is compared is how memopt runs, not the tools that build and check it.
LEFT_OUT = {"dev", "demo", "gpu", "llm", "presidio"}
PINNED = {"torch"}


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def lowest(document: dict[str, object]) -> dict[str, str]:
    """Return name -> lowest version that all dependencies and extras of a document allow."""
    project = document["project"]
    assert isinstance(project, dict)
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(v for k, v in extras.items() if k not in LEFT_OUT)]
    found: dict[str, str] = {}
    for requirement in (each for part in lists for each in part):
        match = re.fullmatch(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", requirement)
        if match and match[1] not in PINNED:
            found[match[1]] = max(found.get(match[1], "0"), match[2], key=_numbers)
    return found


if __name__ == "__main__":
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for name, version in sorted(lowest(document).items()):
        print(f"{name}=={version}")
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.partition("==")[0] in PINNED:
            print(line)
