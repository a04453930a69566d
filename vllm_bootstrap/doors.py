"""Where the daemon is reached and who may come in: keys, the port, the announcement of the address.

Invariant: a bind that others can reach has a key, unless the operator insists. No key is ever logged.
"""

from __future__ import annotations

import logging
import socket
import sys

from vllm_bootstrap import __version__, instance
from vllm_bootstrap.auth.keys import Key, KeyRing, shared_key
from vllm_bootstrap.configure import StartError
from vllm_bootstrap.settings import Settings

log = logging.getLogger("vllm_bootstrap")


def make_keys(settings: Settings) -> tuple[KeyRing, bool]:
    """The keys, and whether the daemon is open to everybody who reaches it."""
    shared: list[Key] = []
    named = {"VLLM_ACCESS_KEY": settings.access_key, "ORCHESTRATOR_TOKEN": settings.orchestrator_token}
    for name, secret in named.items():
        if secret is not None:
            shared.append(shared_key(name, secret.get_secret_value()))
    configured = bool(shared) or settings.auth_keys_file is not None
    open_access = not configured and (settings.is_loopback or settings.insecure)
    if not configured and not open_access:
        key, made = instance.generated_key(settings.state_dir)
        shared.append(shared_key("generated", key))
        _tell_key(settings, key, made=made)
    if not settings.is_loopback:
        _warn_about_public_bind(settings, open_access=open_access)
    return KeyRing(shared, settings.auth_keys_file, allow_examples=settings.is_loopback), open_access


def _tell_key(settings: Settings, key: str, *, made: bool) -> None:
    path = settings.state_dir / instance.ACCESS_KEY_FILE
    if made and sys.stderr.isatty():
        print(f"\n  A key was made for this daemon (shown once): {key}\n", file=sys.stderr)  # noqa: T201
    log.warning("No key is configured: a generated one is in %s, 'vllm-bootstrap keys show' prints it.", path)


def _warn_about_public_bind(settings: Settings, *, open_access: bool) -> None:
    host = settings.host
    if open_access:
        log.warning("Anybody who can reach %s may use this daemon (--insecure).", host)
    if settings.ssl_certfile is None:
        log.warning("Listening on %s without TLS: keys travel in clear. See docs/operations.md.", host)


def listen(settings: Settings) -> socket.socket:
    """Open the port. Raises ``StartError``."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _notice_dead_clients(listener, settings.client_dead_after_s)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as exc:
        raise StartError(f"Cannot listen on {settings.host} port {settings.port}: {exc.strerror}") from exc
    return listener


def _notice_dead_clients(listener: socket.socket, after_s: float) -> None:
    """A client whose machine vanished must not hold an engine until its answer ends. Linux lets every accepted
    connection inherit this; elsewhere what the system's own defaults are must do."""
    # No TCP_USER_TIMEOUT: it would also end a connection whose other end is alive and does not read, which has a limit
    # of its own (write_stall_timeout_s). What it would be good for, gateway/hearing.py does.
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    if after_s and all(hasattr(socket, name) for name in names):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in zip(names, probing(after_s), strict=True):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def probing(after_s: float) -> tuple[int, int, int]:
    """When a silent connection is asked whether its other end is there: seconds until the first probe, seconds between
    probes, probes without an answer that end it. Together about ``after_s``, and at least the two seconds that whole
    numbers allow."""
    first = max(1, round(after_s / 2))
    rest = max(1, round(after_s) - first)
    probes = min(3, rest)
    return first, rest // probes, probes


def announce(settings: Settings, listener: socket.socket) -> None:
    """Say where the daemon is: in its log, and to commands of this user."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    shown = f"[{host}]" if ":" in host else host
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)  # noqa: S104 - compared, not bound
    try:
        instance.announce(settings.state_dir, f"{scheme}://{reachable}:{port}")
    except OSError as exc:  # a full disk must not keep what runs from being served
        log.warning("Commands must be told the address, it could not be written down: %s", exc)
    log.info("vllm-bootstrap %s listens on %s://%s:%d", __version__, scheme, shown, port)
