"""``memopt sync``: adapter weights as signed deltas between machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

app = typer.Typer(
    help="Keep adapter weights in step between machines: signed deltas over Arrow Flight.",
    no_args_is_help=True,
)

Server = Annotated[str, typer.Option("--server", help="host:port of memopt sync serve.")]
Node = Annotated[str, typer.Option(help="This node's name.")]
Keys = Annotated[Path, typer.Option(help="Folder of certificates, keys and trust.json.")]
Plain = Annotated[bool, typer.Option("--plain", help="No TLS: loopback only.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow --plain off loopback.")]
State = Annotated[Path, typer.Option(help="Folder of this node's sync state.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dictionary = Annotated[Path | None, typer.Option(help="zstd dictionary, the same on both ends.")]
Codec = Annotated[
    str | None, typer.Option(help="lossless, fp16, int8, int4, topk or auto [default: int8].")
]
DEFAULT_STATE, DEFAULT_KEYS = Path(".memopt-sync"), Path("keys")


@app.command()
def serve(
    store: Annotated[Path, typer.Argument(help="Folder of the versions; made when absent.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8815,
    node: Node = "server",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    idle: Annotated[float, typer.Option(help="Close silent connections after seconds.")] = 60.0,
    keep: Annotated[int, typer.Option(help="Versions kept per adapter.")] = 200,
    dictionary: Dictionary = None,
) -> None:
    """Serve a store of versions until interrupted."""
    import hashlib
    import signal
    import threading

    from memopt.federation.server import SyncServer
    from memopt.federation.session import NodeFiles, read_dictionary

    files = NodeFiles(folder=keys, node=node)
    data = read_dictionary(dictionary)
    signer = files.folder / f"{node}.sign.key"
    stop = threading.Event()
    with SyncServer(
        store,
        trust=files.trust(),
        host=host,
        port=port,
        tls=files.tls(plain=plain),
        insecure=insecure,
        idle_seconds=idle,
        keep=keep,
        dictionaries={hashlib.sha256(data).hexdigest(): data} if data else None,
        key=files.signing_key() if signer.is_file() else None,
        node=node,
    ) as server:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        how = "plain" if plain else "TLS 1.3, client certificates"
        typer.echo(f"serving {store} on {host}:{server.port} ({how})")
        while not stop.wait(3600):
            pass


@app.command()
def push(
    weights: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet.")],
    adapter: Annotated[str, typer.Option(help="The adapter's id on the server.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    state: State = DEFAULT_STATE,
    codec: Codec = None,
    delta_threshold: Annotated[
        float | None, typer.Option(help="Relative mean change over which a tensor is sent.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of each tensor's update; codec auto.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Payload bound; codec auto.")] = None,
    topk: Annotated[float | None, typer.Option(help="Share of values topk sends.")] = None,
    level: Annotated[int | None, typer.Option(help="zstd level.")] = None,
    dictionary: Dictionary = None,
    full: Annotated[bool, typer.Option("--full", help="Send everything.")] = False,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Send what changed since the last push, signed."""
    from memopt.federation.adapters import read_weights
    from memopt.federation.session import (
        connect,
        delta_settings,
        opened,
        read_dictionary,
        report_json,
    )

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    data = read_dictionary(dictionary)
    settings = delta_settings(
        session.config,
        codec=codec,
        delta_threshold=delta_threshold,
        max_error=max_error,
        max_bytes=max_bytes,
        topk=topk,
        level=level,
        dictionary=data or None,
    )
    with opened(state, adapter, settings) as manager, _progress("pushing") as progress:
        report = session.client.push(
            manager,
            read_weights(weights),
            key=session.files.signing_key(),
            node=node,
            full=full or not session.config.enable_delta_sync,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(report_json(report)))
        return
    _table(
        f"pushed {adapter} version {report.sequence} ({report.kind})",
        [
            ("tensors sent / skipped", f"{report.sent} / {report.skipped}"),
            ("bytes", f"{report.payload_bytes:,} of {report.fp32_bytes:,} (full, fp32)"),
            ("saving against full fp32", f"{report.saving:.1%}"),
            ("error of the update", f"{report.error:.2e} (carried forward)"),
            ("time", f"{report.seconds:.2f} s in {report.attempts} attempt(s)"),
            ("resumed", f"{report.resumed_bytes:,} bytes were there already"),
        ],
    )


