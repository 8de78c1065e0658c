"""Federations whose sums are noised: what nodes change is known exactly, so that what is left of a release is the noise."""

import numpy as np
from drawn_nodes import DENSE, MODULES, manifest_of
from summed_nodes import HEAD

from protocol.adapter import Adapter, Factors
from protocol.federation import Federation
from protocol.files import save_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.update import Update


def write_start(folder, modules=True):
    """An adapter that holds a head, from which clipped changes can be counted."""
    factors = {}
    if modules:
        rng = np.random.default_rng(5)
        for module, (d_out, d_in) in MODULES.items():
            a, b = rng.standard_normal((2, d_in)), 0.1 * rng.standard_normal((d_out, 2))
            factors[module] = Factors(a.astype(np.float32), b.astype(np.float32))
    manifest = Manifest(base_digest="ab" * 32, kind="global", r=2 if modules else 0, federation="before", round=1)
    folder.mkdir(parents=True)
    save_adapter(folder, Adapter(factors, {"score.weight": HEAD}), manifest, Plan())
    return folder


def changed(call, node, arrived, size=1.0):
    """A step from the start that arrived, most of them longer than any norm here; rows of the head that some never train."""
    rng = np.random.default_rng([node, call.round, 7])
    factors = {}
    for module, (d_out, d_in) in MODULES.items():
        start = arrived.factors.get(module, Factors(np.zeros((0, d_in)), np.zeros((d_out, 0))))
        a, b = rng.standard_normal((call.r, d_in)), size * rng.standard_normal((d_out, call.r))
        held = min(start.r, call.r)
        a[:held] = start.A[:held] + (0.1 * size * a[:held] if call.trains != "B" else 0)
        b[:, :held] = start.B[:, :held] + (0.1 * b[:, :held] if call.trains != "A" else 0)
        factors[module] = Factors(a.astype(np.float32), b.astype(np.float32))
    if not arrived.dense:
        return Update(Adapter(factors), manifest_of(call, 7))
    rows = np.arange(6) != node % 6
    head = arrived.dense["score.weight"] + size * rows[:, None] * rng.standard_normal(DENSE["score.weight"])
    return Update(Adapter(factors, {"score.weight": head.astype(np.float32)}), manifest_of(call, 7), {"score.weight": rows})


def federation(output, *, secure=False, rule="product-delta", privacy=None, rounds=None, **changes):
    content = {
        "name": "private",
        "plan": {"training": {"batch_size": 10, "num_train_epochs": 1}},
        "rounds": {"count": 3, "minimum_nodes": 3, "evaluate_every": 0, "retries": 0} | (rounds or {}),
        "aggregation": {"rule": rule, "rank_cap": 16},
        "privacy": {"enabled": True, "epsilon": 8.0, "clipping_norm": 0.5} | (privacy or {}),
        "output": str(output),
    } | changes
    if secure:
        content["secure_sum"] = {"enabled": True}
    return Federation.model_validate(content)
