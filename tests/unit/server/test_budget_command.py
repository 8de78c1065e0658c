"""``fedge coordinator budget``: what a plan costs before it runs, and which noise reaches an epsilon. Nothing is written."""

import json

import pytest
import typer
from typer.testing import CliRunner

from protocol.errors import FedgeError
from protocol.privacy.accounting import Budget, Mechanism, affordable, epsilon
from protocol.privacy.ledger import PrivacyLedger
from server import privacy_commands

APP = typer.Typer()
APP.command("status")(lambda: None)
privacy_commands.mount(APP)


def call(*arguments):
    done = CliRunner().invoke(APP, ["budget", *map(str, arguments)])
    if isinstance(done.exception, FedgeError):
        raise done.exception
    assert not done.exit_code, done.output
    return done.output


def told(*arguments):
    return json.loads(call(*arguments, "--json"))


def test_it_says_what_a_plan_costs():
    found = told("--nodes", 20, "--rounds", 40, "--noise-multiplier", 3, "--epsilon", 8)
    assert found["epsilon"] == epsilon({Mechanism((3.0,), 20, 20): 40}, 1e-5)
    assert [at["round"] for at in found["curve"]] == [10, 20, 30, 40]
    assert found["curve"][-1]["epsilon"] == found["epsilon"] <= found["epsilon_rdp"]
    assert (found["fits"], found["rounds_affordable"] < 40) == (False, True)
    assert "NOT within the budget of 8, which buys" in call(
        "--nodes", 20, "--rounds", 40, "--noise-multiplier", 3, "--epsilon", 8
    )


def test_it_finds_the_noise_that_reaches_an_epsilon():
    found = told("--nodes", 20, "--rounds", 40, "--epsilon", 4, "--releases", 2, "--bit-noise", 6, "--nodes-noise")
    z = found["noise_multiplier"]
    assert found["mechanism"] == {
        "noise_multipliers": [z, z, 12.0],
        "nodes": 20,
        "cohort": 20,
        "sampling": "all",
        "noise": "discrete",
    }
    assert found["fits"]
    assert found["epsilon"] == pytest.approx(4, abs=1e-3)


def test_a_federations_file_says_rounds_cohort_sums_and_whose_noise(tmp_path):
    file = tmp_path / "federation.yaml"
    file.write_text("plan: {}\nrounds: {count: 12, minimum_nodes: 5, cohort: 6}\n")
    found = told(file, "--nodes", 30, "--noise-multiplier", 4, "--sampling", "fixed")
    assert found["rounds"] == 12
    assert found["mechanism"]["noise_multipliers"] == [4.0, 4.0]
    assert (found["mechanism"]["nodes"], found["mechanism"]["cohort"]) == (30, 6)
    file.write_text(
        "plan: {}\nrounds: {minimum_nodes: 5}\naggregation: {rule: fedavg}\nsecure_sum: {enabled: true, examples: 9}\n"
    )
    found = told(file, "--noise-multiplier", 4)
    assert found["mechanism"]["noise_multipliers"] == [4.0]
    assert found["mechanism"]["noise"] == "discrete"


