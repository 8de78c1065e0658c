"""A federation in one YAML file: its nodes have files of their own, and every row of a partition is in exactly one."""

import json

import pytest
import yaml

from protocol.errors import ConfigurationError, UserError
from simulations.scenario import nodes_of, read_scenario


def write(folder, **content):
    path = folder / "scenario.yaml"
    content.setdefault("federation", {"plan": {}, "output": str(folder / "runs")})
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(values, column="domain"):
    return [{"input_text": f"q{at}", "target_text": f"a{at}", column: value} for at, value in enumerate(values)]


def partitioned(folder, rows, held_out=None, **partition):
    write_rows(folder / "rows.jsonl", rows)
    if held_out is not None:
        write_rows(folder / "held.jsonl", held_out)
        partition["evaluate"] = "held.jsonl"
    return nodes_of(read_scenario(write(folder, partition={"rows": "rows.jsonl", **partition})))


def refusal(folder, **content):
    with pytest.raises(ConfigurationError) as caught:
        read_scenario(write(folder, **content))
    return str(caught.value)


def test_paths_of_nodes_are_taken_from_the_folder_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = write(
        tmp_path,
        nodes=[{"name": "a", "train": "a.jsonl", "state": "s/a.json"}, {"name": "b", "train": "/abs/b.jsonl", "tier": "small"}],
    )
    monkeypatch.chdir(tmp_path / "elsewhere")
    first, second = nodes_of(read_scenario(path))
    assert (first.train, first.state, first.evaluate) == (tmp_path / "a.jsonl", tmp_path / "s" / "a.json", None)
    assert (str(second.train), second.tier) == ("/abs/b.jsonl", "small")


@pytest.mark.parametrize("kind", ["iid", "quantity", "dirichlet"])
def test_every_row_of_a_partition_is_in_exactly_one_node(tmp_path, kind):
    rows = rows_of(["x", "y", "z"] * 20)
    more = {"column": "domain"} if kind == "dirichlet" else {}
    nodes = partitioned(tmp_path, rows, kind=kind, nodes=4, **more)
    assert len({node.name for node in nodes}) == 4
    found = [row for node in nodes for row in read_rows(node.train)]
    assert sorted(found, key=str) == sorted(rows, key=str)


def test_a_column_makes_a_node_per_value_with_its_own_held_out_rows(tmp_path):
    rows, held = rows_of(["bank", "clinic", "bank", "法律"]), rows_of(["clinic", "bank"])
    nodes = {node.name: node for node in partitioned(tmp_path, rows, held, kind="column", column="domain")}
    assert set(nodes) == {"bank", "clinic", "法律"}
    for name, node in nodes.items():
        assert read_rows(node.train) == [row for row in rows if row["domain"] == name]
        own = [row for row in held if row["domain"] == name]
        assert (read_rows(node.evaluate) if node.evaluate else []) == own


def test_without_a_column_every_node_is_measured_on_all_held_out_rows(tmp_path):
    held = rows_of("ab")
    nodes = partitioned(tmp_path, rows_of("abcdef"), held, nodes=3)
    assert all(read_rows(node.evaluate) == held for node in nodes)


def test_tiers_and_ranks_are_dealt_out_in_turn(tmp_path):
    nodes = partitioned(tmp_path, rows_of("abcdef"), nodes=5, tiers=["large", "small"], max_ranks=[4, 8, 16])
    assert [node.tier for node in nodes] == ["large", "small", "large", "small", "large"]
    assert [node.max_rank for node in nodes] == [4, 8, 16, 4, 8]


@pytest.mark.parametrize("values", [["a/b", "a_b"], ["a/b", "a_b", "a/b"], ["x", "X/../x"]])
def test_values_that_look_alike_as_folders_keep_their_rows_apart(tmp_path, values):
    rows = rows_of(values)
    nodes = {node.name: node for node in partitioned(tmp_path, rows, kind="column", column="domain")}
    assert len({node.train for node in nodes.values()}) == len(nodes)
    for name, node in nodes.items():
        assert read_rows(node.train) == [row for row in rows if row["domain"] == name]


@pytest.mark.parametrize("value", ["..", ".", "../../x", "/etc"])
def test_no_value_of_a_column_leads_out_of_the_folder_of_nodes(tmp_path, value):
    nodes = partitioned(tmp_path, rows_of([value, "other"]), kind="column", column="domain")
    folders = {node.train.resolve().parent for node in nodes}
    assert {folder.parent for folder in folders} == {tmp_path / "runs" / "nodes"}


@pytest.mark.parametrize("value", ["", " ", "x" * 81, "x" * 300, None], ids=["empty", "blank", "81 long", "300 long", "null"])
def test_a_value_that_cannot_name_a_node_is_the_users_to_mend(tmp_path, value):
    said = ""
    try:
        nodes = partitioned(tmp_path, rows_of([value, "other"]), kind="column", column="domain")
    except UserError as error:
        said = str(error)
    assert "column" in said or len(nodes) == 2


def test_a_column_that_rows_lack_is_named_with_the_first_such_row(tmp_path):
    rows = [*rows_of("a"), {"input_text": "x", "target_text": "y"}]
    with pytest.raises(ConfigurationError, match=r"1 rows have no 'domain', the first is row 2"):
        partitioned(tmp_path, rows, kind="column", column="domain")


def test_two_sources_of_nodes_or_none_are_refused(tmp_path):
    node, partition = {"train": "a.jsonl"}, {"rows": "a.jsonl", "nodes": 2}
    assert "nodes or partition" in refusal(tmp_path)
    assert "nodes or partition" in refusal(tmp_path, nodes=[node], partition=partition)


def test_two_nodes_of_one_name_are_refused(tmp_path):
    assert "same name" in refusal(tmp_path, nodes=[{"name": "a", "train": "a.jsonl"}, {"name": "a", "train": "b.jsonl"}])


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        ({"rows": "a", "kind": "column"}, "needs column"),
        ({"rows": "a", "kind": "dirichlet", "nodes": 2}, "needs column"),
        ({"rows": "a", "kind": "iid"}, "needs nodes"),
        ({"rows": "a", "kind": "iid", "nodes": 0}, "partition.nodes"),
        ({"rows": "a", "kind": "dirichlet", "column": "c", "nodes": 2, "alpha": 0}, "partition.alpha"),
        ({"rows": "a", "nodes": 2, "tiers": ["huge"]}, "partition.tiers"),
        ({"kind": "iid", "nodes": 2}, "partition.rows: missing"),
        ({"rows": "a", "nodes": 2, "colunm": "x"}, "did you mean 'column'"),
    ],
)
def test_a_partition_that_cannot_be_made_says_which_key_and_why(tmp_path, partition, said):
    assert said in refusal(tmp_path, partition=partition)


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    text = refusal(tmp_path, nodes=[{"train": "a", "teir": "small"}], federation={"rounds": {"count": 0}}, compere=True)
    assert "did you mean 'tier'" in text
    assert "federation.rounds.count" in text
    assert "did you mean 'compare'" in text


def test_a_coordinators_plan_with_files_in_it_is_refused(tmp_path):
    federation = {"plan": {"data": {"train": "x.jsonl"}}}
    assert "each node brings its own data" in refusal(tmp_path, federation=federation, nodes=[{"train": "a"}])
