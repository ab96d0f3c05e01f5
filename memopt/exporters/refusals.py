"""What nobody has foreseen while a model is exported, in one line that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, ExportError, MemoptError
from memopt.progress import Step
from memopt.runtimes.torch_model import LoadedModel

_log = logging.getLogger(__name__)


def need_one_graph(bundle: Bundle, what: str) -> None:
    """Refuse a bundle whose text is written by two graphs, where ``what`` is made of one.

    Raises:
        ConfigurationError: it is a model of encoder and decoder.
    """
    if bundle.task.answer == "text":
        raise ConfigurationError(
            f"{bundle.path} has task {bundle.manifest.task}: {what} is not there for a model of "
            "encoder and decoder",
            fix="run it in float; --precision fp16 of memopt export halves its files",
        )


@contextmanager
def foreseen(kind: str, say: Step) -> Iterator[Step]:
    """Yield ``say``, and name the model and the step of what nobody has foreseen.

    Models are built in more ways than are known here, and a traceback tells nobody what to do.
    """
    steps = ["begin"]

    def step(line: str) -> None:
        steps.append(line)
        say(line)

    try:
        yield step
    except (MemoptError, OSError, MemoryError):
        raise
    except Exception as error:
        _log.info("%s at %r: %r", kind, steps[-1], error)
        raise ExportError(
            f"{kind} is built in a way that memopt does not know: {type(error).__name__} at the "
            f"step {steps[-1]!r}",
            fix="nothing was written; memopt --debug export shows where, which is worth a report",
        ) from error


@contextmanager
def refused(loaded: LoadedModel, task: str) -> Iterator[None]:
    """Say in one line that a model's own code fails when it is called as ``task`` asks.

    What it says itself is about arguments that nobody has seen; it is logged, and --debug shows it.
    """
    try:
        yield
    except MemoptError:
        raise
    except Exception as error:
        kind = loaded.config.model_type
        _log.info("%s as %s: %r", kind, task, error)
        raise ExportError(
            f"{kind} cannot be run as {task}: transformers' code of it fails on such input alone "
            f"({type(error).__name__})",
            fix="choose another --task, or an encoder of text, pictures or sound; memopt --debug "
            "shows what it says",
        ) from error
