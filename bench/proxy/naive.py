"""What one writes in an hour: a FastAPI route that passes requests on with httpx. The proxy bench's lower end.

``python -m bench.proxy.naive PORT BACKEND``
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import fastapi
import httpx
import uvicorn
from fastapi.responses import Response, StreamingResponse

port, backend = int(sys.argv[1]), int(sys.argv[2])
app = fastapi.FastAPI()
client = httpx.AsyncClient(
    base_url=f"http://127.0.0.1:{backend}",
    timeout=None,
    limits=httpx.Limits(max_connections=1024, max_keepalive_connections=1024),
)


@app.post("/v1/{path:path}")
async def forward(path: str, request: fastapi.Request) -> Response:
    headers = {"content-type": request.headers["content-type"]}
    outgoing = client.build_request("POST", f"/v1/{path}", content=await request.body(), headers=headers)
    answer = await client.send(outgoing, stream=True)

    async def body() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()

    return StreamingResponse(body(), status_code=answer.status_code, media_type=answer.headers.get("content-type"))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="info")
