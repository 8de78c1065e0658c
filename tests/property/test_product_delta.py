"""ProductDelta against a dense float64 oracle: the issue asks for a relative error of at most 1e-6."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.codec import encode
from protocol.manifest import Manifest
from protocol.product_space import at_rank, split
from protocol.update import Update
from server.aggregation.product_delta import ProductDelta

# The merge is exact in float64; its result is rounded to float32 once per factor entry, 6e-8 of each.
CLOSE = 1e-6
quick = settings(deadline=None, derandomize=True, max_examples=60)

dims = st.integers(1, 72)
ranks = st.integers(0, 64)
scalings = st.sampled_from([1.0, 2.0, -0.5, 0.01, 33.3])
counts = st.integers(1, 10**6)
rates = st.sampled_from([1.0, 0.5, 0.1, 2.0])
seeds = st.integers(0, 2**32 - 1)


@st.composite
def shapes(draw):
    d_out, d_in = draw(dims), draw(dims)
    return d_out, d_in + (d_in == d_out)


def draw_pair(rng, shape, rank, scaling=1.0):
    d_out, d_in = shape
    return Factors(rng.normal(size=(rank, d_in)).astype(np.float32), rng.normal(size=(d_out, rank)).astype(np.float32), scaling)


def update(num_examples, factors=None, dense=None, rows=None):
    manifest = Manifest(base_digest="ab" * 32, kind="update", num_examples=num_examples)
    return Update(Adapter(factors or {}, dense or {}), manifest, rows or {})


def merge(rule, current, arrivals):
    rule.begin(current)
    for sent, start in arrivals:
        rule.add(sent, start)
    return rule.finalise()


def cut(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def oracle(current, arrivals, module, shape, rate):
    """G + eta * sum_k w_k (s_k B_k A_k - start_k) as a matrix in float64, before the cap."""
    total = sum(sent.manifest.num_examples for sent, _ in arrivals)
    matrix = current.factors[module].product() if module in current.factors else np.zeros(shape)
    for sent, start in arrivals:
        change = sent.adapter.factors[module].product()
        if module in start.factors:
            change = change - start.factors[module].product()
        matrix = matrix + rate * sent.manifest.num_examples / total * change
    return matrix


def gap_at(matrix, cap):
    """Relative size of the gap in the spectrum where it is cut; 1 if nothing is cut."""
    s = np.linalg.svd(matrix, compute_uv=False)
    return 1.0 if cap >= len(s) or not s[0] else (s[cap - 1] - s[cap]) / s[0]


def error(found, wanted):
    return np.linalg.norm(found - wanted) / (np.linalg.norm(wanted) or 1.0)


def start_of(current, rank, wire="fp32"):
    return encode(Adapter({m: at_rank(pair, rank) for m, pair in current.factors.items()}, current.dense), wire)


@st.composite
def rounds_of(draw, most=4, fresh=None):
    """Some module's global change (or none yet) and updates of mixed ranks that started from it."""
    shape, rng = draw(shapes()), np.random.default_rng(draw(seeds))
    current = Adapter()
    if not (draw(st.booleans()) if fresh is None else fresh):
        current = Adapter({"q": draw_pair(rng, shape, draw(ranks))})
    wire = draw(st.sampled_from(["fp32", "fp16"]))
    arrivals = []
    for _ in range(draw(st.integers(1, most))):
        rank = draw(ranks)
        pair = draw_pair(rng, shape, rank, draw(scalings))
        arrivals.append((update(draw(counts), {"q": pair}), start_of(current, rank, wire)))
    return shape, current, arrivals


# ---- factors ----------------------------------------------------------------------------------------------------------


