"""The catalogue in force, with real files that are edited while it watches, and a real database."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tests.support.aio import eventually, run
from vllm_bootstrap.db import Database
from vllm_bootstrap.engines import build_engines
from vllm_bootstrap.errors import BadRequest, Conflict, NotFound
from vllm_bootstrap.models.book import CatalogueBook
from vllm_bootstrap.models.checks import checker
from vllm_bootstrap.models.entries import EntryStore
from vllm_bootstrap.models.orders import MODEL_LABEL
from vllm_bootstrap.models.parsing import CatalogueError
from vllm_bootstrap.models.types import AdapterEntry, Fetched, ModelEntry, Rewrite

QWEN = "models:\n  qwen: {source: org/qwen, aliases: [chat], defaults: {temperature: 0}}\n"
BROKEN = "models:\n  qwen: {source: org/qwen, gpus: {cuont: 1}}\n"


class Desk:
    """A book on a folder of its own, and how often it told of a change."""

    def __init__(self, folder: Path, text: str | None = QWEN, **options) -> None:
        self.path = folder / "models.yaml"
        if text is not None:
            self.path.write_text(text)
        self.db = Database.open(folder / "state.db")
        self.store = EntryStore(self.db)
        self.changes = 0
        self.book = CatalogueBook(
            self.path, self.store, checker(build_engines(), "simulator"), **{"look_every_s": 0.02, **options}
        )
        self.book.on_change(self.changed)

    def changed(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> CatalogueBook:
        await self.book.start()
        return self.book

    async def __aexit__(self, *_: object) -> None:
        await self.book.close()
        self.db.close()

    def edit(self, text: str) -> None:
        """As editors do: a new file takes the old one's place."""
        fresh = self.path.with_name("models.yaml.new")
        fresh.write_text(text)
        fresh.replace(self.path)


def names(book: CatalogueBook) -> list[str]:
    return sorted(book.entries())


def test_an_edit_takes_effect_without_being_told(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path)
        async with desk as book:
            assert book.find("chat").source == "org/qwen"
            assert book.rewrite_of("chat") == Rewrite({"temperature": 0})
            before = book.current()
            desk.edit("models:\n  other: {source: org/other}\n")
            await eventually(lambda: names(book) == ["other"])
            assert (desk.changes, book.find("chat"), book.rewrite_of("other"), book.note) == (1, None, None, None)
            assert list(before.entries) == ["qwen"], "a catalogue that somebody holds does not change"

    run(work())


def test_a_broken_edit_keeps_the_catalogue_and_says_so_once(tmp_path, caplog):
    async def work() -> None:
        desk = Desk(tmp_path)
        async with desk as book:
            desk.edit(BROKEN)
            await eventually(lambda: book.note)
            assert book.note == f"{desk.path}: models.qwen.gpus.cuont: there is no such key: did you mean count?"
            assert names(book) == ["qwen"]
            assert not await book.reload()
            assert [r.levelno for r in caplog.records].count(logging.ERROR) == 1
            desk.path.unlink()
            await eventually(lambda: book.note == f"{desk.path}: there is no such file")
            assert names(book) == ["qwen"]
            desk.edit(QWEN)
            await eventually(lambda: book.note is None)
            assert desk.changes == 0, "nothing is different from before"

    run(work())


@pytest.mark.parametrize(
    "text", ["", "models:\n", "# nothing\n", "defaults: {ttl: 60}\n", "models: null\ngroups: {}\n"]
)
def test_an_edit_that_leaves_nothing_is_taken_for_a_mistake(tmp_path, text):
    async def work() -> None:
        desk = Desk(tmp_path)
        async with desk as book:
            desk.path.write_text(text)
            await eventually(lambda: book.note)
            assert book.note == (
                f"{desk.path}: no model is left in it, so those from before stay: write 'models: {{}}' to have none"
            )
            assert (names(book), desk.changes, await book.reload()) == (["qwen"], 0, False)
            desk.path.write_text(QWEN)
            await eventually(lambda: book.note is None)
            assert (names(book), desk.changes) == (["qwen"], 0)

    run(work())


def test_a_file_is_emptied_by_saying_so(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, setting=ModelEntry("one", "org/one", origin="setting"))
        async with desk as book:
            desk.path.write_text("models: {}\n")
            await eventually(lambda: names(book) == ["one"])
            desk.path.write_text("")
            assert (await book.reload(), book.note) == (True, None), "there was nothing before either"

    run(work())


