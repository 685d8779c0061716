"""Mixes of options drawn at random, saved and continued: exact, or it is said why not. See ``mixes.py``."""

import pytest
from mixes import Finding, draw, try_mixes

pytestmark = pytest.mark.processes

# They had found faults: strides of images, VecNormalize over discrete observations, gSDE's matrices of several
# environments (two seeds)
FEW = (0, 5, 89, 97)
CHUNK = 20


def check(seeds: list[int]) -> list[Finding]:
    findings = []
    for seed, found in try_mixes(seeds):
        assert not isinstance(found, str), f"mix {seed}, {draw(seed).choices}:\n{found}"
        for finding in found:
            assert not finding.is_fault, f"mix {seed} at {finding.stop}, {draw(seed).choices}: {finding.differs}"
        findings += found
    return findings


def test_few_mixes() -> None:
    findings = check(list(FEW))
    assert sum(not finding.differs for finding in findings) >= len(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 320, CHUNK))
def test_many_mixes(first: int) -> None:
    findings = check(list(range(first, first + CHUNK)))
    n_exact = sum(not finding.differs for finding in findings)
    print(f"mixes {first} to {first + CHUNK - 1}: {n_exact} of {len(findings)} continuations exact, the rest announced")
    assert n_exact >= 0.75 * len(findings)
