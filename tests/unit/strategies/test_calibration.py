"""What real steps showed is kept, read back and applied; a damaged file is told and left out."""

import json
import logging

import pytest

from protocol.errors import HardwareError, ModelError
from protocol.plan import Plan
from strategies.architecture import read
from strategies.calibration import Calibration, Point, cache_file, calibrate, device_of, measure, read_calibration, rows_of
from strategies.cost import estimate
from strategies.data.encode import encode
from strategies.hardware import PROFILES, Rates, probe
from strategies.memory import Setup

torch = pytest.importorskip("torch", reason="takes real steps")

from strategies.base_model import find, load_tokenizer  # noqa: E402

DEVICE, KIND = device_of(probe())


def point(**changed):
    values = {
        "device": DEVICE,
        "method": "lora",
        "precision": "fp32",
        "checkpointing": False,
        "base": "tiny",
        "day": "2026-11-22",
        "seconds": 3.0,
        "estimated_seconds": 2.0,
        "bytes": 120,
        "estimated_bytes": 100,
    }
    return Point(**{**values, **changed})


def calibration(*points, kind="cpu"):
    return Calibration(DEVICE, kind, points, None)


def setup(**changed):
    return Setup(**{"method": "lora", "base_dtype": "fp32", "device": "cpu", **changed})


def test_factors_are_measured_over_estimated_of_trainings_alike():
    """3 / 2 of LoRA and 8 / 2 of LoRA with layers computed again; what was not measured: their geometric mean, root of 6."""
    known = calibration(point(), point(checkpointing=True, seconds=8.0, bytes=70, day="2026-11-23"))
    assert known.time_factor(setup()) == pytest.approx(1.5)
    assert known.time_factor(setup(gradient_checkpointing=True)) == pytest.approx(4.0)
    assert known.time_factor(setup(method="full")) == pytest.approx(6**0.5)
    assert known.memory_factor(setup()) == pytest.approx(1.2)
    assert known.memory_factor(setup(gradient_checkpointing=True)) == 0.9  # 0.7 was measured: not lowered so far
    assert known.memory_factor(setup(method="full")) is None
    assert known.source == f"{DEVICE}, 2026-11-23"


def test_the_precision_is_part_of_what_is_alike():
    known = calibration(point(), point(method="qlora", precision="nf4-dq", seconds=9.0), point(precision="bf16, autocast bf16"))
    assert known.memory_factor(setup(method="qlora", quantization="nf4-dq")) == pytest.approx(1.2)
    assert known.memory_factor(setup(method="qlora", quantization="int8")) is None
    assert known.memory_factor(setup(base_dtype="bf16", mixed_precision="bf16")) == pytest.approx(1.2)
    assert known.memory_factor(setup(base_dtype="bf16")) is None


def test_of_two_bases_the_larger_memory_counts_and_the_mean_of_the_times():
    """Times 1.5 and 6: root of 9. Memory 1.2 and 1.5."""
    known = calibration(point(), point(base="other", seconds=12.0, bytes=150))
    assert known.time_factor(setup()) == pytest.approx(3.0)
    assert known.memory_factor(setup()) == pytest.approx(1.5)


def test_another_device_is_not_corrected():
    known = calibration(point())
    assert known.time_factor(setup(device="cuda")) is None
    assert known.memory_factor(setup(device="cuda")) is None
    assert calibration(point(bytes=None)).memory_factor(setup()) is None


def test_the_cost_is_corrected_and_says_so():
    rates = Rates(3e10, {"fp32": 8e10}, "a CPU")
    model = read("tiny")
    plain, found = (estimate(model, setup(), rates, steps=5, calibration=known) for known in (None, calibration(point())))
    assert found.total_seconds == pytest.approx(1.5 * plain.total_seconds)
    assert found.source == f"calibrated: {DEVICE}, 2026-11-22"


def kept(tmp_path, content):
    file = tmp_path / "calibration.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


def test_what_was_kept_is_read_back_but_for_other_machines(tmp_path):
    points = [point().model_dump(), point(device="another").model_dump()]
    rates = {name: {"bandwidth": 1e10, "flops": {"fp32": 5e10}, "day": "2026-11-22"} for name in (DEVICE, "another")}
    found = read_calibration(kept(tmp_path, {"version": 1, "points": points, "rates": rates}))
    assert (found.device, found.kind, found.points) == (DEVICE, KIND, (point(),))
    assert found.rates == Rates(1e10, {"fp32": 5e10}, f"measured on {DEVICE}, 2026-11-22")
    assert read_calibration(kept(tmp_path, {"version": 1, "points": points[1:], "rates": rates})) is None
    assert read_calibration(tmp_path / "nothing.json") is None


