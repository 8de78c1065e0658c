"""The verb ``fedge evaluate``: a base and adapters on the same rows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.adapter import Adapter
from protocol.plan import REFERRING, Plan

if TYPE_CHECKING:
    from strategies.evaluation.bootstrap import Estimate
    from strategies.evaluation.comparison import Comparison, Table
    from strategies.evaluation.report import Setting
    from strategies.evaluation.source import Source
    from strategies.evaluation.wanted import Wanted
    from strategies.job import Job

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")]


def mount(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command()(evaluate)


def evaluate(
    config: Annotated[Path, typer.Argument(help="The YAML file that was trained with.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="Adapter folder; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option(help="Rows to measure on; else those that training held out.")] = None,
    stage: Annotated[str, typer.Option(help="Which stage's objective and rows: its number or objective; else the last.")] = "",
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
    from protocol.writer_settings import JudgeSettings, WriterSettings, beside
    from strategies.base_model import find
    from strategies.evaluation.report import RANDOM_HEAD, Setting, random_head
    from strategies.evaluation.source import doubts, of_file, of_plan
    from strategies.evaluation.wanted import Wanted, check
    from strategies.job import Job

    last = _stage(load(config, Job).beside(config), stage)
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
    plan, base = last.plan(), find(last.base_model)
    check(plan, wanted)
    source = of_file(plan, data) if data else of_plan(plan)
    for doubt in doubts(source, plan, adapter or []):
        _say(f"warning: {doubt}")
    if random_head(plan):
        _say(RANDOM_HEAD)
    contestants = {"base": (plan, None), **_adapters(adapter or [], base.digest, plan)}
    starts = _adapters([last.start] if last.start and plan.objective in REFERRING else [], base.digest, plan)
    near = next((tensors for _, tensors in starts.values() if tensors), Adapter())
    if wanted == Wanted(seed=seed) and report is None:
        _measured(source, plan, contestants, near, as_json)
    else:
        _compared(Setting(plan, base, source, probe, seed), contestants, near, wanted, report, as_json)


def _stage(job: "Job", named: str) -> "Job":
    """One of a job's stages, by number or objective; without a name the last."""
    from protocol.errors import ConfigurationError

    stages = list(enumerate(job.jobs(), 1))
    fit = [one for number, one in stages if named in (str(number), one.objective)] if named else [job.jobs()[-1]]
    if len(fit) != 1:
        there = ", ".join(f"{number} ({one.objective})" for number, one in stages)
        which = "is none" if not fit else f"are {len(fit)}, so give a number"
        raise ConfigurationError("command line", [f"--stage {named}: there {which}; the job has {there}"])
    if job.stages and not named:
        _say(f"the last of {len(stages)} stages, {fit[0].objective}; --stage measures another")
    return fit[0]


def _say(text: str) -> None:
    typer.echo(f"· {text}", err=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _adapters(folders: list[Path], base_digest: str, plan: Plan) -> dict[str, tuple[Plan, Adapter]]:
    """Each with the plan to use it with: its folder says how it was made, whatever the plan was written for."""
    from protocol.files import read_stored

    found = (read_stored(folder, base_digest=base_digest) for folder in folders)
    return {str(stored.folder): (stored.on(plan), stored.adapter) for stored in found}


def _measured(
    source: "Source", plan: Plan, contestants: Mapping[str, tuple[Plan, Adapter | None]], near: Adapter, as_json: bool
) -> None:
    from strategies.base_model import find
    from strategies.evaluation.measure import measure

    rows, base = source.rows, find(plan.base_model)
    results = {who: measure(use, base, rows, tensors, near) for who, (use, tensors) in contestants.items()}
    if as_json:
        typer.echo(json.dumps({"rows": len(rows), "results": results}))
        return
    cells = {who: {name: f"{value:.4g}" for name, value in values.items()} for who, values in results.items()}
    _legend(list(cells))
    _models(f"{len(rows)} rows of {source.name}", cells)


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
    from strategies.evaluation.report import letters, shown

    def estimated(title: str, estimates: "Mapping[str, Mapping[str, Estimate]]", signed: bool = False) -> None:
        _models(
            title, {who: {name: shown(one, signed=signed) for name, one in each.items()} for who, each in estimates.items()}
        )

    def measured(title: str, table: "Table") -> None:
        names = letters(list(table.figures))
        estimated(title, table.estimates)
        for (of, against), each in table.differences.items():
            marked = {name: shown(one, signed=True) + (" *" if one.differs else "") for name, one in each.items()}
            _table("", {name: {f"{names[of]} − {names[against]} (* not 0)": cell} for name, cell in marked.items()})

    _legend(list(found.table.figures))
    measured(f"{found.table.counted} of {setting.data.name}", found.table)
    for kind, one in found.robustness.items():
        estimated(f"{kind}: change on the {one.clean.rows} rows that it changes", one.changes, signed=True)
    if found.probe and setting.probe:
        measured(f"forgetting: {found.probe.counted} of {setting.probe.name}", found.probe)
    if found.wins:
        rates = {
            who: {"win rate": shown(found.table.draws.estimate(won.rate)), "ties": f"{won.ties:.0%}"}
            for who, won in found.wins.items()
        }
        _models("the judge prefers it to the base", rates)
    for who, tasks in found.harness.items():
        scores = {task: {name: f"{score.value:.4g}" for name, score in each.items()} for task, each in tasks.items()}
        _table(f"lm-evaluation-harness: {who}", scores)


def _legend(who: Sequence[str]) -> None:
    """What the letters over the columns stand for."""
    from strategies.evaluation.report import letters

    for name, letter in list(letters(who).items())[1:]:
        typer.echo(f"{letter}: {name}")


def _models(title: str, cells: Mapping[str, Mapping[str, str]]) -> None:
    """A row for each figure: there are more of them than of models, whose letters are shorter than a figure's name."""
    from strategies.evaluation.report import letters

    names = dict.fromkeys(name for values in cells.values() for name in values)
    heads = letters(list(cells)) if "base" in cells else {who: who for who in cells}
    _table(title, {name: {heads[who]: values[name] for who, values in cells.items() if name in values} for name in names})


def _table(title: str, cells: Mapping[str, Mapping[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for each in cells.values() for name in each))
    table = Table(title=title or None)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column)
    for who, values in cells.items():
        table.add_row(who, *(values.get(column, "") for column in columns))
    Console().print(table)
