"""`scripts/soak.py`: a few corruptions and the table of outcomes; for kills see `test_kills.py`."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import corruption
import soak


@pytest.mark.slow
def test_soak_corruptions_never_give_a_wrong_result(capsys):
    met = corruption.trials(4, seed=1)
    assert sum(n for (name, _), n in met.items() if name in corruption.FILES) == 4
    assert not any(n for (_, end), n in met.items() if end in corruption.FAILED), (
        capsys.readouterr()
    )
    kills = Counter({("within", "head"): 2})
    lines = list(soak.outcome_table(kills, True, met))
    assert len({line.count("|") for line in lines}) == 1
    assert "| killed: within | 2 | 2 | 0 | 0 | 0 |" in lines


@pytest.mark.parametrize("how", corruption.DAMAGES)
def test_soak_damage_changes_one_file(how, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(bytes(range(1, 200)))
    assert corruption.damage(tmp_path, "recipe.yaml", how, False, soak.random.Random(0)) == [file]
    assert not file.exists() or file.read_bytes() != bytes(range(1, 200))


def test_soak_notices_a_wrong_result(tmp_path, monkeypatch):
    for run, loss in (("one", 0.5), ("other", 0.7)):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "model.safetensors").write_bytes(run.encode())
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps({"step": 1, "val_loss": loss}))
    monkeypatch.setattr(corruption, "arrays", lambda run, item: {})
    found = list(corruption.differences(tmp_path / "one", tmp_path / "other"))
    assert found[0] == "model.safetensors"
    assert found[1].startswith("metrics.jsonl, which should have {'step': 1, 'val_loss': 0.5}")
