#!/usr/bin/env bash
# Tests of what runs on an NVIDIA GPU, and then the speed there of SB3's SAC and of SoftSAC: eager, compiled without
# CUDA graphs, with them, and with them but without a copy of the replay buffer on the GPU. From the repository's root,
# where the package is installed with what its tests need:
#
#     bash benchmarks/gpu.sh
#
# Settings: PYTHON, TESTS (0: leave them out), REPEATS, STEPS, UPDATES, ENV_ID, OUTPUT. The results are written to
# benchmarks/results/gpu.json. Each measurement has a process of its own; all are made once before any is repeated.
set -euo pipefail

PYTHON=${PYTHON:-python}
TESTS=${TESTS:-1}
REPEATS=${REPEATS:-3}
STEPS=${STEPS:-2000}
UPDATES=${UPDATES:-2000}
ENV_ID=${ENV_ID:-HalfCheetah-v5}
OUTPUT=${OUTPUT:-benchmarks/results/gpu.json}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() {
    echo "gpu.sh: $1" >&2
    exit 1
}
command -v "$PYTHON" > /dev/null || fail "'$PYTHON' not found: activate an environment, or set PYTHON=..."
"$PYTHON" -c 'import sb3_softsac' || fail "the package cannot be imported: pip install -e '.[tests]'"
"$PYTHON" - << 'END'
import sys

import torch as th

if not th.cuda.is_available():
    built = f"for CUDA {th.version.cuda}" if th.version.cuda else "without CUDA (see https://pytorch.org/get-started)"
    sys.exit(
        f"gpu.sh: there is no GPU that torch can use. This torch ({th.__version__}) is built {built}; nvidia-smi shows "
        "which GPUs there are."
    )
print(f"{th.cuda.get_device_name()}, torch {th.__version__}, CUDA {th.version.cuda}")
END

if [ "$TESTS" != 0 ]; then
    "$PYTHON" -m pytest -m "" -rs tests/test_cuda_graph.py tests/test_device_replay.py tests/test_runner.py tests/test_inductor.py tests/test_eager.py tests/test_metrics.py
fi

runs=$(mktemp)
trap 'rm -f "$runs"' EXIT
for repeat in $(seq "$REPEATS"); do
    for arm in sb3 eager compiled graph graph-without-copy; do
        echo "Repeat $repeat of $REPEATS: $arm"
        "$PYTHON" - "$arm" "$repeat" "$STEPS" "$UPDATES" "$runs" "$ENV_ID" << 'END'
import importlib
import json
import sys
import time

import torch as th

arm, runs, env_id = sys.argv[1], *sys.argv[5:]
seed, steps, updates = map(int, sys.argv[2:5])
WARM = 300  # updates before anything is timed: compilation, capture
BATCH_SIZE = 256

options = {}
if arm != "sb3":
    options["compile"] = arm != "eager"
    options["buffer_on_device"] = False if arm == "graph-without-copy" else "auto"
if arm == "compiled":  # each kernel launched by itself
    importlib.import_module("sb3_softsac.execution.cuda_graph").CudaGraph = lambda function, addresses, capture: function
module, name = ("stable_baselines3", "SAC") if arm == "sb3" else ("sb3_softsac", "SoftSAC")
algorithm = getattr(importlib.import_module(module), name)
model = algorithm("MlpPolicy", env_id, learning_starts=1000, device="cuda", seed=seed, **options)
marks = {}


def on_step(_locals, _globals):
    if model._n_updates == WARM:
        th.cuda.synchronize()
        marks["start"] = time.perf_counter()
    return True


model.learn(1000 + WARM + steps, callback=on_step)
th.cuda.synchronize()
row = {"arm": arm, "repeat": seed, "steps_per_second": steps / (time.perf_counter() - marks["start"])}
for at_once in (1, 32):
    model.train(gradient_steps=at_once, batch_size=BATCH_SIZE)
    calls = -(-updates // at_once)
    th.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        model.train(gradient_steps=at_once, batch_size=BATCH_SIZE)
    th.cuda.synchronize()
    row[f"updates_per_second_{at_once}"] = calls * at_once / (time.perf_counter() - start)
row["peak_bytes"] = th.cuda.max_memory_allocated()
if options.get("compile"):
    if not model._runner.compiles:
        sys.exit("gpu.sh: the update could not be compiled, see the warning above.")
    row["compile_seconds"] = model._runner.report.compile_seconds
with open(runs, "a") as file:
    file.write(json.dumps(row) + "\n")
END
    done
done

PYTHONPATH=benchmarks${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" - "$runs" "$OUTPUT" "$ENV_ID" << 'END'
import json
import statistics
import sys
from pathlib import Path

import torch as th
from record import markdown_table, write_json

rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
numbers = ("steps_per_second", "updates_per_second_1", "updates_per_second_32", "compile_seconds", "peak_bytes")
medians = {}
for arm in dict.fromkeys(row["arm"] for row in rows):
    own = [row for row in rows if row["arm"] == arm]
    medians[arm] = {name: statistics.median(row[name] for row in own) for name in numbers if name in own[0]}
gpu = {"name": th.cuda.get_device_name(), "cuda": th.version.cuda, "capability": th.cuda.get_device_capability()}
results = {"env": sys.argv[3], "gpu": gpu, "medians": medians, "results": rows}
write_json(Path(sys.argv[2]).resolve(), command="bash benchmarks/gpu.sh", **results)


def cell(values, name, unit=1.0, form=",.0f"):
    if name not in values:
        return ""
    text = format(values[name] / unit, form)
    base = medians["sb3"]
    return f"{text} ({values[name] / base[name]:.2f}x)" if name.endswith(("second", "_1", "_32")) else text


titles = [sys.argv[3], "environment steps/s", "updates/s, one at a time", "updates/s, 32 at a time"]
table = [
    [arm, *(cell(values, name) for name in numbers[:3]), cell(values, "compile_seconds", 1, ".1f"),
     cell(values, "peak_bytes", 1e6)]
    for arm, values in medians.items()
]
print(markdown_table([*titles, "compilation, s", "GPU memory, MB"], table))
END
