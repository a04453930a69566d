"""An engine's output through a real shim: hidden secrets, rotation, huge and binary lines, nobody waiting."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest

from tests.support.aio import eventually, run
from tests.support.shims import Box, python, within

SECRET = "hf_" + "Zx9" * 11


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path / "b")
    yield box
    assert box.left() == []


def test_secrets_never_reach_the_disk_however_they_are_written(box):
    code = (
        "import os, sys\nkey = os.environ['KEY']\n"
        "os.write(1, b'one: ' + key.encode() + b'\\n')\n"
        "for letter in 'two: ' + key + '\\n': os.write(2, letter.encode()); open('/dev/null').read()\n"
        "os.write(1, b'x' * 65530 + key.encode() + b'\\n')\n"
    )

    async def main():
        async with box.shim() as shim:
            order = box.order(python(code), secrets=(SECRET,))
            await shim.go(replace(order, env={**order.env, "KEY": SECRET}))
            assert (await within(10, shim.wait())).exit_code == 0
            on_disk = b"".join(path.read_bytes() for path in sorted((box.log_base / "1").iterdir()))
            assert SECRET[:12].encode() not in on_disk
            hidden = "*" * len(SECRET)
            assert on_disk.decode() == f"one: {hidden}\ntwo: {hidden}\n{'x' * 65530}{hidden}\n"

    run(main())


def test_a_flood_stays_within_the_cap_and_its_end_is_there(box):
    code = (
        "import os\nline = b'y' * 1023 + b'\\n'\nfor _ in range(32): os.write(1, line * 1024)\n"
        "os.write(1, b'z' * (32 << 20))\nos.write(1, bytes(range(256)) + b'\\r 10 %\\r 20 %\\nthe end\\n')"
    )

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python(code), log_segment_bytes=1 << 18, log_max_bytes=1 << 20))
            assert (await within(20, shim.wait())).exit_code == 0
            folder = box.log_base / "1"
            assert sum(path.stat().st_size for path in folder.iterdir()) <= 1 << 20
            log = box.log()
            assert log.oldest > 0
            last = log.last_lines(1)[-1]
            if last.startswith("[vllm-bootstrap]"):  # a machine too busy to write 64 MiB as fast as they came
                assert last.endswith("the disk is too slow")
            else:
                assert last == "the end"
            assert log.size <= (64 << 20) + 256 + len(b"\r 10 %\r 20 %\nthe end\n")

    run(main())


def test_output_of_orphans_is_kept_too_and_a_closed_stdout_harms_nothing(box):
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    os.write(1, b'from the orphan\\n')\n"
        "    os._exit(0)\n"
        "os.wait(); os.close(1); os.close(2); time.sleep(60)"
    )

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python(code)))
            await box.says("from the orphan")
            status = await shim.status()
            await eventually(lambda: box.log().size == len("from the orphan\n"))
            assert status["phase"] == "running"
            await shim.stop(5)
            assert (await within(3, shim.wait())).signal == signal.SIGTERM

    run(main())


def test_the_last_words_before_sigkill_are_kept(box):
    code = "import os\nwhile True: os.write(1, b'x' * 4095 + b'\\n')"

    async def main():
        async with box.shim() as shim:
            await shim.go(box.order(python(code)))
            await box.says("x")
            os.kill(shim.engine.pid, signal.SIGKILL)
            await within(5, shim.wait())
            assert box.text().replace("x" * 4095 + "\n", "") == "" or "dropped" in box.text()

    run(main())