def test_an_empty_file_is_fine_at_the_start(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, text="", required=True)
        async with desk as book:
            assert (names(book), book.note) == ([], None)
            desk.path.write_text(QWEN)
            await eventually(lambda: names(book) == ["qwen"])

    run(work())


def test_a_file_that_is_still_being_written_is_not_taken_in(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, look_every_s=0.2)
        seen: list[list[str]] = []
        desk.book.on_change(lambda: seen.append(names(desk.book)))
        async with desk as book:
            text = "models:\n" + "".join(f"  m{n}: {{source: org/m{n}}}\n" for n in range(30))
            with desk.path.open("w") as file:
                for line in text.splitlines(keepends=True):
                    file.write(line)
                    file.flush()
                    await asyncio.sleep(0.03)
            await eventually(lambda: len(names(book)) == 30)
            assert (len(seen), book.note) == (1, None), "what was there half was never in force"

    run(work())


def test_a_signal_does_not_wait_until_a_file_is_at_rest(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, look_every_s=3600)
        async with desk as book:
            desk.path.write_text("models:\n  other: {source: org/other}\n")
            book.reload_soon()
            await eventually(lambda: names(book) == ["other"])

    run(work())


def test_a_signal_reads_the_file_at_once(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, look_every_s=3600)
        async with desk as book:
            desk.edit("models:\n  other: {source: org/other}\n")
            book.reload_soon()
            await eventually(lambda: names(book) == ["other"])

    run(work())


def test_the_default_file_may_appear_later(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, text=None)
        async with desk as book:
            assert await book.reload()
            assert (names(book), book.note) == ([], None)
            desk.edit(QWEN)
            await eventually(lambda: names(book) == ["qwen"])

    run(work())


@pytest.mark.parametrize(
    ("text", "said"), [(None, "there is no such file"), (BROKEN, "models.qwen.gpus.cuont"), ("a: [", "line 1")]
)
def test_no_daemon_starts_with_a_catalogue_other_than_the_one_asked_for(tmp_path, text, said):
    with pytest.raises(CatalogueError) as caught:
        Desk(tmp_path, text=text, required=True)
    assert str(caught.value).startswith(f"{tmp_path / 'models.yaml'}: {said}")


def test_a_folder_is_no_catalogue(tmp_path):
    (tmp_path / "models.yaml").mkdir()
    with pytest.raises(CatalogueError, match="Is a directory"):
        Desk(tmp_path, text=None)


def test_added_models_outlive_the_daemon(tmp_path):
    async def first() -> None:
        desk = Desk(tmp_path)
        async with desk as book:
            await book.add(book.parse("new", {"source": "org/new", "aliases": ["n"], "gpus": {"count": 2}}), "alice")
            await book.add(book.parse("gone", {"source": "org/gone"}), "alice")
            await book.remove("gone")
            assert desk.changes == 3
            assert book.find("n").gpus.count == 2

    async def second() -> None:
        desk = Desk(tmp_path)
        async with desk as book:
            assert names(book) == ["new", "qwen"]
            assert book.find("n").origin == "runtime"
            await book.add(book.parse("new", {"source": "org/newer"}), "bob")
            assert (book.find("n"), book.find("new").source) == (None, "org/newer")

    run(first())
    run(second())


def test_added_models_never_shadow_those_of_the_file(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path, setting=ModelEntry("one", "org/one", origin="setting"))
        async with desk as book:
            for name, body in (("qwen", {}), ("one", {}), ("chat", {}), ("new", {"aliases": ["qwen"]})):
                with pytest.raises(Conflict):
                    await book.add(book.parse(name, {"source": "s", **body}))
            with pytest.raises(NotFound):
                await book.remove("nothing")
            with pytest.raises(Conflict):
                await book.remove("qwen")
            assert (names(book), await desk.store.all()) == (["one", "qwen"], [])

    run(work())


def test_an_added_model_waits_while_the_file_has_its_name(tmp_path):
    async def work() -> None:
        desk = Desk(tmp_path)
        async with desk as book:
            await book.add(book.parse("new", {"source": "org/new"}))
            desk.edit("models:\n  new: {source: org/of-the-file}\n")
            await eventually(lambda: book.find("new").source == "org/of-the-file")
            assert "the added model 'new' is left out" in book.note
            desk.edit(QWEN)
            await eventually(lambda: book.find("new").source == "org/new")
            assert book.note is None

    run(work())


