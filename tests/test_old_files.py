"""Files that an earlier version wrote load, are whole and continue. See ``old_files.py``."""

import warnings
from pathlib import Path

import pytest
import resume_script
from old_files import DATA, FILES, differences, end_of, machine
from resume_script import learn

from sb3_softsac import SoftSAC, checkpoint


def continue_run(name: str, path: Path, folder: Path) -> resume_script.Outcome:
    case = FILES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = SoftSAC.load(path, case.make_env(), device="cpu", force_reset=False)
        outcome = learn(model, case, case.steps, folder)
    resume_script.close(model)
    outcome.complaints = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return outcome


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_old_file_goes_on(name: str, kind: str, tmp_path: Path) -> None:
    path = DATA / name / ("run" if kind == "folder" else "model.zip")
    assert checkpoint.verify(path)
    there, expected = end_of(name)
    is_exact = there == machine()
    outcome = continue_run(name, path, tmp_path)
    assert differences(expected, outcome.state, atol=0.0 if is_exact else 1e-3) == []
    assert not is_exact or outcome.complaints == []
