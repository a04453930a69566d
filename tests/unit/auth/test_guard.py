import base64
from dataclasses import replace

import pytest

from vllm_bootstrap.auth import scopes
from vllm_bootstrap.auth.guard import ANY_KEY, LOCAL, Guard, judge_host, missing_scope, same_origin
from vllm_bootstrap.auth.keyfile import digest
from vllm_bootstrap.auth.keys import Key, KeyRing, shared_key
from vllm_bootstrap.auth.sessions import Sessions
from vllm_bootstrap.auth.types import Principal, RequestHead, Rule
from vllm_bootstrap.errors import (
    BadRequest,
    Forbidden,
    ForbiddenOrigin,
    MisdirectedRequest,
    Unauthorized,
    UnsupportedMediaType,
)

NOW = 1_000_000.0
MONITOR = Rule(scopes=frozenset({"monitor"}))
ADMIN = Rule(scopes=frozenset({"admin"}))
PUBLIC = Rule(public=True)
ALWAYS = Rule(public=True, always_public=True)


def key(name, *, disabled=False, expires_at=None, names=("monitor",)):
    principal = Principal(name, frozenset(names), expires_at=expires_at)
    return Key(digest(name), principal, disabled=disabled)


def make(*, open_access=False, **options):
    keys = KeyRing(
        ()
        if open_access
        else (
            shared_key("root", "root"),
            key("mon"),
            key("off", disabled=True),
            key("old", expires_at=NOW),
            key("fresh", expires_at=NOW + 1),
            key("talk", names=("realtime",)),
        ),
        clock=lambda: NOW,
    )
    sessions = Sessions(keys, lifetime_s=60)
    return Guard(keys, sessions, open_access=open_access, **options), sessions


def head(method="GET", host="127.0.0.1:8000", **headers):
    pairs = [] if host is None else [(b"host", host.encode())]
    for name, value in headers.items():
        values = value if isinstance(value, list) else [value]
        name_bytes = name.replace("_", "-").encode()
        pairs.extend((name_bytes, one if isinstance(one, bytes) else one.encode()) for one in values)
    return RequestHead(method, "/x", tuple(pairs))


def bearer(token, **more):
    return head(authorization=f"Bearer {token}", **more)


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# -- credentials ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer mon"},
        {"authorization": "bearer  mon "},
        {"authorization": basic("anybody", "mon")},
        {"authorization": basic("", "mon")},
        {"x_api_key": "mon"},
        {"x_api_key": ["mon", "mon"]},
        {"x_api_key": "mon", "authorization": "Bearer mon"},
        {"x_api_key": "mon", "authorization": [basic("a", "mon"), "Bearer mon"]},
        {"x_api_key": "mon", "authorization": "Bearer "},
        {"x_api_key": ["", "mon"]},
    ],
)
def test_a_key_may_come_in_any_of_the_known_ways(headers):
    guard, _ = make()
    principal = guard.admit(head(**headers), MONITOR)
    assert principal is not None
    assert principal.name == "mon"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "mon"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer off"},
        {"authorization": "Bearer old"},
        {"authorization": "Digest mon"},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(b"mon").decode()},
        {"authorization": basic("mon", "")},
        {"authorization": basic("x", "mon:mon")},
        {"x_api_key": "m\N{CYRILLIC SMALL LETTER O}n"},
        {"x_api_key": b"\xff\xfe"},
        {"x_api_key": "x" * 1_000_000},
        {"x_api_key": "mon", "authorization": "Bearer root"},
        {"x_api_key": ["mon", "root"]},
        {"x_api_key": "mon", "authorization": "Basic !!!"},
        {"x_api_key": "mon", "authorization": "Bearer wrong"},
    ],
)
def test_missing_wrong_expired_disabled_and_differing_keys_get_one_answer(headers):
    guard, _ = make()
    with pytest.raises(Unauthorized) as refused:
        guard.admit(head(**headers), MONITOR)
    assert refused.value.body() == Unauthorized().body()
    assert refused.value.headers() == {"www-authenticate": 'Basic realm="vllm-bootstrap"'}


