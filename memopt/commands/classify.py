"""``memopt classify``: labels with scores for texts, pairs, pictures or sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memopt.errors import ConfigurationError


def classify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Texts, or paths of pictures or sounds.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--input", "-i", help=".txt, .jsonl, .csv, .parquet, a folder, - for stdin."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column to read of a file.")] = None,
    pair: Annotated[
        str | None, typer.Option(help="A second text for each input, of a model of pairs.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels of your own, comma-separated (NLI, CLIP).")
    ] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Labels shown of each input.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .jsonl file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Classify texts, pictures or sounds: the model's labels, or your own (NLI, CLIP, SigLIP)."""
    from memopt.bundle import open_bundle
    from memopt.commands.answers import answered, given, show
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.classifier import Classifier
    from memopt.runtimes.engines.zero_shot import ZeroShotClassifier
    from memopt.runtimes.towers import other_task

    given_labels = labels.split(",") if labels is not None else []
    own = None if labels is None else [label.strip() for label in given_labels if label.strip()]
    if own is not None and other_task(open_bundle(bundle)):
        if pair is not None:
            raise ConfigurationError("--pair is of texts", fix="leave it out")
        with open_configured(ZeroShotClassifier, bundle, device, variant) as towers:
            found = answered(
                given(inputs or [], source, column, "image"),
                lambda items: towers.classify(items, own, top=top),
            )
            show(found, output, as_json, _print)
        return
    with open_configured(Classifier, bundle, device, variant) as engine:
        modality = engine.bundle.manifest.modality

        def answer(items: list[Any]) -> list[Any]:
            values = items if pair is None else [(item, pair) for item in items]
            return engine.classify(values, top=top, labels=own)

        rows = answered(given(inputs or [], source, column, modality), answer)
        show(rows, output, as_json, _print)


def _print(rows: list[tuple[str, Any]]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    table = Table("input", "label", "score", "then")
    for name, found in rows:
        rest = zip(found.labels[1:4], found.scores[1:4], strict=True)
        others = ", ".join(f"{label} {score:.3f}" for label, score in rest)
        table.add_row(name[:60], found.label, f"{found.scores[0]:.3f}", others)
    stdout(120).print(table)
