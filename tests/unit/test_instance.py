import stat

import pytest

from vllm_bootstrap import instance


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_is_made_for_us_alone(tmp_path):
    made = instance.private_dir(tmp_path / "a" / "b")
    assert mode(made) == 0o700
    assert instance.private_dir(made) == made


def test_an_empty_folder_and_one_of_ours_are_closed(tmp_path):
    for name, content in (("empty", None), ("ours", instance.LOCK_FILE)):
        folder = tmp_path / name
        folder.mkdir()
        folder.chmod(0o755)
        if content is not None:
            (folder / content).touch()
        assert mode(instance.private_dir(folder)) == 0o700


@pytest.mark.parametrize("open_to", [0o1777, 0o755, 0o750])
def test_a_folder_that_others_use_is_refused_and_left_as_it_is(tmp_path, open_to):
    folder = tmp_path / "tmp"
    folder.mkdir()
    (folder / "somebody's").touch()
    folder.chmod(open_to)
    with pytest.raises(PermissionError, match="not empty") as caught:
        instance.private_dir(folder)
    assert str(folder) in str(caught.value)
    assert mode(folder) == open_to


def test_a_private_folder_with_things_in_it_is_taken(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o700)
    (folder / "thing").touch()
    assert instance.private_dir(folder) == folder
    assert (folder / "thing").exists()
