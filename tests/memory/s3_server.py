"""A small object store that speaks enough of the S3 protocol over a real socket.

What cannot run here is the hosted service; what is tested is that a store at an ``s3://`` address
works over HTTP, with conditional puts (``If-None-Match: *``) as the commit mechanism.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Bucket(ThreadingHTTPServer):
    """The objects of all buckets, by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.guard = threading.Lock()
        self.conflicts = 0
        # Answers to whatever would change something, as for a user who may only read.
        self.read_only = False

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to find this server."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "eu-north-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextmanager
def s3_server() -> Iterator[Bucket]:
    """Run a server for the length of the block."""
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer in several small packets would wait 40 ms for each acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Bucket

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def _target(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, True).items()}
        return unquote(parts.path).strip("/"), query

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        length = headers.pop("length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _xml(self, text: str) -> None:
        self._answer(200, f'<?xml version="1.0"?>{text}'.encode(), Content_Type="application/xml")

    def _refused(self) -> bool:
        if self.server.read_only:
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        return self.server.read_only

    def do_PUT(self) -> None:
        path, query = self._target()
        body = self._body()
        if self._refused():
            return
        with self.server.guard:
            if "partNumber" in query:
                self.server.parts[query["uploadId"]][int(query["partNumber"])] = body
            elif self.headers.get("If-None-Match") == "*" and path in self.server.objects:
                self.server.conflicts += 1
                self._answer(412)
                return
            elif source := self.headers.get("x-amz-copy-source"):
                self.server.objects[path] = self.server.objects[unquote(source).strip("/")]
                self._xml(f"<CopyObjectResult><ETag>{_etag(b'')}</ETag></CopyObjectResult>")
                return
            else:
                self.server.objects[path] = body
        self._answer(200, ETag=_etag(body))

    def do_POST(self) -> None:
        path, query = self._target()
        body = self._body()
        if self._refused():
            return
        if "uploads" in query:
            upload = uuid.uuid4().hex
            self.server.parts[upload] = {}
            self._xml(
                "<InitiateMultipartUploadResult>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        elif "uploadId" in query:
            parts = self.server.parts.pop(query["uploadId"])
            data = b"".join(parts[number] for number in sorted(parts))
            self.server.objects[path] = data
            self._xml(
                "<CompleteMultipartUploadResult>"
                f"<ETag>{_etag(data)}</ETag></CompleteMultipartUploadResult>"
            )
        else:
            keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
            for key in keys:
                self.server.objects.pop(f"{path}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._xml(f"<DeleteResult>{deleted}</DeleteResult>")

    def do_DELETE(self) -> None:
        if self._refused():
            return
        self.server.objects.pop(self._target()[0], None)
        self._answer(204)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, query = self._target()
        if "list-type" in query:
            self._list(path, query)
            return
        data = self.server.objects.get(path)
        if data is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        headers = {"ETag": _etag(data), "Last_Modified": formatdate(usegmt=True)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._answer(200, data, length=str(len(data)), **headers)
            return
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(int(last) + 1, len(data)) if first and last else len(data)
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._answer(206, data[start:stop], **headers)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("start-after", "")
        items, folders = [], set()
        for path, data in sorted(self.server.objects.items()):
            key = path.removeprefix(f"{bucket}/")
            if not key.startswith(prefix) or key <= after:
                continue
            below = key[len(prefix) :]
            if delimiter and delimiter in below:
                folders.add(prefix + below.split(delimiter)[0] + delimiter)
                continue
            items.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        )
        self._xml(
            f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(items)}{common}"
            "</ListBucketResult>"
        )


def _etag(data: bytes) -> str:
    return f'"{hashlib.blake2b(data, digest_size=16).hexdigest()}"'
