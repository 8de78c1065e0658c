"""Verbs for one machine: ``fedge evaluate`` and ``fedge generate``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from protocol.adapter import Adapter
from protocol.plan import Plan

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")]


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.command()(evaluate)
    app.command()(generate)


def evaluate(
    config: Annotated[Path, typer.Argument(help="The YAML file that was trained with.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter folder; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option(help="Rows to measure on; else data.evaluate of the file.")] = None,
    as_json: Json = False,
) -> None:
    """Measures the base, and each adapter, on the same held-out rows."""
    from protocol.configuration import load
    from protocol.errors import ConfigurationError
    from strategies.base_model import find
    from strategies.data.formats import load as load_rows
    from strategies.evaluation.measure import measure
    from strategies.job import Job

    job = load(config, Job).beside(config)
    path = data or job.data.evaluate
    if path is None:
        raise ConfigurationError(str(config), ["data.evaluate: missing; name a file there, or give --data"])
    plan, base = job.plan(), find(job.base_model)
    rows, adapters = load_rows(path, plan), _adapters(adapter or [], base.digest, plan)
    near = _adapters([job.start], base.digest, plan)[str(job.start)][1] if job.start else Adapter()
    results = {"base": measure(plan, base, rows, None, near)}
    for name, (use, tensors) in adapters.items():
        results[name] = measure(use, base, rows, tensors, near)
    if as_json:
        typer.echo(json.dumps({"rows": len(rows), "results": results}))
        return
    _table(f"{len(rows)} rows of {path.name}", results)


def generate(
    questions: Annotated[list[str], typer.Argument(help="What to ask; each is answered on its own.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter folder; may be given several times.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base; else the one that the first adapter names.")] = None,
    precision: Annotated[str, typer.Option(help="How the base is held: fp32, bf16, fp16, int8 or nf4.")] = "fp32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Answers with the base, and with each adapter."""
    from protocol.configuration import parse
    from protocol.files import base_model_of
    from protocol.plan import QUANTISED
    from strategies.base_model import EMBEDDED, find
    from strategies.generation import answer

    name = base_model or (base_model_of(adapter[0]) if adapter else EMBEDDED)
    method = "qlora" if precision in QUANTISED else "lora"
    told = {"base_model": name, "precision": precision, "method": method, "data": {"max_length": max_new_tokens}}
    plan = parse(told, Plan, source="command line")
    base = find(name)
    asked: dict[str, tuple[Plan, Adapter | None]] = {"base": (plan, None), **_adapters(adapter or [], base.digest, plan)}
    answers = {who: answer(use, base, questions, tensors, max_new_tokens) for who, (use, tensors) in asked.items()}
    if as_json:
        typer.echo(json.dumps({"questions": questions, "answers": answers}, ensure_ascii=False))
        return
    for at, question in enumerate(questions):
        typer.echo(f"? {question}")
        for who, texts in answers.items():
            typer.echo(f"  {who}: {texts[at]}")


def _adapters(folders: list[Path], base_digest: str, plan: Plan) -> dict[str, tuple[Plan, Adapter]]:
    """Each with the plan to use it with: its folder says how it was made, whatever the plan was written for."""
    from protocol.files import read_stored

    found = (read_stored(folder, base_digest=base_digest) for folder in folders)
    return {str(stored.folder): (stored.on(plan), stored.adapter) for stored in found}


def _table(title: str, results: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    metrics = list(next(iter(results.values())))
    table = Table("", *metrics, title=title)
    for who, values in results.items():
        table.add_row(who, *(f"{values[metric]:.4g}" for metric in metrics))
    Console().print(table)
