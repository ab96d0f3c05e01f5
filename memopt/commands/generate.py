"""``memopt generate``: text from a language model, as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memopt.runtimes.engines.writer import Generation, Pieces

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
Overflow = Annotated[
    str, typer.Option(help="Past the context: refuse the prompt, or slide: the oldest go.")
]
Keep = Annotated[int, typer.Option(min=0, help="First tokens that do not slide out.")]
Speculate = Annotated[
    int, typer.Option(min=0, help="Tokens proposed at once from what was there before; 0 is none.")
]
Inexact = Annotated[
    bool,
    typer.Option("--inexact", help="Take shortcuts where they make it another text: int4."),
]
SchemaFile = Annotated[
    Path | None, typer.Option("--schema", help="JSON schema that the answer keeps to.")
]
Regex = Annotated[str | None, typer.Option(help="Regular expression of the whole answer.")]
GrammarFile = Annotated[
    Path | None, typer.Option("--grammar", help="Grammar of the answer, Lark's or GBNF.")
]
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
    context: Overflow = "refuse",
    keep: Keep = 4,
    speculate: Speculate = 0,
    inexact: Inexact = False,
    schema: SchemaFile = None,
    regex: Regex = None,
    grammar: GrammarFile = None,
    device: Device = None,
    variant: Chosen = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write what follows prompts; with a T5, BART or Marian, what it makes of them."""
    from memopt.commands.answers import show
    from memopt.errors import InputError
    from memopt.runtimes.configured import open_configured

    options: dict[str, Any] = {
        **sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        "max_new_tokens": max_tokens,
        "stop": stop or (),
        "max_context": max_context,
        "context": context,
        "keep": keep,
        "speculate": speculate,
        "exact": not inexact,
        "schema": text_of(schema),
        "regex": regex,
        "grammar": text_of(grammar),
    }
    with open_configured(opener(threads), bundle, device, variant) as engine:
        if as_json:
            answers = engine.generate(prompts, **options)
            show(zip(prompts, answers, strict=True), None, True, lambda _: None)
        else:
            answers = (printed(engine.stream(prompt, **options)) for prompt in prompts)
        for answer in answers:
            if answer.finish != "stop" and (schema or regex or grammar):
                raise InputError(
                    f"the answer was cut after {len(answer.tokens)} tokens: it is not of its form",
                    fix="give more --max-tokens",
                )


def printed(pieces: Pieces, *, quiet: bool = False) -> Generation:
    """Print pieces as they come, and a line's end; return what was written."""
    from memopt.commands.console import echo

    say = (lambda *_, **__: None) if quiet else echo
    try:
        while True:
            say(next(pieces), nl=False)  # typer flushes what it prints
    except StopIteration as end:
        say("")
        found: Generation = end.value
        return found


def text_of(file: Path | None) -> str | None:
    """Return what a file says; None of none.

    Raises:
        InputError: it cannot be read.
    """
    from memopt.errors import InputError, first_line

    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {first_line(error)}") from error


def opener(threads: int | None) -> Any:
    """Return what opens a bundle that writes, by its task, on so many threads."""
    from functools import partial

    return partial(_writer, threads=threads)


def _writer(bundle: Path, *arguments: Any, **named: Any) -> Any:
    from memopt.bundle import open_bundle
    from memopt.runtimes.engines.generator import Generator
    from memopt.runtimes.engines.rewriter import Rewriter

    opened = open_bundle(bundle)
    engine = Rewriter if opened.manifest.task in Rewriter.tasks else Generator
    return engine(opened, *arguments, **named)


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
