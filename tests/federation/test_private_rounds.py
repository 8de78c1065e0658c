"""Rounds with noise: what is released is the clipped sum and noise of the promised size, and is written down before it leaves.

The oracle of every sum is dense and in float64, from what the nodes were made to send. Noise cannot be foretold, so its
variance is held to a chi-square's bounds, beyond which an honest run is once in 1e9.
"""

import json
import math
import os
from contextlib import contextmanager

import numpy as np
import pytest
from drawn_nodes import MODULES
from flwr.app import MessageType
from private_nodes import changed, federation, write_start
from scipy import stats
from summed_nodes import ENROLLED, Watched, make_app
from typer.testing import CliRunner

from protocol.audit import read
from protocol.errors import BudgetSpentError, FederationError, PrivacyError
from protocol.files import read_adapter
from protocol.privacy.accounting import Budget, Mechanism, affordable, epsilon
from protocol.privacy.ledger import FILE, PrivacyLedger
from protocol.records import VECTOR, call_records, read_call, read_stage, read_vector, stage_records
from protocol.secure_sum.stages import Next
from protocol.signature import make_key, write_pair
from server.audit_export import export_for_auditor
from server.commands import coordinator
from server.rounds import run

NODES, NORM, WIDE = 8, 0.5, {"epsilon": 1000.0, "clipping_norm": 0.5}
HIDDEN = [("coordinator", False), ("coordinator", True), ("nodes", True)]


class Heard(Watched):
    """Remembers every update that nodes were made to send, by round, and every adapter that arrived."""

    def __init__(self, nodes=NODES, size=1.0, away=(), **app):
        self.updates, self.arrived, self.away = {}, {}, set(away)
        super().__init__(make_app(self.update, **app), nodes, before=self.left)
        self.size = size

    def update(self, call, node, arrived):
        made = changed(call, node, arrived, self.size)
        self.updates.setdefault(call.round, {})[node] = (made, call)
        self.arrived[call.round] = arrived
        return made

    def left(self, message):
        training = message.metadata.message_type.startswith(MessageType.TRAIN)
        return None if training and message.metadata.dst_node_id in self.away else message


def start_in(folder):
    return str(write_start(folder / "start"))


def private(output, grid=None, **settings):
    """A run of a rule in product space begins from an adapter with a head; of the others nodes have no head."""
    if settings.get("rule", "product-delta") == "product-delta":
        settings.setdefault("start", start_in(output))
        grid = grid or Heard()
    return run(grid or Heard(dense={}), federation(output / "run", **settings), enrolled=ENROLLED)


def clipped_sum(updates, arrived, kind):
    """The oracle: by module (or factor) and for the head, the sum of whole changes, each no longer than ``NORM``."""
    total = {}
    for update, call in updates.values():
        own = {}
        for module, pair in update.adapter.factors.items():
            start = arrived.factors[module]
            if kind == "products":
                own[module] = pair.product() - start.B[:, : call.r].astype(np.float64) @ start.A[: call.r]
            else:
                own["A", module] = pair.A.astype(np.float64) - start.A
                own["B", module] = pair.B.astype(np.float64) - start.B
        for name, tensor in update.adapter.dense.items():
            own[name] = update.rows[name][:, None] * (tensor.astype(np.float64) - arrived.dense[name])
        norm = math.sqrt(sum(float(np.sum(part**2)) for part in own.values()))
        assert norm > NORM  # so that clipping has something to do
        for name, part in own.items():
            total[name] = total.get(name, 0.0) + part * (NORM / norm)
    return total


def is_noise(values, std):
    """Whether so many values are what Gaussian noise of that size looks like: mean, variance and largest."""
    values = np.concatenate([np.asarray(part).ravel() for part in values])
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], values.size)
    return low < np.sum((values / std) ** 2) < high and abs(values.mean()) < 6 * std / values.size**0.5


def spread_of(noise, z):
    """Of all eight nodes' noise, where six are counted on (two thirds): theirs alone make what was promised."""
    return z * NORM * (math.sqrt(8 / 6) if noise == "nodes" else 1.0)