@quick
@given(case=rounds_of(), cap=st.integers(1, 64), rate=rates)
def test_a_merge_is_the_dense_sum_of_innovations_cut_at_the_cap(case, cap, rate):
    shape, current, arrivals = case
    merged, _ = merge(ProductDelta(cap, rate), current, arrivals)
    exact = oracle(current, arrivals, "q", shape, rate)
    assume(gap_at(exact, cap) > 1e-8)  # else the best approximation is not one matrix
    assert merged.factors["q"].r <= cap
    assert error(merged.factors["q"].product(), cut(exact, cap)) <= CLOSE


@quick
@given(case=rounds_of(), rate=rates)
def test_a_merge_under_a_cap_that_suffices_loses_nothing(case, rate):
    shape, current, arrivals = case
    merged, report = merge(ProductDelta(min(shape), rate), current, arrivals)
    assert error(merged.factors["q"].product(), oracle(current, arrivals, "q", shape, rate)) <= CLOSE
    assert report.discarded_energy <= 1e-12


@quick
@given(shape=shapes(), seed=seeds, data=st.data())
def test_several_rounds_in_a_row_follow_the_dense_oracle(shape, seed, data):
    """The oracle keeps its own float64 matrix; only the starts are what was really sent."""
    rng, rule = np.random.default_rng(seed), ProductDelta(min(shape))
    tiers = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    current, matrix, scale = Adapter(), np.zeros(shape), 0.0
    for _ in range(4):
        arrivals = []
        for rank in tiers:
            # As server.rounds does it: the leading directions of the global adapter as it was sent.
            sent = encode(current, "fp32")
            start = Adapter({module: split(pair, rank)[0] for module, pair in sent.factors.items()})
            step = Factors(*(0.3 * t for t in (lambda p: (p.A, p.B))(draw_pair(rng, shape, rank))))
            arrivals.append((update(int(rng.integers(1, 1000)), {"q": step}), start))
        total = sum(sent.manifest.num_examples for sent, _ in arrivals)
        for sent, start in arrivals:
            begun = start.factors["q"].product() if start.factors else 0.0
            matrix = matrix + sent.manifest.num_examples / total * (sent.adapter.factors["q"].product() - begun)
        current, _ = merge(rule, current, arrivals)
        scale = max(scale, np.linalg.norm(matrix))
        # Each round rounds G to float32 once; what was rounded before stays, so errors of rounds add up: 4 times 1e-7.
        assert np.linalg.norm(current.factors["q"].product() - matrix) <= CLOSE * scale


@quick
@given(case=rounds_of(), cap=st.integers(1, 64), data=st.data())
def test_merge_is_unchanged_by_the_order_of_arrival(case, cap, data):
    shape, current, arrivals = case
    assume(gap_at(oracle(current, arrivals, "q", shape, 1.0), cap) > 1e-6)
    one, told = merge(ProductDelta(cap), current, arrivals)
    other, also = merge(ProductDelta(cap), current, data.draw(st.permutations(arrivals)))
    assert error(other.factors["q"].product(), one.factors["q"].product()) <= CLOSE
    assert (told.updates, told.num_examples) == (also.updates, also.num_examples)
    assert told.discarded_energy == pytest.approx(also.discarded_energy, abs=1e-9)


@quick
@given(case=rounds_of(), cap=st.integers(1, 64), seed=seeds)
def test_merge_is_unchanged_by_a_gauge_change_of_a_nodes_factors(case, cap, seed):
    shape, current, arrivals = case
    assume(gap_at(oracle(current, arrivals, "q", shape, 1.0), cap) > 1e-6)
    rng, changed = np.random.default_rng(seed), []
    for sent, start in arrivals:
        pair = sent.adapter.factors["q"]
        q, d = np.linalg.qr(rng.normal(size=(pair.r, pair.r)))[0], rng.uniform(0.5, 2.0, size=pair.r)
        # In float64, so that the gauge itself rounds nothing that counts: (M A, B M^-1).
        other = Factors((q * d) @ pair.A.astype(np.float64), pair.B.astype(np.float64) @ (q / d).T, pair.scaling)
        changed.append((update(sent.manifest.num_examples, {"q": other}), start))
    one, _ = merge(ProductDelta(cap), current, arrivals)
    other, _ = merge(ProductDelta(cap), current, changed)
    assert error(other.factors["q"].product(), one.factors["q"].product()) <= CLOSE


