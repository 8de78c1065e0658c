"""Verbs for adapters that are trained: ``fedge merge``, ``extract``, ``combine``, ``verify`` and ``fedge registry …``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from protocol.plan import Plan
    from strategies.adapters.version import Version

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of text.")]
Where = Annotated[str, typer.Argument(metavar="LOCATION", help="file:///srv/adapters, s3://bucket/adapters, or a folder.")]
Which = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="NAME for its latest, NAME@VERSION or NAME@TAG.")]
Config = Annotated[Path | None, typer.Option(help="The YAML file that was trained with.")]
BaseModel = Annotated[str | None, typer.Option(help="Base; else the one that the adapter names.")]

registry = typer.Typer(help="Publishes and fetches versions of adapters.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.command()(merge)
    app.command()(extract)
    app.command()(combine)
    app.command()(verify)
    app.add_typer(registry, name="registry")


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[Path, typer.Argument(help="New folder for the model.")],
    config: Config = None,
    base_model: BaseModel = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; else what the base's configuration names.")] = None,
    as_json: Json = False,
) -> None:
    """Writes an adapter into its base: one model for plain transformers."""
    from protocol.files import base_model_of, read_stored
    from strategies.adapters.merge import merge
    from strategies.base_model import find

    kind = _one_of("dtype", dtype, ("fp32", "bf16", "fp16")) if dtype else None
    plan = _plan(config)
    base = find(base_model or (plan.base_model if plan else base_model_of(adapter)))
    done = merge(base, read_stored(adapter, base_digest=base.digest), output, plan=plan, dtype=kind)
    _tell(
        {
            "output": str(output),
            "base_digest": done.base_digest,
            "adapter_digest": done.adapter_digest,
            "method": done.method,
            "dtype": done.dtype,
            "rounding": done.rounding,
            "remarks": list(done.remarks),
        },
        [
            f"{done.method} merged into {base.name}, saved as {done.dtype} in {output}",
            *([f"rounding to {done.dtype} is {done.rounding:.2%} of the change"] if done.rounding else []),
            *done.remarks,
        ],
        as_json,
    )


def extract(
    base_model: Annotated[str, typer.Argument(help="Base that was fine-tuned: folder, hub name or installed package.")],
    tuned: Annotated[str, typer.Argument(help="The model that it became, likewise.")],
    output: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    rank: Annotated[int | None, typer.Option(min=1, max=1024, help="Of every pair of factors; 16 if nothing is said.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead: share of each matrix's change to keep, such as 0.9.")] = None,
    as_json: Json = False,
) -> None:
    """Makes a LoRA of what a full fine-tune changed, and says how much of it that keeps."""
    from protocol.errors import ConfigurationError
    from protocol.files import write_adapter
    from strategies.adapters.extract import extract
    from strategies.base_model import find

    if rank and energy is not None:
        raise ConfigurationError("command line", ["--rank and --energy: found both, expected one"])
    if energy is not None and not 0 < energy < 1:
        raise ConfigurationError("command line", [f"--energy: found {energy}, expected a share between 0 and 1"])
    _new(output)
    found = extract(find(base_model), find(tuned), r=None if energy else rank or 16, energy=energy)
    write_adapter(output, found.adapter, found.manifest, found.plan)
    matrices = {name: {"r": kept.r, "energy_kept": kept.energy, "change": kept.change} for name, kept in found.matrices.items()}
    _tell(
        {
            "output": str(output),
            "energy_kept": found.energy_kept,
            "matrices": matrices,
            "whole": list(found.whole),
            "left_out": dict(found.left_out),
        },
        [
            f"{output}: {found.energy_kept:.1%} of the change kept, {len(matrices)} matrices, rank {found.manifest.r} at most",
            *(f"  {name}: rank {kept.r}, {kept.energy:.1%} kept" for name, kept in found.matrices.items()),
            *(f"  {name}: whole" for name in found.whole),
            *(f"  {name}: left out, changed by {size:.2%} of its norm" for name, size in found.left_out.items()),
        ],
        as_json,
    )


def combine(
    output: Annotated[Path, typer.Argument(help="New folder for the combined adapter.")],
    adapter: Annotated[list[Path], typer.Option(help="Adapter folder; give several.")],
    weight: Annotated[list[float] | None, typer.Option(help="One for each adapter, in order; 1 if nothing is said.")] = None,
    how: Annotated[
        str, typer.Option(help="svd, cat, linear, ties, dare_linear, dare_ties, magnitude_prune, or …_svd.")
    ] = "svd",
    rank: Annotated[int | None, typer.Option(min=1, max=1024, help="svd and …_svd: else the largest of them.")] = None,
    density: Annotated[float | None, typer.Option(help="ties, dare, magnitude_prune: share of numbers that stay.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what dare drops.")] = 0,
    base_model: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Makes one adapter of several LoRAs of the same base."""
    from math import isfinite
    from typing import get_args

    from protocol.errors import ConfigurationError
    from protocol.files import base_model_of, read_stored, write_adapter
    from protocol.manifest import MOST_EXAMPLES, Manifest
    from protocol.plan import Plan
    from strategies.adapters.combine import SPARSE, Way, combine, energy_kept
    from strategies.base_model import find

    _new(output)
    weights = weight or [1.0] * len(adapter)
    wrong = []
    if len(weights) != len(adapter):
        wrong.append(f"--weight: found {len(weights)} for {len(adapter)} adapters, expected one for each")
    wrong += [f"--weight: found {value}, expected a finite number" for value in weights if not isfinite(value)]
    if (density is not None) != (how in SPARSE) or not (density is None or 0 < density <= 1):
        wrong.append(f"--density: found {density} with {how}; expected a share above 0 for {', '.join(SPARSE)}, else none")
    if rank and not how.endswith("svd"):
        wrong.append(f"--rank is for svd and what ends in _svd, found {how}")
    if wrong:
        raise ConfigurationError("command line", wrong)
    stored = [read_stored(folder) for folder in adapter]
    made = combine(stored, weights, _one_of("how", how, get_args(Way)), r=rank, density=density, seed=seed)
    kept = energy_kept(stored, weights, made) if how == "svd" else None
    name = base_model or base_model_of(adapter[0])
    manifests = [each.manifest for each in stored if each.manifest]
    manifest = Manifest(
        base_digest=manifests[0].base_digest if manifests else find(name).digest,
        kind="adapter",
        r=max(made.ranks().values(), default=0),
        num_examples=min(MOST_EXAMPLES, sum(each.num_examples for each in manifests)),
        embeddings=tuple(sorted({module for each in manifests for module in each.embeddings})),
    )
    objective = "classification" if stored[0].task_type == "SEQ_CLS" else "sft"
    write_adapter(output, made, manifest, Plan.model_validate({"base_model": name, "objective": objective}))
    parts = [{"adapter": str(folder), "weight": value} for folder, value in zip(adapter, weights, strict=True)]
    _tell(
        {"output": str(output), "how": how, "r": manifest.r, "energy_kept": kept, "adapters": parts},
        [f"{output}: {how} of {len(parts)} adapters, rank {manifest.r}" + (f", {kept:.1%} kept" if kept is not None else "")],
        as_json,
    )


