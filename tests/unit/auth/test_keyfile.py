import hashlib
import json

import pytest

from vllm_bootstrap.auth import keyfile, scopes
from vllm_bootstrap.auth.keyfile import KeyFileError

TOKEN = "a-long-enough-token-for-tests"


def parse(*entries, allow_examples=False):
    return keyfile.parse(json.dumps({"keys": list(entries)}), allow_examples=allow_examples)


def entry(**fields):
    return {"name": "ci", "token": TOKEN, "scopes": ["monitor"], **fields}


def test_an_entry_becomes_a_principal_without_its_token():
    (found,) = parse(
        entry(
            models=["llama-*"],
            max_class="batch",
            requests_per_minute=60,
            max_parallel=4,
            tokens_per_minute=90_000,
            max_enqueued_tokens=2_000_000,
            cold_start_hold_s=2.5,
            max_sequences=8,
            expires_at="2030-01-01T00:00:00Z",
        )
    ).entries
    principal = found.principal()
    assert (principal.name, principal.scopes, principal.models) == ("ci", frozenset({"monitor"}), ("llama-*",))
    assert (principal.max_class, principal.requests_per_minute) == ("batch", 60)
    assert (principal.max_parallel, principal.max_sequences) == (4, 8)
    assert (principal.tokens_per_minute, principal.max_enqueued_tokens) == (90_000, 2_000_000)
    assert principal.cold_start_hold_s == 2.5
    assert principal.expires_at == 1893456000.0
    assert TOKEN not in repr(principal)
    assert TOKEN not in repr(found)


def test_a_stored_hash_is_the_hash_of_the_token():
    stored = hashlib.sha256(TOKEN.encode()).hexdigest()
    hashed = {"name": "ci", "token_sha256": stored.upper(), "scopes": ["monitor"]}
    assert parse(hashed).entries[0].digest() == parse(entry()).entries[0].digest()


@pytest.mark.parametrize("expires_at", ["2030-01-01T01:00:00+01:00", 1893456000])
def test_expiry_is_rfc_3339_or_unix_seconds(expires_at):
    assert parse(entry(expires_at=expires_at)).entries[0].principal().expires_at == 1893456000.0


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry(tokens_per_minute=0)], "tokens_per_minute"),
        ([entry(max_enqueued_tokens=1.5)], "max_enqueued_tokens"),
        ([entry(cold_start_hold_s=-1)], "cold_start_hold_s"),
        ([entry(cold_start_hold_s="30")], "cold_start_hold_s"),
        ([entry(cold_start_hold_s=1e9)], "cold_start_hold_s"),
        ([entry(colour="red")], "colour: unknown field"),
        ([entry(scopes=["root"])], "unknown scope 'root'; known: admin"),
        ([entry(scopes=[])], "scopes"),
        ([{"token": TOKEN, "scopes": ["logs"]}], "name"),
        ([entry(name="with space")], "name"),
        ([entry(name="local")], "belongs to the daemon's own keys"),
        ([entry(token=None)], "either 'token' or 'token_sha256'"),
        ([entry(token_sha256="0" * 64)], "either 'token' or 'token_sha256'"),
        ([{"name": "ci", "token_sha256": "xyz", "scopes": ["logs"]}], "token_sha256"),
        ([entry(token="with space in it, which is long")], "without spaces"),
        ([entry(token="line\nbreak")], "without spaces"),
        ([entry(token="")], "token"),
        ([entry(requests_per_minute=0)], "requests_per_minute"),
        ([entry(max_parallel="4")], "max_parallel"),
        ([entry(max_class="urgent")], "max_class"),
        ([entry(models=[])], "models"),
        ([entry(expires_at="2030-01-01T00:00:00")], "expires_at"),
        ([entry(), entry(token="another-token-for-tests")], "the name 'ci' is there twice"),
        ([entry(), entry(name="two")], "'ci' and 'two' have the same token"),
        (["ci"], r"keys\[0\] must be an object"),
        ([entry(token="example-realtime-token")], "example token, which everybody knows"),
    ],
)
def test_a_wrong_entry_is_refused_by_number_and_reason_and_never_by_token(entries, reason):
    with pytest.raises(KeyFileError, match=reason) as refused:
        parse(*entries)
    assert TOKEN not in str(refused.value)
    assert "with space in it" not in str(refused.value)


@pytest.mark.parametrize("text", ["[]", "{}", '{"keys": {}}', '{"keys": [], "more": 1}', "keys", b"\xff"])
def test_a_wrong_file_is_refused(text):
    with pytest.raises(KeyFileError):
        keyfile.parse(text, allow_examples=True)


def test_a_key_twice_in_one_entry_is_refused():
    with pytest.raises(KeyFileError, match="'scopes' is there twice"):
        keyfile.parse('{"keys": [{"name": "a", "scopes": ["logs"], "scopes": ["admin"]}]}', allow_examples=True)


def test_an_example_hash_is_refused_like_its_token():
    digest = hashlib.sha256(b"example-admin-token").hexdigest()
    with pytest.raises(KeyFileError, match="example token"):
        parse({"name": "ci", "token_sha256": digest, "scopes": ["admin"]})


def test_no_key_at_all_is_a_valid_wish():
    assert parse().entries == ()


def test_notes_tell_what_a_key_will_not_do():
    notes = parse(entry(scopes=["eval", "upload", "logs"], token="short")).notes
    assert len(notes) == 2
    assert "'eval' is not built yet" in notes[0]
    assert "shorter than 16" in notes[1]


def test_every_scope_has_an_example_token_that_counts_as_known():
    for name in scopes.ALL:
        example = entry(token=f"example-{name}-token", scopes=[name])
        assert parse(example, allow_examples=True).entries
        with pytest.raises(KeyFileError):
            parse(example)


def test_new_tokens_are_usable_and_differ():
    tokens = {keyfile.new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(keyfile.token_problem(token) is None and len(token) > 40 for token in tokens)


def test_a_token_of_a_megabyte_is_no_token():
    assert "at most" in (keyfile.token_problem("x" * 1_000_000) or "")
