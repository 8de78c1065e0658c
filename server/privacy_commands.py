"""The verb ``fedge coordinator budget``: what private rounds cost before they run, and which noise reaches an epsilon."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from protocol.federation import Federation
    from protocol.privacy.accounting import Mechanism, Rounds


class Sampling(StrEnum):
    """``protocol.privacy.accounting.Sampling``, for the command line."""

    all = "all"
    poisson = "poisson"
    fixed = "fixed"


def mount(coordinator: typer.Typer) -> None:
    """Adds the verb to those of the coordinator."""
    coordinator.command()(budget)


def budget(
    federation: Annotated[
        Path | None, typer.Argument(help="Its YAML file: with a privacy section it says all that the options say.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Institutions that may be drawn; else the cohort, or minimum_nodes.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Rounds; else the federation's.")] = None,
    cohort: Annotated[int | None, typer.Option(min=1, help="Institutions a round; else the federation's, or all.")] = None,
    sampling: Annotated[
        Sampling | None,
        typer.Option(help="How a cohort is drawn that stays secret; all: whoever reads the result may know who took part."),
    ] = None,
    releases: Annotated[
        int | None,
        typer.Option(min=1, max=15, help="Noised sums a round: 2 through a sketch, 1 of tensors; else the federation's."),
    ] = None,
    bit_noise: Annotated[
        float | None,
        typer.Option(help="Noise on the bits of an adaptive clipping norm, in nodes; a twentieth of the cohort is usual."),
    ] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise of each sum over the clipping norm; without it the one that reaches --epsilon.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget.")] = None,
    delta: Annotated[float | None, typer.Option(help="Below one institution's share; else the federation's, or 1e-5.")] = None,
    nodes_noise: Annotated[
        bool | None, typer.Option("--nodes-noise/--own-noise", help="Nodes noise their updates, or the coordinator the sum.")
    ] = None,
    ledger: Annotated[Path | None, typer.Option(help="A privacy.jsonl: what was spent already counts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")] = False,
) -> None:
    """What a plan of private rounds will cost, and which noise reaches an epsilon. Nothing is sent or written."""
    from protocol.errors import ConfigurationError
    from protocol.privacy.accounting import Budget, Mechanism, affordable
    from protocol.privacy.accounting import noise_multiplier as least

    said = _said(federation)
    rounds, cohort = rounds or said.get("rounds"), cohort or said.get("cohort")
    people = nodes or said.get("people") or cohort or said.get("nodes")
    delta = said.get("delta", 1e-5) if delta is None else delta
    if noise_multiplier is None and epsilon is None:  # a budget that is asked about is not answered with the file's noise
        noise_multiplier = said.get("noise_multiplier")
    epsilon = said.get("epsilon") if epsilon is None else epsilon
    how: Literal["all", "poisson", "fixed"] = sampling.value if sampling else said.get("sampling", "all")
    ledger = ledger or said.get("ledger")
    problems = []
    if rounds is None:
        problems.append("--rounds: missing; say how many, or name a federation's file")
    if people is None:
        problems.append("--nodes: missing; say of how many institutions a round may hear")
    if noise_multiplier is None and epsilon is None:
        problems.append("--noise-multiplier and --epsilon: both missing; name the noise, or the budget that it is to reach")
    if problems or rounds is None or people is None:
        raise ConfigurationError("command line", problems + _unpromised(federation, said))
    number, everybody = rounds, people
    own = nodes_noise if nodes_noise is not None else bool(said.get("secure"))
    sums, votes = releases or said.get("releases", 1), said.get("votes", lambda z: None)

    def mechanism(z: float) -> Mechanism:
        bits = bit_noise or votes(z)
        return Mechanism(
            (*(z,) * sums, *(() if bits is None else (2 * bits,))),
            nodes=everybody,
            cohort=everybody if how == "all" else cohort or everybody,
            sampling=how,
            noise="discrete" if own else "gaussian",
        )

    spent = _spent(ledger, epsilon, delta)
    z = noise_multiplier
    if z is None:
        z = least(lambda each: _together(spent, mechanism(each), number), Budget(epsilon or 0, delta))
    told = _cost(mechanism(z), number, spent, delta) | {"noise_multiplier": z}
    if epsilon is not None:
        told |= {"budget": epsilon, "fits": told["epsilon"] <= epsilon, "rounds_affordable": number}
        if noise_multiplier is not None:  # else it was made for this number
            told["rounds_affordable"] = affordable(mechanism(z), Budget(epsilon, delta), spent)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo("\n".join((*_heading(said), *_lines(told))))


def _said(file: Path | None) -> dict[str, Any]:
    """What a federation's file says of its rounds."""
    if file is None:
        return {}
    from protocol.configuration import load
    from protocol.federation import Federation
    from protocol.privacy_settings import SUMMED
    from server.ledger import ENDED, ROUNDS

    found = load(file, Federation)
    rounds, output = max(len(plans) for plans in found.schedules().values()), found.output
    ended, kept = (output / ENDED).exists(), len(list((output / ROUNDS).glob("[0-9]*")))
    said = {
        "rounds": rounds if ended else max(rounds - kept, 1),
        "kept": kept,
        "ended": ended,
        "cohort": found.rounds.cohort,
        "nodes": found.rounds.minimum_nodes,
        "releases": 2 if SUMMED.get(found.aggregation.rule) == "products" else 1,
        "secure": found.secure_sum.enabled,
    }
    return said | _privacy(found) if found.privacy.enabled else said


