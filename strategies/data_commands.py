"""Verbs for files of rows: ``fedge data check``, ``clean``, ``mask``, ``unmask``, ``key`` and ``card``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from protocol.data_settings import DataPolicy
    from protocol.plan import Plan
    from strategies.data.files import Raw, Read
    from strategies.data.formats import Row

_SHOWN_LABELS = 40

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of text.")]
File = Annotated[Path, typer.Argument(help="JSON, JSONL, CSV or Parquet file.")]
Out = Annotated[Path, typer.Option(help="JSONL file to write.")]
Settings = Annotated[
    Path | None, typer.Option(help="YAML with the sections cleaning and masking, as in an institution's data policy.")
]
Job = Annotated[Path | None, typer.Option(help="The YAML file that is trained with: its objective and its section data.")]
Objective = Annotated[
    str | None, typer.Option(help="What the rows are for, without --job; else the objective whose fields most of them have.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on without rows that cannot be used.")]


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    data = typer.Typer(help="Checks, cleans and masks files of rows.", no_args_is_help=True)
    for verb in (check, clean, mask, unmask, key, card):
        data.command()(verb)
    app.add_typer(data, name="data")


def check(file: File, job: Job = None, objective: Objective = None, as_json: Json = False) -> None:
    """Says whether every row can be used; names the file, the lines and the reasons. Exit code 2 if one cannot."""
    from strategies.data.prepared import file_rows

    plan = _plan(file, job, objective)
    rows, report = file_rows(_skipping(plan), file)
    found = {"file": str(file), "objective": plan.objective, "read": report.read, "used": report.used, "rows": len(rows)}
    found |= {"unusable": report.skipped} | _labels(rows, plan)
    if as_json:
        typer.echo(json.dumps(found | {"why": report.why_skipped, "report": _told(report)}))
    else:
        typer.echo(f"{file}: {report.read} rows for {plan.objective}, {report.skipped} of them cannot be used")
        for line in report.why_skipped:
            typer.echo(f"  - {line}")
        if report.skipped > len(report.why_skipped):
            typer.echo(f"  - and {report.skipped - len(report.why_skipped)} more")
        for line in _said_of_labels(found):
            typer.echo(line)
    if report.skipped:
        raise typer.Exit(2)


def clean(
    file: File,
    out: Out,
    settings: Settings = None,
    removed: Annotated[Path | None, typer.Option(help="JSONL file that lists the rows that are left out, and why.")] = None,
    job: Job = None,
    objective: Objective = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Writes the rows without what is no text and without duplicates; without --settings as much as never hurts."""
    from protocol.data_settings import CleaningSettings
    from strategies.data.cleaning import Cleaned, cleaned

    _another(file, out)
    if removed:
        _another(file, removed, "--removed")
        _another(out, removed, "--removed")
    gentle = CleaningSettings(control_characters=True, exact_duplicates=True)
    wanted = _policy(settings).cleaning if settings else gentle
    told = Cleaned()
    looked = _looked(file, _plan(file, job, objective), lambda found: cleaned(found, wanted, told), skip_bad=skip_bad)
    _write(out, looked.rows)
    if removed:
        gone = [(one.line, {"why": one.why} | ({"like": one.like} if one.like else {})) for one in told.gone]
        gone += [(line, {"why": f"unusable: {why}"}) for line, why in looked.problems]
        raw = {line: None if isinstance(row, str) else row for line, row in looked.read}
        _write(removed, [{"line": line, **why, "row": raw[line]} for line, why in sorted(gone, key=lambda one: one[0])])
    found: dict[str, Any] = {"read": len(looked.read), "rows": len(looked.rows), "unusable": len(looked.problems)}
    found |= {"changed": dict(told.changed), "removed": dict(told.removed), "out": str(out)}
    _tell(found, as_json=as_json)
    if not as_json and 2 * len(told.gone) > len(looked.read):
        typer.echo(f"{len(told.gone)} of {len(looked.read)} rows are left out; --removed FILE lists them", err=True)