def test_the_file_must_not_name_the_model_of_the_setting(tmp_path):
    with pytest.raises(CatalogueError, match=r"models\.qwen: the name 'qwen' is used"):
        Desk(tmp_path, setting=ModelEntry("qwen", "org/qwen", origin="setting"))


def test_uploaded_adapters_come_and_go(tmp_path):
    uploaded: list[AdapterEntry] = []

    async def work() -> None:
        desk = Desk(tmp_path, adapters=lambda name: uploaded if name == "qwen" else [])
        async with desk as book:
            before = book.fingerprint(book.find("qwen"))
            uploaded.append(AdapterEntry("support", "/adapters/support"))
            book.refresh()
            assert book.find("support").name == "qwen"
            assert book.order_of(book.find("support")).adapters == {"support": "/adapters/support"}
            assert book.fingerprint(book.find("qwen")) != before
            book.refresh()
            assert desk.changes == 1

    run(work())


def test_orders_name_what_was_downloaded(tmp_path):
    desk = Desk(tmp_path, resolved=lambda entry: Fetched("c0ffee", "/hub/q") if entry.name == "qwen" else None)
    order = desk.book.order_of(desk.book.find("qwen"), gpu_count=2)
    assert (order.fields["revision"], order.gpu_count, order.labels[MODEL_LABEL]) == ("c0ffee", 2, "qwen")
    assert order.folder == "/hub/q"
    desk.db.close()


def test_a_request_may_name_a_repository_and_never_a_path(tmp_path):
    desk = Desk(tmp_path)
    assert desk.book.adhoc("org/any") == ModelEntry("org/any", "org/any", origin="request")
    for name in ("/etc", "../x", "a/../b", "~/x", "-x", "", "a/b/c", "http://x/y", "x" * 200, "a b", "org/load"):
        assert desk.book.adhoc(name) is None, name
    desk.db.close()


def test_a_body_is_judged_like_the_file(tmp_path):
    desk = Desk(tmp_path)
    for body, param in (
        ({}, "source"),
        ({"source": "s", "gpus": {"count": "2"}}, "gpus.count"),
        ({"source": "s", "args": {"trust_remote_code": True}}, "args.trust_remote_code"),
        (
            {"source": "s", "adapters": {"l": {"source": "/l"}, "m": {"source": "/m", "aliases": ["l"]}}},
            "adapters.m.aliases",
        ),
        ([], "name"),
    ):
        with pytest.raises(BadRequest) as caught:
            desk.book.parse("n", body)
        assert caught.value.param == param
    desk.db.close()


def test_changes_at_the_same_time_take_turns(tmp_path):
    async def work() -> None:
        async with Desk(tmp_path) as book:
            bodies = [book.parse(f"m{n}", {"source": "s", "aliases": ["same"]}) for n in range(5)]
            done = await asyncio.gather(*map(book.add, bodies), return_exceptions=True)
            assert [type(one) for one in done] == [type(None), *[Conflict] * 4]
            assert names(book) == ["m0", "qwen"]

    run(work())


def test_a_listener_that_fails_does_not_end_the_watch(tmp_path, caplog):
    async def work() -> None:
        desk = Desk(tmp_path)

        def fail() -> None:
            raise RuntimeError("a bug")

        desk.book.on_change(fail)
        async with desk as book:
            for name in ("one", "two"):
                desk.edit(f"models: {{{name}: {{source: s}}}}")
                await eventually(lambda name=name: names(book) == [name])
            assert "could not be taken in" in caplog.text

    run(work())


def test_without_a_file_there_is_what_was_added(tmp_path):
    async def work() -> None:
        database = Database.open(tmp_path / "state.db")
        book = CatalogueBook(None, EntryStore(database), checker(build_engines(), "simulator"))
        await book.start()
        await book.add(ModelEntry("new", "org/new", origin="runtime"))
        assert await book.reload()
        assert (names(book), list(book.groups()), book.current().entries["new"].source) == (["new"], [], "org/new")
        await book.close()
        database.close()

    run(work())