def _privacy(federation: "Federation") -> dict[str, Any]:
    """What its privacy section says, in place of the options."""
    from protocol.privacy.ledger import FILE
    from protocol.privacy.planned import PlannedRounds

    settings, planned = federation.privacy, PlannedRounds.of(federation)
    ledger = settings.ledger or federation.output / FILE
    return {
        "people": planned.nodes,
        "cohort": planned.cohort,
        "releases": max(planned.releases),
        "secure": settings.noise == "nodes",
        "sampling": settings.sampling,
        "epsilon": settings.epsilon,
        "delta": settings.delta,
        "noise_multiplier": settings.noise_multiplier,
        "votes": planned.bit_noise,
        "ledger": ledger if ledger.is_file() else None,
    }


def _spent(ledger: Path | None, epsilon: float | None, delta: float) -> "Rounds":
    if ledger is None:
        return {}
    from protocol.errors import DataError
    from protocol.privacy.accounting import Budget
    from protocol.privacy.ledger import PrivacyLedger

    if not ledger.is_file():
        raise DataError(f"--ledger {ledger}: no such file; leave it out where nothing was spent yet")
    return PrivacyLedger(ledger, Budget(epsilon or 1.0, delta)).spent()


def _together(spent: "Rounds", mechanism: "Mechanism", count: int) -> "Rounds":
    found = dict(spent)
    found[mechanism] = found.get(mechanism, 0) + count
    return found


def _cost(mechanism: "Mechanism", rounds: int, spent: "Rounds", delta: float) -> dict[str, Any]:
    from protocol.privacy.accounting import epsilon as cost

    marks = sorted({max(1, rounds * part // 4) for part in range(1, 5)})
    return {
        "mechanism": asdict(mechanism),
        "rounds": rounds,
        "delta": delta,
        "epsilon": cost(_together(spent, mechanism, rounds), delta),
        "epsilon_rdp": cost(_together(spent, mechanism, rounds), delta, "rdp"),
        "spent": cost(spent, delta),
        "curve": [{"round": mark, "epsilon": cost(_together(spent, mechanism, mark), delta)} for mark in marks],
    }


def _unpromised(file: Path | None, said: Mapping[str, Any]) -> list[str]:
    if file is None or "epsilon" in said:
        return []
    return [f"{file}: promises nothing, for it has no privacy section with enabled: true"]


def _heading(said: Mapping[str, Any]) -> Iterator[str]:
    if said.get("ended"):
        yield "every round is done; what one more run over the same data costs:"
    elif said.get("kept"):
        yield f"{said['kept']} rounds are kept; what is left costs:"


def _lines(told: Mapping[str, Any]) -> Iterator[str]:
    noise = told["mechanism"]
    kind = "the nodes' own, inside the secure sum" if noise["noise"] == "discrete" else "the coordinator's, on the sum"
    yield f"{told['rounds']} rounds of {noise['cohort']} of {noise['nodes']} institutions (sampling: {noise['sampling']})"
    yield f"noise multiplier {told['noise_multiplier']:.6g} on each sum ({kind})"
    for at in told["curve"]:
        yield f"  after round {at['round']:>7}  epsilon {at['epsilon']:.4f}  at delta {told['delta']:g}"
    yield f"by Renyi differential privacy alone {told['epsilon_rdp']:.4f}; spent before {told['spent']:.4f}"
    if "budget" in told:
        verdict = "within" if told["fits"] else "NOT within"
        yield f"{verdict} the budget of {told['budget']:g}, which buys {told['rounds_affordable']} such rounds"
