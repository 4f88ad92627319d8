"""Maps of sweeps show their numbers, at the right places."""

import numpy as np
import pytest
import torch

import mambascope as ms
from mambascope.analyses import sweep_figure
from mambascope.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*mostly noise")
CLEAN = torch.tensor([[3, 8, 5, 11, 2, 3]])
CORRUPTED = torch.tensor([[3, 7, 5, 11, 2, 3]])
METRIC = ms.LogitDifference(8, 7)


def test_the_map_shows_the_scores(recall) -> None:
    found = ms.sweep(recall, CLEAN, CORRUPTED, METRIC, ["resid_pre", "h"])
    figure = sweep_figure(found, "h")
    assert np.allclose(figure.data[0].z, found.score[1, :, :, 0].numpy())
    assert figure.data[0].z[0].round(3).tolist() == pytest.approx([0, 1, 1, 1, 1, 1], abs=2e-3)
    assert "LogitDifference" in figure.layout.title.text
    changes = sweep_figure(found, "h", show="change").data[0].z
    assert np.allclose(changes, found.change[1, :, :, 0].numpy())


def test_attribution_is_drawn_alike(recall) -> None:
    found = ms.attribute(recall, CLEAN, CORRUPTED, METRIC, {"sites": "h", "positions": [1, 3]})
    figure = sweep_figure(found)
    assert figure.data[0].z.shape == (1, 2)
    assert list(figure.layout.xaxis.ticktext) == ["1·[8]|[7]", "3·[11]"]


def test_bad_input(recall) -> None:
    found = ms.sweep(recall, CLEAN, CORRUPTED, METRIC, ["resid_pre", "h"])
    with pytest.raises(InputError, match="has 2 sites"):
        sweep_figure(found)
    with pytest.raises(InputError, match="no site 'resid', did you mean 'resid_pre'"):
        sweep_figure(found, "resid")
    with pytest.raises(InputError, match="group 1 is outside"):
        sweep_figure(found, "h", group=1)
    with pytest.raises(InputError, match="show must be"):
        sweep_figure(found, "h", show="loss")  # type: ignore[arg-type]