def test_differing_credentials_are_refused_even_where_no_key_is_needed():
    guard, _ = make()
    with pytest.raises(Unauthorized):
        guard.admit(head(x_api_key="mon", authorization="Bearer root"), PUBLIC)


def test_the_pages_own_calls_get_no_challenge():
    guard, _ = make()
    with pytest.raises(Unauthorized) as refused:
        guard.admit(head(x_requested_with="vllm-bootstrap-page"), MONITOR)
    assert refused.value.headers() == {}


def test_a_key_works_until_it_expires():
    guard, _ = make()
    assert guard.admit(bearer("fresh"), MONITOR)


# -- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_cookie_stands_for_its_key():
    guard, sessions = make()
    cookie = sessions.create("mon")
    principal = guard.admit(head(cookie=f"a=b; vllm_bootstrap_session={cookie}; c"), MONITOR)
    assert principal is not None
    assert principal.name == "mon"


def test_a_session_and_the_same_key_agree_and_another_key_does_not():
    guard, sessions = make()
    cookie = f"vllm_bootstrap_session={sessions.create('mon')}"
    assert guard.admit(bearer("mon", cookie=cookie), MONITOR)
    with pytest.raises(Unauthorized):
        guard.admit(bearer("root", cookie=cookie), MONITOR)


def test_a_wrong_key_is_not_made_good_by_a_session_nor_spoiled_by_a_dead_one():
    guard, sessions = make()
    with pytest.raises(Unauthorized):
        guard.admit(bearer("wrong", cookie=f"vllm_bootstrap_session={sessions.create('mon')}"), MONITOR)
    assert guard.admit(bearer("mon", cookie="vllm_bootstrap_session=dead"), MONITOR)


def test_two_different_session_cookies_are_none():
    guard, sessions = make()
    one, two = sessions.create("mon"), sessions.create("mon")
    with pytest.raises(Unauthorized):
        guard.admit(head(cookie=f"vllm_bootstrap_session={one}; vllm_bootstrap_session={two}"), MONITOR)


# -- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", sorted(scopes.ALL))
def test_admin_may_do_what_any_scope_may(scope):
    guard, _ = make()
    assert guard.admit(bearer("root"), Rule(scopes=frozenset({scope})))


def test_a_known_key_without_the_scope_is_told_which():
    guard, _ = make()
    with pytest.raises(Forbidden) as refused:
        guard.admit(bearer("mon"), Rule(scopes=scopes.INFERENCE))
    error = refused.value.body()["error"]
    assert (refused.value.status, error["code"]) == (403, "insufficient_scope")
    assert error["message"] == "The key 'mon' lacks one of the scopes 'batch', 'realtime'."
    assert error["needed_scopes"] == ["batch", "realtime"]
    assert missing_scope(LOCAL, frozenset({"logs"})).code == "insufficient_scope"


def test_any_key_opens_what_no_route_claims():
    guard, _ = make()
    assert guard.admit(bearer("talk", method="PATCH"), ANY_KEY)
    with pytest.raises(Unauthorized):
        guard.admit(head(), ANY_KEY)


def test_a_public_route_needs_no_key_and_knows_a_given_one():
    guard, _ = make()
    assert guard.admit(head(), PUBLIC) is None
    assert guard.admit(bearer("wrong"), PUBLIC) is None
    principal = guard.admit(bearer("talk"), PUBLIC)
    assert principal is not None
    assert principal.name == "talk"


def test_protect_all_leaves_only_what_is_always_public():
    guard, _ = make(protect_all=True)
    with pytest.raises(Unauthorized):
        guard.admit(head(), PUBLIC)
    assert guard.admit(head(), ALWAYS) is None
    assert guard.admit(bearer("talk"), PUBLIC)


