"""Nodes that join while a federation runs. Oracle: what the rule draws for those nodes alone."""

import numpy as np
import pytest
from drawn_nodes import MODULES, drawn, federation, make_app, rank_of

from server.aggregation.registry import make
from server.rounds import run
from simulations.grid import InProcessGrid

RULES = ["product-delta", "fedavg", "ffa", "rolora", "fedadam", "median"]
LATE = 4


class Joining(InProcessGrid):
    """Nodes 4 and 5 connect after the first round."""

    first = frozenset({1, 2, 3})
    round = 1

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if self.round > 1 or node in self.first]

    def watch(self, record):
        self.round = record.round + 1


def adapter_of(node):
    return "late" if node >= LATE else "early"


@pytest.mark.parametrize("rule", RULES)
def test_an_adapter_whose_first_nodes_join_in_round_two_begins_then_as_its_rule_begins(tmp_path, rule):
    settings = {
        "adapters": {"early": {"lora": {"r": 8}}, "late": {"lora": {"r": 8}}},
        "rounds": {"cohort": None, "over_selection": 0.0, "count": 3, "wire_down": "fp32"},
        "aggregation": {"rule": rule, "server_momentum": 0},
    }
    begun = {}

    def answer(call, node, arrived):
        begun.setdefault((call.adapter, call.round), arrived)
        return drawn(call, node, arrived)

    described = federation(tmp_path, 7, **settings)
    grid = Joining(make_app(answer=answer, adapter_of=adapter_of), [{}] * 5)

    outcome = run(grid, described, grid.watch)

    assert [r.round for r in outcome.rounds if r.adapter == "late" and r.accepted] == [2, 3]
    expected = make(described.aggregation).initial(MODULES, (rank_of(4), rank_of(5)), 7).factors
    found = begun["late", 2].factors
    assert found.keys() == expected.keys()
    for module, pair in expected.items():
        np.testing.assert_array_equal(found[module].A, pair.A)
        np.testing.assert_array_equal(found[module].B, pair.B)