GOOD = point().model_dump()
DAMAGED = {
    "empty": b"",
    "half": json.dumps({"version": 1, "points": [GOOD]}).encode()[:-20],
    "bytes": b"\xff\xfe\x00\x80",
    "a list": [GOOD],
    "another version": {"version": 2, "points": [GOOD]},
    "a negative time": {"version": 1, "points": [{**GOOD, "seconds": -1.0}]},
    "no number": {"version": 1, "points": [{**GOOD, "seconds": float("nan")}]},
    "an infinite time": {"version": 1, "points": [{**GOOD, "estimated_seconds": float("inf")}]},
    "no time": {"version": 1, "points": [{**GOOD, "estimated_seconds": 0}]},
    "a field too many": {"version": 1, "points": [{**GOOD, "rows": ["text"]}]},
    "a field too few": {"version": 1, "points": [{"device": DEVICE}]},
    "text for bytes": {"version": 1, "points": [{**GOOD, "bytes": "many"}]},
    "unknown rates": {"version": 1, "points": [GOOD], "rates": {DEVICE: {"bandwidth": 1, "flops": {"fp3": 1}, "day": "x"}}},
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("which", DAMAGED)
def test_a_damaged_file_is_told_and_left_out(which, tmp_path, caplog):
    file = kept(tmp_path, DAMAGED[which])
    with caplog.at_level(logging.WARNING):
        assert read_calibration(file) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    told = caplog.text
    assert str(file) in told
    assert "fedge plan --calibrate writes it anew" in told


def test_the_file_lies_where_the_user_keeps_such_things(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file() == tmp_path / "xdg" / "fedge" / "calibration.json"
    monkeypatch.setenv("FEDGE_CACHE", str(tmp_path / "own"))
    assert cache_file() == tmp_path / "own" / "calibration.json"
    monkeypatch.delenv("FEDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "fedge" / "calibration.json"


def test_a_machine_is_named_by_its_gpu_or_by_its_processor_and_cores():
    assert device_of(PROFILES["rtx-4090"]) == ("NVIDIA GeForce RTX 4090", "cuda")
    name, kind = device_of(PROFILES["laptop-cpu"])
    assert (name.endswith(f", {PROFILES['laptop-cpu'].cpu_cores} cores"), kind) == (True, "cpu")


PLANS = {
    "sft": {},
    "pretraining": {"objective": "pretraining"},
    "classification": {"objective": "classification", "data": {"labels": ("a", "b", "c")}},
    "regression": {"objective": "regression"},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "reward": {"objective": "reward"},
    "rl": {"objective": "rl", "rl": {"reward_functions": ("builtins:len",)}},
}


@pytest.mark.parametrize("which", PLANS)
def test_rows_are_as_long_as_the_plan_allows(which):
    """What the memory was estimated for: every row fills ``max_length`` once encoded. A reward model reads whole answers, and
    an RL answer is still to be written, so there a few tokens may be missing; none is too long.
    """
    content = PLANS[which]
    plan = Plan(**{**content, "data": {**content.get("data", {}), "max_length": 96}})
    base = find("tiny")
    rows = rows_of(plan, base, 4)
    assert len(rows) == 4
    encoded = encode(rows, load_tokenizer(base), 96, plan.objective)
    assert encoded.dropped == 0
    lengths = []
    for row in encoded.rows[: 4 if which != "pretraining" else 3]:
        answers = [row[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
        before = len(row.get("prompt_ids", ()))
        lengths += [before + len(answer) for answer in answers] or [len(row.get("input_ids", ())) or before]
    room = 96 - plan.rl.max_completion_length if which == "rl" else 96
    if which == "kto":  # answers are cut when they are paired with prompts, not before
        lengths = [min(length, room) for length in lengths]
    assert max(lengths) <= room
    least = room if which not in ("reward", "rl") else 0.8 * room
    assert min(lengths) >= least


def test_steps_are_timed():
    plan = Plan(data={"max_length": 64}, training={"batch_size": 4, "gradient_accumulation_steps": 2})
    assert measure(plan, find("tiny"), 2)["seconds"] > 0


@pytest.mark.slow
def test_a_calibration_is_kept_for_the_next_plan(tmp_path):
    """In a process of its own, as the command does it; the second leaves the first one's figures and rates as they are."""
    file = tmp_path / "cache" / "calibration.json"
    plan = Plan(data={"max_length": 64}, training={"batch_size": 2})
    first = calibrate(plan, steps=2, file=file)
    assert read_calibration(file) == first
    # Adapter, gradients and moments alone are 16 bytes for each of LoRA's float32 parameters; a process of its own sees them.
    assert first.points[0].bytes is None or first.points[0].bytes > 16 * 1000
    assert len(first.points) == 1
    assert (first.rates is None) == (KIND == "cuda" and probe().gpus[0].rates is not None)
    second = calibrate(plan.model_copy(update={"method": "full"}), steps=2, file=file)
    assert second.points[0] == first.points[0]
    assert second.rates == first.rates
    assert [one.method for one in second.points] == ["lora", "full"]
    again = calibrate(plan, steps=2, file=file)
    assert [one.method for one in again.points] == ["full", "lora"]


@pytest.mark.slow
def test_steps_that_cannot_be_taken_say_why_and_keep_nothing(tmp_path):
    file = tmp_path / "calibration.json"
    with pytest.raises(HardwareError, match=r"(?s)a real step failed: .*nothing:at_all"):
        calibrate(Plan(objective="rl", rl={"reward_functions": ("nothing:at_all",)}), file=file)
    assert not file.exists()


def test_a_plan_that_does_not_go_with_its_base_is_told_before_any_step(tmp_path):
    with pytest.raises(ModelError, match="no linear layer nothing"):
        calibrate(Plan(lora={"target_modules": ("nothing",)}), file=tmp_path / "calibration.json")


def test_a_base_that_is_not_here_is_told(tmp_path):
    with pytest.raises(ModelError, match="nothing"):
        calibrate(Plan(base_model=str(tmp_path / "nothing")), file=tmp_path / "calibration.json")
