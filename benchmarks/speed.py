"""
Speed of SoftSAC beside Stable-Baselines3's SAC and SBX's (JAX), with the same hyperparameters, on the CPU (Linux).

    python benchmarks/speed.py run --sbx-python sbx/bin/python
    python benchmarks/speed.py run --sbx-python sbx/bin/python --threads 2 --repeats 3 \\
        --cells pendulum batch1024 freq32 envs4 envs16 buffer
    python benchmarks/speed.py report
    python benchmarks/speed.py run --quick --output /tmp/quick.jsonl

``run`` measures each cell (a task, and how it is trained on) with each arm (who trains) in a process of its own. All is
done once before anything is repeated, so that a busy spell of the machine hits all arms alike. Each result is appended
to a file at once; a benchmark that is started again goes on where it stopped. ``report`` prints tables, and writes
``summary.json`` beside that file. For ratios that do not depend on how busy the machine is, see ``speed_ratio.py``.

A process may use as many cores as it is to have threads: JAX cannot be told a number of threads. "The machine's limit"
is the rate of float32 products of 2048 x 2048 matrices, by the faster of torch's libraries; bfloat16 may exceed it. The
operations of an update are counted, those in matrix products. Time to 100,000 steps is computed, from imports, warm-up
with the first compilation on a machine, and the measured rate.

SBX needs an environment of its own (a CPU build of PyTorch will do):

    python3.11 -m venv sbx
    sbx/bin/pip install sbx-rl==0.28.0 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 optax==0.2.8 \\
        tfp-nightly==0.26.0.dev20261027 stable-baselines3==2.9.2 torch==2.13.0 numpy==2.4.6 \\
        "gymnasium[mujoco]==1.4.0" mujoco==4.0.0
"""

import argparse
import importlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, markdown_table, write_json

# Libraries are imported where they are used: SBX's environment does not have all of them, and Linux counts the memory
# of the process that starts another one into the other's peak

LEARNING_STARTS = 1000
BUFFER_SIZE = 1_000_000
FILLS = (1_000, 10_000, 100_000, 1_000_000)
SIZES = (2048, 256)  # of matrices; products of the first kind tell the machine's limit
COMPILED_CODE = Path(tempfile.gettempdir()) / f"softsac-speed-{os.getuid()}"
VERSIONS = ("sb3-softsac", "stable-baselines3", "torch", "sbx-rl", "jax", "jaxlib", "gymnasium", "mujoco", "numpy")


class Arm(NamedTuple):
    """Who trains."""

    label: str
    colour: str
    algorithm: str
    rate: float  # steps per second and seconds to start, for the estimate
    start: float
    options: dict[str, Any] = {}  # noqa: RUF012
    is_plain: bool = True  # False: with something that SoftSAC's C++ does not know
    preset: str | None = None  # with the hyperparameters of this configuration instead of the cell's
    residual_expansion: int | None = None  # instead of the configuration's
    is_published: bool = False  # with the algorithm's own default hyperparameters instead of the cell's


class Cell(NamedTuple):
    """What is trained on, and how. All else is as in SB3's SAC by default."""

    label: str
    env: str
    steps: int  # timed
    batch_size: int = 256
    n_envs: int = 1
    train_freq: int = 1
    gradient_steps: int = 1
    is_shipped: bool = False  # with what hyperparams/softsac.yml adds to plain SAC; SB3's SAC has no such options