@pytest.mark.parametrize(("noise", "secure"), HIDDEN)
@pytest.mark.parametrize("rule", ["fedavg", "rolora", "ffa"])
def test_tensors_are_released_as_their_clipped_sum_with_the_promised_noise(tmp_path, rule, noise, secure):
    """Two rounds, so that rolora trains B and A. What a round moved, times eight nodes, less the oracle's sum, is noise."""
    grid = Heard(dense={})
    outcome = private(tmp_path, grid, rule=rule, secure=secure, privacy={"noise": noise}, rounds={"count": 2})
    after = {1: grid.arrived[2], 2: outcome.adapter}
    for number, record in enumerate(outcome.rounds, 1):
        wanted = clipped_sum(grid.updates[number], grid.arrived[number], "tensors")
        trains = next(iter(grid.updates[number].values()))[1].trains
        left = []
        for module in MODULES:
            before, new = grid.arrived[number].factors[module], after[number].factors[module]
            moved = {"A": new.A.astype(np.float64) - before.A, "B": new.B.astype(np.float64) - before.B}
            for factor in "AB":
                if trains in ("both", factor):
                    left.append(NODES * moved[factor] - wanted[factor, module])
                else:
                    assert not np.any(moved[factor])
        assert is_noise(left, spread_of(noise, record.privacy["noise_multiplier"]))
        assert not is_noise(left, 2.5 * spread_of(noise, record.privacy["noise_multiplier"]))


@pytest.mark.parametrize(("noise", "secure"), HIDDEN)
def test_products_of_any_rank_are_released_as_their_clipped_sum_with_the_promised_noise(tmp_path, noise, secure):
    """With as many columns as directions the basis ``U`` of what came out is the one that was published, whatever the noise of
    the first sum made it; in it the second sum lies open: ``U^T (n P - D)``. The head is in the first sum."""
    grid = Heard()
    outcome = private(tmp_path, grid, secure=secure, privacy={"noise": noise}, rounds={"count": 1})
    (record,) = outcome.rounds
    wanted, arrived = clipped_sum(grid.updates[1], grid.arrived[1], "products"), grid.arrived[1]
    left = [NODES * (outcome.adapter.dense["score.weight"].astype(np.float64) - arrived.dense["score.weight"])]
    left[0] -= wanted["score.weight"]
    for module in MODULES:
        moved = NODES * (outcome.adapter.factors[module].product() - arrived.factors[module].product())
        basis = np.linalg.svd(moved)[0][:, :16]
        left.append(basis.T @ (moved - wanted[module]))
    std = spread_of(noise, record.privacy["noise_multiplier"])
    assert is_noise(left, std)
    assert not is_noise(left, 1.3 * std)
    assert not is_noise(left, std / 1.3)


def test_a_sum_is_divided_by_a_number_that_is_settled_however_many_came(tmp_path):
    """Eight institutions, of which two fall silent: the oracle's sum is that of six, over eight."""
    grid = Heard(away={2, 7}, dense={})
    outcome = private(tmp_path, grid, rule="fedavg", privacy={"nodes": 8}, rounds={"count": 1})
    wanted = clipped_sum(grid.updates[1], grid.arrived[1], "tensors")
    assert grid.updates[1].keys() == set(range(1, 9)) - {2, 7}
    left = []
    for module in MODULES:
        before, new = grid.arrived[1].factors[module], outcome.adapter.factors[module]
        left += [NODES * (new.A.astype(np.float64) - before.A) - wanted["A", module]]
        left += [NODES * (new.B.astype(np.float64) - before.B) - wanted["B", module]]
    assert is_noise(left, NORM * outcome.rounds[0].privacy["noise_multiplier"])
    assert len(outcome.rounds[0].accepted) == 6


@pytest.mark.parametrize("secure", [False, True])
def test_the_norm_goes_where_the_quantile_is(tmp_path, secure):
    """All changes are far within it, and then far beyond it: with a hundredth of a node's noise on the votes it shrinks, or
    grows, by a factor of ``exp(0.2 / 2)`` a round (Andrew et al. 2021)."""
    privacy = WIDE | {"quantile": 0.5, "bit_noise": 0.1, "noise_multiplier": 1.0}
    for size, power in ((1e-3, -1), (10.0, 1)):
        (tmp_path / str(size)).mkdir()
        outcome = private(
            tmp_path / str(size), Heard(size=size, dense={}), rule="fedavg", secure=secure, privacy=privacy, rounds={"count": 3}
        )
        norms = [record.privacy["clipping_norm"] for record in outcome.rounds]
        assert norms == pytest.approx([NORM * math.exp(power * 0.1 * done) for done in range(3)], rel=0.1)
        assert norms[0] == NORM


