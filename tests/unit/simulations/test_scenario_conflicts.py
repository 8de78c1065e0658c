"""What a scenario says against itself is told all at once, before a node is asked."""

import json

import pytest

from client.node import Node
from protocol.configuration import parse
from protocol.errors import ConfigurationError
from protocol.federation import Federation
from simulations.federation import check
from simulations.scenario import Scenario

NODES = [{"name": "bank", "train": "a.jsonl"}, {"name": "bank", "train": "b.jsonl"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"federation": {}, "nodes": NODES, "partition": {"rows": "a.jsonl", "nodes": 2}},
            ["give either nodes or partition", "nodes: two nodes have the same name", "federation.plan: missing"],
        ),
        (
            {"federation": {"adapters": {"legal": {}}}, "nodes": NODES[:1], "compare": True},
            ["compare: found beside stages or adapters"],
        ),
        (
            {"federation": {"plan": {}}, "partition": {"rows": "a.jsonl", "kind": "dirichlet"}},
            ["partition: a partition of kind dirichlet needs column", "partition: a partition of kind dirichlet needs nodes"],
        ),
    ],
)
def test_each_contradiction_is_told_beside_the_others(content, said):
    with pytest.raises(ConfigurationError) as caught:
        parse(content, Scenario, source="x")
    found = [problem.removeprefix("(whole file): ") for problem in caught.value.problems]
    assert [line[: len(wanted)] for line, wanted in zip(found, said, strict=True)] == said


def test_fewer_nodes_than_a_round_needs_are_refused_with_what_else_is_wrong_with_them(tmp_path):
    row = {"input_text": "Where is desk 4?", "target_text": "Room 7."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    nodes = [Node(name=f"n{at}", adapter=name, train=tmp_path / "rows.jsonl") for at, name in enumerate(("a", "b", "b", "c"))]
    rounds = {"minimum_nodes": 2}
    with pytest.raises(ConfigurationError) as caught:
        check(Federation.model_validate({"name": "f", "adapters": {"a": {}, "b": {}}, "rounds": rounds}), nodes)
    assert list(caught.value.problems) == [
        "1 listed for adapter a, rounds.minimum_nodes is 2; nobody else can come",
        "1 listed for adapter c, rounds.minimum_nodes is 2; nobody else can come",
        "n3: adapter: found 'c'; in federation f there are a, b",
    ]
