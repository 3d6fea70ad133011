"""A PhysioNet on this machine, for the tests of download.py: it cuts, stalls, lies and refuses on demand."""
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CUT = 5000      # bytes that come before a transfer breaks off


class Handler(BaseHTTPRequestHandler):
    """Answers as PhysioNet does, unless the mirror's faults say otherwise for this request."""
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", 1 << 16, True

    def do_GET(self):
        mirror, name = self.server, self.path.lstrip("/")
        mirror.log.append((name, self.client_address))
        fault, detail = next(mirror.faults.get(name, iter(())), (None, None))
        body = mirror.files.get(name)
        if fault == "meet":
            detail.wait()
        if fault == "drop":
            self.close_connection = True
        elif fault == "status":
            self.answer(detail[0], headers=detail[1])
        elif body is None:
            self.answer(404)
        else:
            body = body[:-1] + bytes([body[-1] ^ 1]) if fault == "wrong" else body
            self.answer(200, body, CUT if fault in ("cut", "stall") else None)
        if fault == "stall":
            self.wfile.flush()
            mirror.closing.wait()

    def answer(self, status, body=b"", stop=None, headers=()):
        """Answer with body, or break off after stop bytes of it."""
        self.send_response(status)
        for key, value in {**dict(headers), "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:stop])
        self.close_connection |= stop is not None

    def log_message(self, *_):
        """Nothing: the mirror's log is its list of requests."""


class Mirror(ThreadingHTTPServer):
    """Files by path, the faults of each path's next requests, and the log of all requests.

    files: {path: bytes}. log: [(path, peer)]. faults: {path: iterator over (fault, detail)}, of "cut" and
    "stall" (after CUT bytes), "wrong" (its last bit), "drop" (no answer), "status" (detail: code and headers), "meet"
    (detail: the barrier to wait at).
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.closing = {}, {}, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def publish(self, place, files):
        """Serve files (bytes by name) below place, with their checksums."""
        self.files |= {place + name: content for name, content in files.items()}
        self.files[place + "SHA256SUMS.txt"] = "".join(
            f"{hashlib.sha256(content).hexdigest()} {name}\n" for name, content in files.items()).encode()

    def asked(self, path):
        """How often a path was asked for."""
        return sum(name == path for name, _ in self.log)
