"""What every benchmark writes beside its results: how they were made. Not a benchmark itself."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("sb3-softsac", "stable-baselines3", "rl-zoo3", "gymnasium", "mujoco", "torch", "numpy")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def circumstances() -> dict[str, Any]:
    """
    :return: versions, the repository's commit, machine, number of threads and command, ready for JSON
    """
    import torch as th  # here, so that subprocesses which measure memory need not have it

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", relative(sys.argv[0]), *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "gpu": th.cuda.get_device_name() if th.cuda.is_available() else None,
            "threads": th.get_num_threads(),
        },
    }


def relative(path: Path | str) -> str:
    """
    :param path: file or folder
    :return: its path from the repository's root, so that records do not depend on where that is
    """
    return os.path.relpath(path, ROOT)


def write_json(path: Path, **parts: Any) -> None:
    """
    Write results beneath their circumstances.

    :param path: file; its folder is created
    :param parts: top-level entries, whatever JSON can hold
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**circumstances(), **parts}, indent=2) + "\n")
    print(f"Written: {relative(path)}")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """
    :param header: C titles
    :param rows: rows of C cells
    :return: Markdown table, first column left, others right aligned
    """
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def documents() -> list[Path]:
    """
    :return: README.md and the pages of the documentation
    """
    built = ROOT / "docs" / "_build"
    return [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if built not in path.parents)]


def fill_documents(tables: dict[str, str]) -> None:
    """
    Put tables where the documents have room for them: between ``<!-- name -->`` and ``<!-- end -->``.

    :param tables: Markdown by name
    """
    for path in documents():
        path.write_text(filled(path.read_text(), tables))


def filled(text: str, tables: dict[str, str]) -> str:
    """
    :param text: of a document
    :param tables: see :func:`fill_documents`
    :return: the text with these tables
    """
    for name, table in tables.items():
        room = re.compile(f"(?<=<!-- {re.escape(name)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        text = room.sub(lambda _, table=table: f"\n{table.strip()}\n\n", text)  # type: ignore[misc]
    return text


def commit(folder: Path = ROOT) -> str | None:
    """
    :param folder: a clone
    :return: its commit; None if it is no clone
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """With family and model, since clouds give processors of several generations one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(line.replace("\t", "").split(": ", 1) for line in reversed(lines) if ": " in line)
    numbers = "".join(f", {name} {fields[name]}" for name in ("cpu family", "model") if name in fields)
    return fields.get("model name", platform.processor() or "unknown") + numbers
