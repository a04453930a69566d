"""The daemon's port, as the kernel sees it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from vllm_bootstrap.configure import StartError
from vllm_bootstrap.doors import listen
from vllm_bootstrap.settings import Settings


def settings(tmp_path: Path, port: int = 0, **others: Any) -> Settings:
    return Settings(_env_file=None, host="127.0.0.1", port=port, state_dir=tmp_path, **others)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (30, 10, 3)),
        ({"client_dead_after_s": 3600}, (1800, 600, 3)),
        ({"client_dead_after_s": 5}, (2, 1, 3)),
        ({"client_dead_after_s": 3}, (2, 1, 1)),
        ({"client_dead_after_s": 0.1}, (1, 1, 1)),
    ],
)
def test_clients_whose_machine_vanished_are_asked_for(tmp_path: Path, given: Any, wanted: tuple[int, int, int]) -> None:
    with listen(settings(tmp_path, **given)) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert tuple(accepted.getsockopt(socket.IPPROTO_TCP, name) for name in names) == wanted
            # This would also end a connection whose other end is there and does not read for a while.
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0


def test_nobody_is_asked_for_where_that_is_turned_off(tmp_path: Path) -> None:
    with listen(settings(tmp_path, client_dead_after_s=0)) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_a_port_that_is_taken_is_said_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=f"Cannot listen on 127.0.0.1 port {port}"):
            listen(settings(tmp_path, port))
