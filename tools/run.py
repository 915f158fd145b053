"""`python tools/run.py -c FILE`: the same as `quantkit run -c FILE`, for those who know the command from AngelSlim."""

import sys

from quantkit.cli import entry

if __name__ == "__main__":
    entry(["run", *sys.argv[1:]])
