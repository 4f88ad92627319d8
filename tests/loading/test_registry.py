"""Names: the official models, the embedded ones, and what happens to a name that is neither."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import TINY, write_json

from mambascope.loading import registry
from mambascope.loading.registry import by_hub_id, find, list_models, unknown_name

# Parameters as counted from the published checkpoints' tensors.
PARAMETERS = {"mamba-130m": 129_135_360, "mamba-370m": 371_516_416, "mamba-2.8b": 2_768_345_600}


def test_official_models() -> None:
    names = [info.name for info in list_models() if not info.embedded]
    for size in ("130m", "370m", "790m", "1.4b", "2.8b", "2.8b-slimpj"):
        assert f"mamba-{size}" in names
        assert f"mamba-{size}-hf" in names
    assert {"falcon-mamba-7b", "falcon-mamba-7b-instruct"} <= set(names)
    for name, parameters in PARAMETERS.items():
        info = find(name)
        assert info is not None
        assert info.parameters == parameters
        assert info.licence == "Apache-2.0"
        assert info.hub_id == f"state-spaces/{name}"
        assert info.tokenizer == "EleutherAI/gpt-neox-20b"
    falcon = find("falcon-mamba-7b")
    assert falcon is not None
    assert falcon.size == "7.27B"
    assert "Falcon" in falcon.licence
    assert falcon.tokenizer is None


def test_hub_ids_of_official_models_are_recognised() -> None:
    info = by_hub_id("state-spaces/mamba-790m")
    assert info is not None
    assert info.name == "mamba-790m"
    assert by_hub_id("someone/mamba-790m") is None


def test_unknown_names_offer_the_nearest() -> None:
    text = str(unknown_name("mamba-130"))
    assert "no model is called 'mamba-130', did you mean 'mamba-130m'" in text
    assert "list_models" in text
    assert "owner/name" in text
    assert "did you mean" not in str(unknown_name("zzzzzz"))


def test_embedded_models_come_from_the_zoo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_zoo", lambda: tmp_path)
    folder = tmp_path / "lm-test"
    folder.mkdir()
    assert registry.embedded_folder("lm-test") is None  # no config yet
    write_json(folder / "config.json", {"format": "mambascope", "format_version": 1, **TINY.to_dict()})
    (folder / "card.json").write_text(json.dumps({"licence": "CC BY-SA 4.0", "summary": "tiny"}))
    first = list_models()[0]
    assert (first.name, first.embedded, first.licence, first.summary) == ("lm-test", True, "CC BY-SA 4.0", "tiny")
    assert first.parameters == 2_558
    assert first.size == "2.56K"
    assert registry.embedded_folder("lm-test") == folder
    for outside in ("../lm-test", "lm-test/..", ".", "", "x/lm-test"):
        assert registry.embedded_folder(outside) is None, outside
    assert find("lm-test") == first


def test_every_embedded_model_states_its_licence() -> None:
    for info in list_models():
        assert info.licence, info.name
        assert info.parameters > 0, info.name


def test_listing_needs_no_torch() -> None:
    code = "import sys, mambascope as ms; assert len(ms.list_models()) >= 14; print([m for m in "
    code += "('torch', 'tokenizers', 'transformer_lens', 'huggingface_hub', 'safetensors') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
