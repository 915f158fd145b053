"""Start-up: `import quantkit` against `import torch, transformers`, and `quantkit --help`.

usage: python benchmarks/startup.py [--repeat 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(*command: str, repeat: int) -> float:
    """Median wall time of a command, files cached."""
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    repeat = parser.parse_args().repeat
    base = seconds(sys.executable, "-c", "import torch, transformers", repeat=repeat)
    everything = "import torch, transformers, quantkit, quantkit.ops, quantkit.engine"
    for name, code in (("import quantkit", "import quantkit"), ("import everything", everything)):
        took = seconds(sys.executable, "-c", code, repeat=repeat)
        print(f"{name:<20} {took:5.2f} s = {took / base:.2f} x import torch, transformers ({base:.2f} s)")
    print(f"{'quantkit --help':<20} {seconds(sys.executable, '-m', 'quantkit', '--help', repeat=repeat):5.2f} s")


if __name__ == "__main__":
    main()
