"""A small server that speaks enough of S3's HTTP for the cache's object store, and can misbehave on request.

    with FakeS3() as server: running("services.cache", AUTOGLM_CACHE_ARTIFACT_URL=server.url, **server.environment)

The client is the real one. Objects are whole or not there, as in S3; signatures are not looked at.
"""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, urlsplit

BUCKET = "models"


class FakeS3:
    """`objects` is the bucket. `hang` stops all answers; `cut_after` breaks every body off after so many bytes."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.cut_after: int | None = None
        self.refuses_writes = False
        self.seen = threading.Semaphore(0)
        """Released once for every request."""
        self._woken = threading.Event()
        self._woken.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/shared"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client of S3 call this server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def path_of(self, digest: str) -> str:
        """Where an artifact lies in the bucket."""
        name = digest.removeprefix("sha256:")
        return f"/{BUCKET}/shared/sha256/{name[:2]}/{name}"

    def hang(self) -> None:
        """Requests are taken and not answered until `wake`."""
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def bodies(self) -> int:
        """Requests for content so far."""
        return sum(each.startswith("GET") for each in self.requests)

    def note(self, request: str) -> None:
        """Called by the server's threads; returns when the request may be answered."""
        self.requests.append(request)
        self.seen.release()
        self._woken.wait()

    def __enter__(self) -> FakeS3:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake s3", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._woken.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(fake: FakeS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._read()

        def do_GET(self) -> None:
            self._read()

        def do_PUT(self) -> None:
            body = self._begin()
            if fake.refuses_writes:
                return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            place = urlsplit(self.path)
            words = parse_qs(place.query)
            if "uploadId" in words:
                fake.parts[words["uploadId"][0]][int(words["partNumber"][0])] = body
            else:
                fake.objects[place.path] = body
            self._answer(200, b"", ETag='"0"')

        def do_POST(self) -> None:
            self._begin()
            if fake.refuses_writes:
                return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            place = urlsplit(self.path)
            words = parse_qs(place.query, keep_blank_values=True)
            if "uploads" in words:
                upload = f"u{len(fake.requests)}"
                fake.parts[upload] = {}
                text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
                return self._answer(200, text.encode())
            parts = fake.parts.pop(words["uploadId"][0])
            fake.objects[place.path] = b"".join(parts[number] for number in sorted(parts))
            self._answer(200, b'<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>')

        def do_DELETE(self) -> None:
            self._begin()
            fake.parts.pop(parse_qs(urlsplit(self.path).query).get("uploadId", [""])[0], None)
            self._answer(204, b"")

        def _begin(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fake.note(f"{self.command} {self.path}")
            return body

        def _read(self) -> None:
            self._begin()
            data = fake.objects.get(urlsplit(self.path).path)
            if data is None:
                return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            facts = {"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None:
                return self._answer(200, data, **facts)
            first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
            where = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], **facts, **{"Content-Range": where})

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fake.cut_after is not None and self.command == "GET":
                self.close_connection = True
                body = body[: fake.cut_after]
            self.wfile.write(body)

    return Handler