def mask(
    file: File,
    out: Out,
    settings: Settings = None,
    key: Annotated[Path | None, typer.Option(help="Key that can undo it (fedge data key); without it nobody can.")] = None,
    vault: Annotated[
        Path | None, typer.Option(help="Sealed file of what was masked; else OUT.vault. One that is there goes on.")
    ] = None,
    job: Job = None,
    objective: Objective = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Writes the rows with placeholders for personal data; without --settings for every kind. Counts each kind."""
    from protocol.data_settings import EVERY_KIND, MaskingSettings
    from protocol.errors import ConfigurationError, DataError
    from protocol.vault import Vault
    from strategies.data.fields import everything, with_everything
    from strategies.data.masking import PLACEHOLDER, Masker
    from strategies.data.placeholders import opened, seal

    _another(file, out)
    if vault and not key:
        raise ConfigurationError("command line", ["--vault: found without --key; name the key that seals it"])
    wanted = _policy(settings).masking if settings else MaskingSettings(kinds=EVERY_KIND)
    secret = Vault.at(key) if key else None
    sealed = vault or out.with_name(out.name + ".vault")
    new = not sealed.exists()
    if secret and not vault and not new:
        raise DataError(f"{sealed}: is there already, and what it opens would be lost; --vault {sealed} goes on with it")
    known = opened(sealed, secret) if secret and not new else {}
    looked = _looked(file, _plan(file, job, objective), skip_bad=skip_bad)
    rows, bad = looked.rows, len(looked.problems)
    there = (found for row in rows for text in everything(row) for found in PLACEHOLDER.findall(text))
    masker = Masker(wanted, reserved=there, known=known)
    masked = [with_everything(row, masker) for row in rows]
    if secret:  # before the rows: masked rows without their vault could never be undone
        seal(sealed, masker.values, secret)
    try:
        _write(out, masked)
    except BaseException:
        if secret and new:
            sealed.unlink(missing_ok=True)
        raise
    touched = sum(new != dict(row) for new, row in zip(masked, rows, strict=True))
    told = {"rows": len(rows), "unusable": bad, "touched": touched, "masked": dict(masker.counts), "out": str(out)}
    _tell(told | ({"vault": str(sealed)} if secret else {}), as_json=as_json)


def unmask(
    file: File,
    out: Out,
    key: Annotated[Path, typer.Option(help="The key that it was masked with.")],
    vault: Annotated[Path | None, typer.Option(help="Sealed file of what was masked; else FILE.vault.")] = None,
    as_json: Json = False,
) -> None:
    """Writes the rows with what their placeholders stand for."""
    from protocol.vault import Vault
    from strategies.data.fields import with_everything
    from strategies.data.files import read
    from strategies.data.masking import unmasked
    from strategies.data.placeholders import opened

    _another(file, out)
    values = opened(vault or file.with_name(file.name + ".vault"), Vault.at(key))
    rows = [row for _, row in read(file)]
    _write(out, [with_everything(row, lambda text: unmasked(text, values) if isinstance(text, str) else text) for row in rows])
    _tell({"rows": len(rows), "values": len(values), "out": str(out)}, as_json=as_json)


def key(file: Annotated[Path, typer.Argument(help="Where to; only its owner may read it.")], as_json: Json = False) -> None:
    """Makes the node's own key: whoever has it can undo masking, and nobody else."""
    from protocol.vault import make_key_file

    make_key_file(file)
    _tell({"key": str(file)}, as_json=as_json)


def card(
    file: File,
    evaluate: Annotated[Path | None, typer.Option(help="Held-out rows; else a share of FILE.")] = None,
    job: Job = None,
    objective: Objective = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write it to.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Says what the rows are, in numbers: counts, lengths, languages, duplicates, splits, quality."""
    from protocol.errors import DataError
    from strategies.data.card import card as card_of
    from strategies.data.card import write_card
    from strategies.data.prepared import file_rows, prepare

    asked = _plan(file, job, objective)
    plan = _skipping(asked)
    for path in (file, evaluate) if asked.data.on_bad_rows == "refuse" and not skip_bad else ():
        if path and (report := file_rows(plan, path)[1]).skipped:
            why = "".join(f"\n  - {line}" for line in report.why_skipped)
            raise DataError(f"{path}: {report.skipped} of {report.read} rows cannot be used{why}\n{_ADVICE}")
    told = card_of(prepare(plan, file, evaluate), plan)
    if out:
        write_card(out, told)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(json.dumps({name: told[name] for name in told if name not in ("report", "treatment")}, indent=2))


def _plan(file: Path, job: Path | None, objective: str | None) -> "Plan":
    """The plan that rows are read for; labels are those of the file where none are listed."""
    from protocol.configuration import load, parse
    from protocol.plan import Plan
    from strategies.data.files import stream
    from strategies.data.formats import distinct_labels, likely_objective
    from strategies.job import Job

    if job:
        plan: Plan = load(job, Job).beside(job)
    else:
        wanted = objective or likely_objective(stream(file)) or "sft"
        plan = parse({"objective": wanted} | _NEEDED.get(wanted, {}), Plan, source="command line")
    data = plan.data
    if plan.objective == "classification" and data.labels is None:
        least = 2 if job or objective else 1  # to be cleaned, rows of one label need no other
        data = data.model_copy(update={"labels": distinct_labels(file, skip=True, columns=data.columns, least=least)})
    return plan.model_copy(update={"data": data})


def _skipping(plan: "Plan") -> "Plan":
    return plan.model_copy(update={"data": plan.data.model_copy(update={"on_bad_rows": "skip"})})


_ADVICE = "--skip-bad goes on without them"
# What a plan of the objective must say though it decides nothing about rows.
_NEEDED: dict[str, dict[str, Any]] = {"rl": {"rl": {"reward_functions": ["none:none"]}}}


def _policy(path: Path) -> "DataPolicy":
    from protocol.configuration import load
    from protocol.data_settings import DataPolicy

    return load(path, DataPolicy).beside(path.resolve().parent)


class _Looked(NamedTuple):
    """Rows of a file: all with their lines, those that can be used, and why others cannot."""

    read: "Sequence[Read]"
    rows: "Sequence[Raw]"
    problems: Sequence[tuple[int, str]]


def _looked(
    file: Path, plan: "Plan", treated: "Callable[[Iterable[Read]], Iterable[Read]]" = iter, *, skip_bad: bool
) -> _Looked:
    """The rows of a file that can be used, with what ``treated`` makes of them."""
    from protocol.errors import DataError
    from strategies.data.files import raise_all, stream
    from strategies.data.formats import flagged, groups_of, renamed

    read = list(renamed(file, stream(file), plan.data.columns))
    found = list(treated(flagged(read, plan)))
    groups, problems = groups_of(file, found, _skipping(plan))
    if not skip_bad:
        raise_all(file, problems, len(read), f"\n{_ADVICE}")
    good = {group.line for group in groups}
    rows = [row for line, row in found if line in good and not isinstance(row, str)]
    if not rows:
        raise DataError(f"{file}: no row is left; loosen the section cleaning")
    return _Looked(read, rows, problems)


def _labels(rows: "Sequence[Row]", plan: "Plan") -> dict[str, Any]:
    """Rows of each label, the most frequent first, and labels that are the same but for case and spaces."""
    from collections import Counter, defaultdict

    from strategies.data.formats import LabelledText

    names = plan.data.labels or ()
    counts = Counter(names[row.label] for row in rows if isinstance(row, LabelledText))
    alike = defaultdict[str, list[str]](list)
    for name in sorted(counts):
        alike["".join(name.casefold().split())].append(name)
    same = [found for found in alike.values() if len(found) > 1]
    return {"labels": dict(counts.most_common()), "labels_alike": same} if counts else {}


def _said_of_labels(found: dict[str, Any]) -> "Iterable[str]":
    counts: dict[str, int] = found.get("labels", {})
    if counts:
        shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:_SHOWN_LABELS])
        yield f"labels: {shown}" + (f", and {len(counts) - _SHOWN_LABELS} more" if len(counts) > _SHOWN_LABELS else "")
    if once := [name for name, count in counts.items() if count == 1]:
        yield f"warning: with one row only: {', '.join(once[:_SHOWN_LABELS])}"
    for same in found.get("labels_alike", []):
        yield f"warning: labels that differ in case or spaces only: {', '.join(map(repr, same))}"


def _another(file: Path, out: Path, option: str = "--out") -> None:
    from protocol.errors import ConfigurationError

    problems = [f"{option}: found {out.suffix!r}; rows are written as .jsonl"] if out.suffix.lower() != ".jsonl" else []
    if out.resolve() == file.resolve():
        problems.append(f"{option}: is {file.name} itself, which would be lost; name another")
    if problems:
        raise ConfigurationError("command line", problems)


def _write(out: Path, rows: "Sequence[Raw]") -> None:
    from protocol.files import write_whole

    write_whole(out, "".join(map(_line, rows)))


def _line(row: "Raw") -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    half = any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else False
    return (json.dumps(row, default=str) if half else text) + "\n"  # half a surrogate pair can only be written escaped


def _told(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def _tell(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        shown = ", ".join(f"{count} {kind}" for kind, count in value.items()) or "none" if isinstance(value, dict) else value
        typer.echo(f"{name}: {shown}")
