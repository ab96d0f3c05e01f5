"""``memopt chat``: a conversation with a language model, by its own template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from memopt.commands.generate import (
    AsJson,
    Bundled,
    Chosen,
    Context,
    Device,
    MaxTokens,
    MinP,
    Overflow,
    Penalty,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    opener,
    printed,
    sampling,
)


def chat(
    bundle: Bundled,
    messages: Annotated[
        list[str] | None, typer.Argument(help="What to say; without it, you are asked.")
    ] = None,
    system: Annotated[str, typer.Option(help="What the assistant is told first.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    max_context: Context = None,
    context: Overflow = "refuse",
    device: Device = None,
    variant: Chosen = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Talk with a model; an empty line, Ctrl-D or Ctrl-C ends it."""
    from memopt.commands.console import echo
    from memopt.runtimes.configured import open_configured
    from memopt.visible import json_text

    options: dict[str, Any] = {
        **sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        "max_new_tokens": max_tokens,
        "max_context": max_context,
        "context": context,
        "exact": False,  # nobody compares a conversation: what was said is not read again
    }
    told: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with open_configured(opener(threads), bundle, device, variant) as engine:
        for said in messages or _asked():
            told.append({"role": "user", "content": said})
            pieces = engine.stream(engine.chat_prompt(told), keep=engine.opening(told), **options)
            answer = printed(pieces, quiet=as_json)
            told.append({"role": "assistant", "content": answer.text})
            if as_json:
                row = {"input": said, "answer": answer.text, "finish": answer.finish}
                echo(json_text(row, indent=None))


def _asked() -> Iterator[str]:
    """Yield what is typed, or the lines of a pipe, until there is no more."""
    import sys

    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not said:
            return
        yield said