# Who is drawn -------------------------------------------------------------------------------------------------------------


def test_a_poisson_cohort_is_each_node_by_itself_and_is_merged_whatever_its_size(tmp_path):
    """Six rounds of eight nodes at a rate of a half: 48 draws, within five standard deviations. None of it
    follows from the seed, with which another run draws otherwise. Rounds in which few are drawn are not drawn again."""
    privacy = WIDE | {"sampling": "poisson", "nodes": 8, "noise_multiplier": 20.0}
    drawn = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        outcome = private(
            tmp_path / name,
            rule="ffa",
            privacy=privacy,
            rounds={"count": 6, "cohort": 4, "minimum_nodes": 3, "seed": 5},
        )
        drawn.append([sorted(record.accepted) for record in outcome.rounds])
    sizes = [len(names) for names in drawn[0]]
    assert len(drawn[0]) == 6
    assert abs(sum(sizes) - 24) < 5 * math.sqrt(48 / 4)
    assert drawn[0] != drawn[1]


def test_a_round_for_which_nobody_is_drawn_releases_noise_alone(tmp_path):
    privacy = WIDE | {"sampling": "poisson", "nodes": 10_000, "noise_multiplier": 1.0, "delta": 1e-6}
    grid = Heard(3, dense={})
    outcome = private(tmp_path, grid, rule="fedavg", privacy=privacy, rounds={"count": 1, "cohort": 1, "minimum_nodes": 1})
    assert not outcome.rounds[0].accepted
    assert is_noise([pair.B for pair in outcome.adapter.factors.values()], NORM)  # B began at zero


def test_a_cohort_of_a_fixed_size_is_drawn_from_all_institutions_there_or_not(tmp_path):
    """Of twelve, eight are connected: of six drawn four come on average, two at least (four places are empty), six at most."""
    privacy = WIDE | {"sampling": "fixed", "nodes": 12, "noise_multiplier": 4.0}
    outcome = private(tmp_path, rule="ffa", privacy=privacy, rounds={"count": 4, "cohort": 6, "minimum_nodes": 3})
    sizes = [len(record.accepted) for record in outcome.rounds]
    assert min(sizes) >= 2
    assert max(sizes) <= 6


def test_an_auditor_is_told_how_many_of_a_secret_cohort_and_not_who(tmp_path):
    """He has the adapters as well, and towards whoever knows who was drawn a round costs what one without a draw does."""
    privacy = WIDE | {"sampling": "fixed", "nodes": 12, "noise_multiplier": 4.0}
    outcome = private(tmp_path, rule="ffa", privacy=privacy, rounds={"count": 2, "cohort": 6, "minimum_nodes": 3})
    sizes = [len(record.accepted) for record in outcome.rounds]
    (log,) = tmp_path.rglob("audit.jsonl")
    assert [line.facts["accepted"] for line in read(log) if line.event == "answered"] == sizes
    write_pair(tmp_path / "key", make_key())
    export_for_auditor(log.parent, tmp_path / "bundle", tmp_path / "key", None, None)
    events = [json.loads(line) for line in (tmp_path / "bundle" / "events.jsonl").read_text().splitlines()]
    assert [event["accepted"] for event in events if event["event"] == "round"] == sizes


# What it costs --------------------------------------------------------------------------------------------------------------


def test_all_rounds_together_cost_the_budget_and_no_more(tmp_path):
    outcome = private(tmp_path, rule="fedavg", privacy={"epsilon": 3.0})
    spent = [record.privacy["epsilon"] for record in outcome.rounds]
    z = outcome.rounds[0].privacy["noise_multiplier"]
    assert spent == [pytest.approx(epsilon({Mechanism((z,), 3, 3): done}, 1e-5)) for done in (1, 2, 3)]
    assert 2.999 < spent[-1] <= 3.0
    entries = PrivacyLedger(tmp_path / "run" / FILE, Budget(3.0, 1e-5)).entries
    assert [entry.round for entry in entries] == [1, 2, 3]


def test_a_sketch_costs_two_sums_a_round_and_a_quantile_its_votes(tmp_path):
    private(tmp_path, privacy={"quantile": 0.5}, rounds={"count": 1})
    (entry,) = PrivacyLedger(tmp_path / "run" / FILE, Budget(8.0, 1e-5)).entries
    first, second, votes = entry.mechanism.noise_multipliers
    assert first == second
    assert votes == pytest.approx(5 * first)  # 2.5 nodes for each of the sums' multiplier, over half a node


