"""The ``memopt`` command: a table of commands, and the only place that prints errors.

Exit codes: 0 done, 1 the work failed (any MemoptError, a full disk), 2 wrong usage or
configuration, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import atexit
import errno
import importlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from memopt import __version__
from memopt.errors import MemoptError
from memopt.visible import VisibleLog, visible

# Each module has an attribute of the command's name (a function) or `app` (a group). The modules
# import typer only; the library behind a command is imported inside the command.
COMMANDS: tuple[str, ...] = (
    "convert",
    "import",
    "export",
    "quantize",
    "optimize",
    "embed",
    "job",
    "classify",
    "rerank",
    "detect",
    "tag",
    "answer",
    "fill",
    "generate",
    "chat",
    "segments",
    "transcribe",
    "run",
    "bench",
    "pack",
    "encrypt",
    "info",
    "sync",
    "serve",
    "memory",
    "doctor",
    "config",
)

# A word that Python keeps for itself is no module's name.
_MODULES = {"import": "import_graph"}
_INTERRUPTED = "interrupted; nothing was left half-written"

app = typer.Typer(
    name="memopt",
    help="Turn a model into the fastest file that still gives the right answers, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memopt {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML settings [default: ./memopt.yaml].")
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback when a command fails.")
    ] = False,
) -> None:
    if config:
        os.environ["MEMOPT_CONFIG"] = str(config)
    if debug:
        os.environ["MEMOPT_DEBUG"] = "1"


def _register() -> None:
    for name in COMMANDS:
        attribute = _MODULES.get(name, name)
        module = importlib.import_module(f"memopt.commands.{attribute}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, attribute))


_register()


def main() -> None:
    """Run the command line and turn every expected failure into one line and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    if logging.lastResort:
        logging.lastResort.setFormatter(VisibleLog())
    try:
        app(_debug_anywhere(sys.argv[1:]), prog_name="memopt")
    except MemoptError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        # Modules of weights, memory and sync import pyarrow, which encoding does without.
        if error.name is None or error.name.partition(".")[0] not in ("pyarrow", "ml_dtypes"):
            raise
        from memopt.extras import pip_command

        _fail(f"{error.name} is needed here and not installed; run: {pip_command('arrow')}", 1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(f"no space left on the disk{where}; free some and run the command again", 1)
        if not error.filename or isinstance(error, BrokenPipeError):
            raise
        _fail(f"{error.strerror}{where}; give another path", 1)
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130)
    except SystemExit as error:
        # typer turns Ctrl-C inside a command into this, without a word.
        if error.code == 130:
            told = str(getattr(error.__context__, "__cause__", None) or "")
            _fail(f"interrupted; {told}" if told else _INTERRUPTED, 130)
        raise
    finally:
        atexit.register(_leave)


def _debug_anywhere(arguments: list[str]) -> list[str]:
    """Move --debug to the front: it belongs to memopt, but is thought of after a command failed."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:end]:
        return arguments
    return ["--debug", *(a for a in arguments[:end] if a != "--debug"), *arguments[end:]]


def _stop(number: int, frame: object) -> None:
    # What `docker stop` and `kill` send: unwinding removes what was being written.
    sys.exit(128 + number)


def _leave() -> None:
    # Taking torch down lasts a second, in which Python has put the default handlers back: a signal
    # would make a command that has done its work look killed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Where Ctrl-C met code compiled from a string (every dataclass is), CPython holds it to be
    # unhandled, caught or not, and ends `python -m` by the signal, past the exit code; the next
    # such code makes it forget (run_eval_code_obj of its pythonrun.c).
    exec("")


def _fail(message: str, code: int) -> None:
    if os.environ.get("MEMOPT_DEBUG"):
        import traceback

        print(visible(traceback.format_exc()), end="", file=sys.stderr)
    line = visible(" ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