ARMS = {
    "sb3": Arm("SB3", "0.75", "stable_baselines3.SAC", 137, 3),
    "eager": Arm("SoftSAC, eager", "C9", "sb3_softsac.SoftSAC", 170, 3, {"compile": False}),
    "compiled": Arm("SoftSAC, compiled", "C0", "sb3_softsac.SoftSAC", 450, 7, {"compile": True}),
    "inductor": Arm("SoftSAC, by Inductor", "C2", "sb3_softsac.SoftSAC", 350, 7, {"compile": True}, is_plain=False),
    "before": Arm("SoftSAC, other commit", "0.5", "sb3_softsac.SoftSAC", 450, 7, {"compile": True}),
    "bf16": Arm(
        "SoftSAC, bfloat16", "navy", "sb3_softsac.SoftSAC", 400, 7, {"compile": True, "matmul_precision": "medium"}
    ),
    "sbx": Arm("SBX", "C1", "sbx.SAC", 200, 9),
    "compact": Arm("SoftSAC compact", "C3", "sb3_softsac.SoftSAC", 80, 60, {"compile": True}, preset="compact"),
    "half_wide": Arm(
        *("compact, blocks half as wide", "C6", "sb3_softsac.SoftSAC", 120.0, 60.0, {"compile": True}),
        preset="compact",
        residual_expansion=2,
    ),
    "crossq": Arm("CrossQ, sb3-contrib", "C4", "sb3_contrib.CrossQ", 12, 3, is_published=True),
}
CELLS = {
    "halfcheetah": Cell("HalfCheetah", "HalfCheetah-v5", 768),
    "humanoid": Cell("Humanoid", "Humanoid-v5", 512),
    "hopper": Cell("Hopper", "Hopper-v5", 768),
    "walker2d": Cell("Walker2d", "Walker2d-v5", 768),
    "pendulum": Cell("Pendulum", "Pendulum-v1", 768),
    "batch1024": Cell("HalfCheetah,\nbatch size 1024", "HalfCheetah-v5", 256, batch_size=1024),
    "freq32": Cell("HalfCheetah,\n32 updates\nevery 32 steps", "HalfCheetah-v5", 768, train_freq=32, gradient_steps=32),
    "humanoid_shipped": Cell("Humanoid,\nas shipped", "Humanoid-v5", 512, is_shipped=True),
    "ant_shipped": Cell("Ant,\nas shipped", "Ant-v5", 512, is_shipped=True),
    "envs4": Cell("4 HalfCheetahs", "HalfCheetah-v5", 768, n_envs=4, gradient_steps=-1),
    "envs16": Cell("16 HalfCheetahs", "HalfCheetah-v5", 768, n_envs=16, gradient_steps=-1),
}
COMPILED = ("compiled", "inductor", "bf16", "compact", "half_wide")
IN_BUFFER = ("sb3", "eager", "compiled")  # arms of the cell "buffer"

Settings = dict[str, Any]
Numbers = dict[str, float]
Row = dict[str, Any]
"""One measurement: ``settings``, ``numbers``, ``versions``, whether it was the ``first_compilation``, ``seconds``."""


# What a process of its own measures


def work(args: argparse.Namespace) -> None:
    """
    Measure one thing, and print it as one line of JSON.

    :param args: arguments of the command ``worker``
    """
    settings: Settings = json.loads(args.settings)
    use_cores(settings["threads"])
    measure = {"products": measure_products, "buffer": measure_buffer}.get(settings["cell"], measure_training)
    installed = {found.metadata["Name"].lower().replace("_", "-"): found.version for found in distributions()}
    versions = {name: installed[name] for name in VERSIONS if name in installed}
    print(json.dumps({"numbers": measure(settings), "versions": versions}))


