"""Ranks on two machines: each in namespaces of its own, with a network between them and files that both see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import RUN_ALL, differences, files, run_all, yaml_of

# Arguments: what happens on the first machine besides, and what torchrun starts on both.
MACHINES = r"""
set -e
meanwhile=$1; shift
printf '127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n' > "$FOLDER/hosts"
mkfifo "$FOLDER/connected"
machine='number=$1; shift
mount --bind "$FOLDER/hosts" /etc/hosts; hostname node$number
ip link set lo up; ip address add 10.77.0.$number/24 dev node$number; ip link set node$number up
export GLOO_SOCKET_IFNAME=node$number OMP_NUM_THREADS=1
exec "$PYTHON" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id job \
    --rdzv-endpoint node1:29500 --local-addr 10.77.0.$number "$@"'
apart='unshare --pid --fork --uts --mount --mount-proc'
$apart --net sh -c "read line < \"$FOLDER/connected\"; $machine" second 2 "$@" &
while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
ip link add node1 type veth peer name node2 netns $!
echo > "$FOLDER/connected"
sh -c "$meanwhile" &
$apart sh -c "$machine" first 1 "$@"
wait
"""


def run(folder: Path, command: list[str], meanwhile: str = "true") -> subprocess.CompletedProcess[str]:
    """`command` as torchrun starts it on both, with a `folder` for what connects them."""
    apart = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        "sh",
        "-c",
    ]
    try:
        probe = subprocess.run([*apart, "ip link add node1 type veth peer name node2"], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"two machines need unshare: {error}")
    if probe.returncode:
        pytest.skip(f"two machines need namespaces and veth: {probe.stderr.strip()}")
    return subprocess.run(
        [*apart, MACHINES, "sh", meanwhile, *command],
        env={**os.environ, "PYTHON": sys.executable, "FOLDER": str(folder)},
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_two_machines_write_what_one_process_writes(tmp_path: Path) -> None:
    jobs = ("gptq", "experts")
    code = RUN_ALL + "from quantkit.distributed import ranks\nassert not ranks().one_machine\n"
    script = tmp_path / "all.py"
    script.write_text(code)
    done = run(tmp_path, [str(script), *(str(yaml_of(job, tmp_path, tmp_path / "two")) for job in jobs)])
    assert done.returncode == 0, done.stderr
    one = run_all(jobs, 1, tmp_path / "one")
    for job in jobs:
        assert len(one[job]) > 12 and not differences(files(tmp_path / "two" / job), one[job]), job


@pytest.mark.slow
def test_a_machine_that_vanishes_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """Nothing closes the connection; only the questions that go unanswered tell."""
    code = (
        "import sys, time\nfrom quantkit.distributed import ranks\nranks(); open(sys.argv[1], 'w'); time.sleep(100)\n"
    )
    script = tmp_path / "wait.py"
    script.write_text(code)
    there = tmp_path / "there"
    cut = f"while [ ! -e {there} ]; do sleep 0.1; done; sleep 1; ip link set node1 down"
    done = run(tmp_path, [str(script), str(there)], cut)
    assert done.returncode != 0
    assert "on node2) is gone" in done.stderr or "on node1) is gone" in done.stderr