class Silent(Heard):
    """Nodes of which too many fall silent once, after the first sum was asked to be opened."""

    def left(self, message):
        if message.metadata.message_type == MessageType.TRAIN or message.metadata.message_type == MessageType.QUERY:
            return message
        opening = read_stage(message.content, Next).question.stage == "open"
        if opening and len(self.away) < NODES:
            self.away.add(message.metadata.dst_node_id)
            return None
        return message


@pytest.mark.parametrize("given", [True, False])
def test_an_attempt_that_fails_after_its_release_began_is_paid_for(tmp_path, given):
    """The first attempt at the first round is answered by nobody once its sum is being opened. With a noise of the federation's
    own the third round is no longer affordable and the run ends; without it the noise of the rounds left is raised."""
    z = 1.1263508988443574
    assert affordable(Mechanism((z,), 3, 3, noise="discrete"), Budget(8.0, 1e-5)) == 3
    privacy = {"noise": "nodes"} | ({"noise_multiplier": z} if given else {})
    outcome = private(
        tmp_path, Silent(dense={}), rule="fedavg", secure=True, privacy=privacy, rounds={"count": 3, "retries": 1}
    )
    entries = PrivacyLedger(tmp_path / "run" / FILE, Budget(8.0, 1e-5)).entries
    if given:
        assert [entry.round for entry in entries] == [1, 1, 2]
        assert len(outcome.rounds) == 2
        assert "the privacy budget is spent: epsilon is 7.8" in outcome.ended
    else:
        assert [entry.round for entry in entries] == [1, 1, 2, 3]
        assert outcome.ended == "every round is done"
        assert entries[1].mechanism.noise_multiplier > entries[0].mechanism.noise_multiplier
    assert epsilon({entry.mechanism: entries.count(entry) for entry in entries}, 1e-5) <= 8.0


def test_a_run_whose_ledger_is_spent_sends_nothing(tmp_path):
    """Another run over the same data has used the budget up: the same ledger, named by both."""
    ledger = str(tmp_path / "spent.jsonl")
    first = private(tmp_path, rule="fedavg", privacy={"ledger": ledger})
    assert first.rounds[-1].privacy["epsilon"] > 7.9
    grid = Heard(dense={})
    with pytest.raises(PrivacyError, match=r"epsilon is 8 of 8 at a delta of 1e-05, which leaves nothing for 3 rounds"):
        run(grid, federation(tmp_path / "again", rule="fedavg", privacy={"ledger": ledger}))
    assert not grid.seen
    with pytest.raises(PrivacyError, match=r"3 rounds would end at an epsilon of .* after 8 that are spent"):
        run(grid, federation(tmp_path / "again", rule="fedavg", privacy={"ledger": ledger, "noise_multiplier": 5.0}))
    assert not grid.seen


def test_a_first_round_that_cannot_be_paid_for_is_an_error(tmp_path):
    class Never(Silent):
        def left(self, message):
            self.away.clear()
            return super().left(message)

    with pytest.raises(BudgetSpentError, match="the privacy budget is spent"):
        private(
            tmp_path,
            Never(dense={}),
            rule="fedavg",
            secure=True,
            privacy={"noise": "nodes", "noise_multiplier": 1.1263508988443574},
            rounds={"count": 3, "retries": 9},
        )
    assert not list((tmp_path / "run").glob("rounds/*"))


# Crashes --------------------------------------------------------------------------------------------------------------------


class CrashError(BaseException):
    """Nothing catches it: the process is gone."""


@contextmanager
def crashing_at(number, grid, monkeypatch):
    """The process dies before the so-manieth message or write to the disk."""
    left = [number]

    def count():
        left[0] -= 1
        if left[0] == 0:
            raise CrashError

    def before(message):
        count()
        return message

    fsync, replace = os.fsync, os.replace

    def counted_fsync(handle):
        count()
        return fsync(handle)

    def counted_replace(*paths, **more):
        count()
        return replace(*paths, **more)

    grid.before = before
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", counted_fsync)
        patched.setattr(os, "replace", counted_replace)
        yield
    grid.before = lambda message: message


