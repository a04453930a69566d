"""nginx accepts the shipped example configuration."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "config" / "nginx.conf.example"


def test_nginx_accepts_the_example(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    openssl = shutil.which("openssl")
    if nginx is None or openssl is None:
        pytest.skip("nginx or openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=llm.example.org"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    server = EXAMPLE.read_text().replace("/etc/ssl/llm.example.org/fullchain.pem", str(certificate))
    server = server.replace("/etc/ssl/llm.example.org/privkey.pem", str(key)).replace("listen 443", "listen 8443")
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n"
        f"client_body_temp_path {tmp_path}/body;\nproxy_temp_path {tmp_path}/proxy;\nfastcgi_temp_path {tmp_path}/f;\n"
        f"uwsgi_temp_path {tmp_path}/u;\nscgi_temp_path {tmp_path}/s;\n{server}\n}}\n"
    )
    result = subprocess.run([nginx, "-t", "-c", str(config)], capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 0, result.stderr
