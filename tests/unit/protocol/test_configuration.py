"""From YAML to a checked model: every problem at once, in words that help, and never anything but a ConfigurationError."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from protocol.configuration import load, parse, read_yaml
from protocol.errors import ConfigurationError, UserError
from protocol.federation import Federation
from protocol.plan import Plan


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = 0.1
    steps: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()
    count: int = Field(1, ge=1)


def yaml_file(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path, text, model=Outer):
    with pytest.raises(ConfigurationError) as caught:
        load(yaml_file(tmp_path, text), model)
    return caught.value.problems


def test_a_file_becomes_the_model(tmp_path):
    found = load(yaml_file(tmp_path, "name: a\ninner: {rate: 0.5}\nmany: [{steps: 2}]\n"), Outer)
    assert found == Outer(name="a", inner=Inner(rate=0.5), many=(Inner(steps=2),))


def test_json_is_yaml(tmp_path):
    assert load(yaml_file(tmp_path, '{"name": "a", "count": 3}'), Outer) == Outer(name="a", count=3)


def test_every_problem_is_told_at_once_each_in_a_line(tmp_path):
    found = problems(tmp_path, "inner: {rat: 1, steps: x}\ncount: 0\nmany: [{steps: y}]\n")
    wheres = {line.partition(":")[0] for line in found}
    assert wheres == {"name", "inner.rat", "inner.steps", "count", "many.0.steps"}
    assert all("\n" not in line for line in found)


def test_the_message_names_the_file_and_counts_the_problems(tmp_path):
    with pytest.raises(ConfigurationError, match="2 problems") as caught:
        load(yaml_file(tmp_path, "inner: 3\n"), Outer)
    assert str(tmp_path / "plan.yaml") in str(caught.value)
    with pytest.raises(ConfigurationError, match="1 problem\n"):
        load(yaml_file(tmp_path, "inner: {}\n"), Outer)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("name: a\ncuont: 2\n", "'count'"),
        ("name: a\ninner: {stesp: 2}\n", "'steps'"),
        ("name: a\nmaybe: {raet: 2}\n", "'rate'"),
        ("name: a\nmany: [{step: 2}]\n", "'steps'"),
    ],
    ids=["top", "nested", "optional", "in a list"],
)
def test_an_unknown_key_names_the_one_that_was_probably_meant(tmp_path, text, meant):
    (line,) = problems(tmp_path, text)
    assert f"did you mean {meant}" in line


def test_an_unknown_key_that_resembles_none_lists_those_that_are_known_there(tmp_path):
    (line,) = problems(tmp_path, "name: a\ninner: {zzz: 2}\n")
    assert "known here: rate, steps" in line


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("trainig: {}\n", "training"),
        ("training: {learning-rate: 1}\n", "learning_rate"),
        ("lora: {rank: 3, alpha: 8}\n", "lora_alpha"),
        ("data: {lables: [a, b]}\n", "labels"),
    ],
)
def test_the_real_plan_suggests_its_own_keys(tmp_path, text, meant):
    assert any(f"did you mean {meant!r}" in line for line in problems(tmp_path, text, Plan))


def test_a_key_of_the_plan_inside_a_federation_is_suggested_there(tmp_path):
    (line,) = problems(tmp_path, "plan: {lora: {lora_alhpa: 3}}\n", Federation)
    assert line.startswith("plan.lora.lora_alhpa")
    assert "'lora_alpha'" in line


def test_a_wrong_value_is_shown(tmp_path):
    (line,) = problems(tmp_path, "name: a\ncount: many\n")
    assert "'many'" in line


def test_a_missing_key_is_said_to_be_needed(tmp_path):
    (line,) = problems(tmp_path, "count: 2\n")
    assert line == "name: missing; this key is needed"


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1E5", 1e5), ("-.5e3", -500.0), ("1.e+2", 100.0), ("+3e8", 3e8), ("0.5", 0.5), ("7", 7)],
)
def test_numbers_of_yaml_1_2_are_numbers(tmp_path, text, value):
    found = read_yaml(yaml_file(tmp_path, f"rate: {text}\n"))["rate"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["1e5x", "e5", "1e", "2e-4 or so", "'2e-4'"])
def test_what_only_resembles_a_number_stays_text(tmp_path, text):
    assert isinstance(read_yaml(yaml_file(tmp_path, f"rate: {text}\n"))["rate"], str)


@pytest.mark.parametrize(("text", "wrong"), [("0512", 330), ("1:30", 90)], ids=["octal", "sexagesimal"])
def test_numbers_of_yaml_1_1_are_not_silently_turned_into_others(tmp_path, text, wrong):
    """``_Loader`` promises YAML 1.2's numbers and no silent loss: there, 0512 is 512 and 1:30 is text."""
    assert read_yaml(yaml_file(tmp_path, f"max_length: {text}\n"))["max_length"] != wrong


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "name: x\ninner: {rate: 1, rate: 2}\n", '{"name": 1, "name": 2}'])
def test_a_key_that_stands_twice_is_an_error_with_its_line(tmp_path, text):
    (line,) = problems(tmp_path, text)
    assert "stands twice" in line
    assert line.startswith("line ")


