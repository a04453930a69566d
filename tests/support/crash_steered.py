"""The same as ``crash_world`` for what is done to a batch besides running it, and for single items.

The recorded life: a batch is paused, cancelled in the middle, run again where it failed, and deleted; items come and
end meanwhile. ``python -m tests.support.crash_steered [STEP]`` tries all points.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.support.aio import eventually
from tests.support.batch_office import OWNER, InstantEngine, Office, input_lines, office
from tests.support.batches import COMPLETIONS
from tests.support.crash_world import Cut, try_all
from tests.support.recorded_disk import Op, RecordedDisk, recorded_disk
from vllm_bootstrap.batches.jobs import TERMINAL, State
from vllm_bootstrap.batches.types import BatchView, NewItem
from vllm_bootstrap.errors import NotFound

LINES, ITEMS = 40, 4


def record_steered(root: Path) -> list[Op]:
    root.mkdir()
    with recorded_disk(root) as disk:
        asyncio.run(_life(disk))
    return disk.log


async def _life(disk: RecordedDisk) -> None:
    engine = InstantEngine(pace_s=0.001, holds_after=LINES // 2)
    async with office(disk.folder, engine) as one:
        view = await one.create(await one.upload(input_lines(LINES)))
        batch_id = view.row.id
        disk.note("accepted", batch_id)
        await eventually(lambda: engine.held)
        await one.batches.pause(batch_id, OWNER)
        disk.note("paused", batch_id)
        items = [await _submit(disk, one, number) for number in range(ITEMS)]
        await one.batches.cancel(batch_id, OWNER)
        disk.note("cancel answered", batch_id)
        await one.ended(batch_id)
        disk.note("cancelled", batch_id)
        engine.release()
        for item_id, prompt in items:
            await one.department.items.get(item_id, OWNER, wait_s=10)
            disk.note("item ended", item_id, prompt)
        await one.batches.retry(batch_id, OWNER)
        disk.note("retried", batch_id)
        view = await one.ended(batch_id)
        assert view.row.phase.state is State.COMPLETED
        disk.note("ended again", batch_id)
        await one.batches.delete(batch_id, OWNER)
        disk.note("deleted", batch_id)


async def _submit(disk: RecordedDisk, one: Office, number: int) -> tuple[str, str]:
    prompt = f"item-{number}"
    new = NewItem(OWNER, COMPLETIONS, {"model": "small", "prompt": prompt}, "small", priority=number)
    view = await one.department.items.submit(new)
    disk.note("item accepted", view.id, prompt)
    return view.id, prompt


class SteeredCut(Cut):
    async def _second_life(self, folder: Path, durable: dict[str, set[int]]) -> None:
        engine = InstantEngine()
        async with office(folder, engine) as two:
            for (batch_id,) in self._noted("accepted"):
                await self._batch(two, batch_id)
            for batch_id, lines in self.completed.items():
                again = [key for key in engine.executed if key[0] == batch_id and key[1] in lines]
                self._expect(not again, f"run again although done: {again[:5]}")
            await self._items(two)
        self._look_at_databases(folder)

    async def _batch(self, two: Office, batch_id: str) -> None:
        try:
            view: BatchView = await two.batches.get(batch_id, OWNER)
        except NotFound:
            self._expect(self._noted("ended again"), "the batch is gone before anybody deleted it")
            return
        self._expect(not self._noted("deleted"), "the deleted batch is back")
        row = view.row
        if self._noted("paused") and row.phase.state is State.IN_PROGRESS and not self._noted("cancelled"):
            self._expect(row.paused, "the batch is not paused any more")
        if row.paused and row.phase.state not in TERMINAL:
            await two.batches.resume(batch_id, OWNER)
        view = await two.ended(batch_id)
        self._state_fits(view.row.phase.state)
        await self._whole(two, view)
        if view.row.phase.state is State.CANCELLED and view.row.counts.failed:
            await two.batches.retry(batch_id, OWNER)
            view = await two.ended(batch_id)
            self._expect(view.row.phase.state is State.COMPLETED, f"run again, it is {view.row.phase.state}")
            self._expect(view.row.counts == (LINES, LINES - 4, 4), f"run again, it has {view.row.counts}")
            await self._whole(two, view)

    def _state_fits(self, state: State) -> None:
        if self._noted("retried"):
            fits = {State.COMPLETED}
        elif self._noted("cancel answered") and not self._noted("cancelled"):
            fits = {State.CANCELLED}
        else:
            fits = {State.CANCELLED, State.COMPLETED}
        self._expect(state in fits, f"the batch is {state}")

    async def _whole(self, two: Office, view: BatchView) -> None:
        row = view.row
        good = await two.content(row.output_file_id) if row.output_file_id else []
        bad = await two.content(row.error_file_id) if row.error_file_id else []
        if not good + bad and row.counts == (0, 0, 0):
            return  # cancelled before its lines were known
        ids = sorted(record["custom_id"] for record in good + bad)
        wanted = sorted(f"id-{n}" for n in range(1, LINES + 1))
        self._expect(ids == wanted, f"{row.phase.state}: {len(ids)} records, {len(set(ids))} different ones")
        self._expect(row.counts == (LINES, len(good), len(bad)), f"{row.counts} for {len(good)} and {len(bad)} records")
        wrong = [one for one in good if one["response"]["body"]["choices"][0]["text"] != one["custom_id"]]
        self._expect(not wrong, f"answers of others: {wrong[:2]}")

    async def _items(self, two: Office) -> None:
        ended = {prompt for _, prompt in self._noted("item ended")}
        again = ended & set(two.engine.prompts)
        self._expect(not again, f"items run again although they have ended: {again}")
        for item_id, prompt in self._noted("item accepted"):
            view = await two.department.items.get(item_id, OWNER, wait_s=10)
            self._expect(view.state in {"completed", "failed"}, f"the item {item_id} is {view.state}")
            if view.state == "completed":
                assert view.response is not None
                said = view.response["body"]["choices"][0]["text"]
                self._expect(said == prompt, f"{item_id} has the answer of {said}")
            count = two.engine.prompts.count(prompt)
            self._expect(count <= 1, f"{prompt} was run {count} times")


if __name__ == "__main__":
    sys.exit(try_all(record_steered, SteeredCut))
