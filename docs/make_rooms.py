"""Write docs/rooms.svg, the drawing of memopt's rooms, from what its modules import.

python docs/make_rooms.py [--check]

A room is a package, with what it says of itself and its inner rooms; the single files are one. An
arrow leads to what a room imports, unless a longer way leads there too.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

import grimp

import memopt

TARGET = Path(__file__).with_name("rooms.svg")
FILES, COMMANDS = "single files", "commands"
# The command line finds its commands by name, not by importing them: to a reader they are one.
# A bundle is above the table of tasks, which is above the other single files.
ROOM_OF = {
    "memopt": "",
    "memopt.cli": COMMANDS,
    "memopt.__main__": COMMANDS,
    "memopt.bundle": "bundle",
}
WIDTH, LETTER, LINE, GAP = 900, 6.8, 16, 36  # pixels
SHORT, LONG = 36, 120  # letters of a line, in a room and in that of the single files

STYLE = """
:root{color-scheme:light dark;
--ink:#1c2430;--soft:#4d5868;--line:#8a94a3;--paper:#fff;--room:#eef2f8}
@media(prefers-color-scheme:dark){
:root{--ink:#e8ecf2;--soft:#aab4c3;--line:#76839a;--paper:#12171f;--room:#1d2532}}
text{font:12px system-ui,sans-serif;fill:var(--soft);text-anchor:middle}
.name{font-size:14px;font-weight:600;fill:var(--ink)}
.paper{fill:var(--paper)}.room{fill:var(--room);stroke:var(--line)}
.way{fill:none;stroke:var(--line);stroke-width:1.3}marker{fill:var(--line)}
"""


def rooms() -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """Return the inner rooms, or files, of each room, and the rooms that each one imports."""
    graph = grimp.build_graph("memopt", cache_dir=None)
    room_of, inside = dict(ROOM_OF), defaultdict(list)
    inside |= {name: [] for name in ROOM_OF.values() if name and name != COMMANDS}
    for module in sorted(graph.find_children("memopt") - set(ROOM_OF)):
        children = graph.find_children(module)
        name = module.partition(".")[2] if children else FILES
        parts = [module] if not children else [c for c in children if graph.find_children(c)]
        inside[name] += sorted(part.rpartition(".")[2] for part in parts)
        room_of |= dict.fromkeys({module, *graph.find_descendants(module)}, name)
    imports: dict[str, set[str]] = {name: set() for name in inside}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            if room_of[module] and room_of[other] and room_of[module] != room_of[other]:
                imports[room_of[module]].add(room_of[other])
    return inside, imports


def text_of(room: str, inside: Sequence[str]) -> list[str]:
    """Return the lines of a room: what it says of itself, then its inner rooms or files."""
    if room == FILES:
        return wrap(", ".join(inside), LONG)
    folder = Path(memopt.__path__[0])
    paths = (folder / room / "__init__.py", folder / f"{room}.py")
    source = next(path for path in paths if path.is_file()).read_text(encoding="utf-8")
    said = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].replace("`", "")
    return [*wrap(said, SHORT), *(f"– {line}" for line in wrap(", ".join(inside), SHORT))]


def ways(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the arrows: each the place on every floor from a room down to one it imports."""

    @cache
    def below(name: str) -> frozenset[str]:
        return frozenset(imports[name]).union(*(below(other) for other in imports[name]))

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in imports if name in imports[other]), default=-1)

    arrows = [
        (name, other)
        for name, others in sorted(imports.items())
        for other in sorted(others)
        if not any(other in below(via) for via in others)
    ]
    return [
        [
            f"{floor(a)} {a}",
            *(f"{n} {a}>{b}" for n in range(floor(a) + 1, floor(b))),
            f"{floor(b)} {b}",
        ]
        for a, b in arrows
    ]


def floors(chains: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the places of each floor from the top, below what they are reached from."""
    places = sorted({place for chain in chains for place in chain})
    rows = [
        [place for place in places if place.split()[0] == str(number)]
        for number in range(1 + max(int(place.split()[0]) for place in places))
    ]
    at: dict[str, float] = {}
    for row in rows:
        above = {p: [at[a] for c in chains for a, b in pairwise(c) if b == p] for p in row}
        row.sort(key=lambda p: (sum(above[p]) / (len(above[p]) or 1), p))
        at |= {place: (index + 1) / (len(row) + 1) for index, place in enumerate(row)}
    return rows


def draw() -> str:
    """Return the drawing as SVG."""
    inside, imports = rooms()
    chains = ways(imports)
    boxes, ends, y = [], {}, 8.0
    for row in floors(chains):
        names = [place.partition(" ")[2] for place in row]
        texts = [text_of(name, inside[name]) if name in imports else [] for name in names]
        sizes = [
            0.0 if ">" in name else 24 + LETTER * max(map(len, [name + "  ", *text]))
            for name, text in zip(names, texts, strict=True)
        ]
        height = 14.0 + LINE * (1 + max(map(len, texts)))
        space = (WIDTH - sum(sizes)) / (len(row) + 1)
        x = space
        for place, name, text, size in zip(row, names, texts, sizes, strict=True):
            ends[place] = (x + size / 2, y, y + height)
            if size:
                boxes.append(box(name, text, x, y, size, height))
            x += size + space
        y += height + GAP
    lines = [way([ends[place] for place in chain]) for chain in chains]
    height = y - GAP + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img"><title>The rooms of memopt</title>'
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>\n'
        f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>\n'
        + "\n".join([*lines, *boxes])
        + "\n</svg>\n"
    )


def box(name: str, text: Sequence[str], x: float, y: float, width: float, height: float) -> str:
    """Return a room with its name and what is in it."""
    middle = x + width / 2
    lines = [f'<text class="name" x="{middle:.0f}" y="{y + 18:.0f}">{escape(name)}</text>']
    lines += [
        f'<text x="{middle:.0f}" y="{y + 18 + LINE * number:.0f}">{escape(line)}</text>'
        for number, line in enumerate(text, start=1)
    ]
    return (
        f'<rect class="room" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'rx="6"/>{"".join(lines)}'
    )


def way(places: Sequence[tuple[float, float, float]]) -> str:
    """Return the arrow through places (middle, top, bottom): down past each, curved between."""
    parts = [f"M{places[0][0]:.0f} {places[0][2]:.0f}"]
    for (x, _, bottom), (end, top, passed) in pairwise(places):
        half = (bottom + top) / 2
        parts.append(f"C{x:.0f} {half:.0f} {end:.0f} {half:.0f} {end:.0f} {top:.0f}")
        parts.append(f"V{passed:.0f}")
    return f'<path class="way" d="{"".join(parts[:-1])}" marker-end="url(#head)"/>'


def main() -> None:
    """Write the drawing; with --check only compare."""
    text = draw()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit("docs/rooms.svg is out of date; run: python docs/make_rooms.py")


if __name__ == "__main__":
    main()
