"""The documents: their examples run, and their links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import SAC

from sb3_softsac import CheckpointCallback, SoftSAC

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts and page.is_file()]

FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
FIRST_STEPS, MORE_STEPS = 120, 20  # of learn(): more than learning_starts, and after that
SAVE_FREQ = 60  # of checkpoints

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples(page: Path) -> str:
    """
    :param page: a Markdown file
    :return: its Python blocks, on the lines that they have in the page
    """
    text, lines = page.read_text(), []
    for fence in FENCE.finditer(text):
        language, *options = fence[3].split() or [""]
        if language == "python" and "no-run" not in options:
            first = text.count("\n", 0, fence.start(4))
            lines += [""] * (first - len(lines)) + fence[4].splitlines()
    return "\n".join(lines)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is cut to a few steps, and checkpoints come as often as they would."""
    for algorithm in (SAC, SoftSAC):
        learn = algorithm.learn

        def few(self: Any, total_timesteps: int, *args: Any, learn: Any = learn, **kwargs: Any) -> Any:
            most = MORE_STEPS if self.num_timesteps else FIRST_STEPS
            return learn(self, min(total_timesteps, most), *args, **kwargs)

        monkeypatch.setattr(algorithm, "learn", few)

    init = CheckpointCallback.__init__

    def often(self: CheckpointCallback, save_freq: int, *args: Any, **kwargs: Any) -> None:
        init(self, min(save_freq, SAVE_FREQ), *args, **kwargs)

    monkeypatch.setattr(CheckpointCallback, "__init__", often)


@pytest.mark.learning
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=name_of)
@pytest.mark.usefixtures("short_runs")
@pytest.mark.filterwarnings("ignore::tqdm.std.TqdmExperimentalWarning")
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    exec(compile(examples(page), str(page), "exec"), {"__name__": "__main__"})


def slug(heading: str) -> str:
    """
    :param heading: text of a heading
    :return: its anchor, as GitHub makes it
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.resolve().is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            headings = HEADING.findall(FENCE.sub("", target.read_text()))
            assert anchor in map(slug, headings), f"{link}: there is no such heading"


def test_every_page_is_in_the_tests() -> None:
    assert {"README.md", "docs/index.md", "docs/guide/saving.md"} <= {name_of(page) for page in PAGES}
    assert sum(bool(examples(page)) for page in PAGES) >= 5


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
