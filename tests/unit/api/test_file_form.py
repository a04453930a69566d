"""The form that brings a file: fields in any order, and what is wrong with it."""

from __future__ import annotations

import pytest

from vllm_bootstrap.api.file_form import AdapterForm, FileForm, base_name
from vllm_bootstrap.errors import ApiError, BadRequest, Forbidden, UnknownField

TYPE = b"multipart/form-data; boundary=cut"
PURPOSE, FILE = ("purpose", None, b"batch"), ("file", "in.jsonl", b"one\ntwo\n")
ANCHOR, SECONDS = ("expires_after[anchor]", None, b"created_at"), ("expires_after[seconds]", None, b"3600")


def body(*parts: tuple[str, str | None, bytes], end: bytes = b"--cut--\r\n") -> bytes:
    found = b""
    for name, filename, data in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        found += f'--cut\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
    return found + end


def read(*parts: tuple[str, str | None, bytes], slice_bytes: int = 7, **options: bytes) -> tuple[FileForm, bytes]:
    form, data, got = FileForm(TYPE, lambda purpose: None), body(*parts, **options), b""
    for start in range(0, len(data), slice_bytes):
        form.parse(data[start : start + slice_bytes])
        got += form.take()
    return form, got


@pytest.mark.parametrize("slice_bytes", [1, 7, 10_000])
@pytest.mark.parametrize("parts", [(PURPOSE, FILE), (FILE, PURPOSE), (ANCHOR, FILE, SECONDS, PURPOSE)])
def test_a_form_in_any_order_and_any_pieces(parts: tuple[tuple[str, str | None, bytes], ...], slice_bytes: int) -> None:
    form, got = read(*parts, slice_bytes=slice_bytes)
    assert got == FILE[2]
    assert form.filename == "in.jsonl"
    assert form.finish() == ("batch", 3600.0 if SECONDS in parts else None)


def test_an_empty_file_is_a_file() -> None:
    form, got = read(PURPOSE, ("file", "empty", b""))
    assert (form.filename, got, form.finish()) == ("empty", b"", ("batch", None))


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ((PURPOSE,), "file"),
        ((FILE,), "purpose"),
        ((), "file"),
        ((PURPOSE, FILE, FILE), "file"),
        ((PURPOSE, PURPOSE, FILE), "purpose"),
        ((PURPOSE, ("file", None, b"x")), "file"),
        ((("purpose", "name", b"batch"), FILE), "purpose"),
        ((PURPOSE, ("file", "", b"x")), "file"),
        ((("purpose", None, b"x" * 2000), FILE), "purpose"),
        ((("purpose", None, b"\xff"), FILE), "purpose"),
        ((PURPOSE, FILE, ANCHOR), "expires_after.seconds"),
        ((PURPOSE, FILE, SECONDS), "expires_after.anchor"),
        ((PURPOSE, FILE, ANCHOR, ("expires_after[seconds]", None, b"60")), "expires_after.seconds"),
        ((PURPOSE, FILE, ANCHOR, ("expires_after[seconds]", None, b"soon")), "expires_after.seconds"),
        ((PURPOSE, FILE, ("expires_after[anchor]", None, b"last_active_at"), SECONDS), "expires_after.anchor"),
    ],
)
def test_what_is_missing_or_wrong_is_named(parts: tuple[tuple[str, str | None, bytes], ...], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(*parts)[0].finish()
    assert caught.value.param == param


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(UnknownField) as caught:
        read(PURPOSE, ("colour", None, b"red"), FILE)
    assert caught.value.param == "colour"
    assert "purpose" in caught.value.message


def test_a_cut_body_is_no_form() -> None:
    for end in (b"", b"--cut", b"--cut-"):
        with pytest.raises(BadRequest, match="last boundary"):
            read(PURPOSE, FILE, end=end)[0].finish()


@pytest.mark.parametrize(
    "content_type", [b"", b"multipart/form-data", b"multipart/form-data; boundary=" + b"x" * 500,
                     b"multipart/form-data; boundary=cut; charset=utf-16"],
)  # fmt: skip
def test_no_boundary_no_form(content_type: bytes) -> None:
    with pytest.raises(BadRequest):
        FileForm(content_type, lambda purpose: None)


def test_the_purpose_is_judged_as_soon_as_it_is_known() -> None:
    def judge(purpose: str) -> None:
        raise Forbidden(purpose)

    form = FileForm(TYPE, judge)
    with pytest.raises(Forbidden, match="batch"):
        form.parse(body(PURPOSE, end=b"--cut\r\n"))


@pytest.mark.parametrize(
    ("sent", "kept"),
    [(b"in.jsonl", "in.jsonl"), (b"/etc/passwd", "passwd"), (b"..\\..\\x.txt", "x.txt"), (b"C:\\a\\b c.txt", "b c.txt"),
     ("größe.jsonl".encode(), "größe.jsonl"), (b" spaced ", "spaced")],
)  # fmt: skip
def test_of_a_name_with_folders_the_last_part_is_kept(sent: bytes, kept: str) -> None:
    assert base_name(sent) == kept


@pytest.mark.parametrize(
    "sent", [b"", b"/", b".", b"..", b"a/..", b"a\x00b", b"a\nb", b"\x7f", b"\xff", b"x" * 300, "a\u202eb".encode()]
)
def test_what_is_no_name(sent: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        base_name(sent)
    assert caught.value.param == "file"


# -- adapters -------------------------------------------------------------------------------------------------------

NAME = ("name", None, b"sql")


def judge(name: str) -> None:
    if name == "bad":
        raise Forbidden("not this one")


def adapter(*parts: tuple[str, str | None, bytes], name: str | None = None, slice_bytes: int = 7) -> tuple[str, bytes]:
    form, data, got = AdapterForm(TYPE, name, judge), body(*parts), b""
    for start in range(0, len(data), slice_bytes):
        form.parse(data[start : start + slice_bytes])
        got += form.take()
    form.end()
    return form.name, got


def test_an_adapters_form_has_its_name_first() -> None:
    assert adapter(NAME, FILE) == ("sql", FILE[2])
    with pytest.raises(BadRequest, match="before the file"):
        adapter(FILE, NAME)


def test_the_query_may_name_an_adapter() -> None:
    assert adapter(FILE, name="sql") == ("sql", FILE[2])
    with pytest.raises(BadRequest, match="twice"):
        adapter(NAME, FILE, name="sql")


def test_what_is_wrong_with_an_adapters_form() -> None:
    with pytest.raises(BadRequest, match="needs a name"):
        adapter(FILE)
    with pytest.raises(BadRequest, match="needs the file"):
        adapter(NAME)
    with pytest.raises(UnknownField, match="has file, name"):
        adapter(FILE, PURPOSE)
    with pytest.raises(Forbidden):
        adapter(("name", None, b"bad"), FILE)
