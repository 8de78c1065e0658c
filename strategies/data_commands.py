"""Verbs for files of rows: ``fedge data check``, ``clean``, ``mask``, ``unmask``, ``key`` and ``card``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from protocol.data_settings import DataPolicy
    from strategies.data.files import Raw

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of text.")]
File = Annotated[Path, typer.Argument(help="JSON, JSONL, CSV or Parquet file.")]
Out = Annotated[Path, typer.Option(help="JSONL file to write.")]
Settings = Annotated[
    Path | None, typer.Option(help="YAML with the sections cleaning and masking, as in an institution's data policy.")
]
Job = Annotated[Path | None, typer.Option(help="The YAML file that is trained with: its objective and its section data.")]
Objective = Annotated[str, typer.Option(help="What the rows are for, where there is no --job.")]


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    data = typer.Typer(help="Checks, cleans and masks files of rows.", no_args_is_help=True)
    for verb in (check, clean, mask, unmask, key, card):
        data.command()(verb)
    app.add_typer(data, name="data")


def check(file: File, job: Job = None, objective: Objective = "sft", as_json: Json = False) -> None:
    """Says whether every row can be used; names the file, the lines and the reasons. Exit code 2 if one cannot."""
    from strategies.data.prepared import file_rows

    plan = _plan(file, job, objective, skip=True)
    rows, report = file_rows(plan, file)
    found = {"file": str(file), "read": report.read, "used": report.used, "rows": len(rows), "unusable": report.skipped}
    if as_json:
        typer.echo(json.dumps(found | {"why": report.why_skipped, "report": _told(report)}))
    else:
        typer.echo(f"{file}: {report.read} rows, {report.skipped} of them cannot be used")
        for line in report.why_skipped:
            typer.echo(f"  - {line}")
        if report.skipped > len(report.why_skipped):
            typer.echo(f"  - and {report.skipped - len(report.why_skipped)} more")
    if report.skipped:
        raise typer.Exit(2)


def clean(file: File, out: Out, settings: Settings = None, skip_bad: bool = False, as_json: Json = False) -> None:
    """Writes the rows without what is no text and without duplicates; without --settings as much as never hurts."""
    from protocol.data_settings import CleaningSettings
    from strategies.data.cleaning import Cleaned, cleaned
    from strategies.data.files import stream

    _another(file, out)
    gentle = CleaningSettings(control_characters=True, exact_duplicates=True)
    wanted = _policy(settings).cleaning if settings else gentle
    told = Cleaned()
    rows, bad = _readable(file, cleaned(stream(file), wanted, told), skip_bad=skip_bad)
    _write(out, rows)
    found = {"rows": len(rows), "unusable": bad, "changed": dict(told.changed), "removed": dict(told.removed), "out": str(out)}
    _tell(found, as_json=as_json)


def mask(
    file: File,
    out: Out,
    settings: Settings = None,
    key: Annotated[Path | None, typer.Option(help="Key that can undo it (fedge data key); without it nobody can.")] = None,
    vault: Annotated[
        Path | None, typer.Option(help="Sealed file of what was masked; else OUT.vault. One that is there goes on.")
    ] = None,
    skip_bad: bool = False,
    as_json: Json = False,
) -> None:
    """Writes the rows with placeholders for personal data; without --settings for every kind. Counts each kind."""
    from protocol.data_settings import EVERY_KIND, MaskingSettings
    from protocol.errors import ConfigurationError, DataError
    from strategies.data.fields import everything, with_everything
    from strategies.data.files import stream
    from strategies.data.masking import PLACEHOLDER, Masker
    from strategies.data.vault import opened, read_key, seal

    _another(file, out)
    if vault and not key:
        raise ConfigurationError("command line", ["--vault: found without --key; name the key that seals it"])
    wanted = _policy(settings).masking if settings else MaskingSettings(kinds=EVERY_KIND)
    secret = read_key(key) if key else None
    sealed = vault or out.with_name(out.name + ".vault")
    if secret and not vault and sealed.exists():
        raise DataError(f"{sealed}: is there already, and what it opens would be lost; --vault {sealed} goes on with it")
    known = opened(sealed, secret) if secret and vault and vault.exists() else {}
    rows, bad = _readable(file, stream(file), skip_bad=skip_bad)
    there = (found for row in rows for text in everything(row) for found in PLACEHOLDER.findall(text))
    masker = Masker(wanted, reserved=there, known=known)
    masked = [with_everything(row, masker) for row in rows]
    if secret:  # before the rows: masked rows without their vault could never be undone
        seal(sealed, masker.values, secret)
    _write(out, masked)
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
    from strategies.data.fields import with_everything
    from strategies.data.files import read
    from strategies.data.masking import unmasked
    from strategies.data.vault import opened, read_key

    _another(file, out)
    values = opened(vault or file.with_name(file.name + ".vault"), read_key(key))
    rows = [row for _, row in read(file)]
    _write(out, [with_everything(row, lambda text: unmasked(text, values) if isinstance(text, str) else text) for row in rows])
    _tell({"rows": len(rows), "values": len(values), "out": str(out)}, as_json=as_json)


def key(file: Annotated[Path, typer.Argument(help="Where to; only its owner may read it.")], as_json: Json = False) -> None:
    """Makes the node's own key: whoever has it can undo masking, and nobody else."""
    from strategies.data.vault import create_key

    create_key(file)
    _tell({"key": str(file)}, as_json=as_json)


