"""When simulated devices may work: traces are read as they are written, what is drawn has the shares that were asked for."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigurationError
from simulations.availability import CONDITIONS, DAY_SECONDS, MOST_SHARE, Availability, always, drawn, read_traces

PERIOD = 40
HOUR = 3600


@st.composite
def spells(draw):
    """Spells within the period, in order and apart."""
    bounds = sorted(draw(st.sets(st.integers(0, PERIOD), max_size=12)))
    return list(zip(bounds[0::2], bounds[1::2], strict=False))


def seconds(some):
    """The whole seconds that spells cover."""
    return {second for begin, end in some for second in range(begin, end)}


def written(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def refusal(path, *lines, period=PERIOD):
    with pytest.raises(ConfigurationError) as caught:
        read_traces(written(path, *lines), period)
    return caught.value.problems


@given(st.lists(spells(), min_size=1, max_size=4), st.integers(0, 3 * PERIOD))
def test_a_device_is_there_in_its_spells_of_every_period(devices, now):
    """The oracle counts seconds in sets."""
    found = Availability.of(devices, PERIOD)
    assert found.at(now).tolist() == [now % PERIOD in seconds(each) for each in devices]
    assert found.share() == pytest.approx(sum(len(seconds(each)) for each in devices) / PERIOD / len(devices))


@given(st.lists(spells(), min_size=1, max_size=3), st.integers(0, 2 * PERIOD))
def test_a_spell_lasts_until_the_first_second_without_it_over_the_seam_too(devices, now):
    found = Availability.of(devices, PERIOD)
    for number, each in enumerate(devices):
        covered = seconds(each)
        gone = next((later for later in range(now, now + 2 * PERIOD) if later % PERIOD not in covered), float("inf"))
        assert found.until(number, now) == gone


@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(CONDITIONS, spells())).filter(bool), min_size=1, max_size=4))
def test_a_trace_is_where_all_conditions_that_it_names_hold(tmp_path_factory, lines):
    path = written(tmp_path_factory.mktemp("traces") / "t.jsonl", *lines)
    wanted = [set.intersection(*(seconds(each) for each in line.values())) for line in lines]
    if not any(wanted):
        with pytest.raises(ConfigurationError, match="no device is ever available"):
            read_traces(path, PERIOD)
        return
    found = read_traces(path, PERIOD)
    for now in range(PERIOD):
        assert found.at(now).tolist() == [now in each for each in wanted]


def test_traces_are_dealt_out_in_turn():
    found = Availability.of([[(0, 5), (9, 12)], [], [(3, 4)]], PERIOD).dealt(7)
    for now in range(PERIOD):
        two, none, one = now in {*range(5), 9, 10, 11}, False, now == 3
        assert found.at(now).tolist() == [two, none, one, two, none, one, two]


def test_without_a_trace_devices_never_go():
    assert always(3).at(12345.6).all()
    assert always(3).until(1, 77.0) == float("inf")


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, MOST_SHARE])
def test_devices_that_are_drawn_are_there_for_the_share_of_time_that_was_asked(share):
    """Windows spread by .29 of their mean at most; the renewal process of a device and three days, at these lengths, by less
    than .2 of its mean. Six standard errors of 4000 devices' mean."""
    found = drawn(4000, share, 2400, seed=3)
    assert found.share() == pytest.approx(share, abs=6 * share * np.hypot(0.29, 0.2) / 4000**0.5)


def test_by_night_as_many_are_there_as_the_spread_of_their_habits_says():
    """Of windows uniform on half to one and a half times 9 hours, centred by a normal of 5 hours around 2: the probability that
    a window covers an hour, times that of being undisturbed in it; six standard errors of a binomial."""
    devices, share = 4000, 0.3
    found = drawn(devices, share, 2400, seed=0)
    rng = np.random.default_rng(99)
    centre, half = rng.normal(2, 5, 10**6), rng.uniform(0.5, 1.5, 10**6) * share / MOST_SHARE * 12
    for hour in (2, 8, 14, 20):
        away = np.abs((centre - hour + 12) % 24 - 12)
        wanted = MOST_SHARE * (away < half).mean()
        assert found.at(DAY_SECONDS + hour * HOUR).mean() == pytest.approx(wanted, abs=6 * (0.25 / devices) ** 0.5), hour
    assert found.at(2 * HOUR).sum() > 3 * found.at(14 * HOUR).sum()


def test_spells_are_as_long_as_they_were_drawn():
    """From any moment within it an exponential spell lasts its mean again. Those cut at the end of a window of 9 hours, of 54
    means, shorten that by a fiftieth; four standard errors of 600 devices' mean are a sixth of it."""
    found, noon = drawn(2000, MOST_SHARE, 600, seed=1), 12 * HOUR
    left = [found.until(device, noon) - noon for device in np.flatnonzero(found.at(noon))[:600]]
    assert len(left) == 600
    assert np.mean(left) == pytest.approx(600, rel=0.17)


def test_the_same_seed_draws_the_same_and_ten_thousand_cost_a_few_megabytes():
    one, other, more = (drawn(10_000, 0.3, 2400, seed) for seed in (7, 7, 8))
    now = 3 * HOUR
    assert (one.at(now) == other.at(now)).all()
    assert (one.at(now) != more.at(now)).any()
    assert len(pickle.dumps(one)) < 600 * 10_000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no json\n", "no JSON"),
        ("[" * 100_000 + "\n", "no JSON"),
        ([1], "expected an object"),
        ({}, "at least one"),
        ({"charging": [[0, 1]], "asleep": []}, "nothing else"),
        ({"idle": {"0": 1}}, "idle: expected a list"),
        ({"idle": [[0, 1.5]]}, "whole seconds"),
        ({"idle": [[0, True]]}, "whole seconds"),
        ({"idle": [[0, 1, 2]]}, "idle: expected a list"),
        ({"charging": [[-1, 1]]}, "within 0 to 40"),
        ({"charging": [[0, 41]]}, "within 0 to 40"),
        ({"charging": [[0, 10**400]]}, "within 0 to 40"),
        ({"unmetered": [[0, 2], [5, 5]]}, "spell 2 of 2 ends before it begins"),
        ({"unmetered": [[4, 9], [8, 10]]}, "spell 2 of 2 begins before"),
        ("x" * 2**20 + "y\n", "longer than"),
    ],
)
def test_a_line_that_is_no_trace_is_refused_with_its_number(tmp_path, line, said):
    (problem,) = refusal(tmp_path / "t.jsonl", {"idle": [[0, 3]]}, line)
    assert problem.startswith("line 2: ")
    assert said in problem
    assert len(problem) < 200


def test_all_problems_of_a_file_are_told_at_once_and_many_are_cut(tmp_path):
    wrong = {"idle": [[3, 2]], "charging": [[0, 99]]}
    assert len(refusal(tmp_path / "t.jsonl", wrong, {"idle": [[0, 1]]}, wrong)) == 4
    told = refusal(tmp_path / "u.jsonl", *[wrong] * 500)
    assert len(told) == 21
    assert "were not read" in told[-1]


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_traces(tmp_path / "none.jsonl", PERIOD)
    assert "no device is ever available" in refusal(tmp_path / "empty.jsonl")[0]
    assert (
        "no device is ever available" in refusal(tmp_path / "never.jsonl", {"idle": []}, {"idle": [[0, 2]], "charging": []})[0]
    )
