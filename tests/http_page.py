"""A web server on loopback that answers everything alike."""

from __future__ import annotations

import contextlib
import http.server
import threading


@contextlib.contextmanager
def page(status: int):
    """A server on loopback that answers every GET with that status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