def use_cores(threads: int) -> None:
    """
    :param threads: as many cores are used by this process; to be called before JAX is imported, which counts them
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        sys.exit(f"{threads} threads need as many cores, but this process may only use {len(cores)}.")
    os.sched_setaffinity(0, cores[:threads])


def make_model(settings: Settings) -> tuple[Any, float]:
    """
    :param settings: of the measurement
    :return: model, and when its construction began, after all imports
    """
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    arm = ARMS[settings["arm"]]
    module, _, name = arm.algorithm.partition(".")
    algorithm = getattr(importlib.import_module(module), name)
    # ReLU under another name: the same updates, by Inductor
    others = {} if arm.is_plain else {"activation_fn": type("OwnReLU", (th.nn.ReLU,), {})}
    options = {**arm.options, "num_threads": settings["threads"]} if arm.options else {}
    if arm.options and settings.get("is_shipped"):
        own, of_policy = shipped_options(settings["env"])
        options, others = {**options, **own}, {**others, **of_policy}
    th.set_num_threads(settings["threads"])
    env = make_vec_env(settings["env"], settings["n_envs"], seed=settings["repeat"])
    hyperparameters: dict[str, Any] = {
        "learning_rate": 3e-4,
        "batch_size": settings["batch_size"],
        "tau": 0.005,
        "gamma": 0.99,
        "ent_coef": "auto",  # begins with 1
        "policy_kwargs": {"net_arch": [256, 256], "n_critics": 2, **others},  # with ReLU and Adam
    }
    if arm.preset is not None:
        hyperparameters = importlib.import_module("sb3_softsac").preset(arm.preset)
        if arm.residual_expansion is not None:
            hyperparameters["policy_kwargs"]["residual_expansion"] = arm.residual_expansion
        settings["batch_size"] = hyperparameters["batch_size"]
    elif arm.is_published:
        hyperparameters = {}
    asked = {
        "buffer_size": BUFFER_SIZE,
        "learning_starts": LEARNING_STARTS,
        "train_freq": settings["train_freq"],
        "gradient_steps": settings["gradient_steps"],
        "seed": settings["repeat"],
        "device": "cpu",
    }
    start = time.perf_counter()
    model = algorithm("MlpPolicy", env, **{**hyperparameters, **asked, **options})
    return model, start


def shipped_options(env_id: str) -> tuple[Settings, Settings]:
    """
    :param env_id: of an environment in ``hyperparams/softsac.yml``
    :return: arguments of ``SoftSAC`` that SB3's SAC does not have, and of its policy
    """
    import yaml

    path = Path(__file__).resolve().parents[1] / "hyperparams" / "softsac.yml"
    shipped = yaml.safe_load(path.read_text())[env_id]
    names = ("qf_learning_rate", "ent_coef_learning_rate", "policy_delay", "policy_delay_compensation")
    return {name: shipped[name] for name in names if name in shipped}, eval(shipped.get("policy_kwargs", "{}"))


def measure_training(settings: Settings) -> Numbers:
    """
    Train: through warm-up and compilation first, then as many steps as are to be timed.

    :param settings: of the measurement
    :return: what it took
    """
    begin = time.perf_counter()
    model, start = make_model(settings)
    marks: dict[str, tuple[float, int, int]] = {}

    def on_step(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        now = time.perf_counter(), model.num_timesteps, model._n_updates
        marks.setdefault("first", now)
        if model._n_updates < settings["warmup_updates"]:
            return True
        marks.setdefault("warm", now)
        marks["end"] = now
        return bool(model.num_timesteps < marks["warm"][1] + settings["steps"])

    model.learn(LEARNING_STARTS + 10 * (settings["warmup_updates"] + settings["steps"]), callback=on_step)
    (warm, warm_steps, warm_updates), (end, end_steps, end_updates) = marks["warm"], marks["end"]
    numbers = {
        "import_seconds": start - begin,
        "first_step_seconds": marks["first"][0] - start,
        "warm_seconds": warm - start,
        "warm_steps": warm_steps,
        "updates_per_step": (end_updates - warm_updates) / (end_steps - warm_steps),
        "steps_per_second": (end_steps - warm_steps) / (end - warm),
        "updates_per_second": updates_per_second(model, settings),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if settings["arm"] in COMPILED:
        if not model._runner.compiles:
            sys.exit("The update could not be compiled: see the warning.")
        numbers["compile_seconds"] = model._runner.report.compile_seconds
    if settings["arm"] != "sbx":
        numbers["flop_per_update"] = count_operations(model, settings["batch_size"])
    return numbers


def updates_per_second(model: Any, settings: Settings) -> float:
    """
    :param model: trained for a while
    :param settings: of the measurement
    :return: updates per second, sampling included; as many in one call as in training
    """
    n_at_once = settings["gradient_steps"]
    if n_at_once < 0:
        n_at_once = settings["train_freq"] * settings["n_envs"]
    n_calls = -(-settings["updates"] // n_at_once)
    start = time.perf_counter()
    for _ in range(n_calls):
        model.train(gradient_steps=n_at_once, batch_size=settings["batch_size"])
    if settings["arm"] == "sbx":
        jax = importlib.import_module("jax")
        jax.block_until_ready((model.policy.qf_state, model.policy.actor_state, model.ent_coef_state))
    return float(n_calls * n_at_once / (time.perf_counter() - start))


def count_operations(model: Any, batch_size: int) -> int:
    """
    :param model: SB3's or SoftSAC's, trained for a while; all that was to be timed has been
    :param batch_size: minibatch size
    :return: floating-point operations of one eager update, those in matrix products; means over delays
    """
    from torch.utils.flop_counter import FlopCounterMode

    if hasattr(model, "_runner"):  # SoftSAC's: the counter does not see what compiled code does
        model._compiles, model._runner = False, None
    n_updates = 6
    with FlopCounterMode(display=False) as counter:
        model.train(gradient_steps=n_updates, batch_size=batch_size)
    return counter.get_total_flops() // n_updates


def measure_buffer(settings: Settings) -> Numbers:
    """
    Sample and update with more and more transitions in the replay buffer.

    :param settings: of the measurement
    :return: seconds of one ``sample``, and of one update with its sample, by number of transitions
    """
    import numpy as np

    model, _ = make_model(settings)
    model.learn(LEARNING_STARTS + 10)  # compiles
    buffer, batch_size = model.replay_buffer, settings["batch_size"]
    timed: list[tuple[str, int, Callable[[], Any]]] = [
        ("sample", 10 * settings["updates"], lambda: buffer.sample(batch_size)),
        ("update", settings["updates"], lambda: model.train(gradient_steps=1, batch_size=batch_size)),
    ]
    rng, filled, numbers = np.random.default_rng(0), 0, {}
    for rows in settings["fills"]:
        # SoftSAC's next observations are not an array of their own
        arrays = [vars(buffer).get(name) for name in ("observations", "next_observations", "actions", "rewards")]
        for array in arrays:
            if array is not None:
                array[filled:rows] = rng.random(array[filled:rows].shape, dtype=np.float32)
        filled, buffer.pos, buffer.full = rows, rows % buffer.buffer_size, rows == buffer.buffer_size
        for name, n_calls, function in timed:
            function()
            start = time.perf_counter()
            for _ in range(n_calls):
                function()
            numbers[f"{name}_seconds_{rows}"] = (time.perf_counter() - start) / n_calls
    if settings["arm"] in COMPILED:
        numbers["compile_seconds"] = model._runner.report.compile_seconds
    return numbers


def measure_products(settings: Settings) -> Numbers:
    """
    float32 products of square matrices, by the BLAS that torch calls and by oneDNN.

    :param settings: of the measurement
    :return: operations per second, the best of several rounds, by library and size
    """
    import torch as th

    th.set_num_threads(settings["threads"])
    libraries: dict[str, Callable[[th.Tensor, th.Tensor], th.Tensor]] = {"BLAS": th.mm}
    if th.backends.mkldnn.is_available():
        libraries["oneDNN"] = lambda a, b: th.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    numbers = {}
    for size in SIZES:
        a, b, n_calls = th.randn(size, size), th.randn(size, size), max(1, 1024**3 // size**3)
        for name, product in libraries.items():
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(n_calls):
                    product(a, b)
                seconds.append(time.perf_counter() - start)
            numbers[f"{name}_{size}"] = 2 * size**3 * n_calls / min(seconds)
    return numbers


# Which processes are run


def plan(args: argparse.Namespace) -> list[Settings]:
    """
    :param args: arguments of the command ``run``
    :return: settings of all measurements, in their order
    """
    warmup, updates, fills = (20, 20, FILLS[:2]) if args.quick else (300, 200, FILLS)
    measurements: list[Settings] = []
    for repeat in range(1, args.repeats + 1):
        measurements += [
            {"cell": "products", "threads": threads, "arm": "", "repeat": repeat} for threads in args.threads
        ]
        for name, threads, arm in itertools.product(args.cells, args.threads, args.arms):
            cell = CELLS["halfcheetah" if name == "buffer" else name]
            rollout = cell.train_freq * cell.n_envs
            n_rollouts = -(-(args.steps or cell.steps) // rollout)
            own = {**cell._asdict(), "steps": n_rollouts * rollout, "warmup_updates": warmup, "updates": updates}
            del own["label"]
            settings = {"cell": name, "threads": threads, "arm": arm, "repeat": repeat, **own}
            if name != "buffer":
                measurements.append(settings)
            elif arm in IN_BUFFER:
                measurements.append({**settings, "fills": list(fills)})
    return measurements


def _program(settings: Settings) -> str:
    """Name of an update, the same for all measurements that compile the same."""
    return "-".join(str(settings.get(key)) for key in ("env", "batch_size", "threads", "arm"))


def _estimate(settings: Settings) -> float:
    """About how many seconds a measurement takes where nothing else runs."""
    if settings["cell"] == "products":
        return 5.0
    arm, updates = ARMS[settings["arm"]], settings["warmup_updates"] + settings["steps"] + settings["updates"]
    if settings["cell"] == "buffer":
        updates = len(settings["fills"]) * settings["updates"] + 500  # as long as filling takes
    cost = (1.5 if settings["env"] == "Humanoid-v5" else 1.0) * (0.2 + 0.8 * settings["batch_size"] / 256)
    return arm.start + cost * updates / arm.rate


def run(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the command ``run``
    """
    if "sbx" in args.arms and args.sbx_python is None:
        args.arms.remove("sbx")
        print("SBX is left out: give its interpreter with --sbx-python.")
    done = [row["settings"] for row in _read(args.output)]
    measurements = [settings for settings in plan(args) if settings not in done]
    known = {_program(settings) for settings in done}
    seconds = sum(map(_estimate, measurements))
    seconds += 22 * len({_program(settings) for settings in measurements if settings["arm"] in COMPILED} - known)
    print(f"{len(measurements)} measurements, {seconds / 60:.0f} minutes or so")
    if args.dry_run:
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for i, settings in enumerate(measurements, 1):
        first_compilation = settings["arm"] in COMPILED and _program(settings) not in known
        row = measure(settings, args.sbx_python if settings["arm"] == "sbx" else sys.executable, first_compilation)
        known.add(_program(settings))
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rate = f", {row['numbers']['steps_per_second']:.0f} steps/s" if "steps_per_second" in row["numbers"] else ""
        print(f"{i}/{len(measurements)} {list(settings.values())[:4]}: {row['seconds']:.0f} s{rate}", flush=True)


