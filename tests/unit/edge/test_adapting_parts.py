"""What a device learns with, each part against torch, arithmetic, or what it promises of files."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.runtime.adapting.adamw import AdamW, shortening
from edge.runtime.adapting.budget import Budget, Meter, Senses, _battery, _celsius, _charging, _resident
from edge.runtime.adapting.personal import Personal
from edge.runtime.adapting.preference import dpo
from edge.runtime.adapting.sealing import seal_of
from edge.runtime.adapting.state import State, Trail, alone_in, packed, unpacked
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError, NotNowError


def test_adamw_is_torchs_for_fifty_steps():
    """Oracle: torch.optim.AdamW in float32 with the same gradients; both round each operation once."""
    generator = np.random.default_rng(0)
    start = {"a": generator.standard_normal((5, 7), np.float32), "b": generator.standard_normal(3, np.float32)}
    ours, mine = AdamW(1e-2, weight_decay=0.1, warmup_steps=10), dict(start)
    theirs = {name: torch.nn.Parameter(torch.from_numpy(each.copy())) for name, each in start.items()}
    oracle = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1)
    climb = torch.optim.lr_scheduler.LambdaLR(oracle, lambda at: min(1.0, (at + 1) / 10))
    moments = ours.start(mine)
    for number in range(1, 51):
        gradients = {name: generator.standard_normal(each.shape, np.float32) for name, each in start.items()}
        ours.step(mine, gradients, moments, number)
        for name, parameter in theirs.items():
            parameter.grad = torch.from_numpy(gradients[name])
        oracle.step()
        climb.step()
    for name, parameter in theirs.items():
        np.testing.assert_allclose(mine[name], parameter.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_clipping_is_torchs():
    """Oracle: torch.nn.utils.clip_grad_norm_, but for the 1e-6 that it adds to the norm."""
    generator = np.random.default_rng(1)
    gradients = {"a": generator.standard_normal((5, 7), np.float32), "b": generator.standard_normal(3, np.float32)}
    theirs = [torch.nn.Parameter(torch.zeros(each.shape)) for each in gradients.values()]
    for parameter, each in zip(theirs, gradients.values(), strict=True):
        parameter.grad = torch.from_numpy(each.copy())
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    factor = shortening(gradients.values(), 0.5)
    assert 0.5 / factor == pytest.approx(float(norm), rel=1e-6)
    assert shortening(gradients.values(), 1e3) == 1
    assert np.isnan(shortening([*gradients.values(), np.array([np.inf], np.float32)], 0.5))
    for parameter, each in zip(theirs, gradients.values(), strict=True):
        np.testing.assert_allclose(factor * each, parameter.grad.numpy(), rtol=1e-5)


def test_dpo_and_its_derivative_are_autograds():
    """Oracle: -logsigmoid of the margin in torch, float64."""
    generator = np.random.default_rng(2)
    given_, reference = generator.normal(-30, 5, 8), generator.normal(-30, 5, 8)
    logs = torch.tensor(given_, requires_grad=True)
    gain = logs - torch.tensor(reference)
    loss = -torch.nn.functional.logsigmoid(0.3 * (gain[0::2] - gain[1::2])).sum() / 7
    loss.backward()
    found, derivative = dpo(reference, 0.3, 7)(given_)
    assert found == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(derivative, logs.grad.numpy(), rtol=1e-12)


def test_dpo_of_hopeless_pairs_stays_finite():
    loss, derivative = dpo(np.zeros(2), 1.0)(np.array([-1e6, 0.0]))
    assert loss == pytest.approx(1e6)
    assert np.isfinite(derivative).all()


# Budgets ----------------------------------------------------------------------------------------------------------------------


def sensing(**known):
    told = {name: (lambda value=value: value) for name, value in known.items()}
    return Senses(**{name: told.get(name, lambda: None) for name in ("battery_percent", "charging", "celsius", "memory_bytes")})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("budget", "known", "said"),
    [
        ({"battery_percent": 20}, {"battery_percent": 19.0}, "battery_percent: 19, expected 20 or a charger"),
        ({"battery_percent": 20}, {"battery_percent": 19.0, "charging": True}, ""),
        ({"battery_percent": 20}, {"battery_percent": 20.0}, ""),
        ({"celsius": 60}, {"celsius": 61.0}, "celsius: 61 of 60"),
        ({"celsius": 60}, {"celsius": 60.0}, ""),
        ({"memory_bytes": 10**6}, {"memory_bytes": 2 * 10**6}, "memory: 2 of 1 MB, Python and its libraries among them"),
        ({"memory_bytes": 1000}, {"memory_bytes": 1000}, ""),
    ],
    ids=["low", "low-charging", "enough", "hot", "warm", "large", "fits"],
)
def test_what_the_device_feels_ends_it(budget, known, said):
    assert Meter(Budget(**budget), sensing(**known), Clock()).over() == said


def test_time_and_steps_end_it():
    clock = Clock()
    meter = Meter(Budget(seconds=10, steps=3), sensing(), clock)
    assert meter.over() == ""
    meter.steps = 3
    assert meter.over() == "steps: 3 of 3"
    meter.steps, clock.now = 2, 10.0
    assert meter.over() == "seconds: 10 of 10"


def test_limits_on_what_a_device_does_not_tell_are_named():
    budget = Budget(battery_percent=20, celsius=60, memory_bytes=10)
    assert Meter(budget, sensing(celsius=30.0)).unknown() == ["battery_percent", "memory_bytes"]


def test_linuxs_files_are_read(tmp_path):
    """Oracle: the kernel's documentation: capacity in percent, temp in thousandths of a degree, scope Device for a mouse."""
    for name, files in {
        "power/BAT0": {"type": "Battery", "capacity": "81"},
        "power/BAT1": {"type": "Battery", "capacity": "40"},
        "power/mouse": {"type": "Battery", "scope": "Device", "capacity": "3"},
        "power/AC": {"type": "Mains", "online": "1"},
        "heat/thermal_zone0": {"temp": "41500"},
        "heat/thermal_zone1": {"temp": "67250"},
        "heat/cooling_device0": {"temp": "99999"},
    }.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")
    assert (_battery(tmp_path / "power"), _charging(tmp_path / "power")) == (40, True)
    assert _celsius(tmp_path / "heat") == 67.25
    for said in ("nan", "inf", "-5", "1e9", "", "many"):  # no charge of anything
        (tmp_path / "power" / "BAT1" / "capacity").write_text(said)
        assert _battery(tmp_path / "power") == 81
        (tmp_path / "heat" / "thermal_zone1" / "temp").write_text(said)
    assert _celsius(tmp_path / "heat") == 41.5
    for said, size in (("VmRSS:\t 7 kB", 7168), ("VmRSS: many", None), ("VmRSS:", None), ("", None)):
        (tmp_path / "status").write_text(f"Name: x\n{said}\n")
        assert _resident(tmp_path / "status") == size
    nowhere = tmp_path / "nowhere"
    assert (_battery(nowhere), _charging(nowhere), _celsius(nowhere)) == (None, None, None)


