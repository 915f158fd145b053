"""The end of the command's process."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from quantkit.startup import quick_imports

LEAVES = """
import atexit, sys, threading, time
from quantkit.startup import leave
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("x" * 300_000)
print("error", file=sys.stderr)
leave(3)
"""


def test_nothing_is_lost_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["x" * 300_000, "thread", "at exit"]
    assert done.stderr == "error\n"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), quick_imports():
            assert not gc.isenabled()
            1 / 0  # noqa: B018
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