def process_of(settings: Settings, python: str, script: str) -> tuple[list[str], dict[str, str]]:
    """
    :param settings: of a measurement
    :param python: interpreter
    :param script: has a command ``worker`` that takes the settings
    :return: command and environment of the process that measures
    """
    code = COMPILED_CODE / _program(settings)
    own = {"OMP_NUM_THREADS": str(settings["threads"]), "JAX_PLATFORMS": "cpu"}
    caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "SB3_SOFTSAC_CACHE_DIR"), str(code))
    return [python, script, "worker", json.dumps(settings)], {**os.environ, **own, **caches}


def measure(settings: Settings, python: str, first_compilation: bool) -> Row:
    """
    :param settings: of the measurement
    :param python: interpreter
    :param first_compilation: whether torch is to know nothing of earlier compilations
    :return: what a fresh process has measured
    """
    if first_compilation:
        shutil.rmtree(COMPILED_CODE / _program(settings), ignore_errors=True)
    command, environment = process_of(settings, python, __file__)
    start = time.perf_counter()
    worker = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = round(time.perf_counter() - start, 2)
    if worker.returncode != 0:
        sys.exit(f"{worker.stderr}\nFailed: {settings}")
    measured = json.loads(worker.stdout.splitlines()[-1])
    return {"settings": settings, **measured, "first_compilation": first_compilation, "seconds": seconds}


