"""Messages to a prompt by the bundle's own template, which is a stranger's program: sandboxed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from memopt.bundle import read_json
from memopt.errors import BundleError, InputError, first_line
from memopt.extras import require

Message = Mapping[str, Any]


class ChatPrompt(str):
    """A prompt whose special tokens are all written out: the tokenizer adds none."""

    __slots__ = ()


_ROLES = ("system", "user", "assistant", "tool")


def read_template(folder: Path) -> str | None:
    """Return a bundle's chat template, the default one where there are several; None without one.

    It is ``chat_template.jinja``, or ``chat_template`` of ``tokenizer_config.json``.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(f"{file} is no UTF-8: {first_line(error)}") from error
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    stated = read_json(config).get("chat_template")
    if isinstance(stated, list):
        named = {e.get("name"): e.get("template") for e in stated if isinstance(e, dict)}
        stated = named.get("default")
    return stated if isinstance(stated, str) else None


def prompt_of(
    folder: Path, messages: Sequence[Message], special: Mapping[str, str], *, reply: bool = True
) -> str:
    """Return the prompt of a conversation.

    Args:
        folder: the bundle's.
        messages: each with ``role`` (system, user, assistant, tool) and ``content``.
        special: the tokens that templates name: ``bos_token``, ``eos_token``, ...
        reply: end with what begins the assistant's answer.

    Raises:
        InputError: a message without role or content, or one that the template refuses.
        BundleError: there is no template, or it is broken, or it reaches for what it must not.
    """
    template = read_template(folder)
    if template is None:
        raise BundleError(
            f"{folder} has no chat template", fix="use generate() with a prompt of your own"
        )
    check(messages)
    jinja2 = require("jinja2", extra="chat", why="write a chat by its template")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise InputError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    try:
        made = environment.from_string(template)
        return str(
            made.render(messages=[*messages], add_generation_prompt=reply, tools=None, **special)
        )
    except InputError:
        raise
    except jinja2.exceptions.SecurityError as error:
        raise BundleError(
            f"the chat template of {folder} reaches for what it must not: {first_line(error)}"
        ) from error
    except Exception as error:  # a stranger's program may raise anything
        raise BundleError(
            f"the chat template of {folder} does not work on these messages: {first_line(error)}"
        ) from error


def check(messages: object) -> None:
    """Refuse what is no conversation.

    >>> check("hello")
    Traceback (most recent call last):
    ...
    memopt.errors.InputError: messages is str; give a list of {"role": "user", "content": "..."}
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(
            f"messages is {type(messages).__name__}",
            fix='give a list of {"role": "user", "content": "..."}',
        )
    if not messages:
        raise InputError("there are no messages", fix="give at least one of a user")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            raise InputError(
                f"message {number} has role {role!r}", fix=f"give one of {', '.join(_ROLES)}"
            )
        if "content" not in message:
            raise InputError(f"message {number} has no content")
        content = message["content"]
        # An assistant that only calls tools says nothing; what else is no text would be printed.
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise InputError(
                f"message {number} has content of {type(content).__name__}", fix="give text"
            )
