"""``memopt memory train-joint``: pairs of pictures, sounds and texts to a joint layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memopt.commands.console import echo, progress, stderr, stdout

if TYPE_CHECKING:
    from memopt.bundle import Bundle
    from memopt.joint.model import Encoder


def train_joint(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Parquet: vision_embedding or vision_data, audio_embedding or audio_data, "
            "text_embedding or text; optionally group."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="New folder for the bundle.")],
    vision: Annotated[str | None, typer.Option(help="Bundle that encodes vision_data.")] = None,
    audio: Annotated[str | None, typer.Option(help="Bundle that encodes audio_data.")] = None,
    text: Annotated[str | None, typer.Option(help="Bundle that encodes text.")] = None,
    dim: Annotated[int, typer.Option(help="Length of the joint vector.")] = 768,
    hidden: Annotated[int, typer.Option(help="Width of the fusion MLP.")] = 1024,
    attention: Annotated[bool, typer.Option(help="Modalities attend to each other.")] = True,
    epochs: Annotated[int, typer.Option(help="Passes over the pairs, at most.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="AdamW's.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a joint layer, write it as a bundle, export it and check the graph against torch."""
    from rich.progress import BarColumn, TimeElapsedColumn

    from memopt.joint.bundle import check_free, make_joint_bundle
    from memopt.joint.model import JointConfig
    from memopt.joint.pairs import read_pairs
    from memopt.joint.train import JointRecipe

    check_free(output)
    recipe = JointRecipe(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
    )
    encoders = _encoders(vision=vision, audio=audio, text=text)
    with stderr().status("read the pairs"):
        rows = read_pairs(pairs, encoders)
    # Eight heads as in Vaswani et al., or the most that divide an unusual width.
    heads = next(heads for heads in range(8, 0, -1) if dim % heads == 0)
    config = JointConfig.from_dict(
        {**rows.dims, "joint": dim, "hidden": hidden, "attention": attention, "heads": heads}
    )
    told = "epoch {task.completed}, held-out loss {task.fields[loss]:.4f}"
    columns = ("train", BarColumn(), told, TimeElapsedColumn())
    with progress(*columns, total=epochs, loss=float("nan")) as step:
        made = make_joint_bundle(
            rows,
            output,
            config=config,
            recipe=recipe,
            encoders={name: encoder.model_id for name, encoder in encoders.items()},
            source=pairs,
            on_epoch=lambda epoch, _, loss: step(completed=epoch, loss=loss),
        )
    report = made.manifest.history[0]
    if as_json:
        echo(json.dumps({"bundle": str(made.path), **report}, indent=1))
    else:
        _print(made, report)


def _encoders(**bundles: str | None) -> dict[str, Encoder]:
    from memopt.memory.model.encoders import AudioEncoder, TextEncoder, VisionEncoder
    from memopt.runtimes.engine import ArrowEngine

    kinds = {"vision": VisionEncoder, "audio": AudioEncoder, "text": TextEncoder}
    # What is trained on and judged by comes from one variant, however few rows there are.
    engines = {
        name: ArrowEngine(b, one_variant=True) for name, b in bundles.items() if b is not None
    }
    return {name: kinds[name](engine, engine.dimension) for name, engine in engines.items()}


def _print(bundle: Bundle, report: Any) -> None:
    from rich.table import Table

    console = stdout(100)
    table = Table("direction", "rows", "recall@1", "chance", title="held-out rows")
    for direction, found in report["recall_at_1"].items():
        table.add_row(
            direction, str(found["rows"]), f"{found['recall']:.3f}", f"{found['chance']:.3f}"
        )
    console.print(table)
    console.print(
        f"{report['rows']} rows ({report['rows_held_out']} held out, {report['rows_skipped']} "
        f"skipped), best epoch {report['best_epoch']} of {report['epochs']}, held-out loss "
        f"{report['held_out_loss_before']:.3f} -> {report['held_out_loss']:.3f}"
    )
    console.print(f"wrote {bundle.path}")
