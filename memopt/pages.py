"""Reports as one HTML file each that fetches nothing: Vega's script is in it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from memopt.charts import altair, spec
from memopt.extras import require

# A number that was formatted already, or a dash in its place.
_NUMBER = re.compile(r"-|[-+]?[\d,]+(\.\d+)?")
# Nothing may be loaded, whatever is in the page; Vega compiles its expressions.
_POLICY = "default-src 'none';style-src 'unsafe-inline';script-src 'unsafe-inline' 'unsafe-eval'"


def command() -> str:
    """Return the command that this process carries out, as it was typed; "" under another name."""
    name = Path(sys.argv[0]).name
    return shlex.join(["memopt", *sys.argv[1:]]) if name in ("memopt", "__main__.py") else ""


def page(
    title: str,
    facts: Mapping[str, object],
    sections: Sequence[tuple[str, Sequence[Any]]],
    note: str = "",
) -> str:
    """Return a self-contained HTML page.

    Args:
        facts: what the page is about: model, date, command, ...; empty ones are left out.
        sections: headings with their parts, each HTML or a chart of :mod:`memopt.charts`.

    Raises:
        MissingExtra: Altair is not installed.
    """
    specs: list[Mapping[str, Any]] = []
    body = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value
    )
    body = f"<dl>{body}</dl>" + (f'<p class="soft">{escape(note)}</p>' if note else "")
    for heading, parts in sections:
        body += f"<h2>{escape(heading)}</h2>"
        for part in parts:
            if not isinstance(part, str):
                specs.append(spec(part, heading))
                part = f'<div class="chart" id="chart{len(specs)}"></div>'
            body += part
    data = json.dumps(specs).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{style()}</style><h1>{escape(title)}</h1>"
        "<noscript>The charts need JavaScript; the tables hold their numbers.</noscript>"
        f"{body}<script>{_vega()}</script><script>{data}.forEach((spec, n) => "
        'vegaEmbed(`#chart${n + 1}`, spec, {actions: false, renderer: "svg"}));</script></html>\n'
    )


def style() -> str:
    """Return the style of a page; its first rules are the colours, light and dark."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


@cache
def _vega() -> str:
    # Vega, Vega-Lite and their embedding, 0.9 MB, of the version Altair writes for.
    version = ".".join(altair().SCHEMA_VERSION.lstrip("v").split(".")[:2])
    bundle: str = require("vl_convert", extra="report", why="write a report").javascript_bundle(
        vl_version=version
    )
    return bundle.replace("</script", "<\\/script")


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], styles: Sequence[str] = ()
) -> str:
    """Return an HTML table; columns of numbers are right-aligned, everything is escaped.

    It scrolls where it is wider than the page, with a shadow on that side; a narrow page stacks the
    cells of a row of more than two, each with its column's name.

    Args:
        styles: a style per row (good, bar, bad, soft), none for plain rows.

    >>> table(["a"], [["<b>"]]).count("&lt;b&gt;")
    1
    """
    kinds = [
        ' class="n"' if sum(_is_number(row[column]) for row in rows) * 2 > len(rows) else ""
        for column in range(len(header))
    ]
    names = [escape(str(name)) for name in header]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(names, kinds, strict=True))
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(
            f'<td{kind} data-name="{name}">{escape(_text(cell))}</td>'
            for name, cell, kind in zip(names, row, kinds, strict=True)
        )
        style = f' class="row-{styles[index]}"' if styles else ""
        lines.append(f"<tr{style}>{cells}</tr>")
    size = "many" if len(header) > 2 else "few"
    return f'<div class="wide {size}"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _is_number(cell: object) -> bool:
    if isinstance(cell, int | float):
        return not isinstance(cell, bool)
    return _NUMBER.fullmatch(str(cell)) is not None


def _text(cell: object) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f"{cell:,}"
    return f"{cell:,.4g}" if isinstance(cell, float) else str(cell)
