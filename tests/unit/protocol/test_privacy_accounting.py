"""What private rounds cost: equal to dp-accounting asked another way and to closed forms; monotone; refusals with numbers."""

import itertools
import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from dp_accounting.pld import privacy_loss_distribution

from protocol.errors import PrivacyError
from protocol.privacy.accounting import Budget, Mechanism, affordable, counted, epsilon, noise_multiplier

REPLACE = dp_accounting.NeighboringRelation.REPLACE_ONE


def all_of(*multipliers, nodes=20, **more):
    return Mechanism(multipliers, nodes, nodes, **more)


def normal(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def balle_wang(mu, delta):
    """Epsilon of a Gaussian mechanism of sensitivity over deviation ``mu``: arXiv:1805.06530, theorem 8, by bisection."""

    def spent(eps):
        return normal(mu / 2 - eps / mu) - math.exp(eps) * normal(-mu / 2 - eps / mu)

    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def concentrated(rho, delta, orders):
    """Epsilon of rho-concentrated privacy at some orders: arXiv:2004.00010, proposition 12."""
    return min(a * rho + math.log1p(-1 / a) - math.log(delta * a) / (a - 1) for a in orders if a > 1.01)


FULL = list(itertools.product((0.8, 1.1, 2.0, 4.5, 9.0, 17.0), (1, 3, 10, 50, 200), (1e-3, 1e-5, 1e-7)))
SAMPLED = list(itertools.product((0.8, 1.3, 3.0), ((1000, 10), (200, 50)), (20, 500)))
ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512, 1024]


def test_two_hundred_settings_equal_the_library_asked_another_way_and_closed_forms():
    """1e-6 of epsilon: bisection and the library's own search end there.

    Where all take part, 90 each: Balle and Wang's formula, and the conversion from concentrated privacy at the library's
    orders. The sampled ones: the library's accountants and distributions, composed in parts instead of counted.
    """
    checked = 0
    for z, rounds, delta in FULL:
        exact = balle_wang(math.sqrt(rounds) / z, delta)
        assert epsilon({all_of(z): rounds}, delta) == pytest.approx(min(exact, 1e9), abs=1e-6, rel=1e-9)
        by_orders = concentrated(rounds / (2 * z * z), delta, ORDERS)
        kind = ("gaussian", "discrete")[checked % 4 // 2]
        assert epsilon({all_of(z, noise=kind): rounds}, delta, "rdp") == pytest.approx(max(by_orders, 0), abs=1e-6)
        checked += 2
    for z, (nodes, cohort), rounds in SAMPLED:
        accountant = rdp.RdpAccountant()
        event = dp_accounting.PoissonSampledDpEvent(cohort / nodes, dp_accounting.GaussianDpEvent(z))
        accountant.compose(event, 7).compose(event, rounds - 7)
        found = epsilon({Mechanism((z,), nodes, cohort, "poisson"): rounds}, 1e-5, "rdp")
        assert found == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-6)
        checked += 1
    for z, rounds in ((2.0, 10), (6.0, 100)):
        accountant = rdp.RdpAccountant(neighboring_relation=REPLACE)
        accountant.compose(
            dp_accounting.SampledWithoutReplacementDpEvent(100, 20, dp_accounting.GaussianDpEvent(z / 2)), rounds
        )
        found = epsilon({Mechanism((z,), 100, 20, "fixed"): rounds}, 1e-5)
        assert found == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-6)
        checked += 1
    for z, rounds in ((1.5, 16), (2.0, 64), (3.0, 100), (5.0, 10), (4.0, 50), (8.0, 20)):
        one = privacy_loss_distribution.from_gaussian_mechanism(
            z, sampling_prob=0.1, neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        )
        found = epsilon({Mechanism((z,), 100, 10, "poisson"): rounds}, 1e-5)
        assert found == pytest.approx(one.self_compose(rounds).get_epsilon_for_delta(1e-5), abs=1e-6)
        checked += 1
    assert checked == 200


@pytest.mark.slow
def test_distributions_are_never_dearer_than_renyi_over_many_sampled_settings():
    """The library's two accountants themselves, not the smaller of what both say. PLD's tables are of 1e-4."""
    for z, q, rounds, delta in itertools.product((0.7, 1.0, 2.0, 5.0), (0.01, 0.1, 0.5), (1, 30, 300), (1e-4, 1e-7)):
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
        loose = rdp.RdpAccountant().compose(event, rounds).get_epsilon(delta)
        if loose < 50:
            assert pld.PLDAccountant().compose(event, rounds).get_epsilon(delta) <= loose + 1e-4


def test_distributions_are_never_dearer_than_renyi_where_all_take_part():
    for z, rounds, delta in FULL:
        assert epsilon({all_of(z): rounds}, delta) <= epsilon({all_of(z): rounds}, delta, "rdp")


def test_more_rounds_cost_more_and_more_noise_less():
    for kind in ("gaussian", "discrete"):
        by_rounds = [epsilon({all_of(2.0, noise=kind): n}, 1e-5) for n in (1, 2, 5, 30)]
        by_noise = [epsilon({all_of(z, noise=kind): 10}, 1e-5) for z in (9.0, 5.0, 2.0, 0.7)]
        assert by_rounds == sorted(set(by_rounds))
        assert by_noise == sorted(set(by_noise))
    by_rate = [epsilon({Mechanism((2.0,), 100, cohort, "poisson"): 10}, 1e-5, "rdp") for cohort in (1, 5, 25, 100)]
    assert by_rate == sorted(set(by_rate))
    assert by_rate[-1] == pytest.approx(epsilon({all_of(2.0, nodes=100): 10}, 1e-5, "rdp"), abs=1e-9)
    assert epsilon({}, 1e-5) == 0


