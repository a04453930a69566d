"""The daemon's port, as the kernel sees it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vllm_bootstrap.configure import StartError
from vllm_bootstrap.doors import listen
from vllm_bootstrap.settings import Settings


def settings(tmp_path: Path, port: int = 0) -> Settings:
    return Settings(_env_file=None, host="127.0.0.1", port=port, state_dir=tmp_path)


def test_clients_whose_machine_vanished_are_noticed(tmp_path: Path) -> None:
    with listen(settings(tmp_path)) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            wanted = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
            assert {name: accepted.getsockopt(socket.IPPROTO_TCP, name) for name in wanted} == wanted


def test_a_port_that_is_taken_is_said_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(StartError, match=f"Cannot listen on 127.0.0.1 port {port}"):
            listen(settings(tmp_path, port))