@quick
@given(case=rounds_of(), factor=st.integers(2, 1000))
def test_only_the_ratio_of_examples_counts(case, factor):
    shape, current, arrivals = case
    more = [(update(factor * sent.manifest.num_examples, sent.adapter.factors), start) for sent, start in arrivals]
    one, _ = merge(ProductDelta(min(shape)), current, arrivals)
    other, _ = merge(ProductDelta(min(shape)), current, more)
    assert error(other.factors["q"].product(), one.factors["q"].product()) <= CLOSE


@quick
@given(shape=shapes(), held=ranks, extra=st.integers(0, 16), seed=seeds, count=counts)
def test_one_node_that_was_sent_everything_makes_the_global_product_its_own(shape, held, extra, seed, count):
    """The centralised case: cap and rank suffice, so the global adapter is what the node trained."""
    rng = np.random.default_rng(seed)
    current = Adapter({"q": draw_pair(rng, shape, held)})
    rank = min(64, held + extra)
    trained = draw_pair(rng, shape, rank, 2.0)
    merged, _ = merge(ProductDelta(64), current, [(update(count, {"q": trained}), start_of(current, rank))])
    # Taking the start away leaves what float32 rounded of it.
    scale = np.linalg.norm(trained.product()) + np.linalg.norm(current.factors["q"].product()) or 1.0
    assert np.linalg.norm(merged.factors["q"].product() - trained.product()) <= CLOSE * scale


@quick
@given(shape=shapes(), rank=ranks, seed=seeds, count=counts)
def test_the_first_round_of_one_node_is_its_product(shape, rank, seed, count):
    trained = draw_pair(np.random.default_rng(seed), shape, rank, 0.3)
    merged, _ = merge(ProductDelta(64), Adapter(), [(update(count, {"q": trained}), Adapter())])
    assert error(merged.factors["q"].product(), trained.product()) <= CLOSE


@quick
@given(case=rounds_of(fresh=False), wire=st.sampled_from(["fp32", "fp16"]))
def test_nodes_that_changed_nothing_change_nothing(case, wire):
    """Whatever the rank that they were sent: a node of small rank must not vote zero on the tail."""
    shape, current, arrivals = case
    idle = []
    for sent, _ in arrivals:
        start = start_of(current, sent.adapter.factors["q"].r, wire)
        idle.append((update(sent.manifest.num_examples, dict(start.factors)), start))
    merged, _ = merge(ProductDelta(min(shape)), current, idle)
    assert error(merged.factors["q"].product(), current.factors["q"].product()) <= CLOSE


@quick
@given(case=rounds_of(fresh=False), rate=rates)
def test_the_server_learning_rate_scales_the_step(case, rate):
    shape, current, arrivals = case
    before = current.factors["q"].product()
    full = merge(ProductDelta(min(shape), 1.0), current, arrivals)[0].factors["q"].product() - before
    part = merge(ProductDelta(min(shape), rate), current, arrivals)[0].factors["q"].product() - before
    scale = np.linalg.norm(before) + np.linalg.norm(full) + np.linalg.norm(part) or 1.0
    assert np.linalg.norm(part - rate * full) <= 2 * CLOSE * scale


def test_a_module_that_nobody_sent_stays():
    rng = np.random.default_rng(0)
    current = Adapter({"q": draw_pair(rng, (6, 5), 2), "v": draw_pair(rng, (4, 7), 3)})
    sent = update(3, {"q": draw_pair(rng, (6, 5), 2)})
    merged, _ = merge(ProductDelta(8), current, [(sent, Adapter({"q": current.factors["q"]}))])
    assert error(merged.factors["v"].product(), current.factors["v"].product()) <= CLOSE