def verify(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as a coordinator released or exported it.")],
    trusted: Annotated[Path | None, typer.Option(help="The coordinator's public key, a file (identity.pub).")] = None,
    enrolled: Annotated[Path | None, typer.Option(help="Instead: the federation's list; its coordinators count.")] = None,
    as_json: Json = False,
) -> None:
    """Says which federation, run, round and coordinator released an adapter, and that no file of it was changed since."""
    from protocol.enrolment import read_enrolment
    from protocol.errors import ConfigurationError, shown
    from protocol.release import check_release
    from protocol.signature import fingerprint, read_trusted

    if (trusted is None) == (enrolled is None):
        raise ConfigurationError("command line", ["expected one of --trusted and --enrolled: whose word counts"])
    keys = read_enrolment(enrolled).coordinators.values() if enrolled else read_trusted(trusted) if trusted else ()
    found = check_release(adapter, keys)
    release, key = found.release, fingerprint(found.coordinator)
    named = f", adapter {shown(release.adapter, 80)}" if release.adapter else ""
    _tell(
        {"coordinator": key, "unsigned": list(found.unsigned), **release.model_dump(mode="json")},
        [
            f"{adapter}: round {release.round} of {shown(release.federation, 80)}{named}, signed by {key}",
            f"  run {shown(release.run, 80)}, digest {release.digest}",
            *(f"  not signed: {shown(name, 80)}" for name in found.unsigned),
        ],
        as_json,
    )


@registry.command()
def publish(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder; all files in it are published.")],
    location: Where,
    name: Annotated[str, typer.Argument(help="Letters, digits, hyphens and underscores.")],
    version: Annotated[str | None, typer.Option(help="Such as 3 or 1.2.0; else the next whole number.")] = None,
    parent: Annotated[list[str] | None, typer.Option(help="Published version that it was made from; may be repeated.")] = None,
    config: Config = None,
    data_card: Annotated[Path | None, typer.Option(help="File whose digest is kept.")] = None,
    figures: Annotated[Path | None, typer.Option(help="What fedge evaluate --json printed, or its report.json.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base, for a folder without a manifest.")] = None,
    as_json: Json = False,
) -> None:
    """Publishes an adapter as a version that never changes."""
    from strategies.adapters.registry import Registry
    from strategies.adapters.version import figures_of

    digest = None
    if base_model:
        from strategies.base_model import find

        digest = find(base_model).digest
    made = Registry(location).publish(
        adapter,
        name,
        version,
        base_digest=digest,
        parents=parent or (),
        data_card=data_card,
        plan=_plan(config),
        figures=figures_of(figures, adapter) if figures else None,
    )
    _tell(_of(made), [f"{made.reference} {made.digest}"], as_json)


