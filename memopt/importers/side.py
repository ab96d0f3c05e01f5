"""The small files of an imported graph: config, tokenizer, front ends' settings, their limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import read_json
from memopt.errors import ExportError
from memopt.importers.graph_file import GraphFile
from memopt.positions import position_limit
from memopt.weights.modules import MODULES
from memopt.weights.sentence import Sentence, read_sentence
from memopt.weights.sources import SIDE_FILES
from memopt.weights.tokenizer import VOCABULARIES, write_tokenizer

# transformers writes a huge number where a tokenizer has no limit.
_NO_LIMIT = 10**9
# A tokenizer of fewer of a graph's rows may be another model's; tables are padded by some percent.
_SHARE = 0.9
_TOKENIZER = ("tokenizer.json", *VOCABULARIES)
_TOKENIZER_FILES = (
    *(*_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "merges.txt",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Where the files beside a graph are.

    Attributes:
        folders: searched in this order; the first that has a file gives it.
        tokenizer: the folder of the tokenizer, None where there is none.
        config: what config.json says, {} where there is none.
        sentence: the sentence-transformers pipeline, None where there is none.
    """

    folders: tuple[Path, ...]
    tokenizer: Path | None
    config: Mapping[str, Any]
    sentence: Sentence | None

    @property
    def stated_limit(self) -> int | None:
        """How many tokens the files say that the model takes."""
        stated: Any = self.sentence.max_length if self.sentence else None
        path = self.tokenizer / "tokenizer_config.json" if self.tokenizer else None
        if stated is None and path is not None and path.is_file():
            stated = read_json(path).get("model_max_length")
        limits = [position_limit(self.config)]
        if isinstance(stated, int | float) and 0 < stated < _NO_LIMIT:
            limits.append(int(stated))
        return min((limit for limit in limits if limit), default=None)


def read_side(
    folders: Sequence[Path], tokenizer: str | Path | None, config: str | Path | None
) -> Side:
    """Find the files beside a graph.

    Args:
        folders: of the graph, the nearest first.
        tokenizer: the folder of a tokenizer that lies elsewhere.
        config: config.json, or the folder of it, that lies elsewhere.

    Raises:
        ExportError: what was named is not there.
    """
    given = _folder("--tokenizer", tokenizer)
    settings = _folder("--config", config)
    places = tuple(dict.fromkeys(p for p in (settings, *folders) if p is not None))
    if given is not None and not _has(given, _TOKENIZER):
        raise ExportError(
            f"--tokenizer {str(tokenizer)!r} has no tokenizer.json, nor a vocabulary",
            fix="give the folder that the model's tokenizer was saved in",
        )
    found = given or next((place for place in places if _has(place, _TOKENIZER)), None)
    # What lies beside a tokenizer from elsewhere is only asked where nothing nearer is.
    configs = [place / "config.json" for place in (*places, *([found] if found else []))]
    file = Path(config) if config is not None and Path(config).is_file() else None
    file = file or next((path for path in configs if path.is_file()), None)
    pipelines = [p for p in folders if (p / MODULES).is_file()]
    return Side(
        folders=places,
        tokenizer=found,
        config=read_json(file) if file else {},
        sentence=read_sentence(pipelines[0]) if pipelines else None,
    )


def _folder(option: str, value: str | Path | None) -> Path | None:
    if value is None:
        return None
    path = Path(value)
    if not path.exists():
        raise ExportError(f"{option} {str(value)!r} is not there", fix="check the path")
    return path.parent if path.is_file() else path


def _has(folder: Path, patterns: Sequence[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def copy_side(side: Side, folder: Path) -> None:
    """Copy the small files into a bundle's folder; the first of a name wins."""
    own = [(place, SIDE_FILES) for place in side.folders]
    # A tokenizer may come from elsewhere: of that folder only what is the tokenizer's.
    places = [(side.tokenizer, _TOKENIZER_FILES), *own] if side.tokenizer else own
    for place, patterns in places:
        for pattern in patterns:
            for path in sorted(place.glob(pattern)):
                target = folder / path.name
                if path.is_file() and not target.exists() and path.name != "config.json":
                    # Read and written anew: a hub cache holds links, which runtimes refuse.
                    target.write_bytes(path.read_bytes())
    for module in side.sentence.modules[1:] if side.sentence else ():
        for place in side.folders:
            path = place / module.path / "config.json"
            if module.path and path.is_file():
                (folder / module.path).mkdir(parents=True, exist_ok=True)
                (folder / module.path / "config.json").write_bytes(path.read_bytes())
                break


def write_config(side: Side, folder: Path, graph: GraphFile) -> None:
    """Write config.json with how many ids the graph knows: what is beyond would be made up.

    Raises:
        ExportError: the config is of another model.
    """
    config = dict(side.config)
    stated = config.get("vocab_size")
    if isinstance(stated, int) and graph.rows is not None and stated > graph.rows:
        raise ExportError(
            f"config.json says vocab_size {stated}, and {graph.path} has a table of {graph.rows}",
            fix="give the config.json that the graph was made with",
        )
    if graph.rows is not None:
        config["vocab_size"] = graph.rows
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def add_tokenizer(side: Side, folder: Path, max_length: int | None, graph: GraphFile) -> list[str]:
    """Write tokenizer.json and see that its ids are the graph's; return lines for the user.

    Raises:
        ExportError: there is no tokenizer, or it has ids that the graph has no row of.
    """
    if side.tokenizer is None:
        raise ExportError(
            f"{graph.path} takes text, and no tokenizer lies beside it",
            fix="say --tokenizer DIR, the folder of the tokenizer that it was trained with",
        )
    told = write_tokenizer(side.tokenizer, folder, max_length, side.sentence)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(told[0] if told else f"{side.tokenizer} has no tokenizer.json")
    highest = max(_vocabulary(path).values(), default=-1)
    if graph.rows is not None and highest >= graph.rows:
        raise ExportError(
            f"the tokenizer of {side.tokenizer} has ids up to {highest}, and {graph.path} has a "
            f"table of {graph.rows}",
            fix="give the tokenizer that the graph was made with",
        )
    if graph.rows is not None and highest + 1 < _SHARE * graph.rows:
        told.append(
            f"the tokenizer of {side.tokenizer} has {highest + 1} of the graph's {graph.rows} ids: "
            "is it that graph's?"
        )
    return told


def _vocabulary(path: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    return vocabulary