@app.command()
def pull(
    output: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet to write.")],
    adapter: Annotated[str, typer.Option(help="The adapter's id on the server.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    state: State = DEFAULT_STATE,
    dictionary: Dictionary = None,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the newest version, verify it and write it."""
    from memopt.federation.adapters import write_weights
    from memopt.federation.delta import DeltaSettings
    from memopt.federation.session import connect, opened, read_dictionary, report_json

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    data = read_dictionary(dictionary)
    with (
        opened(state, adapter, DeltaSettings(), data) as manager,
        _progress("pulling") as progress,
    ):
        report = session.client.pull(manager, trust=session.files.trust(), progress=progress)
        write_weights(output, report.weights)
    if as_json:
        typer.echo(json.dumps(report_json(report)))
        return
    _table(
        f"{adapter} is at version {report.sequence} ({report.kind})",
        [
            ("versions applied", str(report.versions)),
            ("bytes", f"{report.payload_bytes:,}"),
            ("weights", f"sha256 {report.weights_hash}"),
            ("time", f"{report.seconds:.2f} s in {report.attempts} attempt(s)"),
            ("written", str(output)),
        ],
    )


@app.command()
def status(
    node: Node,
    adapter: Annotated[str | None, typer.Option(help="One adapter only.")] = None,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print the newest version of each adapter on the server."""
    from memopt.federation.session import connect

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    rows = session.client.status(adapter)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    _rows(
        ("adapter", "version", "kind", "by", "when", "bytes", "weights"),
        [
            (
                *(r["adapter"], r["sequence"], r.get("kind", "-"), r.get("node", "-")),
                *(_when(r.get("time")), f"{r.get('payload_bytes', 0):,}"),
                r.get("weights_hash", "-")[:16],
            )
            for r in rows
        ],
    )


@app.command()
def history(
    adapter: Annotated[str, typer.Argument(help="The adapter's id.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print an adapter's versions and check each signature against trust.json."""
    from memopt.errors import SyncError
    from memopt.federation.session import connect
    from memopt.federation.signing import parse_signed

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    trust = session.files.trust()
    rows = []
    for version in session.client.history(adapter):
        signed = parse_signed({k: version[k] for k in ("manifest", "key", "signature")})
        try:
            trust.verify(signed, fresh=False)
            verdict = "yes"
        except SyncError as error:
            verdict = f"NO: {error.problem}"
        rows.append({**version, "trusted": verdict})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    _rows(
        ("version", "kind", "by", "when", "bytes", "weights", "trusted"),
        [
            (
                *(r["manifest"]["sequence"], _kind(r["manifest"]), r["manifest"]["node"]),
                *(_when(r["manifest"]["time"]), f"{r['manifest']['payload_bytes']:,}"),
                *(r["manifest"]["new_hash"][:16], r["trusted"]),
            )
            for r in rows
        ],
    )


@app.command()
def rollback(
    adapter: Annotated[str, typer.Argument(help="The adapter's id.")],
    to: Annotated[int, typer.Option(help="The version whose weights come back.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
) -> None:
    """Make an old version the newest again, under a new number (role admin)."""
    from memopt.federation.session import connect

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    sequence = session.client.rollback(adapter, to, key=session.files.signing_key(), node=node)
    typer.echo(f"{adapter}: version {sequence} has the weights of version {to}")


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet.")],
    new: Annotated[Path, typer.Argument(help="The same, later.")],
    delta_threshold: Annotated[
        float, typer.Option(help="Relative mean change over which a tensor is sent.")
    ] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Compare two sets of weights: what would be sent, with each codec. No network."""
    from memopt.federation.compare import compare

    result = compare(old, new, delta_threshold=delta_threshold)
    if as_json:
        typer.echo(json.dumps(result))
        return
    _rows(
        ("tensor", "action", "relative mean change"),
        [
            (t["name"], t["action"], "new" if t["change"] is None else f"{t['change']:.3g}")
            for t in result["tensors"]
        ],
    )
    _rows(
        ("codec", "sent as", "bytes", "saving against fp32", "error of the update"),
        [
            (c["codec"], c["kind"], f"{c['bytes']:,}", f"{c['saving']:.1%}", f"{c['error']:.2e}")
            for c in result["codecs"]
        ],
    )


@app.command()
def keygen(
    node: Annotated[str, typer.Argument(help="The node that will sign.")],
    keys: Keys = DEFAULT_KEYS,
    trust: Annotated[
        Path | None, typer.Option(help="Trust file to add it to [default: KEYS/trust.json].")
    ] = None,
    role: Annotated[list[str] | None, typer.Option(help="push, pull, admin; repeatable.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--adapter", help="Adapters it may touch (patterns).")
    ] = None,
) -> None:
    """Make a node's signing key and add the public one to the trust file."""
    from memopt.errors import ConfigurationError
    from memopt.federation.session import NodeFiles
    from memopt.federation.signing import SigningKey, add_trusted

    path = NodeFiles(folder=keys, node=node).folder / f"{node}.sign.key"
    if path.exists():
        raise ConfigurationError(f"{path} exists already", fix="remove it first if it is to go")
    key = SigningKey.generate()
    add_trusted(
        trust or keys / "trust.json",
        node,
        key=key.public(),
        roles=tuple(role or ()),
        adapters=tuple(only or ()),
    )
    key.save(path)
    typer.echo(f"{node} {key.public()}")


@app.command("init-ca")
def init_ca(keys: Keys = DEFAULT_KEYS) -> None:
    """Make a certificate authority for tests and closed fleets."""
    from memopt.federation.authority import init_ca as make

    typer.echo(f"wrote {make(keys)}")


@app.command()
def issue(
    node: Annotated[str, typer.Argument(help="The node's name.")],
    keys: Keys = DEFAULT_KEYS,
    out: Annotated[Path | None, typer.Option(help="Folder for the files [default: KEYS].")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address it may serve on; repeatable.")
    ] = None,
    days: Annotated[float, typer.Option(help="Validity.")] = 90,
) -> None:
    """Issue a node's certificate; with --host it may serve."""
    from memopt.federation.authority import issue as make

    certificate, key = make(out or keys, node, ca=keys, hosts=host or (), days=days)
    typer.echo(f"wrote {certificate} and {key}")


def _progress(what: str) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def bar() -> Iterator[Callable[[int, int], None]]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        from memopt.commands.console import stderr

        console = stderr()
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    typer.echo(title)
    _rows(None, rows)


def _rows(header: tuple[str, ...] | None, rows: list[tuple[Any, ...]]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    console = stdout(160)
    columns = header or ("",) * len(rows[0])
    table = Table(*columns, show_header=header is not None)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def _when(seconds: Any) -> str:
    import time

    if not seconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def _kind(manifest: dict[str, Any]) -> str:
    target = f" to {manifest['target']}" if manifest["target"] else ""
    return f"{manifest['kind']}{target}"
