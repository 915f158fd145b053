"""What it costs to be stopped, and to be able to: a random Llama, GPTQ W4A16, killed at a layer and gone on with.

usage: python benchmarks/resume.py [--rounds 3] [--threads 2] [--layers 8] [--folder DIR]

In turns, whole processes of `quantkit`: one that runs through, one without a journal (nothing is kept: layers are not
told to it), one that is killed by SIGKILL in the middle of layer layers / 2, and the one that goes on from there. The
cost of being stopped is the time of the last two together above that of the first; its bound is one layer's work and
5 s. Outputs are compared, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine
from rates import LLAMA
from synthetic import make_llama

CHILD = """
import json, os, random, signal, sys, time, torch
from pathlib import Path
begun = time.perf_counter()
sys.path.insert(0, sys.argv[1])
from rates import LENGTH, ROWS, RECIPES, job
from quantkit import engine, resume
from quantkit.modifiers.pipeline import Pipeline
model, folder, threads, kill, journal = sys.argv[2:7]
torch.set_num_threads(int(threads))
draw = random.Random(0)
rows = [[draw.randrange(3, 2048) for _ in range(LENGTH)] for _ in range(ROWS)]
spent = 0.0
if journal == "no":
    resume.Resumption.layer_done = lambda *_: None
else:
    usual_done = resume.Resumption.layer_done
    def layer_done(self, *rest):
        global spent
        started = time.perf_counter()
        usual_done(self, *rest)
        spent += time.perf_counter() - started
    resume.Resumption.layer_done = layer_done
usual = Pipeline.finish
def finish(self, layer, statistics):
    if layer.index == int(kill):
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(self, layer, statistics)
Pipeline.finish = finish
result = engine.run(job(Path(model), Path(folder), RECIPES["gptq"]), rows=rows, progress=False)
assert result.audit.ok
print(json.dumps({"layer_done": spent, **result.seconds}))
"""


def run(
    model: Path, folder: Path, threads: int, *, kill: int = -1, journal: bool = True
) -> tuple[float, dict[str, float]]:
    """Seconds of the whole process, and of its stages where it came to its end."""
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-c", CHILD, here, str(model), str(folder), str(threads), str(kill)]
    started = time.perf_counter()
    done = subprocess.run([*command, "yes" if journal else "no"], capture_output=True, text=True)
    taken = time.perf_counter() - started
    assert (done.returncode != 0) == (kill >= 0), done.stderr
    return taken, {} if kill >= 0 else json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = make_llama(folder / "model", **{**LLAMA, "hidden": 1024, "intermediate": 2816, "layers": args.layers})
        whole, without, stopped, layers, told = [], [], [], [], []
        for turn in range(args.rounds):
            taken, stages = run(model, folder / "whole", args.threads)
            whole.append(taken)
            layers.append(stages["quantize"] / args.layers)
            told.append(stages["layer_done"])
            without.append(run(model, folder / "without", args.threads, journal=False)[0])
            killed, _ = run(model, folder / "stopped", args.threads, kill=args.layers // 2)
            again, _ = run(model, folder / "stopped", args.threads)
            stopped.append(killed + again)
            print(
                f"turn {turn + 1}: through {whole[-1]:.2f} s (a layer {layers[-1]:.2f} s, of all {told[-1]:.3f} s in "
                f"layer_done), without journal {without[-1]:.2f} s, killed {killed:.2f} s + gone on {again:.2f} s",
                flush=True,
            )
            for path in sorted((folder / "whole" / "out").iterdir()):
                for other in ("without", "stopped"):
                    assert path.read_bytes() == (folder / other / "out" / path.name).read_bytes(), path.name
            for other in ("whole", "without", "stopped"):
                shutil.rmtree(folder / other)
        cost = statistics.median(s - w for s, w in zip(stopped, whole, strict=True))
        journal = statistics.median(w / n for w, n in zip(whole, without, strict=True)) - 1
        layer = statistics.median(layers)
        print(f"being stopped costs {cost:.2f} s; one layer's work {layer:.2f} s + 5 s = {layer + 5:.2f} s")
        print(
            f"the journal costs {100 * journal:.1f} % of a process (median of ratios in turns); the sweep waits for it "
            f"{100 * statistics.median(t / w for t, w in zip(told, whole, strict=True)):.1f} %; all files the same"
        )


if __name__ == "__main__":
    main()
