"""The catalogue in force: the file's models, ``MODEL_ID``, those added at run time and uploaded adapters, as one.

Invariant: whoever asks gets one consistent catalogue, and the one before a change until all of the change is good. A
broken edit of the file changes nothing and is told in ``note``; one that leaves no model in it without saying so is
taken for broken. What is loaded is unknown here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vllm_bootstrap.errors import BadRequest, Conflict, NotFound
from vllm_bootstrap.launches.types import LaunchOrder
from vllm_bootstrap.models import names, orders
from vllm_bootstrap.models.assembly import Assembled, assemble
from vllm_bootstrap.models.catalogue_file import Identity, identity_of, read
from vllm_bootstrap.models.entries import EntryStore
from vllm_bootstrap.models.parsing import CatalogueError, Check, clashes, parse, parse_entry
from vllm_bootstrap.models.types import AdapterEntry, Catalogue, Fetched, Group, ModelEntry, Rewrite
from vllm_bootstrap.pulse import until_pulse

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
# Not everybody replaces a file in one step: what has changed is taken in when it stayed the same for so long.
SETTLE_S = 0.5
# A repository's id, or a plain name for engines that need no weights. Never a path: who asks for a model by name must
# not choose what is read from this machine's disk.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(?:/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")


class CatalogueBook:
    """``path`` None: no file. ``required``: the file was asked for and must be there; otherwise it may appear later.
    ``setting`` is the model of one-model mode. ``adapters`` tells those uploaded for a model, ``resolved`` what was
    downloaded for it.

    The constructor reads the file (blocking) and raises ``CatalogueError`` naming it. All else belongs to the event
    loop; ``find`` and ``rewrite_of`` are one look into a dictionary each.
    """

    def __init__(
        self,
        path: Path | None,
        store: EntryStore,
        check: Check,
        *,
        required: bool = False,
        setting: ModelEntry | None = None,
        adapters: Callable[[str], Sequence[AdapterEntry]] = lambda _name: (),
        resolved: Callable[[ModelEntry], Fetched | None] = lambda _entry: None,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._path, self._store, self._check, self._required = path, store, check, required
        self._fixed = () if setting is None else (setting,)
        self._adapters, self._resolved, self._look_every_s = adapters, resolved, look_every_s
        self._listeners: list[Callable[[], None]] = []
        self._added: dict[str, ModelEntry] = {}
        self._changing = asyncio.Lock()
        self._asked = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._seen: Identity | None = None
        self._problem: str | None = None
        self._judge(setting)
        self._base = Catalogue()
        self._base = self._read()
        self._now = Assembled()
        self._assemble()

    # -- asking -------------------------------------------------------------------------------------------------

    def current(self) -> Catalogue:
        """All models and groups."""
        return self._now.catalogue

    def entries(self) -> Mapping[str, ModelEntry]:
        """All models by name."""
        return self._now.catalogue.entries

    def groups(self) -> Sequence[Group]:
        """All groups."""
        return self._now.catalogue.groups

    def find(self, name: str) -> ModelEntry | None:
        """The model whose engine serves ``name``: its own name, an alias, an adapter or an alias of one."""
        return self._now.by_name.get(name)

    def rewrite_of(self, name: str) -> Rewrite | None:
        """What is done to the bodies of requests for ``name``, None when nothing is."""
        return self._now.rewrites.get(name)

    @property
    def note(self) -> str | None:
        """What is wrong with the catalogue at the moment, None when nothing is."""
        return "\n".join(filter(None, (self._problem, *self._now.notes))) or None

    def adhoc(self, name: str) -> ModelEntry | None:
        """The model that a request's name stands for where any model may be asked for, None where it can be none."""
        if not _REPOSITORY.fullmatch(name) or names.problem(name) is not None:
            return None
        entry = ModelEntry(name, name, origin="request")
        try:
            self._check(entry)
        except BadRequest:
            return None
        return entry

    def parse(self, name: str, body: object) -> ModelEntry:
        """A model for ``add`` out of what stands below a name in the file. Raises ``BadRequest`` naming the field."""
        try:
            entry = parse_entry(name, body, "runtime", self._check)
        except CatalogueError as exc:
            place, reason = exc.problems[0]
            raise BadRequest(f"{place or 'name'}: {reason}", param=place or "name") from None
        if twice := clashes([entry]):
            place = twice[0][0].removeprefix(f"models.{name}.")
            raise BadRequest(f"{place}: each name may be used once.", param=place)
        return entry

    def order_of(
        self, entry: ModelEntry, *, gpu_count: int | None = None, gpu_ids: Sequence[int | str] | None = None
    ) -> LaunchOrder:
        """The launch that serves ``entry``. ``gpu_count`` and ``gpu_ids`` were chosen where it leaves them open."""
        return orders.order_of(entry, gpu_count=gpu_count, gpu_ids=gpu_ids, fetched=self._resolved(entry))

    def fingerprint(self, entry: ModelEntry) -> str:
        """What launches made for the entry carry as their label: another one was made before the entry was changed."""
        return orders.fingerprint(entry)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` after the catalogue has changed."""
        self._listeners.append(listener)

    # -- changing -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take in what was added earlier, and begin to watch the file. Raises ``StorageFailed``."""
        self._added = {entry.name: entry for entry in await self._store.all()}
        self._assemble()
        for note in self._now.notes:
            log.warning("Catalogue: %s", note)
        if self._path is not None:
            self._watching = asyncio.create_task(self._watch(), name="catalogue")

    async def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching

    async def add(self, entry: ModelEntry, owner_id: str = "") -> None:
        """Add a model, or change one that was added. On disk when this returns. Raises ``Conflict`` for a name that is
        another model's."""
        async with self._changing:
            known = self._now.catalogue.entries.get(entry.name)
            if known is not None and known.origin != "runtime":
                where = "MODEL_ID" if known.origin == "setting" else "the catalogue's file"
                raise Conflict(f"The model {entry.name!r} comes from {where}: change it there.", param="name")
            for name in entry.served_names:
                other = self.find(name)
                if other is not None and other.name != entry.name:
                    raise Conflict(f"{name!r} is a name of the model {other.name!r} already.", param="name")
            await self._store.put(entry, owner_id, time.time())
            self._added[entry.name] = entry
            self._changed()

    async def remove(self, name: str) -> None:
        """Remove a model that was added. Raises ``NotFound``, and ``Conflict`` for one from elsewhere."""
        async with self._changing:
            known = self._now.catalogue.entries.get(name)
            if name not in self._added:
                if known is None:
                    raise NotFound(f"There is no model {name!r} in the catalogue.", param="name")
                raise Conflict(
                    f"The model {name!r} was not added at run time: remove it where it stands.", param="name"
                )
            await self._store.delete(name)
            del self._added[name]
            self._changed()

    def refresh(self) -> None:
        """Uploaded adapters have changed."""
        self._changed()

    def reload_soon(self) -> None:
        """Read the file now, changed or not (SIGHUP). Does not wait."""
        self._asked.set()

    async def reload(self) -> bool:
        """Read the file now. Whether it is in force; ``note`` says why not."""
        async with self._changing:
            try:
                base = await asyncio.to_thread(self._read)
            except CatalogueError as exc:
                if self._problem != str(exc):
                    log.error("Catalogue not reloaded, the one before the change stays in force: %s", exc)
                self._problem = str(exc)
                return False
            self._problem, self._base = None, base
            log.info("Catalogue loaded: %d models", len(base.entries))
            self._changed()
            return True

    # -- inside -------------------------------------------------------------------------------------------------

    def _judge(self, setting: ModelEntry | None) -> None:
        if setting is None:
            return
        if (wrong := names.problem(setting.name)) is not None:
            raise CatalogueError([("MODEL_ID", f"the name {setting.name!r} {wrong}")])
        try:
            self._check(setting)
        except BadRequest as exc:
            raise CatalogueError([("MODEL_ID", f"this model cannot be served: {exc.message}")]) from None

    def _read(self) -> Catalogue:
        if self._path is None:
            return parse(None, self._check, self._fixed)
        try:
            raw, self._seen = read(self._path)
            self._required = True  # once there, it does not become an empty catalogue by being moved away
            return self._not_emptied(raw, parse(raw, self._check, self._fixed))
        except FileNotFoundError:
            if not self._required:
                return parse(None, self._check, self._fixed)
            raise CatalogueError([(str(self._path), "there is no such file")]) from None
        except OSError as exc:
            raise CatalogueError([(str(self._path), exc.strerror or str(exc))]) from None
        except CatalogueError as exc:
            inside = [(f"{self._path}: {place}" if place else str(self._path), why) for place, why in exc.problems]
            raise CatalogueError(inside) from None

    def _not_emptied(self, raw: object, made: Catalogue) -> Catalogue:
        """``made``, unless no model of the file is left and nobody said so: a file that was cut off or is not saved
        yet must not have everything unloaded. Raises ``CatalogueError``."""
        left, had = ([entry for entry in one.entries.values() if entry.origin == "file"] for one in (made, self._base))
        if had and not left and not (isinstance(raw, Mapping) and raw.get("models") is not None):
            said = "no model is left in it, so those from before stay: write 'models: {}' to have none"
            raise CatalogueError([("", said)])
        return made

    async def _watch(self) -> None:
        looked = self._seen
        while True:
            pause = until_pulse(self._look_every_s, time.monotonic())
            if looked != self._seen:
                pause = min(SETTLE_S, self._look_every_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._asked.wait()
            before, looked = looked, await self._look()
            if self._asked.is_set() or (looked != self._seen and looked == before):
                self._asked.clear()
                self._seen = looked
                try:
                    await self.reload()
                except Exception:
                    log.exception("The changed catalogue could not be taken in: the next change is")

    async def _look(self) -> Identity | None:
        """Which version of the file is there, None when none is."""
        assert self._path is not None  # noqa: S101 - start has looked; narrows the type
        try:
            return identity_of(await asyncio.to_thread(self._path.stat))
        except OSError as exc:
            return None if isinstance(exc, FileNotFoundError) else (exc.errno or -1,)

    def _changed(self) -> None:
        before = self._now
        self._assemble()
        for note in self._now.notes:
            if note not in before.notes:
                log.warning("Catalogue: %s", note)
        if self._now.catalogue != before.catalogue:
            for listener in self._listeners:
                listener()

    def _assemble(self) -> None:
        self._now = assemble(self._base, self._added.values(), self._adapters)