@pytest.mark.parametrize("first", [6, *(pytest.param(at, marks=pytest.mark.slow) for at in range(10) if at != 6)])
def test_fifty_coordinators_that_crash_and_go_on_never_count_too_few(tmp_path, monkeypatch, first):
    """Five of the fifty: each dies twice, at other points, and then ends. Releases are what others than the coordinator have
    seen: adapters that arrived at nodes or lie in the folder. Noise makes each another, so that they can be told apart."""
    settings = {"rule": "ffa", "rounds": {"count": 2, "minimum_nodes": 3}, "privacy": WIDE | {"noise_multiplier": 1.0}}
    crashed = 0
    for at in range(1 + first, 51, 10):
        folder, seen = tmp_path / str(at), set()
        ledger = folder / FILE
        for number in (at, at // 2 + 1, None):
            grid = Heard(3, dense={})
            try:
                with crashing_at(number or -1, grid, monkeypatch):
                    run(grid, federation(folder, **settings))
            except CrashError:
                crashed += 1
            seen |= {adapter.digest() for round_, adapter in grid.arrived.items() if round_ > 1}
            seen |= {read_adapter(place)[0].digest() for place in folder.glob("rounds/*") if place.is_dir()}
            if seen:
                entries = PrivacyLedger(ledger, Budget(1000.0, 1e-5)).entries
                assert len(entries) >= len(seen)
        assert len(seen) >= 2
        assert len(PrivacyLedger(ledger, Budget(1000.0, 1e-5)).entries) <= len(seen) + 2
    assert crashed >= 5


def test_a_coordinator_that_goes_on_keeps_norm_and_ledger(tmp_path):
    class KilledError(Exception):
        pass

    def kill(record):
        if record.round == 2:
            raise KilledError

    settings = {"rule": "fedavg", "privacy": WIDE | {"quantile": 0.5, "bit_noise": 0.1, "noise_multiplier": 1.0}}
    with pytest.raises(KilledError):
        run(Heard(dense={}), federation(tmp_path, **settings), kill)
    outcome = run(Heard(dense={}), federation(tmp_path, **settings))
    (record,) = outcome.rounds
    assert record.privacy["clipping_norm"] == pytest.approx(NORM * math.exp(0.2), rel=0.1)  # all changes are longer
    assert len(PrivacyLedger(tmp_path / FILE, Budget(1000.0, 1e-5)).entries) == 3


@pytest.mark.parametrize("given", [True, False])
def test_a_run_that_crashed_goes_on_with_what_is_left(tmp_path, given):
    """After two of three rounds a crash has cost another. With a noise of the federation's own the third is no longer
    affordable, and the run ends with two; without it the third gets more noise."""

    class KilledError(Exception):
        pass

    def kill(record):
        if record.round == 2:
            raise KilledError

    z = 1.0602177282735628
    assert affordable(Mechanism((z,), 3, 3), Budget(8.0, 1e-5)) == 3
    settings = {"rule": "fedavg", "privacy": {"noise_multiplier": z} if given else {}}
    with pytest.raises(KilledError):
        run(Heard(dense={}), federation(tmp_path, **settings), kill)
    ledger = PrivacyLedger(tmp_path / FILE, Budget(8.0, 1e-5))
    ledger.spend(Mechanism((z if given else 3.0,), 3, 3), 3)
    outcome = run(Heard(dense={}), federation(tmp_path, **settings))
    assert "the privacy budget is spent" in outcome.ended if given else outcome.ended == "every round is done"
    assert [record.round for record in outcome.rounds] == [] if given else [3]
    assert outcome.manifest.round == (2 if given else 3)


def test_a_ledger_that_has_lost_releases_is_refused(tmp_path):
    class KilledError(Exception):
        pass

    def kill(record):
        if record.round == 2:
            raise KilledError

    settings = {"rule": "fedavg"}
    with pytest.raises(KilledError):
        run(Heard(dense={}), federation(tmp_path, **settings), kill)
    (tmp_path / FILE).unlink()
    grid = Heard(dense={})
    with pytest.raises(PrivacyError, match="holds 0 releases, and 2 are known"):
        run(grid, federation(tmp_path, **settings))
    assert not grid.seen


# Bad coordinators and nodes -------------------------------------------------------------------------------------------------


def told(message, **changes):
    """The same question with another promise."""
    received = read_call(message.content)
    promise = received.call.privacy.model_copy(update=changes)
    records = call_records(received.call.model_copy(update={"privacy": promise}))
    for key in message.content.keys() - records.keys():
        records[key] = message.content[key]
    message.content = records
    return message


def test_nodes_that_are_promised_different_noise_make_no_sum(tmp_path):
    """One node is told the truth, the others that they need to add nearly none: their keys do not agree."""
    grid = Heard(dense={})
    grid.before = lambda message: (
        told(message, noise_multiplier=1e-3)
        if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id > 1
        else message
    )
    with pytest.raises(FederationError, match="secure sum"):
        private(tmp_path, grid, rule="fedavg", secure=True, privacy={"noise": "nodes"}, rounds={"count": 1, "retries": 0})
    assert not (tmp_path / "run" / FILE).exists()


def test_a_vector_that_is_longer_than_any_honest_one_is_not_merged(tmp_path):
    """A node of eight adds a number to all words that it sends: the sum's length gives it away, and of that round nothing is
    kept, though it is paid for."""

    def lengthened(message, reply):
        if VECTOR in reply.content and message.metadata.dst_node_id == 1:
            vector = read_vector(reply.content, reply.content[VECTOR][VECTOR].numpy().size) + np.uint32(2**30)
            vector[0] -= np.uint32(2**30)
            reply.content[VECTOR] = stage_records(None, vector=vector)[VECTOR]
        return reply

    grid = Heard(dense={})
    grid.edit = lengthened
    with pytest.raises(FederationError, match=r"the noised sum of 8 updates of norm 0\.5 at most has the norm"):
        private(tmp_path, grid, rule="fedavg", secure=True, rounds={"count": 1})
    assert len(PrivacyLedger(tmp_path / "run" / FILE, Budget(8.0, 1e-5)).entries) == 1


def test_nothing_that_nodes_say_beside_their_vectors_tells_of_their_data(tmp_path):
    """No metric, no evaluation, no norm in any record; the nodes are not asked to measure."""
    grid = Heard(dense={})
    outcome = private(tmp_path, grid, rule="fedavg", rounds={"evaluate_every": 1})
    assert not [message for message, _ in grid.seen if message.metadata.message_type == MessageType.EVALUATE]
    for record in outcome.rounds:
        assert not record.norms
        assert not record.evaluation
        assert all(metrics == {} for metrics in record.accepted.values())
        assert record.merge["num_examples"] == NODES
    (tmp_path / "told").mkdir()
    grid = Heard(dense={})
    private(tmp_path / "told", grid, rule="fedavg", privacy={"evaluate": True})
    assert [reply for message, reply in grid.seen if message.metadata.message_type == MessageType.EVALUATE]


def test_a_tenth_of_the_budget_needs_much_noise_and_the_fixed_point_has_room_for_it(tmp_path):
    outcome = private(tmp_path, rule="fedavg", secure=True, privacy={"noise": "nodes", "epsilon": 0.2})
    assert outcome.rounds[0].privacy["noise_multiplier"] > 20
    assert len(outcome.rounds) == 3


def test_nodes_whose_noise_makes_the_promise_open_nothing_beyond_it_whatever_a_coordinator_forgets(tmp_path):
    """The plan's three rounds cost all of epsilon 8. Another coordinator of that name, with a ledger of its own that is empty,
    asks the same nodes for one more: each has kept its own count."""
    grid = Heard(dense={})
    settings = {"rule": "fedavg", "secure": True, "privacy": {"noise": "nodes"}}
    private(tmp_path / "once", grid, **settings)
    with pytest.raises(FederationError, match="privacy"):
        private(tmp_path / "again", grid, rounds={"count": 1, "retries": 0}, **settings)
    assert not list((tmp_path / "again").glob("run/rounds/*"))


def test_what_is_spent_is_told(tmp_path):
    outcome = private(tmp_path, rule="fedavg")
    said = CliRunner().invoke(coordinator, ["status", str(tmp_path / "run"), "--json"]).output
    assert json.loads(said) | {"epsilon": 8.0, "epsilon_budget": 8.0, "delta": 1e-5} == json.loads(said)
    told = json.loads(CliRunner().invoke(coordinator, ["rounds", str(tmp_path / "run"), "--json"]).output)
    assert [event["privacy"] for event in told] == [dict(record.privacy) for record in outcome.rounds]
    assert "epsilon" in CliRunner().invoke(coordinator, ["rounds", str(tmp_path / "run")]).output