# What is made of the results


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def derive(rows: list[Row]) -> None:
    """
    Add the numbers that follow from more than one measurement.

    :param rows: all measurements
    """
    limits, first_compilations = {}, {}
    for row in rows:
        settings, numbers = row["settings"], row["numbers"]
        if settings["cell"] == "products":
            rates = [rate for name, rate in numbers.items() if name.endswith(f"_{SIZES[0]}")]
            limits[settings["threads"], settings["repeat"]] = max(rates)
        elif row["first_compilation"]:
            first_compilations[_program(settings)] = numbers.pop("compile_seconds")
    for row in rows:
        settings, numbers = row["settings"], row["numbers"]
        if settings["cell"] not in CELLS:
            continue
        seconds = numbers["import_seconds"] + numbers["warm_seconds"]
        if _program(settings) in first_compilations:
            numbers["first_compile_seconds"] = first_compilations[_program(settings)]
            if "compile_seconds" in numbers:  # had been compiled before; who starts to use it has not
                seconds += numbers["first_compile_seconds"] - numbers["compile_seconds"]
        numbers["seconds_to_100k"] = seconds + (100_000 - numbers["warm_steps"]) / numbers["steps_per_second"]
        limit = limits.get((settings["threads"], settings["repeat"]))
        if "flop_per_update" in numbers and limit is not None:
            numbers["of_limit"] = numbers["flop_per_update"] * numbers["updates_per_second"] / limit


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """
    :param rows: all measurements
    :return: for each cell, number of threads and arm: median and range of all numbers over the repeats, and their
        ratios to SB3's and to SBX's, medians of the ratios in each repeat
    """
    groups: dict[tuple[str, int, str], dict[int, Numbers]] = defaultdict(dict)
    for row in rows:
        settings = row["settings"]
        groups[settings["cell"], settings["threads"], settings["arm"]][settings["repeat"]] = row["numbers"]
    entries = []
    for (cell, threads, arm), repeats in groups.items():
        values: dict[str, list[float]] = defaultdict(list)
        ratios: dict[str, dict[str, list[float]]] = {"sb3": defaultdict(list), "sbx": defaultdict(list)}
        for repeat, numbers in repeats.items():
            for name, value in numbers.items():
                values[name].append(value)
                for other, of_other in ratios.items():
                    if base := groups.get((cell, threads, other), {}).get(repeat, {}).get(name):
                        of_other[name].append(value / base)
        entry = {"cell": cell, "threads": threads, "arm": arm, "repeats": len(repeats)}
        entry |= {"median": _medians(values), "range": {name: [min(v), max(v)] for name, v in values.items()}}
        entries.append(entry | {f"to_{other}": _medians(of_other) for other, of_other in ratios.items()})
    return entries


