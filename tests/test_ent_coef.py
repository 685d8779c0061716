"""The entropy coefficient's two forms."""

import numpy as np
import pytest
import torch as th

from sb3_softsac.ent_coef import make_ent_coef

CPU = th.device("cpu")


def test_ent_coef_forms() -> None:
    assert not make_ent_coef(0.3, 1e-3, CPU).is_learned
    assert make_ent_coef(0, 1e-3, CPU).value().item() == 0.0
    assert make_ent_coef(np.float32(0.5), 1e-3, CPU).value().item() == pytest.approx(0.5)
    assert make_ent_coef("0.3", 1e-3, CPU).value().item() == pytest.approx(0.3)
    learned = make_ent_coef("auto_0.1", 1e-3, CPU)
    assert learned.is_learned
    assert learned.value().item() == pytest.approx(0.1)
    assert make_ent_coef("auto", 1e-3, CPU).value().item() == 1.0


@pytest.mark.parametrize(
    "value", ["auto_", "auto_0", "auto_-1", "auto0.1", "autox", "yes", -0.1, float("nan"), "auto_inf"]
)
def test_bad_ent_coef(value: str | float) -> None:
    with pytest.raises(ValueError, match="ent_coef="):
        make_ent_coef(value, 1e-3, CPU)