def card(
    file: File,
    evaluate: Annotated[Path | None, typer.Option(help="Held-out rows; else a share of FILE.")] = None,
    job: Job = None,
    objective: Objective = "sft",
    out: Annotated[Path | None, typer.Option(help="JSON file to write it to.")] = None,
    as_json: Json = False,
) -> None:
    """Says what the rows are, in numbers: counts, lengths, languages, duplicates, splits, quality."""
    from strategies.data.card import card as card_of
    from strategies.data.card import write_card
    from strategies.data.prepared import prepare

    plan = _plan(file, job, objective, skip=False)
    told = card_of(prepare(plan, file, evaluate), plan)
    if out:
        write_card(out, told)
    if as_json:
        typer.echo(json.dumps(told))
    else:
        typer.echo(json.dumps({name: told[name] for name in told if name not in ("report", "treatment")}, indent=2))


def _plan(file: Path, job: Path | None, objective: str, *, skip: bool) -> Any:
    """The plan that rows are read for; labels are those of the file where none are listed."""
    from protocol.configuration import load, parse
    from protocol.plan import Plan
    from strategies.data.formats import distinct_labels
    from strategies.job import Job

    if job:
        plan: Plan = load(job, Job).beside(job)
        settings = plan.data
    else:
        plan = parse({"objective": objective} | _NEEDED.get(objective, {}), Plan, source="command line")
        settings = plan.data
    if plan.objective == "classification" and settings.labels is None:
        settings = settings.model_copy(update={"labels": distinct_labels(file, skip=True)})
    return plan.model_copy(update={"data": settings.model_copy(update={"on_bad_rows": "skip"} if skip else {})})


# What a plan of the objective must say though it decides nothing about rows.
_NEEDED: dict[str, dict[str, Any]] = {"rl": {"rl": {"reward_functions": ["none:none"]}}}


def _policy(path: Path) -> "DataPolicy":
    from protocol.configuration import load
    from protocol.data_settings import DataPolicy

    return load(path, DataPolicy).beside(path.resolve().parent)


def _readable(file: Path, found: Any, *, skip_bad: bool) -> tuple[list["Raw"], int]:
    from protocol.errors import DataError
    from strategies.data.files import raise_all

    rows, bad = [], []
    for line, row in found:
        if isinstance(row, str):
            bad.append((line, row))
        else:
            rows.append(row)
    if not skip_bad:
        raise_all(file, bad, len(bad) + len(rows), "\n--skip-bad goes on without them")
    if not rows:
        raise DataError(f"{file}: no row is left; loosen the section cleaning, or mend what cannot be read")
    return rows, len(bad)


def _another(file: Path, out: Path) -> None:
    from protocol.errors import ConfigurationError

    problems = [f"--out: found {out.suffix!r}; rows are written as .jsonl"] if out.suffix.lower() != ".jsonl" else []
    if out.resolve() == file.resolve():
        problems.append("--out: is the file itself, which would be lost; name another")
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