def test_an_open_daemon_takes_everybody_whatever_they_send():
    guard, _ = make(open_access=True, protect_all=True)
    assert guard.open_access
    for sent in (head(), bearer("anything"), head(x_api_key="a", authorization="Bearer b")):
        assert guard.admit(sent, ADMIN) is LOCAL
    assert guard.is_current(LOCAL)
    assert not guard.is_current(Principal("mon", frozenset()))


def test_a_daemon_with_keys_cannot_be_open():
    keys = KeyRing([shared_key("root", "root")])
    with pytest.raises(ValueError, match="cannot be open"):
        Guard(keys, Sessions(keys, lifetime_s=60), open_access=True)


def test_is_current_follows_the_keys():
    guard, _ = make()
    principal = guard.admit(bearer("mon"), MONITOR)
    assert principal is not None
    assert guard.is_current(principal)
    assert not guard.is_current(Principal("old", frozenset({"monitor"}), expires_at=NOW))


def test_who_was_let_in_goes_on_unless_the_key_lost_something():
    guard, _ = make()
    principal = guard.admit(bearer("mon"), MONITOR)
    assert principal is not None
    assert guard.still_allows(principal)
    assert guard.still_allows(replace(principal, requests_per_minute=1)), "limits are not rights"
    for other in ({"models": ("m",)}, {"max_class": "batch"}, {"scopes": principal.scopes | {"admin"}}):
        before = replace(principal, **other)
        assert not guard.still_allows(before)
        assert guard.knows(before)
    for gone in ("nobody", "old"):
        assert not guard.still_allows(Principal(gone, frozenset()))
        assert not guard.knows(Principal(gone, frozenset()))
    everybody, _ = make(open_access=True)
    assert everybody.still_allows(LOCAL)
    assert everybody.knows(LOCAL)


# -- hosts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.1:8000", "10.1.2.3:1", "[::1]", "[::1]:8000", "[fe80::1]:65535", "localhost", "LocalHost:80",
     "box.example", "Box.Example:8443", "a.pods.example", "b.a.pods.example:1"],
)  # fmt: skip
def test_addresses_localhost_and_configured_names_are_ours(host):
    guard, _ = make(allowed_hosts=["box.example", "*.Pods.example"])
    assert guard.admit(bearer("mon", host=host), MONITOR)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "box.example.evil", "xbox.example", "pods.example", "localhost.evil", "127.1", "0x7f.0.0.1",
     "127.0.0.1.nip.io", "1", "localhost."],
)  # fmt: skip
@pytest.mark.parametrize("rule", [MONITOR, PUBLIC, ALWAYS])
def test_any_other_name_is_misdirected_with_or_without_key(host, rule):
    guard, _ = make(allowed_hosts=["box.example", "*.pods.example"])
    for sent in (head(host=host), bearer("root", host=host)):
        with pytest.raises(MisdirectedRequest):
            guard.admit(sent, rule)


@pytest.mark.parametrize(
    "host",
    [None, "", " ", "a/#@b", "a@127.0.0.1", "127.0.0.1/", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "::1",
     "[::1", "[127.0.0.1]", "[zz]", "a b", "localhost:80:80", "http://localhost", "-x", "é", "localhost\t"],
)  # fmt: skip
@pytest.mark.parametrize("rule", [MONITOR, PUBLIC])
def test_a_malformed_host_is_a_bad_request_with_or_without_key(host, rule):
    guard, _ = make()
    for sent in (head(host=host), bearer("root", host=host)):
        with pytest.raises(BadRequest):
            guard.admit(sent, rule)


def test_a_doubled_host_is_a_bad_request():
    sent = RequestHead("GET", "/x", ((b"host", b"localhost"), (b"host", b"localhost"), (b"x-api-key", b"root")))
    guard, _ = make()
    with pytest.raises(BadRequest):
        guard.admit(sent, MONITOR)


def test_judging_needs_no_guard():
    assert judge_host(b"[::1]:80", frozenset()) == "ok"
    assert judge_host(b"x" * 300, frozenset()) == "malformed"