def test_a_federation_with_privacy_says_everything(tmp_path):
    """Oracle: the mechanism of its rounds, written down here; its ledger, once there is one, counts."""
    file = tmp_path / "federation.yaml"
    content = (
        "plan: {}\nrounds: {count: 6, minimum_nodes: 3, cohort: 10}\naggregation: {rule: rolora}\n"
        f"output: {tmp_path}\n"
        "privacy: {enabled: true, epsilon: 4, delta: 1.0e-4, nodes: 40, sampling: poisson, quantile: 0.5}\n"
    )
    file.write_text(content)
    found = told(file)
    z = found["noise_multiplier"]
    assert found["mechanism"]["noise_multipliers"] == pytest.approx([z, 5 * z])
    round_ = Mechanism(tuple(found["mechanism"]["noise_multipliers"]), 40, 10, "poisson")
    assert found["epsilon"] == pytest.approx(epsilon({round_: 6}, 1e-4))
    assert (found["fits"], found["delta"], found["budget"]) == (True, 1e-4, 4.0)
    assert 3.9 < found["epsilon"] <= 4
    ledger = PrivacyLedger(tmp_path / "privacy.jsonl", Budget(4.0, 1e-4))
    ledger.spend(round_, 1)
    again = told(file)
    assert again["spent"] == pytest.approx(ledger.epsilon())
    assert again["noise_multiplier"] > z
    (tmp_path / "rounds" / "0001").mkdir(parents=True)
    assert told(file)["rounds"] == 5
    assert call(file).startswith("1 rounds are kept; what is left costs:\n5 rounds of 10 of 40")
    (tmp_path / "ended.json").write_text("{}")
    assert call(file).startswith("every round is done; what one more run over the same data costs:\n6 rounds")


def test_a_federation_without_privacy_is_told_so(tmp_path):
    file = tmp_path / "federation.yaml"
    file.write_text("plan: {}\nrounds: {count: 6, minimum_nodes: 3}\n")
    with pytest.raises(FedgeError, match="promises nothing, for it has no privacy section with enabled: true"):
        call(file)


def test_a_federation_with_noise_of_its_own_says_what_that_buys(tmp_path):
    file = tmp_path / "federation.yaml"
    file.write_text(
        "plan: {}\nrounds: {count: 4, minimum_nodes: 20}\nsecure_sum: {enabled: true}\n"
        f"output: {tmp_path}\nprivacy: {{enabled: true, epsilon: 8, noise: nodes, noise_multiplier: 3}}\n"
    )
    found = told(file)
    assert found["mechanism"]["noise"] == "discrete"
    mechanism = Mechanism((3.0,), 20, 20, noise="discrete")
    assert found["epsilon"] == epsilon({mechanism: 4}, 1e-5)
    assert found["rounds_affordable"] == affordable(mechanism, Budget(8.0, 1e-5))
    assert told(file, "--epsilon", 2)["noise_multiplier"] > 3  # which noise reaches another budget


def test_what_a_ledger_says_was_spent_counts(tmp_path):
    ledger = PrivacyLedger(tmp_path / "privacy.jsonl", Budget(50.0, 1e-5))
    for number in range(1, 4):
        ledger.spend(Mechanism((3.0,), 20, 20), number)
    content = ledger.path.read_bytes()
    found = told("--nodes", 20, "--rounds", 5, "--noise-multiplier", 3, "--ledger", ledger.path)
    assert found["spent"] == ledger.epsilon()
    assert found["epsilon"] == epsilon({Mechanism((3.0,), 20, 20): 8}, 1e-5)
    assert ledger.path.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", 20], "--rounds: missing"),
        (["--rounds", 20, "--epsilon", 1], "--nodes: missing"),
        (["--nodes", 20, "--rounds", 5], "--noise-multiplier and --epsilon: both missing"),
        (["--nodes", 20, "--rounds", 5, "--epsilon", 1, "--delta", 0.05], "below 1/20"),
        (["--nodes", 20, "--cohort", 30, "--sampling", "poisson", "--rounds", 5, "--epsilon", 1], "30 of 20 nodes"),
        (["--nodes", 20, "--rounds", 5, "--epsilon", -1], "an epsilon of -1"),
        (["--nodes", 20, "--rounds", 5, "--noise-multiplier", 0], "found 0; expected positive"),
        (["--nodes", 20, "--rounds", 50, "--epsilon", 0.1, "--bit-noise", 1], "what else is released costs"),
        (["--nodes", 20, "--rounds", 5, "--epsilon", 1, "--ledger", "none.jsonl"], "no such file"),
        (["none.yaml", "--epsilon", 1], "no such file"),
    ],
)
def test_numbers_that_make_no_plan_are_refused(arguments, said):
    with pytest.raises(FedgeError, match=said):
        call(*arguments)