@registry.command("list")
def list_(
    location: Where,
    by: Annotated[str, typer.Option(help="Figure by which the leading version is told.")] = "loss",
    as_json: Json = False,
) -> None:
    """Lists adapters, their versions and tags, and of those with figures the leading version."""
    from strategies.adapters.registry import Registry

    there = Registry(location)
    found: dict[str, Any] = {}
    lines = []
    for name in there.names():
        versions, tags = there.versions(name), there.tags(name)
        best = there.leading(name, by)
        told = dict(zip(("version", "value", "rows"), best, strict=True)) | {"by": by} if best else None
        found[name] = {"versions": versions, "tags": tags, "leading": told}
        named = ", ".join(f"{tag} {version}" for tag, version in tags.items())
        leads = f"; {best[0]} leads by {by}: {best[1]:.4g} on {best[2]} rows" if best else ""
        lines.append(f"{name}: {', '.join(versions) or 'none'} ({named or 'no tags'}){leads}")
    _tell({"adapters": found}, lines or ["nothing is published here"], as_json)


@registry.command()
def show(location: Where, version: Which, as_json: Json = False) -> None:
    """Shows what a version holds and where it comes from."""
    from strategies.adapters.registry import Registry

    there = Registry(location)
    found = there.show(version)
    tags = [tag for tag, of in there.tags(found.name).items() if of == found.version]
    lineage = found.lineage.model_dump(mode="json", exclude={"plan"}, exclude_defaults=True)
    lineage |= {"parents": ", ".join(found.lineage.parents) or "none", "tags": ", ".join(tags) or "none"}
    lines = [f"{found.reference} {found.digest}", f"  published: {_time(found.published_seconds)}"]
    lines += [f"  {key}: {value}" for key, value in lineage.items()]
    if found.figures:
        values = ", ".join(f"{name} {value:.4g}" for name, value in found.figures.values.items())
        lines.append(f"  figures on {found.figures.rows} rows: {values}")
    lines += [f"  plan.{key}: {value}" for key, value in _not_default(found.lineage.plan or {})]
    lines += [f"  {path}: {file.size_bytes} bytes, {file.sha256}" for path, file in found.files.items()]
    _tell({**_of(found), "tags": tags}, lines, as_json)


@registry.command()
def fetch(
    location: Where,
    version: Which,
    output: Annotated[Path, typer.Argument(help="New folder for the adapter.")],
    as_json: Json = False,
) -> None:
    """Copies a version here, every file held against its digest."""
    from strategies.adapters.registry import Registry

    found = Registry(location).fetch(version, output)
    _tell({"output": str(output), **_of(found)}, [f"{found.reference} in {output}"], as_json)


@registry.command()
def tag(
    location: Where,
    version: Which,
    tag: Annotated[str, typer.Argument(help="Such as production.")],
    remove: Annotated[bool, typer.Option("--remove", help="Takes the tag away.")] = False,
    as_json: Json = False,
) -> None:
    """Points a tag to a version."""
    from strategies.adapters.registry import Registry

    there = Registry(location)
    found = there.tag(version, tag, remove=remove)
    _tell({"tag": tag, "version": found, "removed": remove}, [f"{tag} {'no longer' if remove else 'is'} {found}"], as_json)


@registry.command()
def prune(
    location: Where,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions of each adapter stay.")],
    name: Annotated[list[str] | None, typer.Option(help="Only of this adapter; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Removes old versions, but none that a tag names or that one which stays was made from."""
    from strategies.adapters.registry import Registry

    done = Registry(location).prune(keep, name or ())
    _tell(
        {"removed": list(done.removed), "kept": dict(done.kept)},
        [f"removed: {', '.join(done.removed) or 'none'}", *(f"{version} stays: {why}" for version, why in done.kept.items())],
        as_json,
    )


def _plan(config: Path | None) -> "Plan | None":
    if config is None:
        return None
    from protocol.configuration import load
    from strategies.job import Job

    return load(config, Job).beside(config).plan()


def _time(seconds: int) -> str:
    from datetime import UTC, datetime

    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):  # whoever can write there chose it
        return f"{seconds} s after 1970"


def _not_default(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings of a published plan that are not as they are by default, by their key."""
    from protocol.plan import Plan

    def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in settings.items():
            inner = flat(value, f"{above}{name}.") if isinstance(value, Mapping) and value else {f"{above}{name}": str(value)}
            found |= inner
        return found

    default = flat(Plan().model_dump(mode="json"))
    return [(name, value) for name, value in flat(plan).items() if default.get(name) != value]


def _of(version: "Version") -> dict[str, Any]:
    return {"digest": version.digest, **version.model_dump(mode="json", exclude={"folder", "format_version"})}


def _one_of(option: str, found: str, known: tuple[str, ...]) -> Any:
    from protocol.errors import ConfigurationError

    if found not in known:
        raise ConfigurationError("command line", [f"--{option}: found {found!r}, expected one of {', '.join(known)}"])
    return found


def _new(folder: Path) -> None:
    from protocol.errors import AdapterError

    if folder.exists():
        raise AdapterError(f"{folder}: is there already; name a new folder")


def _tell(facts: Mapping[str, Any], lines: list[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    for line in lines:
        typer.echo(line)
