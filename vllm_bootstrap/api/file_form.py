"""Forms that bring a file: which fields they may have, and what is wrong with it in words.

Invariant: the file's bytes are handed on as they come, at most one read of them is held; every field is judged before
the file counts as received, whatever order they come in. Knows nothing of disks and keys.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import ValidationError

from vllm_bootstrap.api.errors import from_validation
from vllm_bootstrap.errors import BadRequest, UnknownField
from vllm_bootstrap.gateway.multipart import Form, Part
from vllm_bootstrap.wire_batches import ExpiresAfter

FILE, PURPOSE, ANCHOR, SECONDS = "file", "purpose", "expires_after[anchor]", "expires_after[seconds]"
NAME = "name"
FIELDS = (FILE, PURPOSE, ANCHOR, SECONDS)
MAX_FIELD_BYTES = 1024
MAX_NAME_BYTES = 255


class OneFileForm:
    """A form with one file, in the part ``file``, and the plain ``fields``. ``parse`` the body in slices and ``take``
    what they held of the file; ``end`` when all was given. ``filename`` None: the file has not begun."""

    def __init__(self, content_type: bytes, fields: tuple[str, ...]) -> None:
        self.filename: str | None = None
        self._known = fields
        self._fields: dict[str, str] = {}
        self._pieces: list[bytes] = []
        self._form = Form(content_type, self)
        self.parse = self._form.parse

    def take(self) -> bytes:
        """The file's bytes since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def end(self) -> None:
        """All of the body was given. Raises ``BadRequest`` when there was no file."""
        self._form.finish()
        if self.filename is None:
            raise BadRequest("The form needs the file itself, in a part named 'file'.", param=FILE)

    def judge(self, name: str, text: str) -> None:
        """Raise for a plain field that is not allowed to be this."""

    # From the form

    def part_begins(self, part: Part) -> None:
        if part.name not in self._known:
            raise UnknownField(f"Unknown field {part.name[:64]!r}: a form with a file has {', '.join(self._known)}.",
                               param=part.name[:64])  # fmt: skip
        if part.name in self._fields or (part.name == FILE and self.filename is not None):
            raise BadRequest(f"The field {part.name!r} is there twice.", param=part.name)
        if (part.name == FILE) != (part.filename is not None):
            kind = "a file, with a filename" if part.name == FILE else "plain text"
            raise BadRequest(f"The field {part.name!r} must be {kind}.", param=part.name)
        if part.filename is not None:
            self.filename = base_name(part.filename)

    def part_data(self, part: Part, data: bytes, start: int, end: int) -> None:
        if part.name == FILE:
            self._pieces.append(data[start:end])
        elif len(part.data) + end - start > MAX_FIELD_BYTES:
            raise BadRequest(f"The field {part.name!r} is too long.", param=part.name)
        else:
            part.data += data[start:end]

    def part_ends(self, part: Part) -> None:
        if part.name == FILE:
            return
        try:
            text = part.data.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"The field {part.name!r} is not UTF-8.", param=part.name) from None
        self.judge(part.name, text)
        self._fields[part.name] = text


class FileForm(OneFileForm):
    """A file that is to be stored. ``judge_purpose`` raises for a purpose that is not allowed, as early as it is
    known. At the end ``finish``."""

    def __init__(self, content_type: bytes, judge_purpose: Callable[[str], None]) -> None:
        super().__init__(content_type, FIELDS)
        self._judge_purpose = judge_purpose

    def judge(self, name: str, text: str) -> None:
        if name == PURPOSE:
            self._judge_purpose(text)

    @property
    def purpose(self) -> str | None:
        return self._fields.get(PURPOSE)

    def finish(self) -> tuple[str, float | None]:
        """All of the body was given: the file's purpose, and the seconds until it expires. Raises ``BadRequest`` for
        what is missing."""
        self.end()
        if self.purpose is None:
            raise BadRequest("The form needs a part 'purpose', which says what the file is for.", param=PURPOSE)
        return self.purpose, self._expires_after_s()

    def _expires_after_s(self) -> float | None:
        given = {name: self._fields[part] for name, part in (("anchor", ANCHOR), ("seconds", SECONDS))
                 if part in self._fields}  # fmt: skip
        if not given:
            return None
        try:
            return float(ExpiresAfter.model_validate(given).seconds)
        except ValidationError as exc:
            problems = [{**problem, "loc": ("expires_after", *problem["loc"])} for problem in exc.errors()]
            raise from_validation(problems) from None


class AdapterForm(OneFileForm):
    """A LoRA adapter's archive, and before it the name it is to have, where the query does not say that."""

    def __init__(self, content_type: bytes, name: str | None, judge_name: Callable[[str], None]) -> None:
        super().__init__(content_type, (FILE, NAME))
        self._name, self._judge_name = name, judge_name

    @property
    def name(self) -> str:
        """Raises ``BadRequest`` when it has not been given so far."""
        found = self._name or self._fields.get(NAME)
        if found is None:
            raise BadRequest(
                "The adapter needs a name: a part 'name' before the file, or ?name= in the query.", param=NAME
            )
        return found

    def judge(self, name: str, text: str) -> None:
        if name != NAME:
            return
        if self._name is not None:
            raise BadRequest("The adapter's name is there twice: in the query and in the form.", param=NAME)
        if self.filename is not None:
            raise BadRequest("The adapter's name must stand before the file.", param=NAME)
        self._judge_name(text)


def base_name(filename: bytes) -> str:
    """A file's name without the folders that some clients send along. Raises ``BadRequest`` for what is no name."""
    try:
        name = filename.decode().replace("\\", "/").rpartition("/")[2].strip()
    except UnicodeDecodeError:
        raise BadRequest("The file's name is not UTF-8.", param=FILE) from None
    if name in {"", ".", ".."} or not name.isprintable():
        raise BadRequest("The file needs a name of printable characters.", param=FILE)
    if len(name.encode()) > MAX_NAME_BYTES:
        raise BadRequest(f"The file's name is longer than {MAX_NAME_BYTES} bytes.", param=FILE)
    return name
