"""``memopt generate``: text from a language model, as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

Bundled = Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="Of the softmax; 0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw among so many of the likeliest; 0 is all.")]
TopP = Annotated[float, typer.Option(help="Draw among the likeliest with this sum.")]
MinP = Annotated[float, typer.Option(help="Least share of the likeliest token's probability.")]
Penalty = Annotated[float, typer.Option(help="Above 1 a token is less likely the second time.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws; the same answer each time.")]
Context = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")]
Device = Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")]
Chosen = Annotated[str, typer.Option("--variant", help="Variant of the bundle.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on a CPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


def generate(
    bundle: Bundled,
    prompts: Annotated[list[str], typer.Argument(help="Texts to go on from.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    max_context: Context = None,
    device: Device = None,
    variant: Chosen = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write what follows a prompt, or each of several."""
    from memopt.commands.answers import show
    from memopt.runtimes.configured import open_configured

    options: dict[str, Any] = {
        **sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        "max_new_tokens": max_tokens,
        "stop": stop or (),
        "max_context": max_context,
    }
    with open_configured(opener(threads), bundle, device, variant) as engine:
        if as_json:
            rows = zip(prompts, engine.generate(prompts, **options), strict=True)
            show(rows, None, True, lambda _: None)
            return
        for prompt in prompts:
            printed(engine.stream(prompt, **options))


def printed(pieces: Iterable[str]) -> str:
    """Print pieces as they come, and a line's end; return them all."""
    from memopt.commands.console import echo

    given = ""
    for piece in pieces:
        echo(piece, nl=False)  # typer flushes what it prints
        given += piece
    echo("")
    return given


def opener(threads: int | None) -> Any:
    """Return what opens a Generator on so many threads."""
    from functools import partial

    from memopt.runtimes.engines.generator import Generator

    return partial(Generator, threads=threads)


def sampling(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int | None
) -> dict[str, Any]:
    """Return how tokens are chosen, by the names of :class:`Sampling`."""
    return {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
        "seed": seed,
    }
