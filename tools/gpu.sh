#!/usr/bin/env bash
# Builds quantkit's kernels for the GPU of this machine and runs on it what needs one. Nothing is downloaded or
# installed: the libraries go into python/quantkit of this checkout, and that is what runs.
#
#   bash tools/gpu.sh STEP...        PYTHON=python3      an interpreter whose torch (>= 2.11) sees the GPU, with pytest
#                                    RESULTS=build/gpu   folder for logs and JSON
#                                    LIMIT=86400         seconds that all steps together may take
#                                    FILE_LIMIT=240      and each file of tests
# Steps, each with the seconds that it may take if you like: test=200
#   check      what is here: GPU, driver, torch, nvcc, compiler, tools
#   build      compile for this device: nvcc, a C++20 compiler, cmake >= 3.25, ninja (QUANTKIT_CUDA_ARCHS=90a if torch
#              sees no device here)
#   layouts    the bulk copy and the wgmma product of sm_90 alone, byte by byte; needs nvcc, not build
#   test       every test that needs a GPU, a process for each file: a fault ends a process's use of the device
#   memcheck, racecheck, initcheck, synccheck   each op once under compute-sanitizer; CASES chooses others (pytest -k)
#   ops, gemm, attention   the benchmarks
# A step that fails does not keep the next from running, but a build that fails does, unless libraries are there
# already. The exit status is how many failed; the last lines say which.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

STEPS=" check build layouts test memcheck racecheck initcheck synccheck ops gemm attention "
if [ $# = 0 ]; then
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 2
fi
for wanted in "$@"; do
    name=${wanted%%=*}
    case $STEPS in
        *" $name "*) ;;
        *) echo "gpu.sh: no step is called $name; there are$STEPS" >&2 && exit 2 ;;
    esac
    case $wanted in
        *=*[!0-9]* | *=) echo "gpu.sh: $wanted: after = come whole seconds" >&2 && exit 2 ;;
    esac
done
named=${PYTHON:-python3}
PYTHON=$(command -v "$named") || { echo "gpu.sh: no interpreter $named: set PYTHON" >&2 && exit 2; }
RESULTS=${RESULTS:-build/gpu}
mkdir -p "$RESULTS"
# Tools that came with the interpreter's environment, and nvcc where its installer leaves it.
PATH="$(dirname "$PYTHON"):$PATH:/usr/local/cuda/bin"
export PYTHONPATH="$PWD/python" PYTHONUNBUFFERED=1

# Runs a command in what is left of the time, of all and of the step.
end=$((SECONDS + ${LIMIT:-86400}))
deadline=$end
limited() {
    local left=$((deadline - SECONDS))
    [ "$left" -gt 0 ] || { echo "no time left for: $*" && return 124; }
    [ "$left" -lt "${CAP:-$left}" ] || left=${CAP:-$left}
    timeout --kill-after=10 "$left" "$@"
}

check() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm,clocks.max.mem,mig.mode.current \
        --format=csv,noheader || nvidia-smi -L || echo "no nvidia-smi"
    "$PYTHON" - << 'END'
import importlib.util, shutil, subprocess, sys
import torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
there = torch.cuda.is_available()
print("device", torch.cuda.get_device_name() if there else "none that torch can use")
missing = [m for m in ("pytest", "numpy") if importlib.util.find_spec(m) is None]
print("missing packages:", ", ".join(missing) or "none")
for tool in ("nvcc", "cmake", "ninja", "g++", "compute-sanitizer"):
    print(f"{tool:18}", shutil.which(tool) or "not found")
if torch.version.cuda and (nvcc := shutil.which("nvcc")):
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.split("release ")[-1].split(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:  # two runtimes, of which only one is on the path
        print("nvcc is of CUDA", release, "and torch of", torch.version.cuda)
sys.exit(not there or bool(missing))
END
}

arch() {
    "$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9))' \
        2> /dev/null
}

# Without one, tests would skip, and pass.
need_device() { [ -n "$(arch)" ] || { echo "torch sees no device" && return 1; }; }

