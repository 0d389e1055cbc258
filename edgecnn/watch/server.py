"""The page of a run that goes on: http on the loopback address, read only, nothing from the net.

Who may read it: whoever has the address, which holds a random word, so that other users of the machine do not. A page of the web that
points its own name at 127.0.0.1 (DNS rebinding) is refused by the Host header; no other site may embed it or read it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from edgecnn.errors import UsageError
from edgecnn.watch.progress import Progress

HERE = Path(__file__).parent
HOSTS = ("127.0.0.1", "localhost")  # with any port: an ssh tunnel has its own
FILES = {"": ("page.html", "text/html"), "page.css": ("page.css", "text/css"), "page.js": ("page.js", "text/javascript")}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
LINGER_S = 4.0


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[str]:
    """Serve the run in `folder` from a thread; gives the address. At the end it waits shortly for whoever looks to see the end.

    Args:
        folder: the run folder, which need not be there yet.
        port: of 127.0.0.1; 0 for any that is free.

    Raises:
        UsageError: the port cannot be had.
    """
    progress, word = Progress(folder), secrets.token_urlsafe(9)
    seen = {"asked": 0.0, "end": False}

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "edgecnn", ""
        timeout = 10  # seconds a connection may say nothing

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            asked, _, name = self.path.lstrip("/").partition("/")
            if host not in HOSTS or not secrets.compare_digest(asked.encode(), word.encode()):
                self._answer(403, "text/plain", b"Not here: use the address that edgecnn printed.\n")
            elif name == "state":
                state = progress.state()
                self._answer(200, "application/json", json.dumps(state).encode())
                seen["asked"], seen["end"] = time.monotonic(), bool(state["ended"])
            elif name in FILES and self.path.startswith(f"/{word}/"):
                file, kind = FILES[name]
                self._answer(200, kind, (HERE / file).read_bytes())
            else:
                self._answer(404, "text/plain", b"There is only one page here.\n")

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            for key, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Content-Security-Policy": POLICY,
                "Cross-Origin-Resource-Policy": "same-origin",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            }.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = _Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as fault:
        raise UsageError(f"watch: port {port} of 127.0.0.1 cannot be had ({fault}). Leave --port out for any that is free.") from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{word}/"
        until = time.monotonic() + LINGER_S
        while time.monotonic() < until and seen["asked"] > time.monotonic() - 10 and not seen["end"]:
            time.sleep(0.1)
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up is not the run's business."""
