"""The README's code runs as it stands, and its table of hook points is the code's."""

import re
from pathlib import Path

import torch

from mambascope.hooks.points import HOOK_POINTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run_in_order() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    delta, state, window = (names[k] for k in ("delta", "state", "window"))
    assert isinstance(delta, torch.Tensor)
    assert delta.shape[1] == names["logits"].shape[1]  # type: ignore[attr-defined]
    assert window.shape[1] == 4  # type: ignore[attr-defined]
    assert state.position == delta.shape[1]  # type: ignore[attr-defined]
    assert not torch.equal(names["forgetful"], names["logits"])  # type: ignore[arg-type]


def test_the_path_shown_is_the_path_taken() -> None:
    shown = re.search(r"explain_path\(\)\[3\]\)\s+# (PathTaken\(.*?), …\)", README)
    assert shown is not None
    import mambascope as ms

    model = ms.load("lm-mini", backend="cpu")
    model.run_with_hooks("The river ran down to the sea", fwd_hooks=[("h3[5]", lambda h, hook: h * 0)])
    assert str(model.explain_path()[3]).startswith(shown[1])


def test_every_hook_point_is_in_the_table() -> None:
    for spec in HOOK_POINTS:
        assert spec.name in README, spec.name


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