def _medians(values: dict[str, list[float]]) -> Numbers:
    return {name: statistics.median(of_name) for name, of_name in values.items()}


# Title, name of the number, unit and format
Column = tuple[str, str, float, str]
SPEED: list[Column] = [
    ("environment steps/s", "steps_per_second", 1, ",.0f"),
    ("updates/s alone", "updates_per_second", 1, ",.0f"),
    ("GFLOP per update", "flop_per_update", 1e9, ".3f"),
    ("of the machine's limit", "of_limit", 1, ".0%"),
]
START_AND_MEMORY: list[Column] = [
    ("imports, s", "import_seconds", 1, ".1f"),
    ("first step, s", "first_step_seconds", 1, ".2f"),
    ("warm, s", "warm_seconds", 1, ".1f"),
    ("compiled first, s", "first_compile_seconds", 1, ".1f"),
    ("compiled again, s", "compile_seconds", 1, ".1f"),
    ("100,000 steps (computed), min", "seconds_to_100k", 60, ".1f"),
    ("peak memory, MB", "peak_bytes", 1e6, ",.0f"),
]
PRODUCTS: list[Column] = [
    (f"{library}, {size} x {size}, GFLOP/s", f"{library}_{size}", 1e9, ",.0f")
    for size, library in itertools.product(SIZES, ("BLAS", "oneDNN"))
]
BUFFER: list[Column] = [
    (f"{name}, {rows:,} rows, {unit}", f"{name}_seconds_{rows}", scale, form)
    for name, unit, scale, form in (("sample", "µs", 1e-6, ",.0f"), ("update", "ms", 1e-3, ".2f"))
    for rows in FILLS
]
WITH_RATIOS = ("steps_per_second", "updates_per_second", "seconds_to_100k")