# -- pages of other sites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        (b"http://127.0.0.1:8000", b"127.0.0.1:8000", True),
        (b"http://LOCALHOST:8000", b"localhost:8000", True),
        (b"https://box.example", b"box.example", True),
        (b"https://box.example", b"box.example:443", True),
        (b"http://box.example", b"box.example:80", True),
        (b"http://box.example:80", b"box.example", True),
        (b"http://localhost:3000", b"localhost:8000", False),
        (b"http://127.0.0.1:8000", b"localhost:8000", False),
        (b"https://box.example:8443", b"box.example", False),
        (b"https://evil.example", b"box.example", False),
        (b"http://box.example.evil", b"box.example", False),
        (b"http://box.example@evil", b"box.example", False),
        (b"null", b"box.example", False),
        (b"", b"box.example", False),
        (b"file://", b"box.example", False),
        (b"chrome-extension://abc", b"abc", False),
        (b"http://box.example/", b"box.example", False),
    ],
)
def test_same_origin(origin, host, same):
    assert same_origin(origin, host) is same


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"origin": "null"},
                                     {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": ["none", "Cross-Site"]},
                                     {"origin": ["http://127.0.0.1:8000", "http://evil.example"]}])  # fmt: skip
@pytest.mark.parametrize("open_access", [True, False])
def test_a_foreign_page_may_not_do_anything_unsafe(headers, open_access):
    guard, _ = make(open_access=open_access)
    for method in ("POST", "DELETE", "PUT", "PATCH", "INVENTED"):
        with pytest.raises(ForbiddenOrigin):
            guard.admit(bearer("root", method=method, **headers), ADMIN)
    with pytest.raises(ForbiddenOrigin):
        guard.admit(bearer("root", upgrade="WebSocket", **headers), ADMIN)
    assert guard.admit(bearer("root", **headers), ADMIN)


def test_our_own_page_and_programs_may():
    guard, _ = make()
    assert guard.admit(bearer("root", method="POST"), ADMIN)
    own = {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"}
    assert guard.admit(bearer("root", method="POST", **own), ADMIN)


# -- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content_length": "0"},
        {"content_length": "0", "content_type": "text/plain"},
        {"content_length": "2", "content_type": "application/json"},
        {"content_length": "2", "content_type": "Application/JSON; charset=utf-8"},
        {"transfer_encoding": "chunked", "content_type": "application/json"},
    ],
)
def test_json_and_no_body_pass(headers):
    guard, _ = make()
    assert guard.admit(bearer("root", method="POST", **headers), ADMIN)


@pytest.mark.parametrize(
    "headers",
    [
        {"content_length": "2"},
        {"transfer_encoding": "chunked"},
        {"content_length": "2", "content_type": "text/plain"},
        {"content_length": "2", "content_type": "application/x-www-form-urlencoded"},
        {"content_length": "2", "content_type": "multipart/form-data; boundary=x"},
        {"content_length": "2", "content_type": ["application/json", "text/plain"]},
        {"content_length": "2", "content_type": "text/plain; application/json"},
    ],
)
def test_any_other_body_is_refused_on_unsafe_methods(headers):
    guard, _ = make()
    with pytest.raises(UnsupportedMediaType, match="application/json"):
        guard.admit(bearer("root", method="POST", **headers), ADMIN)


def test_a_rule_may_take_other_content_types_or_any():
    guard, _ = make()
    sent = bearer("root", method="POST", content_length="2", content_type="multipart/form-data; boundary=x")
    assert guard.admit(sent, Rule(scopes=scopes.INFERENCE, media=("multipart/form-data",)))
    assert guard.admit(sent, Rule(scopes=scopes.INFERENCE, media=()))


def test_a_refusal_for_lack_of_a_key_comes_before_one_for_the_content_type():
    guard, _ = make()
    with pytest.raises(Unauthorized):
        guard.admit(head(method="POST", content_length="2", content_type="text/plain"), ADMIN)
