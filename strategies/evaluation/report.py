"""One report of a comparison: JSON for machines, Markdown with plots for people. Figures and settings, no text of a row."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from protocol.errors import ConfigurationError
from protocol.files import write_whole
from protocol.plan import Plan
from strategies.base_model import Base
from strategies.evaluation.bootstrap import FEWEST, Estimate
from strategies.evaluation.calibration import Bin
from strategies.evaluation.comparison import Comparison, Robustness, Table
from strategies.evaluation.figures import Figure
from strategies.evaluation.measure import LEADING
from strategies.evaluation.source import Source
from strategies.evaluation.wins import Wins

JSON, MARKDOWN = "report.json", "report.md"
RANDOM_HEAD = "The base's own head is random: its figures are those of guessing, and a gain over them says little."
_ARROWS = {"higher": "↑", "lower": "↓"}


@dataclass(frozen=True)
class Setting:
    """What was measured with.

    Attributes:
        plan: Says what for, and how the base is held.
        base: The base.
        data: The rows, or their file.
        probe: File of the general rows.
        seed: Of the bootstrap and of perturbations.
    """

    plan: Plan
    base: Base
    data: Path | Source
    probe: Path | None
    seed: int


def as_json(found: Comparison, setting: Setting) -> dict[str, Any]:
    """Everything as plain JSON: ``rows`` and ``results`` as without any option, and the rest beside them."""
    told = {**_table(found.table), "about": _about(found, setting)}
    if found.robustness:
        told["robustness"] = {kind: _robustness(one) for kind, one in found.robustness.items()}
    if found.probe:
        told["probe"] = _table(found.probe)
    if found.reliability:
        told["reliability"] = {who: [asdict(one) for one in bins] for who, bins in found.reliability.items()}
    if found.wins:
        told["wins"] = {who: _wins(one, found.table) for who, one in found.wins.items()}
    if found.harness:
        told["harness"] = {
            who: {task: {name: asdict(score) for name, score in scores.items()} for task, scores in tasks.items()}
            for who, tasks in found.harness.items()
        }
    return told


def check_plots() -> None:
    """Makes sure that plots can be drawn.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError(
            "command line", ["--report draws with matplotlib, which is not installed; pip install 'fedge[evaluation]'"]
        )


