"""Rendered pages on a port of their own, without the service behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from service.outgoing import Response
from service.pages import render

Answer = Callable[[str, str, str], Response]  # of method, path with query, body


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """The origin where `answer` is asked, beside the files of all pages."""
    assets = dict(render._assets.values())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._give("GET", "")

        def do_POST(self) -> None:
            self._give("POST", self.rfile.read(int(self.headers.get("content-length", "0"))).decode())

        def _give(self, method: str, body: str) -> None:
            response = assets.get(self.path) or answer(method, self.path, body)
            self.send_response(response.status)
            for name, value in (*response.headers, ("content-length", str(len(response.body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
