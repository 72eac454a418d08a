"""Where requests come in: lines of JSON over TCP, served by a thread of its own.

  to the engine:    {"id": "r1", "prompt": [1, 2, 3], "max_tokens": 8}
  from the engine:  {"id": "r1", "token": 17, "index": 0}      once per token, from 0
                    {"id": "r1", "done": true}                 after the last one
                    {"id": "r1", "handback": true, "tokens": [...]}    go on elsewhere; the tokens were all sent before
                    {"id": "r1", "refused": "draining"}        nothing was begun
"""
from __future__ import annotations

import json
import queue
import selectors
import socket
import threading
from typing import Callable

LINE_MAX = 1 << 20


class Request:
    def __init__(self, client: "_Client", id: str, prompt: list[int], max_tokens: int):
        self.client, self.id, self.prompt, self.max_tokens = client, id, prompt, max_tokens

    @property
    def gone(self) -> bool:
        """Nobody waits for it any more."""
        return self.client.closed

    def say(self, **words) -> None:
        self.client.say({"id": self.id, **words})


class _Client:
    def __init__(self, frontend: "Frontend", sock: socket.socket):
        self.frontend, self.sock = frontend, sock
        self.received, self.pending = b"", bytearray()
        self.closed = False

    def say(self, words: dict) -> None:
        self.frontend.replies.put((self, json.dumps(words, separators=(",", ":")).encode() + b"\n"))


class Frontend:
    def __init__(self, host: str, port: int, on_request: Callable[[], None]):
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.replies: queue.SimpleQueue[tuple[_Client, bytes]] = queue.SimpleQueue()
        self.refuse: str | None = "starting"  # why new requests are not taken
        self._on_request = on_request
        self._listener = socket.create_server((host, port))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._bell, far = socket.socketpair()
        self._bell.setblocking(False)
        far.setblocking(False)
        self._far = far
        self._selector.register(far, selectors.EVENT_READ, None)
        self._ending = False
        self._thread = threading.Thread(target=self._main, daemon=True, name="frontend")
        self._thread.start()

    def flush(self) -> None:
        """Sends what was said.  Any thread."""
        try:
            self._bell.send(b"1")
        except BlockingIOError:
            pass  # it rings already

    def close(self) -> None:
        self._ending = True
        self.flush()
        self._thread.join()

    def _main(self) -> None:
        while not self._ending:
            for key, what in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._far:
                    self._far.recv(4096)
                elif what & selectors.EVENT_READ and not key.data.closed:
                    self._read(key.data)
            self._send()
        self._send()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(sock, selectors.EVENT_READ, _Client(self, sock))

    def _drop(self, client: _Client) -> None:
        if not client.closed:
            client.closed = True
            self._selector.unregister(client.sock)
            client.sock.close()

    def _read(self, client: _Client) -> None:
        try:
            data = client.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, client.received = (client.received + data).split(b"\n")
        for line in lines:
            self._line(client, line)
        if not data or len(client.received) > LINE_MAX:
            self._drop(client)

    def _line(self, client: _Client, line: bytes) -> None:
        try:
            words = json.loads(line)
            request = Request(client, str(words["id"]), [int(t) for t in words["prompt"]], int(words["max_tokens"]))
            if not request.prompt or request.max_tokens < 1:
                raise ValueError("an empty request")
        except (ValueError, KeyError, TypeError):
            self._drop(client)  # a client that speaks something else
            return
        if self.refuse:
            request.say(refused=self.refuse)
        else:
            self.requests.put(request)
            self._on_request()

    def _send(self) -> None:
        clients = {key.data for key in self._selector.get_map().values() if key.data}
        while not self.replies.empty():
            client, line = self.replies.get()
            client.pending += line
        for client in clients:
            try:
                while client.pending:
                    del client.pending[:client.sock.send(client.pending)]
                what = selectors.EVENT_READ
            except BlockingIOError:
                what = selectors.EVENT_READ | selectors.EVENT_WRITE
            except OSError:
                self._drop(client)
                continue
            self._selector.modify(client.sock, what, client)
