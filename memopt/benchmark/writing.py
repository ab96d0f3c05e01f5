"""How fast a language model reads a prompt and writes behind it, each measurement in a process.

    python -m memopt.benchmark.writing SPEC

is such a process: it opens the engine, warms it, reads a prompt it has not seen, then writes behind
it. Rounds go over all contenders in turn, so that a busy moment does not hit one of them alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from memopt.benchmark.workload import default_inputs
from memopt.bundle import Bundle, open_bundle
from memopt.errors import DeviceError, InputError
from memopt.positions import position_limit
from memopt.progress import Step, silent
from memopt.runtimes.engines.generator import Generator

# Tokens of the prompt and of what is written; a model made for shorter texts gets less of both.
PROMPT, NEW = 256, 32
READ_PER_WRITTEN = 4  # tokens of a prompt for each that is written, in a mix
# Seconds after which a process is given up: a hundred times what a small model needs.
PATIENCE = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingSpeed:
    """What was measured of one variant: medians over the rounds.

    ``first_token_seconds`` is from the call to the first token behind the whole prompt.
    """

    variant: str
    device: str
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    load_seconds: float
    rss_mb: float
    rounds_seconds: tuple[float, ...]  # of what was asked to be compared: a token, by round

    @property
    def label(self) -> str:
        """Variant and threads."""
        return self.variant if self.threads is None else f"{self.variant} x{self.threads}"

    def speed(self, prefer: str) -> float:
        """Tokens per second: see :func:`preferred`."""
        return preferred(self.prefill_tokens_per_second, self.decode_tokens_per_second, prefer)


def preferred(prefill: float, decode: float, prefer: str) -> float:
    """Return the speed that counts: of tokens read (``prefill``), written (``decode``) or both.

    ``mix`` is of requests as chats have them: four tokens are read for each that is written.

    >>> round(preferred(400.0, 50.0, "mix"), 1)
    166.7
    """
    if prefer == "mix":
        return (READ_PER_WRITTEN + 1) / (READ_PER_WRITTEN / prefill + 1 / decode)
    return prefill if prefer == "prefill" else decode


@dataclass(frozen=True, slots=True)
class Typist:
    """A contender: a variant on a device with so many threads, None for what the engine takes."""

    variant: str
    device: str = "auto"
    threads: int | None = None


def measure_writers(
    bundle: Bundle,
    writers: Sequence[Typist],
    *,
    rounds: int = 3,
    text: str = "",
    prefer: str = "decode",
    deadline: float | None = None,
    failures: dict[int, str] | None = None,
    step: Step = silent,
) -> list[WritingSpeed]:
    """Measure contenders in turn, ``rounds`` times, fewer past ``deadline`` (time.monotonic).

    Args:
        text: what the prompt is made of; "" takes seeded sentences.
        prefer: whose seconds a token ``rounds_seconds`` are: see :func:`preferred`.
        failures: gets the number of a contender that cannot run, and why; without it that raises.

    Raises:
        DeviceError: a contender cannot run.
    """
    text = text or " ".join(default_inputs(bundle.manifest, PROMPT))
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in range(len(writers))}
    lost = {} if failures is None else failures
    for turn in range(rounds):
        if turn and deadline is not None and time.monotonic() > deadline:
            break
        for number, writer in enumerate(writers):
            if number in lost:
                continue
            step(f"round {turn + 1} of {rounds}: {writer.variant}")
            try:
                found[number].append(_process(bundle.path, writer, text, turn))
            except DeviceError as error:
                if failures is None:
                    raise
                lost[number] = error.problem
    return [
        _median(writers[n], made, prefer) for n, made in found.items() if made and n not in lost
    ]


def _process(path: Path, writer: Typist, text: str, turn: int) -> dict[str, Any]:
    spec = {"path": str(path.absolute()), **asdict(writer), "text": text, "turn": turn}
    command = [sys.executable, "-m", "memopt.benchmark.writing"]
    try:
        ended = subprocess.run(
            command, input=json.dumps(spec), capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{writer.variant} took more than {PATIENCE:.0f} s") from error
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit {ended.returncode}"]
        raise DeviceError(f"{writer.variant} cannot be measured: {lines[-1][:300]}")
    made: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return made


def _median(writer: Typist, made: Sequence[Mapping[str, Any]], prefer: str) -> WritingSpeed:
    def of(name: str) -> float:
        return float(median(float(m[name]) for m in made))

    last = made[-1]
    speeds = [preferred(float(m["prefill"]), float(m["decode"]), prefer) for m in made]
    return WritingSpeed(
        variant=str(last["variant"]),
        device=str(last["device"]),
        threads=writer.threads,
        prompt_tokens=int(last["prompt_tokens"]),
        new_tokens=int(last["new_tokens"]),
        prefill_tokens_per_second=of("prefill"),
        decode_tokens_per_second=of("decode"),
        first_token_seconds=of("first_token_seconds"),
        load_seconds=of("load_seconds"),
        rss_mb=of("rss_mb"),
        rounds_seconds=tuple(1 / speed for speed in speeds),
    )


def bench_writing(
    path: str | Path,
    *,
    variants: Sequence[str] | None = None,
    device: str = "auto",
    text: Path | None = None,
    rounds: int = 3,
    on_step: Step = silent,
) -> list[WritingSpeed]:
    """Measure variants of a language model's bundle.

    Args:
        variants: names, or "auto"; None takes all that passed their gate.
        text: a file that the prompt is made of.

    Raises:
        InputError: the file cannot be read, or is empty.
        BundleError, DeviceError: as of :class:`Generator`.
    """
    bundle = open_bundle(path)
    names = variants or [v.name for v in bundle.manifest.variants.values() if v.passed]
    for name in names:
        if name != "auto":
            bundle.variant(name)
    given = ""
    if text is not None:
        try:
            given = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text} cannot be read as text: {error}") from error
        if not given.strip():
            raise InputError(f"{text} is empty", fix="give a text to begin with")
    writers = [Typist(name, device) for name in names]
    return measure_writers(bundle, writers, rounds=rounds, text=given, step=on_step)


def speed_table(records: Sequence[WritingSpeed]) -> Any:
    """Return a rich table, ratios against the first record."""
    from rich.table import Table

    head = ("variant", "device", "prefill tok/s", "decode tok/s", "vs first")
    made = Table(*head, "first token s", "load s", "RSS MB")
    for record in records:
        made.add_row(
            record.label,
            record.device,
            f"{record.prefill_tokens_per_second:,.0f}",
            f"{record.decode_tokens_per_second:,.1f}",
            f"{record.decode_tokens_per_second / records[0].decode_tokens_per_second:.2f}x",
            f"{record.first_token_seconds:.3f}",
            f"{record.load_seconds:.2f}",
            f"{record.rss_mb:.0f}",
        )
    return made


def _measured(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Open an engine and measure it once; of each turn the prompt begins otherwise."""
    import psutil

    begin = time.perf_counter()
    with Generator(
        spec["path"], spec["device"], spec["variant"], strict=True, threads=spec["threads"]
    ) as engine:
        loaded = time.perf_counter() - begin
        stated = position_limit(dict(engine.bundle.config())) or 1 << 20
        size, new = min(PROMPT, stated // 2), min(NEW, stated // 4)
        prompt = _prompt(engine, f"{spec['turn']} {spec['text']}", size)
        engine.generate("1", max_new_tokens=2)  # opens what is opened late
        first, made = _timed(lambda: engine.generate(prompt, max_new_tokens=1)[0])
        # The prompt is there now, but for its last token: one step each for what is written. Not
        # exact: a variant that would read it anew is timed for writing alone too.
        after, more = _timed(lambda: engine.generate(prompt, max_new_tokens=new, exact=False)[0])
        info = engine.device_info()
    return {
        "variant": info["variant"],
        "device": info["device"],
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": len(more.tokens),
        "prefill": made.prompt_tokens / first,
        "decode": max(1, len(more.tokens)) / after,
        "first_token_seconds": first,
        "load_seconds": loaded,
        "rss_mb": psutil.Process().memory_info().rss / 2**20,
    }


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    made = run()
    return max(time.perf_counter() - begin, 1e-9), made


def _prompt(engine: Generator, text: str, tokens: int) -> str:
    """Return the beginning of a text, repeated where it is short, of about so many tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(engine.bundle.path / "tokenizer.json"))
    while len(ids := tokenizer.encode(text, add_special_tokens=False).ids) < tokens:
        text = f"{text} {text}"
    return str(tokenizer.decode(ids[:tokens]))


if __name__ == "__main__":
    print(json.dumps(_measured(json.load(sys.stdin))))