# What is kept -----------------------------------------------------------------------------------------------------------------


def adapter(seed):
    generator = np.random.default_rng(seed)
    pair = Factors(generator.standard_normal((2, 3), np.float32), generator.standard_normal((4, 2), np.float32), 0.5)
    return Adapter({"layer.q": pair}, {"head.weight": generator.standard_normal((2, 4), np.float32)})


@given(st.integers(0, 255), st.data())
@settings(max_examples=60, deadline=None)
def test_a_state_with_any_byte_changed_or_cut_off_is_none(value, data):
    content = packed(State({"step": 3, "written": 1}, {"x": np.arange(5, dtype=np.float32)}))
    at = data.draw(st.integers(0, len(content) - 1))
    assert unpacked(content).facts["step"] == 3
    broken = content[:at] + bytes([value]) + content[at + 1 :]
    for each in (content[:at], *([broken] if broken != content else [])):
        with pytest.raises(AdapterError):
            unpacked(each)


def test_of_two_states_the_newer_is_taken_and_the_older_where_it_is_damaged(tmp_path):
    trail = Trail(tmp_path)
    for step in range(1, 4):
        trail.keep(State({"step": step}, {"x": np.full(3, step, np.float32)}))
    again = Trail(tmp_path)
    assert again.newest()[0].facts["step"] == 3
    newest = max(tmp_path.glob("*.state"), key=lambda path: unpacked(path.read_bytes()).facts["step"])
    newest.write_bytes(newest.read_bytes()[:-1])
    state, wrong = Trail(tmp_path).newest()
    assert (state.facts["step"], len(wrong)) == (2, 1)
    assert newest.name in wrong[0]
    # What goes on from the older one writes over the damaged one, and never over what it stands on.
    again = Trail(tmp_path)
    again.newest()
    again.keep(State({"step": 3}, {}))
    assert sorted(unpacked(path.read_bytes()).facts["step"] for path in tmp_path.glob("*.state")) == [2, 3]
    assert Trail(tmp_path).newest()[0].facts["step"] == 3


def test_states_and_adapters_are_for_their_owner_alone(tmp_path):
    own = Personal(tmp_path / "own")
    own.keep(adapter(0), {})
    Trail(own.folder).keep(State({"step": 1}))
    assert {oct(path.stat().st_mode & 0o777) for path in own.folder.iterdir()} == {"0o600"}
    assert own.folder.stat().st_mode & 0o777 == 0o700


def test_versions_are_numbered_rolled_back_and_found_again(tmp_path):
    own = Personal(tmp_path)
    assert own.current() == (None, [])
    numbers = [own.keep(adapter(seed), {"seed": seed}) for seed in range(3)]
    assert numbers == [1, 2, 3]
    found, wrong = Personal(tmp_path).current()
    assert (found.number, found.facts, wrong) == (3, {"seed": 2}, [])
    assert found.adapter.digest() == adapter(2).digest()
    assert [own.roll_back() for _ in range(3)] == [2, 1, 0]
    assert own.current()[0] is None
    with pytest.raises(AdapterError, match="nothing to roll back"):
        own.roll_back()
    assert own.keep(adapter(9), {}) == 4  # no number stands for two adapters


