"""What the data plane must know about a running engine, and nothing more. PURE.

These values are the whole contact surface between launches (who make engines) and gateway and scheduler (who send
traffic to them): launches announce an ``Instance`` when it becomes routable and withdraw it when it stops being so.
Nothing here assumes that engine and gateway share a host, beyond the ``Endpoint``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RequestClass = Literal["realtime", "batch"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine listens: a Unix socket path, or host and port. ``credential`` is the engine's internal key.
    ``keep_alive_s``: after so long it closes an idle connection, None where that is not known."""

    uds: str | None = None
    host: str | None = None
    port: int | None = None
    tls: bool = False
    base_path: str = ""
    credential: str | None = field(default=None, repr=False)
    keep_alive_s: float | None = None

    def __post_init__(self) -> None:
        if (self.uds is None) == (self.host is None or self.port is None):
            raise ValueError("an endpoint is either a Unix socket or host and port")

    @property
    def authority(self) -> str:
        """The value for the ``Host`` header of requests sent there."""
        return "localhost" if self.uds is not None else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EngineRoute:
    """One (method, path) an engine may be asked for through the proxy. ``path`` is exact, or has one ``*`` that
    stands for one whole segment. ``scopes``: any one suffices. ``inference`` routes pass through admission and carry
    a model."""

    method: str
    path: str
    scopes: frozenset[str]
    inference: bool = False
    websocket: bool = False
    multipart: bool = False

    def matches(self, method: str, path: str) -> bool:
        if method != self.method:
            return False
        before, star, after = self.path.partition("*")
        if not star:
            return path == self.path
        segment = path[len(before) : len(path) - len(after)]
        return path.startswith(before) and path.endswith(after) and bool(segment) and "/" not in segment


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine that can take requests. ``slots`` is how many sequences it runs at once.

    ``base_model`` is what the launch was asked for (keys are limited by it as well as by the served names).
    ``priority_header``: the engine takes ``X-Vllm-Priority`` (vLLM 0.32+); ``priority_field``: it takes the body's
    ``priority`` (older vLLM with the priority policy); neither: it knows no priority. ``health_path`` answers 200 while
    the engine can be asked.
    """

    launch_id: str
    group_id: str
    engine: str
    base_model: str
    served_names: tuple[str, ...]
    endpoint: Endpoint
    slots: int
    routes: tuple[EngineRoute, ...]
    priority_header: bool = False
    priority_field: bool = False
    refuses_http_media: bool = False
    node_id: str = "local"
    health_path: str = "/health"

    def route(self, method: str, path: str) -> EngineRoute | None:
        """The route that allows ``method`` on ``path`` here; None: it must not be asked for."""
        return next((route for route in self.routes if route.matches(method, path)), None)

    def offers(self, method: str, path: str) -> bool:
        return self.route(method, path) is not None


@dataclass(frozen=True, slots=True)
class Advert:
    """What launches tell the data plane whenever something changes. ``instance`` is set exactly while new requests
    may be sent there; ``state`` is the launch's public state, for honest refusals, but ``stopping`` from the moment on
    that somebody wants its end, which is a little before others see that; ``retry_after_s`` from its ETA.
    ``stopped``: it ends or has ended because somebody wanted it to."""

    launch_id: str
    group_id: str
    base_model: str
    served_names: tuple[str, ...]
    state: str
    instance: Instance | None = None
    retry_after_s: float | None = None
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Requests of one launch right now, by class."""

    in_flight: dict[str, int]
    queued: dict[str, int]