build() {
    local archs=${QUANTKIT_CUDA_ARCHS:-$(arch)}
    [ -n "$archs" ] || { echo "torch sees no device: set QUANTKIT_CUDA_ARCHS, to 90a for an H100 or H200" && return 1; }
    # Without the module for checkpoint files; warnings of compilers that nobody tried stay warnings.
    limited cmake -S . -B build/gpu-objects -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$PYTHON" \
        -DQUANTKIT_CUDA=ON -DQUANTKIT_CUDA_ARCHS="$archs" -DQUANTKIT_HOST=OFF -DQUANTKIT_WERROR=OFF &&
        limited cmake --build build/gpu-objects &&
        cmake --install build/gpu-objects --prefix python &&
        libraries
}

libraries() {
    "$PYTHON" -c 'import quantkit.ops as o; o._load.require("cpu"), o._load.require("cuda"), print("both libraries load")'
}

# tests FILE PREFIX... -- ARGUMENTS...
tests_of() {
    local file=$1 prefix=()
    shift
    while [ "$1" != -- ]; do prefix+=("$1") && shift; done
    shift
    echo "== $file"
    # Where a kernel never ends, the test is shown after a minute, and the other files still get their turn.
    CAP=${FILE_LIMIT:-240} limited "${prefix[@]}" "$PYTHON" -m pytest -q -m 'cuda and not slow and not bench' \
        -o faulthandler_timeout=60 --durations=5 "$@" "$file"
    local result=$?
    [ "$result" = 5 ] && return 0 # none of the file's tests was chosen
    return "$result"
}

files() { grep -l 'pytest\.mark\.cuda' tests/ops/test_*.py | grep -v layouts; }

layouts() {
    need_device || return 1
    tests_of tests/ops/test_sm90_layouts.py --
}

all_tests() {
    need_device || return 1
    local failed=0 file left=''
    for file in $(files); do
        [ "$deadline" -gt "$SECONDS" ] || { left="$left $file" && continue; }
        tests_of "$file" -- || failed=1
    done
    [ -z "$left" ] || { echo "not reached:$left" && failed=1; }
    return "$failed"
}

sanitize() {
    need_device || return 1
    command -v compute-sanitizer > /dev/null || { echo "no compute-sanitizer on PATH" && return 1; }
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # so that a buffer's end is its allocation's
    local failed=0 file
    local tool=(compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all)
    for file in $(files); do tests_of "$file" "${tool[@]}" -- -k "${CASES:-current_stream}" || failed=1; done
    if [ "$(arch)" = 90a ]; then # wgmma even for few rows
        QUANTKIT_CUDA_GEMM=sm90 tests_of tests/ops/test_gemm_cuda.py "${tool[@]}" -- -k "${CASES:-current_stream}" ||
            failed=1
    fi
    return "$failed"
}

benchmark() { limited "$PYTHON" "benchmarks/$1_cuda.py" --json "$RESULTS/$1.json" "${@:2}"; }

step() {
    case $1 in
        check | build | layouts) "$1" ;;
        test) all_tests ;;
        *check) sanitize "$1" ;;
        gemm) benchmark gemm --paths default,sm80 ;;
        *) benchmark "$1" ;;
    esac
}

failed=()
for wanted in "$@"; do
    name=${wanted%%=*}
    deadline=$end
    case $wanted in
        *=*) [ $((SECONDS + ${wanted#*=})) -lt "$end" ] && deadline=$((SECONDS + ${wanted#*=})) ;;
    esac
    echo "=== $name"
    started=$SECONDS
    (step "$name") 2>&1 | tee "$RESULTS/$name.log"
    result=${PIPESTATUS[0]}
    echo "=== $name: $([ "$result" = 0 ] && echo passed || echo "failed, status $result"), $((SECONDS - started)) s"
    [ "$result" = 0 ] && continue
    failed+=("$name")
    [ "$name" = build ] && ! libraries && break
done
[ ${#failed[@]} = 0 ] || echo "=== failed: ${failed[*]}"
exit ${#failed[@]}
