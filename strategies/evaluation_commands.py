"""The verb ``fedge evaluate``: a base and adapters on the same rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.adapter import Adapter
from protocol.plan import REFERRING, Plan

if TYPE_CHECKING:
    from strategies.evaluation.bootstrap import Estimate
    from strategies.evaluation.comparison import Comparison
    from strategies.evaluation.report import Setting
    from strategies.evaluation.wanted import Wanted

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")]


def mount(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command()(evaluate)


def evaluate(
    config: Annotated[Path, typer.Argument(help="The YAML file that was trained with.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter folder; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option(help="Rows to measure on; else data.evaluate of the file.")] = None,
    metrics: Annotated[str, typer.Option(help="Only these figures, by name, with commas between.")] = "",
    generate: Annotated[bool, typer.Option("--generate", help="Let each write its answers: BLEU, ROUGE, speed …")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=2, help="Longest answer; else as long as those given.")] = None,
    robustness: Annotated[str, typer.Option(help="Also under typos, case, options, paraphrase, with commas between.")] = "",
    writer: Annotated[Path | None, typer.Option(help="YAML file that says who paraphrases.")] = None,
    probe: Annotated[Path | None, typer.Option(help="General rows: what was forgotten?")] = None,
    judge: Annotated[Path | None, typer.Option(help="YAML file that says who judges answers against the base's.")] = None,
    harness: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.")] = "",
    harness_folder: Annotated[Path | None, typer.Option(help="Tasks of your own for it.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for report.json, report.md and plots.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of intervals and of perturbations.")] = 0,
    as_json: Json = False,
) -> None:
    """Measures the base, and each adapter, on the same held-out rows; any option beyond these two adds intervals."""
    from protocol.configuration import load
    from protocol.errors import ConfigurationError
    from protocol.writer_settings import JudgeSettings, WriterSettings, beside
    from strategies.base_model import find
    from strategies.evaluation.report import Setting
    from strategies.evaluation.wanted import Wanted
    from strategies.job import Job

    job = load(config, Job).beside(config)
    last = job.jobs()[-1]
    path = data or last.data.evaluate
    if path is None:
        raise ConfigurationError(str(config), ["data.evaluate: missing; name a file there, or give --data"])
    wanted = Wanted(
        metrics=_names(metrics),
        generate=generate,
        max_new_tokens=max_new_tokens,
        robustness=_names(robustness),
        writer=beside(load(writer, WriterSettings), writer.resolve().parent) if writer else None,
        probe=probe,
        judge=beside(load(judge, JudgeSettings), judge.resolve().parent) if judge else None,
        harness=_names(harness),
        harness_folder=harness_folder,
        seed=seed,
    )
    plan, base = job.plan(), find(last.base_model)
    contestants = {"base": (plan, None), **_adapters(adapter or [], base.digest, plan)}
    starts = _adapters([last.start] if last.start and plan.objective in REFERRING else [], base.digest, plan)
    near = next((tensors for _, tensors in starts.values() if tensors), Adapter())
    if wanted == Wanted(seed=seed) and report is None:
        _measured(path, plan, contestants, near, as_json)
    else:
        _compared(Setting(plan, base, path, probe, seed), contestants, near, wanted, report, as_json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _adapters(folders: list[Path], base_digest: str, plan: Plan) -> dict[str, tuple[Plan, Adapter]]:
    """Each with the plan to use it with: its folder says how it was made, whatever the plan was written for."""
    from protocol.files import read_stored

    found = (read_stored(folder, base_digest=base_digest) for folder in folders)
    return {str(stored.folder): (stored.on(plan), stored.adapter) for stored in found}


def _measured(
    path: Path, plan: Plan, contestants: Mapping[str, tuple[Plan, Adapter | None]], near: Adapter, as_json: bool
) -> None:
    from strategies.base_model import find
    from strategies.data.prepared import file_rows
    from strategies.evaluation.measure import measure

    rows, base = file_rows(plan, path)[0], find(plan.base_model)
    results = {who: measure(use, base, rows, tensors, near) for who, (use, tensors) in contestants.items()}
    if as_json:
        typer.echo(json.dumps({"rows": len(rows), "results": results}))
        return
    cells = {who: {name: f"{value:.4g}" for name, value in values.items()} for who, values in results.items()}
    _table(f"{len(rows)} rows of {path.name}", cells)


def _compared(
    setting: "Setting",
    contestants: Mapping[str, tuple[Plan, Adapter | None]],
    near: Adapter,
    wanted: "Wanted",
    folder: Path | None,
    as_json: bool,
) -> None:
    from strategies.evaluation.comparison import compare
    from strategies.evaluation.report import MARKDOWN, check_plots, write
    from strategies.evaluation.report import as_json as told

    if folder:
        check_plots()
    found = compare(setting.plan, setting.base, setting.data, contestants, wanted, near)
    if folder:
        write(folder, found, setting)
    if as_json:
        typer.echo(json.dumps(told(found, setting), ensure_ascii=False))
        return
    _show(found, setting)
    if folder:
        typer.echo(f"{folder / MARKDOWN}")


def _show(found: "Comparison", setting: "Setting") -> None:
    from strategies.evaluation.report import shown

    def estimated(title: str, estimates: "Mapping[str, Mapping[str, Estimate]]", signed: bool = False) -> None:
        """A row for each figure: there are more of them than of models."""
        names = dict.fromkeys(name for each in estimates.values() for name in each)
        cells = {
            name: {who: shown(each[name], signed=signed) for who, each in estimates.items() if name in each} for name in names
        }
        _table(title, cells)

    estimated(f"{found.table.rows} rows of {setting.data.name}", found.table.estimates)
    for kind, one in found.robustness.items():
        estimated(f"{kind}: change on the {one.clean.rows} rows that it changes", one.changes, signed=True)
    if found.probe and setting.probe:
        estimated(f"forgetting: {found.probe.rows} rows of {setting.probe.name}", found.probe.estimates)
    if found.wins:
        rates = {
            who: {"win rate": shown(found.table.draws.estimate(won.rate)), "ties": f"{won.ties:.0%}"}
            for who, won in found.wins.items()
        }
        _table("the judge prefers it to the base", rates)
    for who, tasks in found.harness.items():
        scores = {task: {name: f"{score.value:.4g}" for name, score in each.items()} for task, each in tasks.items()}
        _table(f"lm-evaluation-harness: {who}", scores)


def _table(title: str, cells: Mapping[str, Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for each in cells.values() for name in each))
    table = Table("", *columns, title=title)
    for who, values in cells.items():
        table.add_row(who, *(values.get(column, "") for column in columns))
    Console().print(table)