def test_two_phases_cost_what_one_of_twice_the_squared_sensitivity_does_and_bits_what_the_split_says():
    """Gaussian mechanisms compose like one whose inverse variance is the sum of theirs, sampled or not."""
    assert epsilon({all_of(3.0, 3.0): 10}, 1e-5) == pytest.approx(balle_wang(math.sqrt(20) / 3, 1e-5), abs=1e-6)
    assert all_of(3.0, 3.0).noise_multiplier == pytest.approx(3 / math.sqrt(2))
    event = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(2.0), dp_accounting.GaussianDpEvent(5.0)])
    told = rdp.RdpAccountant().compose(dp_accounting.PoissonSampledDpEvent(0.05, event), 40).get_epsilon(1e-5)
    assert epsilon({Mechanism((2.0, 5.0), 100, 5, "poisson"): 40}, 1e-5, "rdp") == pytest.approx(told, abs=1e-6)


def test_a_cohort_of_everybody_and_a_fixed_size_costs_as_replacing_a_node_does():
    """Sensitivity 2 C: the multiplier is half of what the same noise is over the norm."""
    fixed = Mechanism((4.0,), 20, 20, "fixed")
    assert epsilon({fixed: 5}, 1e-5) == pytest.approx(epsilon({all_of(2.0): 5}, 1e-5, "rdp"), abs=1e-9)


@pytest.mark.parametrize("target", [8.0, 4.0, 1.0, 0.1])
@pytest.mark.parametrize("kind", ["gaussian", "discrete"])
def test_the_noise_that_reaches_an_epsilon_reaches_it_and_hardly_more_is_spent(target, kind):
    def plan(z):
        return {all_of(z, z, noise=kind): 30}

    z = noise_multiplier(plan, Budget(target, 1e-5))
    assert epsilon(plan(z), 1e-5) <= target < epsilon(plan(z - 2e-4), 1e-5)


@pytest.mark.slow
def test_the_noise_of_a_sampled_plan_reaches_its_epsilon_by_distributions():
    def plan(z):
        return {Mechanism((z,), 100, 10, "poisson"): 5}

    z = noise_multiplier(plan, Budget(2.0, 1e-4))
    assert epsilon(plan(z), 1e-4) <= 2.0
    assert z < noise_multiplier(plan, Budget(2.0, 1e-4), "rdp")


def test_no_noise_on_the_sums_makes_up_for_bits_that_cost_more():
    with pytest.raises(PrivacyError, match=r"reaches an epsilon of 0\.5; what else .* costs 1\.47"):
        noise_multiplier(lambda z: {all_of(z, 9.0): 10}, Budget(0.5, 1e-5))


def test_as_many_rounds_as_a_budget_buys_and_not_one_more():
    for kind in ("gaussian", "discrete"):
        mechanism, budget = all_of(5.0, noise=kind), Budget(4.0, 1e-5)
        buys = affordable(mechanism, budget)
        assert epsilon({mechanism: buys}, 1e-5) <= 4.0 < epsilon({mechanism: buys + 1}, 1e-5)
        assert affordable(mechanism, budget, {mechanism: buys - 3}) == 3
        assert affordable(mechanism, budget, {mechanism: buys}) == 0


def test_kinds_of_rounds_are_counted():
    one, other = all_of(1.0), all_of(2.0)
    assert counted([one, other, one]) == {one: 2, other: 1}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mechanism((1.0,), 10, 11, "poisson"), "found 11 of 10 nodes; expected 1 to all of them"),
        (lambda: Mechanism((1.0,), 10, 0, "fixed"), "found 0 of 10"),
        (lambda: Mechanism((1.0,), 10, 5), "found all beside a cohort of 5 of 10"),
        (lambda: Mechanism((), 10, 10), "noise_multipliers: found none"),
        (lambda: Mechanism((1.0, 0.0), 10, 10), "found 1, 0; expected positive"),
        (lambda: Mechanism((math.inf,), 10, 10), "found inf"),
        (lambda: Mechanism((math.nan,), 10, 10), "found nan"),
        (lambda: Mechanism((1e-300,), 10, 10), "found 1e-300; expected positive numbers, 1e-06 at least"),
        (lambda: Mechanism((1e300,), 10, 10), r"found 1e\+300"),
        (lambda: Mechanism((1.0,), 10, 5, "poisson", "discrete"), "found poisson beside the nodes' own noise"),
        (lambda: Budget(0, 1e-5), "an epsilon of 0"),
        (lambda: Budget(math.nan, 1e-5), "an epsilon of nan"),
        (lambda: Budget(1e300, 1e-5), "1000 at most"),
        (lambda: Budget(1, 0), "a delta of 0"),
        (lambda: Budget(1, 1), "a delta of 1"),
        (lambda: epsilon({all_of(1.0, nodes=50): 1}, 0.02), r"below 1/50 = 0.02"),
        (lambda: epsilon({all_of(1.0): 1, Mechanism((1.0,), 9, 3, "fixed"): 1}, 1e-5), "do not add up"),
        (lambda: epsilon({all_of(1.0, noise="discrete"): 1}, 1e-5, "pld"), "take rdp"),
        (lambda: noise_multiplier(lambda z: {all_of(z): 1}, Budget(1, 0.05)), "below 1/20"),
    ],
)
def test_numbers_that_promise_nothing_are_refused_with_numbers(make, said):
    with pytest.raises(PrivacyError, match=said):
        make()
