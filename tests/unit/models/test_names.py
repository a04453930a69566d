import pytest

from vllm_bootstrap.models import names


@pytest.mark.parametrize(
    "name",
    ["chat", "org/chat", "org/chat:7b", "a/b/c", "adapters/x", "org/loading", "/models/chat", "é", "org/chat@v1"],
)
def test_names_that_paths_can_hold(name: str) -> None:
    assert names.problem(name) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("load", "end in 'load'"),
        ("org/load", "end in 'load'"),
        ("org/files", "end in 'files'"),
        ("org/adapters/one", "end in 'adapters/"),
        ("/", "slash"),
        ("/models/x/", "slash"),
        ("//org", "'//'"),
        ("org/", "slash"),
        ("org//chat", "'//'"),
        ("org/../chat", "'/../'"),
        ("what?", "?"),
        ("a#b", "#"),
        ("50%", "%"),
        ("a\\b", "\\"),
        ("a\nb", "control"),
    ],
)
def test_names_that_paths_cannot_hold(name: str, said: str) -> None:
    problem = names.problem(name)
    assert problem is not None
    assert said in problem


def test_names_of_uploaded_adapters() -> None:
    assert all(names.is_adapter_name(name) for name in ("sql", "sql-2.1_x", "0", "a" * 128))
    assert not any(names.is_adapter_name(name) for name in ("", "-a", ".a", "a/b", "a b", "a" * 129, "a\n"))