def test_a_damaged_version_gives_way_to_the_one_before_and_it_is_said(tmp_path):
    own = Personal(tmp_path)
    for seed in range(2):
        own.keep(adapter(seed), {})
    path = tmp_path / "adapter-2.state"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found, wrong = own.current()
    assert (found.number, len(wrong)) == (1, 1)
    assert "version 2 is damaged" in wrong[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"version": "../3"}',
        b'{"version": true}',
        b"\xff",
        b"[" * 10_000,
        json.dumps({"version": -1}).encode(),
    ],
    ids=["empty", "no-version", "list", "path", "bool", "no-json", "deep", "negative"],
)
def test_a_damaged_pointer_means_the_newest_and_it_is_said(tmp_path, content):
    own = Personal(tmp_path)
    own.keep(adapter(0), {})
    (tmp_path / "current.json").write_bytes(content)
    found, wrong = own.current()
    assert found.number == 1
    assert "current.json is damaged" in wrong[0]


def test_only_the_last_five_versions_are_kept(tmp_path):
    own = Personal(tmp_path)
    for seed in range(8):
        own.keep(adapter(seed), {})
    assert own.numbers() == [4, 5, 6, 7, 8]


HOSTILE = {
    "numbers": State(
        {"scaling": {"q": 1.0}, "facts": {}}, {"A|q": np.full((1, 2), np.nan, "f4"), "B|q": np.zeros((2, 1), "f4")}
    ),
    "kind": State({"scaling": {"q": 1.0}, "facts": {}}, {"A|q": np.zeros((1, 2)), "B|q": np.zeros((2, 1))}),
    "scaling": State({"scaling": [1], "facts": {}}),
    "facts": State({"scaling": {}, "facts": 5}),
    "labels": State({"scaling": {}, "facts": {"labels": 5}}),
    "nothing": State({}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_version_whose_sum_holds_and_whose_content_does_not_gives_way_too(tmp_path, name):
    own = Personal(tmp_path)
    for seed in range(2):
        own.keep(adapter(seed), {})
    (tmp_path / "adapter-2.state").write_bytes(packed(HOSTILE[name]))
    found, wrong = own.current()
    assert (found.number, len(wrong)) == (1, 1)


@pytest.mark.parametrize("facts", [[1], {}, {"written": math.inf}, {"written": None}, "x"], ids=str)
def test_a_state_of_strange_facts_is_damaged_and_it_is_said(tmp_path, facts):
    (tmp_path / "training-a.state").write_bytes(packed(State(facts)))
    state, wrong = Trail(tmp_path).newest()
    assert state is None
    assert "training-a.state is damaged" in wrong[0]


@pytest.mark.parametrize("put", ["pipe", "folder", "dangling"])
def test_what_is_no_file_is_neither_waited_for_nor_followed(tmp_path, put):
    """A pipe would be waited for without end; a draft that is a link would write over what it names."""
    make = {"pipe": os.mkfifo, "folder": Path.mkdir, "dangling": lambda path: path.symlink_to("nowhere")}[put]
    for name in ("adapter-1.state", "training-a.state", "current.json"):
        make(tmp_path / name)
    assert seal_of(tmp_path, None) is None
    found, wrong = Personal(tmp_path).current()
    assert found is None
    assert "current.json is damaged" in wrong[0]
    assert Trail(tmp_path).newest()[0] is None


@pytest.mark.parametrize("put", ["pipe", "link"])
def test_a_draft_that_is_there_is_taken_away_and_not_written_into(tmp_path, put):
    victim, draft = tmp_path / "victim", tmp_path / ".current.json.draft"
    victim.write_text("as it was")
    os.mkfifo(draft) if put == "pipe" else draft.symlink_to(victim)
    Personal(tmp_path)._point(1)
    assert (victim.read_text(), json.loads((tmp_path / "current.json").read_bytes())) == ("as it was", {"version": 1})
    assert not (tmp_path / "current.json").is_symlink()


def test_one_at_a_time_learns_in_a_folder_and_what_a_killed_one_left_is_gone(tmp_path):
    own = tmp_path / "own"
    with alone_in(own):
        assert own.stat().st_mode & 0o777 == 0o700
        (own / ".adapter-1.state.draft").touch()
        with pytest.raises(NotNowError, match="another process learns there"), alone_in(own):
            pass
    with alone_in(own):
        assert not list(own.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match="name another"), alone_in(place):
            pass


def test_who_only_looks_into_a_folder_changes_nothing_of_it(tmp_path):
    """A folder of somebody's, named by mistake, stays open to others; one on a disk that cannot be written can be read."""
    tmp_path.chmod(0o755)
    assert Personal(tmp_path).current() == (None, [])
    assert Trail(tmp_path).newest() == (None, [])
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert Personal(tmp_path / "nowhere").numbers() == []
    assert not (tmp_path / "nowhere").exists()