def write(folder: Path, found: Comparison, setting: Setting) -> None:
    """Writes ``report.json``, ``report.md`` and its plots; other files of the folder stay as they are.

    Raises:
        OSError: The folder cannot be written.
    """
    plots = dict(_plots(found, setting.plan))
    for name, content in plots.items():
        write_whole(folder / name, content)
    told = as_json(found, setting)
    write_whole(folder / JSON, json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    write_whole(folder / MARKDOWN, "\n".join(_markdown(found, told, list(plots), setting)) + "\n")


def random_head(plan: Plan) -> bool:
    """Whether the base alone has a head that nobody has trained."""
    return plan.task_type == "SEQ_CLS" and (plan.objective != "classification" or plan.head.init == "random")


def letters(names: Sequence[str]) -> dict[str, str]:
    """``base``, ``A``, ``B``, …: folders are too long for a table's head."""
    return {name: "base" if not at else _letter(at - 1) for at, name in enumerate(names)}


def shown(estimate: Estimate, *, signed: bool = False) -> str:
    """A figure with its interval, to be read."""
    sign = "+" if signed else ""
    if math.isnan(estimate.low):
        return f"{estimate.value:{sign}.4g}"
    return f"{estimate.value:{sign}.4g} [{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"


def _letter(at: int) -> str:
    return (_letter(at // 26 - 1) if at >= 26 else "") + chr(ord("A") + at % 26)


def _table(table: Table) -> dict[str, Any]:
    estimates = table.estimates
    return {
        "rows": table.rows,
        **({} if table.texts is None else {"texts": table.texts}),
        "results": {who: {name: one.value for name, one in each.items()} for who, each in estimates.items()},
        "intervals": {
            who: {name: [_number(one.low), _number(one.high)] for name, one in each.items()} for who, each in estimates.items()
        },
        "differences": [
            {"of": of, "against": against, "figures": _estimates(each)} for (of, against), each in table.differences.items()
        ],
    }


def _robustness(one: Robustness) -> dict[str, Any]:
    return {
        "rows": one.clean.rows,
        "clean": {who: _values(each) for who, each in one.clean.figures.items()},
        "perturbed": {who: _values(each) for who, each in one.perturbed.figures.items()},
        "changes": {who: _estimates(each) for who, each in one.changes.items()},
    }


def _wins(one: Wins, table: Table) -> dict[str, Any]:
    rate = _estimate(table.draws.estimate(one.rate))
    return {"win-rate": rate, "ties": one.ties, "disagreement": one.disagreement, "unreadable": one.unreadable}


def _values(figures: Mapping[str, Figure]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items()}


def _estimates(each: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: _estimate(one) for name, one in each.items()}


def _estimate(one: Estimate) -> dict[str, float | None]:
    return {"value": one.value, "low": _number(one.low), "high": _number(one.high)}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _about(found: Comparison, setting: Setting) -> dict[str, Any]:
    units = next(iter(found.table.figures.values()))
    return {
        "base_model": setting.plan.base_model,
        "base_digest": setting.base.digest,
        "objective": setting.plan.objective,
        "precision": setting.plan.precision,
        "data": setting.data.name,
        "probe": setting.probe.name if setting.probe else None,
        "dropped": found.dropped,
        "max_length": setting.plan.data.max_length,
        "max_new_tokens": found.max_new_tokens,
        "bleu_tokenizer": found.bleu_tokenizer,
        "better": {name: figure.better for name, figure in units.items()},
        "units": {name: figure.unit for name, figure in units.items() if figure.unit},
        "interval": {"level": found.table.draws.level, "draws": len(found.table.draws.weights), "seed": setting.seed},
    }


# Markdown ---------------------------------------------------------------------------------------------------------------


def _markdown(found: Comparison, told: Mapping[str, Any], plots: Sequence[str], setting: Setting) -> Iterator[str]:
    about, names = told["about"], letters(list(found.table.figures))
    yield "# Evaluation\n"
    yield (
        f"{found.table.counted} of `{about['data']}` for objective {about['objective']}, base held as {about['precision']}"
        + (f"; {found.dropped} longer than {about['max_length']} tokens left out" if found.dropped else "")
        + f". Brackets: {about['interval']['level']:.0%} intervals of {about['interval']['draws']} bootstrap draws of the "
        "rows, the same for all models. ↑: more is better, ↓: less is.\n"
    )
    yield "| | model |\n|---|---|"
    yield from (f"| {letter} | `{about['base_model'] if letter == 'base' else who}` |" for who, letter in names.items())
    if random_head(setting.plan):
        yield f"\n{RANDOM_HEAD}"
    yield "\n## Figures\n"
    yield from _grid(found.table, names)
    yield from _differences(found.table, names)
    if math.isnan(next(iter(next(iter(found.table.estimates.values())).values())).low):
        yield f"\nOf fewer than {FEWEST} rows no interval is told."
    if about["max_new_tokens"]:
        yield f"\nAnswers are greedy, of at most {about['max_new_tokens']} tokens."
    if about["bleu_tokenizer"]:
        yield f"BLEU is sacrebleu's with tokenizer `{about['bleu_tokenizer']}`."
    for kind, one in found.robustness.items():
        yield f"\n## Robustness: {kind}\n\nChange of each figure on the {one.clean.rows} rows that {kind} changes.\n"
        yield from _rows_of(one.changes, one.clean.figures, names, signed=True)
    if found.probe:
        yield f"\n## Forgetting\n\n{found.probe.counted} of `{about['probe']}`.\n"
        yield from _grid(found.probe, names)
        yield from _differences(found.probe, names)
    for who, bins in found.reliability.items():
        yield f"\n## Calibration: {names[who]}\n\n| confidence | rows | mean confidence | accuracy |\n|---|---|---|---|"
        yield from (f"| {b.above:.2f} to {b.up_to:.2f} | {b.rows} | {b.confidence:.3f} | {b.accuracy:.3f} |" for b in bins)
    if found.wins:
        yield "\n## Preference\n\nHow often the judge prefers a model's answer to the base's; a tie counts half.\n"
        yield "| model | win rate ↑ | ties | judge contradicts itself |\n|---|---|---|---|"
        for who, won in found.wins.items():
            rate = shown(found.table.draws.estimate(won.rate))
            yield f"| {names[who]} | {rate} | {won.ties:.0%} | {won.disagreement:.0%} |"
    if found.harness:
        yield "\n## lm-evaluation-harness\n\n| task | metric | " + " | ".join(names.values()) + " |"
        yield "|---|---|" + "---|" * len(names)
        yield from _tasks(found)
    yield from (f"\n![{name.removesuffix('.png')}]({name})" for name in plots)


def _grid(table: Table, names: Mapping[str, str]) -> Iterator[str]:
    yield from _rows_of(table.estimates, table.figures, names, signed=False)


def _differences(table: Table, names: Mapping[str, str]) -> Iterator[str]:
    pairs = {f"{names[of]} − {names[against]}": each for (of, against), each in table.differences.items()}
    if pairs:
        yield "\nDifferences, drawn on the same rows; **bold** where the interval leaves out 0.\n"
        first = next(iter(table.figures.values()))
        yield from _rows_of(pairs, dict.fromkeys(pairs, first), {pair: pair for pair in pairs}, signed=True)


def _rows_of(
    estimates: Mapping[str, Mapping[str, Estimate]],
    figures: Mapping[str, Mapping[str, Figure]],
    names: Mapping[str, str],
    *,
    signed: bool,
) -> Iterator[str]:
    """A row for each figure, a column for each model."""
    yield "| figure | " + " | ".join(names[who] for who in estimates) + " |"
    yield "|---|" + "---|" * len(estimates)
    for name, figure in next(iter(figures.values())).items():
        cells = [_cell(each[name], signed) if name in each else "" for each in estimates.values()]
        yield f"| {name}{f' ({figure.unit})' if figure.unit else ''} {_ARROWS[figure.better]} | " + " | ".join(cells) + " |"


def _cell(estimate: Estimate, signed: bool) -> str:
    text = shown(estimate, signed=signed)
    return f"**{text}**" if signed and estimate.differs else text


def _tasks(found: Comparison) -> Iterator[str]:
    first = next(iter(found.harness.values()))
    for task, scores in first.items():
        for metric in scores:
            cells = [each[task][metric] for each in found.harness.values()]
            values = [f"{one.value:.4g}" + (f" ± {one.stderr:.2g}" if one.stderr else "") for one in cells]
            yield f"| {task} | {metric} | " + " | ".join(values) + " |"


# Plots ------------------------------------------------------------------------------------------------------------------


def _plots(found: Comparison, plan: Plan) -> Iterator[tuple[str, bytes]]:
    names = letters(list(found.table.figures))
    yield "figures.png", _panels(found.table, names)
    if found.robustness:
        yield "robustness.png", _changes(found.robustness, names, LEADING[plan.objective])
    if found.probe:
        yield "forgetting.png", _panels(found.probe, names)
    if found.reliability:
        yield "reliability.png", _reliability(found.reliability, names)


def _panels(table: Table, names: Mapping[str, str]) -> bytes:
    """A panel for each figure with a point and its interval for each model."""
    estimates = table.estimates
    first = next(iter(table.figures.values()))
    picture, panels = _grid_of(len(first), height=0.8 + 0.3 * len(names))
    for panel, (name, figure) in zip(panels, first.items(), strict=True):
        _points(panel, [each[name] for each in estimates.values()], [names[who] for who in estimates])
        panel.set_title(f"{name} {_ARROWS[figure.better]}", fontsize=9)
        panel.set_xlabel(figure.unit, fontsize=8)
    return _png(picture)


def _changes(robustness: Mapping[Any, Robustness], names: Mapping[str, str], leading: str) -> bytes:
    """A panel for each perturbation with the change of one figure."""
    picture, panels = _grid_of(len(robustness), height=0.8 + 0.3 * len(names))
    for panel, (kind, one) in zip(panels, robustness.items(), strict=True):
        changes = one.changes
        shared = next(iter(changes.values()))
        name = leading if leading in shared else next(iter(shared))
        _points(panel, [each[name] for each in changes.values()], [names[who] for who in changes])
        panel.axvline(0, color="0.6", linewidth=0.8)
        panel.set_title(f"{kind}: change of {name}", fontsize=9)
    return _png(picture)


def _reliability(bins: Mapping[str, Sequence[Bin]], names: Mapping[str, str]) -> bytes:
    """A reliability diagram for each model; a point's area grows with its rows."""
    picture, panels = _grid_of(len(bins), height=3.0)
    for panel, (who, held) in zip(panels, bins.items(), strict=True):
        total = sum(one.rows for one in held)
        panel.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        sizes = [10 + 200 * one.rows / total for one in held]
        panel.scatter([one.confidence for one in held], [one.accuracy for one in held], s=sizes, alpha=0.7)
        panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=names[who])
    return _png(picture)


def _points(panel: Any, estimates: Sequence[Estimate], labels: Sequence[str]) -> None:
    # An interval need not hold its figure (calibration error): then the bar begins or ends at the point.
    below = [max(one.value - one.low, 0) for one in estimates]
    above = [max(one.high - one.value, 0) for one in estimates]
    places = range(len(estimates))
    panel.errorbar([one.value for one in estimates], places, xerr=[below, above], fmt="o", capsize=3)
    panel.set_yticks(places, labels)
    panel.invert_yaxis()
    panel.margins(y=0.3)
    panel.tick_params(labelsize=8)
    panel.locator_params(axis="x", nbins=5)


def _grid_of(count: int, height: float) -> tuple[Any, list[Any]]:
    """A picture of up to three panels a row."""
    from matplotlib.figure import Figure as Picture

    columns = min(count, 3)
    rows = math.ceil(count / columns)
    picture = Picture(figsize=(3.2 * columns, height * rows), layout="constrained")
    panels = list(picture.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return picture, panels[:count]


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()
