"""Which addresses may be asked on somebody's behalf."""

import ipaddress

import pytest

from vllm_bootstrap.batches.posting import NotAllowed, is_public, parse

PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1",
    "2001:db8::1", "3fff::1", "2001::1", "100::1", "64:ff9b:1::a00:1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a00:1", "2002:7f00:1::1", "2002:a9fe:a9fe::", "2002:a00:1::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "100.63.255.255", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_what_not_everybody_can_reach_is_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_what_everybody_can_reach_is_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "", "example.com", "ftp://example.com/", "file:///etc/passwd", "gopher://x/", "http://", "http:///x",
        "http://[::1", "http://h:99999/", "http://h:0/", "http://h:x/", "http://h/a b", "http://h/\r\nx: y",
        "http://h/\n", "http://\u00fcml\u00e4ut.example/", "http://user@h/", "http://user:secret@h/",
        f"http://h/{'x' * 2048}",
    ],
)  # fmt: skip
def test_urls_that_are_refused(url):
    with pytest.raises(NotAllowed) as caught:
        parse(url, allow_private=True)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "169.254.169.254", "10.1.2.3:8080"])
def test_a_private_address_in_the_url_shows_at_once(host):
    with pytest.raises(NotAllowed, match="WEBHOOK_ALLOW_PRIVATE"):
        parse(f"http://{host}/hook", allow_private=False)
    assert parse(f"http://{host}/hook", allow_private=True).path == "/hook"


@pytest.mark.parametrize(
    "url", ["https://example.com", "http://example.com:8080/a?b=c", "https://8.8.8.8/x", "http://127.1/"]
)
def test_urls_that_may_be_asked_as_far_as_they_show(url):
    assert parse(url, allow_private=False).scheme in {"http", "https"}
