"""The verb ``fedge node policy``: what an institution's policy allows in words, and what of a federation it would refuse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protocol.data_settings import EVERY_KIND

if TYPE_CHECKING:
    from client.policy import Policy, Question
    from protocol.privacy.promise import Promise
    from protocol.privacy_settings import PrivacySettings


def mount(node: typer.Typer) -> None:
    """Adds the verb to those of the node."""
    node.command()(policy)


def policy(
    file: Annotated[Path, typer.Argument(help="The policy's YAML file.")],
    asked: Annotated[
        Path | None,
        typer.Argument(metavar="[FEDERATION]", help="A federation's YAML file, or a plan's: what of it is refused?"),
    ] = None,
    masked: Annotated[
        Path | None, typer.Option("--data-policy", help="The node's data_policy, which may mask more than a plan says.")
    ] = None,
    coordinator: Annotated[str, typer.Option(metavar="SHA256:...", help="The key that would ask; without it any may.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line in place of sentences.")] = False,
) -> None:
    """What a policy allows; with a federation, exit code 1 where it would refuse any of it. Hours are not looked at."""
    from client.policy import read_policy

    found = read_policy(file)
    refused = {
        where: [str(refusal) for refusal in found.refusals(question)]
        for where, question in (_questions(asked, found, masked, coordinator) if asked else ())
    }
    if as_json:
        typer.echo(json.dumps({"allows": dict(_sentences(found)), "refused": refused}))
    else:
        for name, sentence in _sentences(found):
            typer.echo(f"{name}: {sentence}")
        for where, problems in refused.items():
            typer.echo(f"{where}: {'refused' if problems else 'allowed'}")
            typer.echo("".join(f"  - {problem}\n" for problem in problems), nl=False)
    if any(refused.values()):
        raise typer.Exit(1)


def _sentences(found: "Policy") -> Iterator[tuple[str, str]]:
    """Each rule that says something, with what it bounds."""
    from client.policy import Policy

    for name, field in Policy.model_fields.items():
        value = getattr(found, name)
        if value != field.default:
            yield name, f"{_shown(value)} ({field.description})"
    if found == Policy():
        yield "nothing", "is refused: the file holds no rule"


def _shown(value: Any) -> str:
    if value == EVERY_KIND:
        return "every kind"
    if isinstance(value, dict):
        return ", ".join(f"{name} to {step:g}" for name, step in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}" if isinstance(value, int) else str(value)


def _questions(path: Path, found: "Policy", masked: Path | None, coordinator: str) -> Iterator[tuple[str, "Question"]]:
    """What a node would be asked: to join with each adapter's first plan, and to train each plan of the schedule."""
    from client.policy import Question
    from protocol.configuration import load, parse, read_yaml
    from protocol.data_settings import DataPolicy
    from protocol.federation import Federation
    from protocol.plan import Plan
    from protocol.records import Call

    content = read_yaml(path)
    whole = isinstance(content, dict) and content.keys() & {"plan", "stages", "adapters", "rounds", "aggregation"}
    given = content if whole else {"plan": parse(content, Plan, source=str(path)).model_dump(exclude_unset=True)}
    federation = parse(given, Federation, source=str(path))
    treated = load(masked, DataPolicy) if masked else DataPolicy()
    own_key = coordinator or next(iter(found.coordinators or ()), "")
    for name, plans in federation.schedules().items():
        for number, plan in enumerate(plans, 1):
            if number > 1 and plan is plans[number - 2]:
                continue
            call = Call(
                federation=federation.name,
                round=number,
                rounds=len(plans),
                plan=plan,
                adapter=name,
                summed=federation.secure_sum.enabled,
                minimum_nodes=federation.rounds.minimum_nodes,
                privacy=_promise(federation.privacy),
            )
            where = ", ".join(filter(None, (name and f"adapter {name}", federation.stage(number)))) or "plan"
            yield where, Question("join", call, plan, treated.added_to(plan.data).masking.kinds, own_key)


def _promise(settings: "PrivacySettings") -> "Promise | None":
    """As far as a policy looks at it: which noise reaches epsilon is the coordinator's to find."""
    from protocol.privacy.promise import Promise

    if not settings.enabled or settings.epsilon is None:
        return None
    told = settings.model_dump(include={"epsilon", "delta", "clipping_norm", "noise"})
    return Promise(noise_multiplier=settings.noise_multiplier or 1.0, **told)
