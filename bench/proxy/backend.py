"""The engine stand-in of the proxy bench: a raw protocol server that costs as little as possible.

``python -m bench.proxy.backend PORT PATH`` listens on the port and on a Unix socket at the path. A POST whose prompt is
``events/ms COUNT/INTERVAL`` is answered by that many server-sent events of 220 bytes, one each INTERVAL milliseconds,
and if it asks for it one more about usage; any other POST by 0.5 KB of JSON at once; GETs by what readiness probes want
to see.
"""

from __future__ import annotations

import asyncio
import json
import sys

import httptools
import uvloop

EVENT_BYTES = 220
EVENT = b"data: " + b"x" * (EVENT_BYTES - 8) + b"\n\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
USED = b'"usage":{"prompt_tokens":8,"total_tokens":108,"completion_tokens":100}}'
USAGE = b'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"bench","choices":[],' + USED + b"\n\n"
USAGE_CHUNK = b"%x\r\n%s\r\n" % (len(USAGE), USAGE)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"bench","object":"model"}]}'
MODEL_INFO = b'{"model_path":"bench","is_generation":true}'


def answer(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


JSON = answer(b'{"choices":[{"text":"' + b"y" * 400 + b'"}],' + USED)


class Backend(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        self.loop = asyncio.get_running_loop()
        self.url = self.body = b""
        self.tells_usage = False

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # some routers ask whether HTTP/2 is spoken
            self.transport.close()

    def on_message_begin(self) -> None:
        self.url = self.body = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        if self.parser.get_method() == b"GET":
            known = MODELS if b"models" in self.url else MODEL_INFO if b"model_info" in self.url else b"{}"
            self.transport.write(answer(known))
        elif b'"events/ms ' in self.body:
            asked = json.loads(self.body)
            events, interval_ms = asked["prompt"].removeprefix("events/ms ").split("/")
            self.tells_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
            self.transport.write(STREAM_HEAD)
            self.interval_s, self.due, self.left = int(interval_ms) / 1000, self.loop.time(), int(events)
            self.next_event()
        else:
            self.transport.write(JSON)

    def next_event(self) -> None:
        if self.transport.is_closing():
            return
        if self.left == 0:
            self.transport.write(USAGE_CHUNK + LAST if self.tells_usage else LAST)
            return
        self.left -= 1
        self.transport.write(CHUNK)
        self.due += self.interval_s
        self.loop.call_at(self.due, self.next_event)


async def main() -> None:
    loop = asyncio.get_running_loop()
    port, path = int(sys.argv[1]), sys.argv[2]
    on_path = await loop.create_unix_server(Backend, path, backlog=4096)
    on_port = await loop.create_server(Backend, "127.0.0.1", port, backlog=4096)
    await asyncio.gather(on_path.serve_forever(), on_port.serve_forever())


if __name__ == "__main__":
    uvloop.run(main())