def test_a_round_without_updates_keeps_the_global_adapter():
    rng = np.random.default_rng(0)
    current = Adapter({"q": draw_pair(rng, (6, 5), 2)}, {"h": np.ones((2, 3), np.float32)})
    merged, report = merge(ProductDelta(8), current, [])
    assert error(merged.factors["q"].product(), current.factors["q"].product()) <= CLOSE
    assert np.array_equal(merged.dense["h"], current.dense["h"])
    assert (report.updates, report.num_examples) == (0, 0)


def test_begin_forgets_the_round_before():
    rng, rule = np.random.default_rng(0), ProductDelta(8)
    pair = draw_pair(rng, (6, 5), 2)
    merge(rule, Adapter(), [(update(9, {"q": draw_pair(rng, (6, 5), 3)}, {"h": np.ones((2, 3), np.float32)}), Adapter())])
    merged, report = merge(rule, Adapter(), [(update(1, {"q": pair}), Adapter())])
    assert error(merged.factors["q"].product(), pair.product()) <= CLOSE
    assert not merged.dense
    assert (report.updates, report.num_examples) == (1, 1)


def test_the_merged_adapter_is_float32_with_scaling_one_and_sorted_names():
    rng = np.random.default_rng(0)
    sent = update(1, {"q": draw_pair(rng, (6, 5), 2, 3.0), "a": draw_pair(rng, (6, 5), 1)}, {"h": np.ones((2, 3), np.float16)})
    merged, _ = merge(ProductDelta(8), Adapter(), [(sent, Adapter())])
    assert list(merged.factors) == ["a", "q"]
    assert {pair.scaling for pair in merged.factors.values()} == {1.0}
    assert {t.dtype for pair in merged.factors.values() for t in (pair.A, pair.B)} == {np.dtype(np.float32)}
    assert merged.dense["h"].dtype == np.float32


@quick
@given(case=rounds_of(), cap=st.integers(1, 64))
def test_the_report_tells_what_the_cap_cut_off_and_how_many_directions_there_were(case, cap):
    shape, current, arrivals = case
    _, report = merge(ProductDelta(cap), current, arrivals)
    s = np.linalg.svd(oracle(current, arrivals, "q", shape, 1.0), compute_uv=False)
    assume(s[0] > 0)
    share = s[s > 1e-13 * s[0]] / s.sum()
    assert (report.updates, report.num_examples) == (len(arrivals), sum(u.manifest.num_examples for u, _ in arrivals))
    assert report.discarded_energy == pytest.approx(np.sum(s[cap:] ** 2) / np.sum(s**2), abs=1e-9)
    assert report.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-6)


# ---- dense tensors ----------------------------------------------------------------------------------------------------


@st.composite
def heads(draw):
    """A tensor with rows and what some nodes made of it, each with the rows that it trained (None: all)."""
    rng = np.random.default_rng(draw(seeds))
    shape = draw(st.sampled_from([(1,), (7,), (5, 3), (4, 1), (3, 2, 4)]))
    current = rng.normal(size=shape).astype(np.float32)
    sent = []
    for _ in range(draw(st.integers(1, 4))):
        rows = None if draw(st.booleans()) else np.array(draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])))
        sent.append((rng.normal(size=shape).astype(np.float32), rows, draw(counts)))
    return current, sent


def literal(current, sent, rate):
    """Row by row, as the docstring says it: the mean over the nodes that trained the row; a row nobody trained stays."""
    result = current.astype(np.float64)
    for row in range(len(current)):
        trainers = [(value, count) for value, rows, count in sent if rows is None or rows[row]]
        if trainers:
            total = sum(count for _, count in trainers)
            mean = sum(
                count / total * (value[row].astype(np.float64) - current[row].astype(np.float64)) for value, count in trainers
            )
            result[row] = current[row].astype(np.float64) + rate * mean
    return result


