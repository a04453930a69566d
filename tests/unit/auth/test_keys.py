import pytest

from vllm_bootstrap.auth import keyfile, scopes
from vllm_bootstrap.auth.keyfile import KeyFileError
from vllm_bootstrap.auth.keys import KeyRing, shared_key
from vllm_bootstrap.auth.sessions import MAX_SESSIONS, Sessions


def ring(*tokens):
    return KeyRing([shared_key(f"key-{token}", token) for token in tokens])


def test_a_shared_key_has_all_scopes_and_is_found_by_token_only():
    keys = ring("first", "second")
    found = keys.lookup(b"second")
    assert found is not None
    assert (found.name, found.scopes) == ("key-second", scopes.ALL)
    for wrong in (
        b"",
        b"First",
        b"firs",
        b"first ",
        b"x" * 1_000_000,
        "f\N{LATIN SMALL LETTER DOTLESS I}rst".encode(),
        b"\xff\x00",
        b"' OR 1=1 --",
    ):
        assert keys.lookup(wrong) is None


def test_no_token_is_kept():
    keys = KeyRing([shared_key("root", "very-secret")])
    assert "very-secret" not in repr(vars(keys))


def test_names_are_listed_and_current_while_the_key_is():
    keys = ring("one")
    (principal,) = keys.principals()
    assert keys.is_current(principal)
    assert not ring("two").is_current(principal)


def test_configured_means_any_source():
    assert ring("one").configured
    assert not KeyRing().configured


def test_the_same_value_in_both_settings_is_one_key():
    keys = KeyRing([shared_key("access-key", "same"), shared_key("orchestrator", "same")])
    found = keys.lookup(b"same")
    assert found is not None
    assert found.name == "access-key"


def test_an_unusable_shared_token_is_refused_without_showing_it():
    with pytest.raises(KeyFileError, match="access-key") as refused:
        shared_key("access-key", "white space")
    assert "white space" not in str(refused.value).replace("without spaces", "")


def test_an_example_token_as_shared_key_is_refused_where_others_can_reach_it():
    example = [shared_key("access-key", "example-admin-token")]
    assert KeyRing(example, allow_examples=True).lookup(b"example-admin-token")
    with pytest.raises(KeyFileError, match="example token"):
        KeyRing(example)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_session_lasts_its_time_and_no_longer():
    clock = Clock()
    sessions = Sessions(ring("one"), lifetime_s=60, clock=clock)
    cookie = sessions.create("one")
    assert cookie is not None
    principal = sessions.principal(cookie.encode())
    assert principal is not None
    assert principal.name == "key-one"
    clock.now += 60
    assert sessions.principal(cookie.encode()) is None


def test_a_wrong_key_opens_no_session():
    sessions = Sessions(ring("one"), lifetime_s=60)
    assert sessions.create("two") is None
    assert sessions.create("\udcff") is None
    assert sessions.principal(b"invented") is None


def test_a_closed_session_is_over():
    sessions = Sessions(ring("one"), lifetime_s=60)
    cookie = sessions.create("one") or ""
    sessions.close(cookie.encode())
    sessions.close(cookie.encode())
    assert sessions.principal(cookie.encode()) is None


def test_the_oldest_session_gives_way_and_ended_ones_are_forgotten():
    clock = Clock()
    sessions = Sessions(ring("one"), lifetime_s=60, clock=clock)
    cookies = [sessions.create("one") or "" for _ in range(MAX_SESSIONS + 1)]
    assert sessions.principal(cookies[0].encode()) is None
    assert sessions.principal(cookies[1].encode()) is not None
    clock.now += 61
    fresh = sessions.create("one") or ""
    assert sessions.principal(fresh.encode()) is not None
    assert len(sessions._open) == 1


def test_cookies_are_closed_to_scripts_and_other_sites():
    sessions = Sessions(ring("one"), lifetime_s=60)
    text = sessions.set_cookie("abc", secure=False)
    assert text == "vllm_bootstrap_session=abc; Path=/; Max-Age=60; HttpOnly; SameSite=Strict"
    assert sessions.set_cookie("abc", secure=True).endswith("; Secure")
    assert "Max-Age=0" in sessions.clear_cookie(secure=False)


def test_digest_takes_text_and_bytes_alike():
    assert keyfile.digest("é") == keyfile.digest("é".encode())
