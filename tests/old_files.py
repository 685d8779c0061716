"""
Files of earlier versions, which every later one has to load and continue: ``tests/data/<case>/``.

``python tests/old_files.py`` writes those that are missing, with the code that is there: ``model.zip``, a folder of
checkpoints ``run``, and in ``end.json.gz`` what the uninterrupted run came to. A file that is there is never written
again, since what matters about it is that an older version wrote it.
"""

import dataclasses
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import resume_script
import torch as th
from resume_script import CASES, Case, Outcome, in_new_process

from benchmarks.record import circumstances
from sb3_softsac.persistence.codec import decode, encode

DATA = Path(__file__).with_name("data")


def small(case: Case, stop: int) -> Case:
    """With networks that make small files."""
    policy_kwargs = {**case.kwargs.get("policy_kwargs", {}), "net_arch": [8, 8]}
    return dataclasses.replace(case, stops=(stop,), kwargs={**case.kwargs, "policy_kwargs": policy_kwargs})


# In mid-episode, and some in mid-rollout, too
FILES = {
    "plain": small(CASES["plain"], 70),
    "options": small(CASES["all_options"], 97),
    "her": small(CASES["her"], 65),
    "dict": small(Case(resume_script.bits, "MultiInputPolicy"), 65),
    "gsde": small(CASES["gsde_sampling_envs"], 62),
    "vec_normalize": small(CASES["vec_normalize"], 70),
    "compiled": small(CASES["compiled"], 70),
}


def whole_run(name: str, folder: Path) -> Outcome:
    th.set_num_threads(1)
    return resume_script.run(FILES[name], folder)


def machine() -> dict[str, Any]:
    """What has to be the same for results to be the same to the last bit."""
    here = circumstances()
    versions = {name: here["versions"][name] for name in ("torch", "numpy")}
    return {"cpu": here["machine"]["cpu"], "instructions": th.backends.cpu.get_cpu_capability(), "versions": versions}


def end_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    :return: where the file was written, and the state that the uninterrupted run came to
    """
    with gzip.open(DATA / name / "end.json.gz") as file:
        written = json.load(file)
    return written["machine"], decode(written["state"])


def differences(expected: Any, actual: Any, atol: float, name: str = "") -> list[str]:
    """Names of what differs: numbers by more than ``atol`` (and 1e-3 of their size, if that is not zero)."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        missing = [f"{name}.{key}" for key in expected.keys() ^ actual.keys()]
        both = [key for key in expected if key in actual]
        return missing + [
            each for key in both for each in differences(expected[key], actual[key], atol, f"{name}.{key}")
        ]
    a, b = np.asarray(expected), np.asarray(actual)
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return resume_script.differences(expected, actual, name)
    same = a.shape == b.shape and np.allclose(a, b, rtol=1e-3 if atol > 0 else 0.0, atol=atol, equal_nan=True)
    return [] if same else [name]


def main() -> None:
    for name, case in FILES.items():
        if (DATA / name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            end = in_new_process(whole_run, name, Path(folder))
            (DATA / name).mkdir(parents=True)
            Path(folder, f"{case.stops[0]}.zip").rename(DATA / name / "model.zip")
            Path(folder, "run").rename(DATA / name / "run")
        text = json.dumps({"machine": machine(), "state": encode(end.state)})
        (DATA / name / "end.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"Written: {DATA / name}")


if __name__ == "__main__":
    import old_files  # the functions that other processes run must not be those of __main__

    old_files.main()