def print_table(entries: list[dict[str, Any]], columns: list[Column]) -> None:
    """
    :param entries: of the summary
    :param columns: what to tell of each; a number that was not measured is left out
    """
    header, rows = ["cell", "threads", "arm"], [[e["cell"], str(e["threads"]), e["arm"]] for e in entries]
    for title, name, unit, form in columns:
        groups = {"median": title, "to_sb3": "to SB3", "to_sbx": "to SBX"} if name in WITH_RATIOS else {"median": title}
        for group, heading in groups.items():
            header.append(heading)
            for entry, row in zip(entries, rows, strict=True):
                scale, how = (unit, form) if group == "median" else (1.0, ".2f")
                row.append(format(entry[group][name] / scale, how) if name in entry[group] else "")
    if rows:
        print(markdown_table(header, rows), end="\n\n")


def report(args: argparse.Namespace) -> None:
    """
    :param args: arguments of the command ``report``
    """
    rows = _read(args.runs)
    derive(rows)
    entries = summarise(rows)
    training = [entry for entry in entries if entry["cell"] in CELLS]
    print_table([entry for entry in entries if entry["cell"] == "products"], PRODUCTS)
    print_table(training, SPEED)
    print_table(training, START_AND_MEMORY)
    print_table([entry for entry in entries if entry["cell"] == "buffer"], BUFFER)
    versions = {row["settings"]["arm"]: row["versions"] for row in rows}
    write_json(args.runs.parent / "summary.json", versions_by_arm=versions, results=entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = RESULTS / "speed" / "runs.jsonl"

    command = commands.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument(
        "--cells", nargs="+", choices=[*CELLS, "buffer"], default=["halfcheetah", "humanoid"], help="tasks"
    )
    command.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="who trains")
    command.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads")
    command.add_argument("--repeats", type=int, default=5, help="how often all is measured")
    command.add_argument("--steps", type=int, help="timed steps, in place of the cells' own")
    command.add_argument("--sbx-python", metavar="PATH", help="interpreter of SBX's environment")
    command.add_argument("--output", type=Path, default=runs, help="file that results are appended to")
    command.add_argument("--quick", action="store_true", help="a few steps of each, once, to see whether it works")
    command.add_argument("--dry-run", action="store_true", help="only say how long it will take")
    command.set_defaults(do=run)

    command = commands.add_parser("report", help="tables and summary")
    command.add_argument("--runs", type=Path, default=runs, help="file of results")
    command.set_defaults(do=report)

    command = commands.add_parser("worker", help="measure one thing here (called by run)")
    command.add_argument("settings", help="JSON")
    command.set_defaults(do=work)

    args = parser.parse_args()
    if args.do is run and args.quick:
        args.repeats, args.steps = 1, args.steps or 64
        if args.output == runs:
            parser.error("--quick measures nothing of worth: give its results another place with --output.")
    args.do(args)


if __name__ == "__main__":
    main()
