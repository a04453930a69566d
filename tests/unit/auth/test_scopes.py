import pytest

from vllm_bootstrap.auth import scopes


@pytest.mark.parametrize("scope", sorted(scopes.ALL))
def test_admin_allows_every_scope(scope):
    assert scopes.allows(frozenset({"admin"}), frozenset({scope}))


@pytest.mark.parametrize("have", sorted(scopes.ALL - {"admin"}))
@pytest.mark.parametrize("needed", sorted(scopes.ALL))
def test_any_other_scope_allows_only_itself(have, needed):
    assert scopes.allows(frozenset({have}), frozenset({needed})) is (have == needed)


def test_any_one_of_the_needed_scopes_suffices():
    assert scopes.allows(frozenset({"batch", "logs"}), scopes.INFERENCE)
    assert not scopes.allows(frozenset({"logs"}), scopes.INFERENCE)
    assert not scopes.allows(frozenset(), scopes.ALL)


def test_needs_are_told_in_words():
    assert scopes.describe(frozenset({"logs"})) == "the scope 'logs'"
    assert scopes.describe(scopes.INFERENCE) == "one of the scopes 'batch', 'realtime'"


def test_table_has_a_row_for_each_scope_and_marks_the_unbuilt():
    table = scopes.table()
    assert table.count("\n") == len(scopes.SCOPES) + 1
    assert [line for line in table.splitlines() if "not built" in line and "`eval`" in line]