def arrivals_of(current, sent):
    start = Adapter(dense={} if current is None else {"h": current})
    return [(update(n, dense={"h": value}, rows=None if rows is None else {"h": rows}), start) for value, rows, n in sent]


@quick
@given(case=heads(), rate=rates)
def test_rows_are_averaged_over_the_nodes_that_trained_them(case, rate):
    current, sent = case
    merged, _ = merge(ProductDelta(4, rate), Adapter(dense={"h": current}), arrivals_of(current, sent))
    # float64 until one rounding to float32 at the end.
    np.testing.assert_allclose(merged.dense["h"], literal(current, sent, rate), rtol=CLOSE, atol=1e-7)


@quick
@given(case=heads())
def test_a_row_that_nobody_trained_stays_bit_by_bit(case):
    current, sent = case
    merged, _ = merge(ProductDelta(4), Adapter(dense={"h": current}), arrivals_of(current, sent))
    untrained = ~np.any([np.ones(len(current), bool) if rows is None else rows for _, rows, _ in sent], axis=0)
    assert np.array_equal(merged.dense["h"][untrained], current[untrained])


@quick
@given(case=heads(), data=st.data())
def test_dense_tensors_are_unchanged_by_the_order_of_arrival(case, data):
    current, sent = case
    one, _ = merge(ProductDelta(4), Adapter(dense={"h": current}), arrivals_of(current, sent))
    shuffled = arrivals_of(current, data.draw(st.permutations(sent)))
    other, _ = merge(ProductDelta(4), Adapter(dense={"h": current}), shuffled)
    np.testing.assert_allclose(other.dense["h"], one.dense["h"], rtol=CLOSE, atol=1e-7)


@quick
@given(case=heads(), data=st.data())
def test_the_first_round_is_the_mean_over_those_who_trained_a_row_and_the_common_start_elsewhere(case, data):
    """Nobody has sent the coordinator a head yet; all nodes begin from the same one, and untrained rows are still that."""
    common, sent = case
    real = []
    for value, rows, count in sent:
        mask = np.ones(len(common), bool) if rows is None else rows
        real.append((np.where(mask.reshape(-1, *[1] * (common.ndim - 1)), value, common), rows, count))
    merged, _ = merge(ProductDelta(4), Adapter(), arrivals_of(None, data.draw(st.permutations(real))))
    np.testing.assert_allclose(merged.dense["h"], literal(common, sent, 1.0), rtol=CLOSE, atol=1e-6)


@pytest.mark.parametrize("wire", ["fp32", "fp16"])
def test_nodes_that_changed_no_dense_tensor_change_none(wire):
    """What a node contributes is its change against the start *as it arrived there*, on an fp16 wire too."""
    current = Adapter(dense={"h": np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)})
    start = encode(current, wire)
    merged, _ = merge(ProductDelta(4), current, [(update(3, dense=dict(start.dense)), start)])
    np.testing.assert_allclose(merged.dense["h"], current.dense["h"], rtol=CLOSE)


def test_a_dense_tensor_that_is_a_single_number_is_averaged():
    sent = [(update(n, dense={"scale": np.array(value, np.float32)}), Adapter()) for n, value in ((1, 2.0), (3, 4.0))]
    merged, _ = merge(ProductDelta(4), Adapter(), sent)
    assert merged.dense["scale"].shape == ()
    assert merged.dense["scale"] == 3.5


def test_a_dense_tensor_that_nobody_sent_stays():
    current = Adapter(dense={"h": np.ones((2, 3), np.float32), "b": np.full(2, 7, np.float32)})
    merged, _ = merge(ProductDelta(4), current, [(update(1, dense={"h": np.zeros((2, 3), np.float32)}), current)])
    assert np.array_equal(merged.dense["b"], current.dense["b"])
    assert not merged.dense["h"].any()
