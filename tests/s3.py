"""An S3 server of one's own for tests (moto's), and a door before it that checks signatures and can cut, expire and shut.

moto lets everybody in; the door is what tells whether an address was signed well and is still valid.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.services import lacks

START_S = 60.0
REGION = "eu-central-1"
KEY_ID = "AKIAWHERRYTESTS"
SECRET = "a-secret-of-the-bucket"


def with_key(folder: Path) -> None:
    """Put the key of the buckets into the data folder of a server that is to be made."""
    keys = folder / "keys"
    keys.mkdir(parents=True, exist_ok=True)
    (keys / "s3.json").write_text(json.dumps({"access_key_id": KEY_ID, "secret_access_key": SECRET}))


class S3:
    """A running server; `bucket` makes a new one."""

    def __init__(self) -> None:
        missing = [name for name in ("moto", "flask") if importlib.util.find_spec(name) is None]
        if missing:
            lacks(f"not installed: {', '.join(missing)}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._made = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def bucket(self) -> str:
        """Make a bucket and return its `s3://` address, with a prefix."""
        self._made += 1
        name = f"wherry-{self._made}"
        self._wait()
        configuration = (
            f"<CreateBucketConfiguration><LocationConstraint>{REGION}</LocationConstraint></CreateBucketConfiguration>"
        )
        assert self.ask("PUT", f"/{name}", configuration.encode()) == 200
        return f"s3://{name}/some/prefix"

    def uploads(self, bucket: str) -> int:
        """Return how many multipart uploads were begun and neither completed nor aborted."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", f"/{urlsplit(bucket).netloc}?uploads", headers=_host())
        found = connection.getresponse().read()
        connection.close()
        assert b"ListMultipartUploadsResult" in found, found
        return found.count(b"<UploadId>")

    def ask(self, method: str, path: str, body: bytes = b"") -> int:
        """Ask something without a signature and return the status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body=body, headers=_host())
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status

    def close(self) -> None:
        """End the server; what it held is gone."""
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, "moto's server ended"
                assert time.monotonic() < end, "moto's server does not answer"
                time.sleep(0.05)


def _host() -> dict[str, str]:
    scope = f"20260101/{REGION}/s3/aws4_request"
    return {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY_ID}/{scope}, SignedHeaders=host, Signature=0"}


class Door:
    """A second address of the store. `asked` lists (path with query, headers) of every GET with a signed address."""

    def __init__(self, s3: S3) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.refused: list[str] = []
        self.shut = False
        """Hang up on everybody."""
        self.late_s: list[float] = []
        """By how many seconds the next requests are late, one after the other."""
        self.cuts: list[int | None] = []
        """After how many bytes the next answers to signed addresses break off."""
        self._s3 = s3
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def any_method(self) -> None:
                outer.handle(self)

            def log_message(self, *_args: object) -> None:
                pass

        for method in ("GET", "PUT", "POST", "HEAD", "DELETE"):
            setattr(Handler, f"do_{method}", Handler.any_method)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        """Pass a request on if the door is open and the address is good."""
        if self.shut:
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        signed = "X-Amz-Signature=" in request.path
        cut: int | None = None
        if signed:
            self.asked.append((request.path, {name.lower(): value for name, value in request.headers.items()}))
            wrong = self._wrong(request.path, request.headers["Host"])
            if wrong:
                self.refused.append(wrong)
                said = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
                self._answer(request, 403, {}, said)
                return
            cut = self.cuts.pop(0) if self.cuts else None
        onward = http.client.HTTPConnection("127.0.0.1", self._s3.port, timeout=60)
        onward.request(request.command, request.path, body=body or None, headers=dict(request.headers.items()))
        answer = onward.getresponse()
        data = answer.read()
        self._answer(request, answer.status, dict(answer.headers.items()), data, cut)
        onward.close()

    def _answer(self, request: Any, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
        request.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("date", "server", "content-length", "connection", "transfer-encoding"):
                request.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if request.command == "HEAD" else str(len(data))
        request.send_header("Content-Length", length)
        request.end_headers()
        request.wfile.write(data if cut is None else data[:cut])
        request.close_connection = request.close_connection or cut is not None

    def _wrong(self, target: str, host: str) -> str:
        """Return what is wrong with a signed address (AWS Signature Version 4, query form), empty if nothing."""
        path, _, query = target.partition("?")
        pairs = sorted(pair for pair in query.split("&") if not pair.startswith("X-Amz-Signature="))
        given = {name: values[0] for name, values in parse_qs(query).items()}
        stamp, scope = given["X-Amz-Date"], given["X-Amz-Credential"].partition("/")[2]
        canonical = "\n".join(["GET", path, "&".join(pairs), f"host:{host}", "", "host", "UNSIGNED-PAYLOAD"])
        text = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{SECRET}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        if not hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), given["X-Amz-Signature"]):
            return "signature"
        begun = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        late_s = self.late_s.pop(0) if self.late_s else 0.0
        return "expired" if time.time() + late_s > begun + int(given["X-Amz-Expires"]) else ""

    def close(self) -> None:
        """Shut it for good."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)
