"""The engine stand-in of the proxy bench: a raw protocol server that costs as little as possible.

``python -m bench.proxy.backend PORT``. A POST whose body holds ``"stream": true`` is answered by 100 server-sent events
of 220 bytes, one each 20 ms; any other POST by 0.5 KB of JSON at once; GETs by what a readiness probe wants to see.
"""

from __future__ import annotations

import asyncio
import sys

import httptools
import uvloop

EVENTS, EVENT_BYTES, INTERVAL_S = 100, 220, 0.02
EVENT = b"data: " + b"x" * (EVENT_BYTES - 8) + b"\n\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"bench","object":"model"}]}'


def answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


JSON = answer(b'{"choices":[{"text":"' + b"y" * 470 + b'"}]}')


class Backend(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.parser.get_method() == b"GET":
            self.transport.write(answer(MODELS if b"models" in self.url else b"{}"))
        elif b'"stream": true' in self.body:
            self.transport.write(STREAM_HEAD)
            self.next_event(EVENTS)
        else:
            self.transport.write(JSON)

    def next_event(self, left: int) -> None:
        if self.transport.is_closing():
            return
        if left == 0:
            self.transport.write(LAST)
            return
        self.transport.write(CHUNK)
        asyncio.get_running_loop().call_later(INTERVAL_S, self.next_event, left - 1)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", int(sys.argv[1]), backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
