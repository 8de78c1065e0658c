"""Every round on disk: there whole or not at all, with the numbers that were measured."""

import json
import math

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.files import base_model_of, read_adapter
from protocol.manifest import Manifest
from server.ledger import Ledger, RoundRecord

BASE = "ab" * 32


def adapter(seed):
    rng = np.random.default_rng(seed)
    pair = Factors(rng.normal(size=(2, 5)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32))
    return Adapter({"layers.0.q": pair}, {"score.weight": rng.normal(size=(3, 4)).astype(np.float32)})


def manifest(number):
    return Manifest(base_digest=BASE, kind="global", r=2, federation="f", round=number, num_examples=8)


def record(number, **changes):
    return RoundRecord(
        **{
            "round": number,
            "accepted": {"bank": {"loss": 0.5, "num-examples": 8}},
            "refused": {"clinic 诊所": "round: found '1', expected '2'"},
            "evaluation": {"bank": {"accuracy": 0.75}},
            "merge": {"discarded_energy": 0.125},
            "bytes_sent": 10,
            "bytes_received": 20,
            "seconds": 1.5,
        }
        | changes
    )


def ledger(tmp_path):
    return Ledger(tmp_path / "run", base_model="some/base", task_type="SEQ_CLS")


def every_file(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_nothing_is_written_before_the_first_round(tmp_path):
    ledger(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_round_is_read_back_as_it_was_kept(tmp_path):
    folder = ledger(tmp_path).keep(record(1), adapter(1), manifest(1))
    found, described = read_adapter(folder, base_digest=BASE)
    assert folder == tmp_path / "run" / "rounds" / "0001"
    assert found.digest() == adapter(1).digest()
    assert described == manifest(1)
    assert RoundRecord(**json.loads((folder / "round.json").read_text(encoding="utf-8"))) == record(1)
    assert base_model_of(folder) == "some/base"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_every_round_stays_and_adapter_is_the_newest(tmp_path):
    kept = ledger(tmp_path)
    for number in (1, 2, 3):
        kept.keep(record(number), adapter(number), manifest(number))
    rounds = tmp_path / "run" / "rounds"
    assert sorted(path.name for path in rounds.iterdir()) == ["0001", "0002", "0003"]
    for number in (1, 2, 3):
        assert read_adapter(rounds / f"000{number}")[0].digest() == adapter(number).digest()
    assert read_adapter(tmp_path / "run" / "adapter")[0].digest() == adapter(3).digest()
    assert json.loads((tmp_path / "run" / "adapter" / "round.json").read_text(encoding="utf-8"))["round"] == 3


def test_a_round_that_is_kept_again_is_replaced_whole(tmp_path):
    kept = ledger(tmp_path)
    folder = kept.keep(record(1), adapter(1), manifest(1))
    (folder / "stale").write_text("x")
    kept.keep(record(1), adapter(9), manifest(1))
    assert read_adapter(folder)[0].digest() == adapter(9).digest()
    assert not (folder / "stale").exists()


def test_a_round_that_cannot_be_written_to_its_end_leaves_everything_as_it_was(tmp_path):
    kept = ledger(tmp_path)
    kept.keep(record(1), adapter(1), manifest(1))
    before = every_file(tmp_path)
    # round.json is the last file; an object that JSON does not know makes it fail after the weights are written.
    with pytest.raises(TypeError):
        kept.keep(record(2, merge={"report": object()}), adapter(2), manifest(2))
    assert every_file(tmp_path) == before
    assert read_adapter(tmp_path / "run" / "adapter")[0].digest() == adapter(1).digest()


def test_no_hidden_drafts_are_left(tmp_path):
    kept = ledger(tmp_path)
    for number in (1, 1, 2):
        kept.keep(record(number), adapter(number), manifest(number))
    kept.describe({"a": 1})
    assert not list(tmp_path.rglob(".*"))


def test_a_round_without_any_adapter_is_kept(tmp_path):
    folder = ledger(tmp_path).keep(RoundRecord(round=0), Adapter(), manifest(0))
    assert read_adapter(folder)[0].digest() == Adapter().digest()


def test_round_json_is_json_for_every_reader(tmp_path):
    """NaN is no JSON; other programs refuse a file that holds it."""
    folder = ledger(tmp_path).keep(record(1, merge={"effective_rank": math.nan}), adapter(1), manifest(1))

    def refuse(constant):
        raise AssertionError(f"{constant} in round.json")

    json.loads((folder / "round.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_what_was_published_is_described_and_replaced(tmp_path):
    kept = ledger(tmp_path)
    kept.describe({"offers": {"bank": {"r": 1}}})
    kept.describe({"offers": {"银行": {"r": 2}}, "output": tmp_path})
    found = json.loads((tmp_path / "run" / "federation.json").read_text(encoding="utf-8"))
    assert found == {"offers": {"银行": {"r": 2}}, "output": str(tmp_path)}