def test_the_line_of_the_second_of_two_equal_keys_is_named(tmp_path):
    (line,) = problems(tmp_path, "name: a\ncount: 1\nname: b\n")
    assert line.startswith("line 3:")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: {b: 1, c: 2\nd: 3\n", 2),
        ("a: 1\nb: @c\n", 2),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 1\n---\nb: 1\n", 2),
        ("a: 1\n\nb: !!python/object/apply:os.system ['true']\n", 3),
        ("a: 1\nb: *nowhere\n", 2),
        ("~: 1\n", 1),
        ("? [a]\n: 1\n", 1),
    ],
    ids=["flow", "token", "tab", "documents", "python tag", "alias", "null key", "list key"],
)
def test_broken_yaml_names_its_line(tmp_path, text, line):
    (found,) = problems(tmp_path, text)
    assert found.startswith(f"line {line}:")


@pytest.mark.parametrize(
    "text",
    ["name: \x01\n", "name: 2024-13-45\n", "name: !!int abc\n", "name: !!float abc\n", "name: !!timestamp x\n", "[" * 3000],
    ids=["control character", "month 13", "tagged int", "tagged float", "tagged time", "deep nesting"],
)
def test_whatever_is_wrong_with_the_file_becomes_a_configuration_error(tmp_path, text):
    with pytest.raises(ConfigurationError):
        load(yaml_file(tmp_path, text), Outer)


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_said_to_be_empty_and_what_was_expected(tmp_path, text):
    (line,) = problems(tmp_path, text)
    assert "empty file" in line
    assert "name, inner, maybe, many" in line


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "list"), ("word\n", "str"), ("3\n", "int")])
def test_a_file_that_holds_no_mapping_says_what_it_holds(tmp_path, text, found):
    (line,) = problems(tmp_path, text)
    assert f"found a {found}" in line


def test_a_missing_file_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "nowhere.yaml", Outer)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigurationError, match="not readable"):
        load(tmp_path, Outer)


def test_bytes_that_are_not_utf_8_are_said_to_be_so(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        load(path, Outer)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert load(yaml_file(tmp_path, "\ufeffname: a\n"), Outer) == Outer(name="a")


def test_parse_names_the_source_that_it_was_given():
    with pytest.raises(ConfigurationError, match=r"^run config: 1 problem"):
        parse({"nam": "a", "name": "b"}, Outer, source="run config")


# All at once ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "aggregation: {rule: krum, beta_1: 0.5, tau: 1, server_momentum: 0.5}",
            ["aggregation.beta_1 is not for", "aggregation.tau is not for", "aggregation.server_momentum is not for"],
        ),
        (
            "stages: [{name: a, rounds: 1, plan: {data: {train: x}}}]\nadapters: {a: {}}\nrounds: {cluster: true}\n"
            "aggregation: {rule: fedavg, attackers: 2}",
            ["stages and adapters do not go together", "aggregation.attackers is not for", "rounds.cluster compares products"],
        ),
        ("aggregation: {rule: krum, beta_1: 0.5, rnk: 1}", ["aggregation.rnk: unknown key", "aggregation.beta_1 is not for"]),
        ("aggregation: {rule: krum, beta_1: 0.5}\nrounds: {count: x}", ["rounds.count: ", "aggregation.beta_1 is not for"]),
        (
            "aggregation: {rule: krum, beta_1: 0.5}\nrounds: {count: x}\nplan: {method: qlora, heda: {}}\nstop: {target: 1}",
            [
                "rounds.count: ",
                "plan.heda: unknown",
                "plan: method qlora needs",
                "stop: metric and",
                "aggregation.beta_1 is not",
            ],
        ),
        ("rounds: {cohort: 2, minimum_nodes: 3}", ["rounds.cohort: 2 updates a round are fewer"]),
        ("aggregation: {rule: flexlora, server_learning_rate: 2}", ["aggregation.server_learning_rate: found 2"]),
    ],
    ids=["one section", "three sections", "beside a typo", "beside a wrong value", "everywhere", "cohort", "without steps"],
)
def test_every_conflict_is_told_at_once(tmp_path, text, said):
    found = problems(tmp_path, text, Federation)
    assert len(found) == len(said), found
    for beginning in said:
        assert any(line.removeprefix("(whole file): ").startswith(beginning) for line in found), (beginning, found)


