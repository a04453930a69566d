"""Which process is the daemon."""

import pytest

from vllm_bootstrap.cli import is_serve


@pytest.mark.parametrize("args", [[], ["serve"], ["serve", "--help"], ["--port", "1"], ["--mock"]])
def test_the_daemon(args):
    assert is_serve(args)


@pytest.mark.parametrize(
    "args", [["ps"], ["--help"], ["-h"], ["--version"], ["launch", "serve"], ["--show-completion"]]
)
def test_all_other_commands(args):
    assert not is_serve(args)