@pytest.mark.parametrize("text", ["aggregation: {ruel: fedadam, beta_1: 0.5}", "aggregation: {rule: fedadm, beta_1: 0.5}"])
def test_no_conflict_is_told_with_the_default_of_what_was_meant_otherwise(tmp_path, text):
    """beta_1 is for rule fedadam, which was meant; it is not for product-delta, the default."""
    (line,) = problems(tmp_path, text, Federation)
    assert line.startswith(("aggregation.ruel: unknown key; did you mean 'rule'?", "aggregation.rule: input should be"))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rounds", "count", "1000000000"),
        ("rounds", "cohort", "10000000"),
        ("rounds", "minimum_nodes", "10000000"),
        ("aggregation", "rank_cap", "1000000"),
        ("aggregation", "server_learning_rate", "1e160"),
        ("aggregation", "tau", "1e200"),
        ("aggregation", "rank_cap", "1" + "0" * 30),
        ("rounds", "count", "1" + "0" * 400),
        ("rounds", "seed", "0x" + "f" * 100_000),
        ("rounds", "pause_rounds", "9" * 10_000),
    ],
    ids=lambda value: value[:12],
)
def test_a_number_that_no_run_could_be_made_with_is_refused_as_it_is_read(tmp_path, section, key, value):
    (line,) = problems(
        tmp_path,
        f"aggregation: {{rule: fedadam}}\n{section}: {{{key}: {value}}}\n".replace(
            "aggregation: {rule: fedadam}\naggregation: {", "aggregation: {rule: fedadam, "
        ),
        Federation,
    )
    assert line.startswith(f"{section}.{key}: input should be less than or equal to") or "whole number beyond 2**63" in line


def test_stages_have_no_more_rounds_together_than_one_may_have(tmp_path):
    stages = ", ".join(f"{{name: s{at}, rounds: 90000, plan: {{}}}}" for at in range(2))
    (line,) = problems(tmp_path, f"stages: [{stages}]\n", Federation)
    assert "stages: found 180000 rounds, expected at most 100000" in line


@pytest.mark.parametrize("key", ["output", "start"])
def test_a_path_with_a_nul_is_refused_as_it_is_read(tmp_path, key):
    (line,) = problems(tmp_path, f'{key}: "a\\0b"\n', Federation)
    assert f"{key}: found a NUL character" in line


@pytest.mark.parametrize(
    "text",
    [
        '"\\e[2J": 1\n',
        'rounds: {"\\e[2J": 1}\n',
        'rounds: {count: "\\e[2J"}\n',
        'adapters: {"\\e[2J": {}}\n',
        f"? {'x' * 1_000_000}\n: 1\n",
        f"rounds: {{count: {'x' * 1_000_000}}}\n",
        f'adapters: {{"{"a" * 10_000}": {{}}}}\n',
        f'plan: {{lora: {{rank_pattern: {{"({"x" * 10_000}": 2}}}}}}\n',
        '"\\e[2J": 1\n"\\e[2J": 2\n',
        f"rounds: !{'x' * 10_000} 1\n",
    ],
    ids=lambda text: text[:30],
)
def test_what_a_file_holds_is_shown_cut_and_with_its_escapes_written_out(tmp_path, text):
    found = problems(tmp_path, text, Federation)
    assert all(line.isprintable() and len(line) <= 1500 for line in found), found
