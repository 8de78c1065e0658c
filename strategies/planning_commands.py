"""Verbs that look before they train: ``fedge probe-hardware``, ``memory``, ``plan``, ``compare`` and ``roadmap``."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protocol.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from strategies.calibration import Point
    from strategies.hardware import Gpu
    from strategies.memory import Estimate
    from strategies.request import Answer
    from strategies.roadmap import Phase
    from strategies.selector import Candidate

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")]
GpuMemory = Annotated[str | None, typer.Option(help="Memory of each GPU instead of what is here, such as 24GB or 24GiB.")]
Gpus = Annotated[int | None, typer.Option(help="Number of GPUs instead of what is here; 0 for none.")]
Profile = Annotated[str | None, typer.Option(help="A named machine, such as rtx-4090, a100-80gb, t4, laptop-cpu or phone.")]


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.command("probe-hardware")(probe_hardware)
    app.command()(memory)
    app.command()(plan)
    app.command()(compare)
    app.command()(roadmap)


def probe_hardware(gpu_memory: GpuMemory = None, gpus: Gpus = None, profile: Profile = None, as_json: Json = False) -> None:
    """Shows what this machine can be used for; nothing of it is sent anywhere."""
    from strategies.hardware import override, probe

    found = override(probe(), profile=profile, gpu_memory=gpu_memory, gpus=gpus)
    rest = {key: value for key, value in asdict(found).items() if key != "gpus"}
    if as_json:
        typer.echo(json.dumps({"gpus": [_gpu(gpu) for gpu in found.gpus], **rest}))
        return
    from rich.table import Table

    table = Table("what", "found", title="hardware")
    for at, gpu in enumerate(found.gpus):
        major, minor = gpu.compute_capability
        kernels = ", ".join(sorted(gpu.bitsandbytes)) or "none"
        fast = f"{gpu.rates.bandwidth / 1e9:.0f} GB/s" if gpu.rates else "rates not known"
        table.add_row(
            f"GPU {at}",
            f"{gpu.name}: {gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free, "
            f"compute capability {major}.{minor}, "
            f"{'bf16' if gpu.bf16 else 'no bf16'}, bitsandbytes {kernels}, {fast}",
        )
    if not found.gpus:
        table.add_row("GPU", "none")
    table.add_row("CPU cores", str(found.cpu_cores))
    table.add_row("RAM", f"{found.ram_free_bytes / 1e9:.1f} of {found.ram_total_bytes / 1e9:.1f} GB free")
    table.add_row("disk", f"{found.disk_free_bytes / 1e9:.0f} GB free")
    _console().print(table)


def memory(
    config: Annotated[str, typer.Option(help="config.json, folder, hub name, installed package with a model, or tiny.")],
    method: Annotated[str, typer.Option(help="full, lora, qlora or adapter.")] = "lora",
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    targets: Annotated[str, typer.Option(help="all-linear, or module names with commas.")] = "all-linear",
    batch_size: Annotated[int, typer.Option(help="Rows of a step on each GPU.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Compute layers again.")] = False,
    gradient_accumulation: Annotated[bool, typer.Option("--gradient-accumulation", help="More than one batch a step.")] = False,
    optimizer: Annotated[str, typer.Option(help="As transformers calls it.")] = "adamw_torch",
    loss: Annotated[str, typer.Option(help="hf, chunked (TRL) or liger.")] = "hf",
    objective: Annotated[str, typer.Option(help="sft, classification, dpo, reward or rl.")] = "sft",
    reference: Annotated[str | None, typer.Option(help="model, adapter-off, precomputed or none; dpo and rl.")] = None,
    base_dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    mixed_precision: Annotated[str, typer.Option(help="none, bf16 or fp16: autocast.")] = "none",
    quantization: Annotated[str | None, typer.Option(help="none, nf4, nf4-dq, int8 or gptq4; qlora: nf4.")] = None,
    kbit_preparation: Annotated[
        bool,
        typer.Option("--kbit-preparation", help="All that is not quantised in float32, as fedge train and PEFT's guide do."),
    ] = False,
    attention: Annotated[str, typer.Option(help="flash, sdpa or eager.")] = "sdpa",
    lora_dropout: Annotated[float, typer.Option(help="Of LoRA's input.")] = 0.0,
    trained_parameters: Annotated[int, typer.Option(help="Trained besides; all that method adapter trains.")] = 0,
    gpus: Annotated[int, typer.Option(help="GPUs that share the work.")] = 1,
    sharding: Annotated[str, typer.Option(help="none, zero2, zero3 or fsdp.")] = "none",
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    as_json: Json = False,
) -> None:
    """Estimates the peak memory of a training step, part by part; downloads no weights."""
    from protocol.errors import ConfigurationError, ModelError
    from strategies.architecture import read
    from strategies.memory import Setup, estimate

    if reference is None:
        reference = ("model" if method == "full" else "adapter-off") if objective in ("dpo", "rl") else "none"
    values: dict[str, Any] = {
        "method": method,
        "rank": rank,
        "targets": "all-linear"
        if targets == "all-linear"
        else tuple(name.strip() for name in targets.split(",") if name.strip()),
        "batch": batch_size,
        "sequence": sequence_length,
        "gradient_checkpointing": gradient_checkpointing,
        "accumulates": gradient_accumulation,
        "quantization": quantization or ("nf4" if method == "qlora" else "none"),
    }
    values |= {"optimizer": optimizer, "loss": loss, "objective": objective, "reference": reference, "base_dtype": base_dtype}
    values |= {"mixed_precision": mixed_precision, "kbit_preparation": kbit_preparation, "attention": attention, "gpus": gpus}
    values |= {"sharding": sharding, "device": device, "lora_dropout": lora_dropout, "trained_parameters": trained_parameters}
    problems: list[str] = []
    try:
        setup = Setup(**values)
    except ConfigurationError as error:
        problems += error.problems
    architecture = None
    try:
        # A hub is asked, again and again, only where an answer will come of it.
        if problems and not Path(config).expanduser().exists() and config != "tiny":
            raise ModelError(f"{shown(config, 200)} was not looked for: it is no file or folder, and the rest is not right yet")
        architecture = read(config)
        if method in ("lora", "qlora"):
            architecture.targets(values["targets"])
    except ModelError as error:
        problems.append(f"{'targets' if architecture else 'config'}: {error}")
    if problems or architecture is None:
        raise ConfigurationError("fedge memory", problems)
    found = estimate(architecture, setup)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "parameters": architecture.parameters, "setup": asdict(setup)}))
        return
    _show(f"{architecture.model_type}, {architecture.parameters / 1e9:.2f} B parameters, {method}", found)
    if 0 < architecture.context < sequence_length:
        typer.echo(f"! the base reads {architecture.context} tokens at most; rows of {sequence_length} are cut to that")


Question = Annotated[Path | None, typer.Argument(help="YAML: base_model, data, task, limits, hardware, wishes.")]
BaseModel = Annotated[str | None, typer.Option(help="Hub name, folder, config.json, installed package, or tiny.")]
Data = Annotated[Path | None, typer.Option(help="Training rows, to measure facts on.")]
TaskFacts = Annotated[
    list[str] | None, typer.Option("--task", help="A fact or wish of the task, such as rows=5000 or quality=critical.")
]
Allowed = Annotated[list[str] | None, typer.Option("--limit", help="What is allowed, such as hours=8 or max_rank=16.")]
Wishes = Annotated[list[str] | None, typer.Option("--wish", help="A field of the plan that must be so: method=lora, lora.r=8.")]


def plan(
    question: Question = None,
    base_model: BaseModel = None,
    data: Data = None,
    task: TaskFacts = None,
    limit: Allowed = None,
    wish: Wishes = None,
    gpu_memory: GpuMemory = None,
    gpus: Gpus = None,
    profile: Profile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also every reason, rule and rung of the ladder.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Take a few real steps here first, and keep what they show.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the YAML that fedge train takes, with every stage.")] = None,
    as_json: Json = False,
) -> None:
    """Finds the best way to fine-tune that fits this machine, and says why."""
    from strategies.request import answer

    asked = _asked(question, base_model, data, task, limit, wish, gpu_memory, gpus, profile, output, calibrate=calibrate)
    found, measured = answer(asked), None
    if calibrate and found.selection.chosen:
        from strategies.calibration import calibrate as measure

        shown_here = measure(found.selection.chosen.plan.model_copy(update={"base_model": asked.base_model}))
        found, measured = answer(asked, shown_here), shown_here.points[-1]
    written = _write(found, output) if output else []
    if as_json:
        told = {"calibrated": measured.model_dump()} if measured else {}
        typer.echo(json.dumps({**_answered(found), **told, "written": [str(path) for path in written]}))
    else:
        _show_measured(measured)
        _show_answer(found, explain=explain)
        for path in written:
            typer.echo(f"wrote {path}")
            if asked.data is None:
                typer.echo("! it names no rows: add data.train before fedge train, or plan with --data")
    if found.selection.chosen is None:
        raise typer.Exit(1)


def compare(
    question: Question = None,
    base_model: BaseModel = None,
    data: Data = None,
    task: TaskFacts = None,
    limit: Allowed = None,
    wish: Wishes = None,
    gpu_memory: GpuMemory = None,
    gpus: Gpus = None,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Puts every strategy side by side: memory, hours, money, expected quality, complexity, what it is worth."""
    from strategies.request import answer

    found = answer(_asked(question, base_model, data, task, limit, wish, gpu_memory, gpus, profile))
    if as_json:
        rejected = [asdict(one) for one in found.selection.rejected]
        told = {"strategies": [_told(one) for one in found.selection.feasible], "rejected": rejected}
        typer.echo(json.dumps(told | {"warnings": found.selection.warnings}))
    else:
        _show_candidates(found)
        _show_warnings(found)
    if not found.selection.feasible:
        raise typer.Exit(1)


def roadmap(
    question: Question = None,
    base_model: BaseModel = None,
    data: Data = None,
    task: TaskFacts = None,
    limit: Allowed = None,
    wish: Wishes = None,
    gpu_memory: GpuMemory = None,
    gpus: Gpus = None,
    profile: Profile = None,
    as_json: Json = False,
) -> None:
    """Lays out the way from a quick validation to production, made from the plan that was chosen."""
    from strategies.request import answer
    from strategies.roadmap import roadmap as lay_out

    found = answer(_asked(question, base_model, data, task, limit, wish, gpu_memory, gpus, profile))
    phases = lay_out(found)
    if as_json:
        rejected = [asdict(one) for one in found.selection.rejected] if not phases else []
        told = {"phases": [_phase(phase) for phase in phases], "warnings": found.selection.warnings, "rejected": rejected}
        typer.echo(json.dumps(told))
    elif phases:
        for number, phase in enumerate(phases, 1):
            _show_phase(number, phase)
    else:
        _show_answer(found, explain=False)
    if not phases:
        raise typer.Exit(1)


def _asked(
    question: Path | None,
    base_model: str | None,
    data: Path | None,
    task: Sequence[str] | None,
    limit: Sequence[str] | None,
    wish: Sequence[str] | None,
    gpu_memory: str | None,
    gpus: int | None,
    profile: str | None,
    output: Path | None = None,
    *,
    calibrate: bool = False,
) -> Any:
    """The request of a file, with what the command line says on top."""
    from protocol.configuration import parse, read_yaml
    from strategies.request import Request
    from strategies.request import asked as checked

    content = {} if question is None else read_yaml(question)
    if not isinstance(content, dict):
        parse(content, Request, source=str(question))
    if data is None and question is not None and isinstance(named := content.get("data"), str):
        content["data"] = str(question.resolve().parent / named)
    content |= {name: value for name, value in (("base_model", base_model), ("data", data and str(data))) if value is not None}
    read = [question, *(Path(one) for name in ("data", "base_model") if isinstance(one := content.get(name), str))]
    problems = _unwritable(output, read) if output else []
    machine = {"gpu_memory": gpu_memory, "gpus": gpus, "profile": profile}
    said = {"task": _pairs(task or (), "--task", problems), "limits": _pairs(limit or (), "--limit", problems)}
    said |= {"wishes": _pairs(wish or (), "--wish", problems)}
    said |= {"hardware": {name: value for name, value in machine.items() if value is not None}}
    for section, given in said.items():
        if (there := content.get(section)) is None:
            content[section] = given
        elif isinstance(there, dict):
            content[section] = {**there, **given}
    if calibrate and content["hardware"]:
        problems.append("--calibrate: measures this machine and no described one; leave out the hardware")
    return checked(content, str(question or "command line"), problems)


def _unwritable(output: Path, read: Sequence[Path | None]) -> list[str]:
    """Why a file must not be written there."""
    expected = "expected the path of a YAML file, new or to be replaced"
    try:
        if output.exists() and not output.is_file():
            return [f"--output: {output} is no file; {expected}"]
        if output.exists() and any(one is not None and one.resolve() == output.resolve() for one in read):
            return [f"--output: {output} is what is read here; {expected}"]
        above = next(folder for folder in output.resolve().parents if folder.exists())
    except OSError as error:
        return [f"--output: {error.strerror}; {expected}"]
    if not above.is_dir() or not os.access(above, os.W_OK):
        return [f"--output: nothing can be written below {above}; {expected}"]
    return []


def _pairs(given: Sequence[str], option: str, problems: list[str]) -> dict[str, Any]:
    from protocol.configuration import value_of

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            problems.append(f"{option}: found {text[:100]!r}, expected NAME=VALUE")
            continue
        found[name] = value_of(value)
    return found


def _write(found: "Answer", output: Path) -> list[Path]:
    """The job, with all of its stages."""
    import yaml

    from protocol.files import write_whole
    from strategies.request import job_of

    chosen = found.selection.chosen
    if chosen is None:
        return []
    kept = (output.parent / "runs" / output.stem).resolve()
    write_whole(output, yaml.safe_dump(job_of(chosen.stages, chosen.why, found.request, kept), sort_keys=False))
    return [output]


def _answered(found: "Answer") -> dict[str, Any]:
    selection = found.selection
    return {
        "chosen": _told(selection.chosen) if selection.chosen else None,
        "feasible": [_told(one) for one in selection.feasible],
        "rejected": [asdict(one) for one in selection.rejected],
        "rules": [rule.id for rule in selection.rules],
        "advice": list(selection.advice),
        "warnings": list(selection.warnings),
        "ladder": [{"change": rung.change, "needs_bytes": rung.needs_bytes} for rung in selection.ladder],
        "tier": selection.tier,
        "task": found.task.model_dump(mode="json"),
        "measured": list(found.measured),
        "assumed": found.assumed,
    }


def _told(one: "Candidate") -> dict[str, Any]:
    return {
        "name": one.name,
        "rule": one.rule.id,
        "stages": [stage.model_dump(mode="json", exclude_defaults=True) for stage in one.stages],
        "reasons": dict(one.reasons),
        "stage_reasons": [dict(why) for why in one.why],
        "given_up": list(one.given_up),
        "peak_bytes": one.peak_bytes,
        "hours": None if one.seconds is None else one.seconds / 3600,
        "money": one.money,
        "kwh": one.kwh,
        "quality": one.quality,
        "complexity": one.complexity,
        "preference": one.preference,
        "value": one.value,
    }


def _phase(phase: "Phase") -> dict[str, Any]:
    told = {key: value for key, value in vars(phase).items() if key != "plan"}
    return told | {"plan": phase.plan.model_dump(mode="json", exclude_defaults=True) if phase.plan else None}


def _show_answer(found: "Answer", *, explain: bool) -> None:
    from strategies.request import decided

    console, selection = _console(), found.selection
    if found.assumed:
        console.print(f"assumed, for want of data: {', '.join(f'{name}={value}' for name, value in found.assumed.items())}")
    if one := selection.chosen:
        console.print(f"chosen: {one.name}")
        before: dict[str, Any] = {}
        for number, (stage, why) in enumerate(zip(one.stages, one.why, strict=True), 1):
            fields = decided(stage, why)
            if len(one.stages) > 1:
                console.print(f"stage {number}: {stage.objective}{' (the rest as in stage 1)' if before else ''}")
            table = _plain_table("field", "value", "why")
            for name, value in fields.items():
                if name not in before or before[name] != value:
                    table.add_row(name, _short(value), why.get(name, ""))
            console.print(table)
            before = before or fields
    _show_candidates(found)
    _show_warnings(found)
    for advice in selection.advice if selection.chosen else ():
        console.print(f"· {advice}")
    if not explain:
        return
    console.print(f"tier: {selection.tier}")
    for rule in selection.rules:
        when = " and ".join(map(str, rule.when)) or "always"
        console.print(f"rule {rule.id}: {when} ({rule.source})")
    for rung in selection.ladder:
        console.print(f"on out of memory: {rung.change} ({rung.needs_bytes / 1e9:.1f} GB)")
    if found.measured:
        console.print(f"measured on the data: {', '.join(f'{n}={getattr(found.task, n)}' for n in found.measured)}")


def _show_measured(point: "Point | None") -> None:
    if point is None:
        return
    memory = f", {point.bytes / 1e9:.2f} GB (estimated {point.estimated_bytes / 1e9:.2f})" if point.bytes else ""
    typer.echo(
        f"measured on {point.device}: {point.seconds:.3g} s a step (estimated {point.estimated_seconds:.3g}){memory}; kept, "
        "and estimates here are corrected by it. Evaluations and loading the model come on top."
    )


def _show_warnings(found: "Answer") -> None:
    for warning in found.selection.warnings:
        _console().print(f"! {warning}")


def _show_candidates(found: "Answer") -> None:
    limits = found.request.limits
    price = ("money",) if limits.gpu_hour is not None or limits.kwh is not None else ()
    table, console = _plain_table("strategy", "GB", "time", *price, "kWh", "quality", "complexity", "value"), _console()
    for one in found.selection.feasible:
        money = "?" if one.money is None else f"{one.money:.2f}"
        kwh = "?" if one.kwh is None else f"{one.kwh:.2g}"
        row = (f"{one.peak_bytes / 1e9:.1f}", _lasting(one.seconds), *((money,) if price else ()), kwh, one.quality)
        table.add_row(f"{one.name}{' *' if one.given_up else ''}", *row, str(one.complexity), f"{one.value:.3g}")
    if found.selection.feasible:
        console.print("\nwhat fits")
        console.print(table)
    for one in found.selection.feasible:
        if one.given_up and one is not found.selection.chosen:  # of the chosen one, the warnings say it
            console.print(f"* {one.name}: {'; '.join(one.given_up)}")
    reasons: dict[str, list[str]] = {}
    for rejected in found.selection.rejected:
        reasons.setdefault(rejected.reason, []).append(rejected.name)
    out = _plain_table("strategy", "why not")
    for reason, names in reasons.items():
        out.add_row("; ".join(names), reason)
    if reasons:
        console.print("\nwhat does not")
        console.print(out)


def _show_phase(number: int, phase: "Phase") -> None:
    from rich.text import Text

    console = _console()
    console.print(Text(f"{number}. {phase.name}", style="bold") + f": {phase.goal}")
    if phase.plan:
        hours = "time not known" if phase.hours is None else _lasting(3600 * phase.hours)
        money = "" if phase.money is None else f", {phase.money:.2f}"
        console.print(f"   {phase.strategy}, {phase.rows} rows, {phase.peak_bytes / 1e9:.1f} GB, {hours}{money}")
    for title, lines in (("begins when", phase.entry), ("ends when", phase.exit), ("risk", phase.risks)):
        for line in lines:
            console.print(f"   {title}: {line}")


def _console() -> "Console":
    """Prints names and reasons as they are: what stands in brackets is no markup."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def _plain_table(*columns: str) -> "Table":
    """Without lines: names of fields must be read whole, and a terminal may have 80 columns."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for at, name in enumerate(columns):
        table.add_column(name, no_wrap=name == "field" or (at == 0 and len(columns) > 2), overflow="fold")
    return table


def _lasting(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    value, unit = (seconds, "s") if seconds < 100 else (seconds / 60, "min") if seconds < 6000 else (seconds / 3600, "h")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _short(value: Any) -> str:
    text = shown(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return text if len(text) <= 40 else f"{text[:37]}…"


def _gpu(gpu: "Gpu") -> dict[str, object]:
    return {**asdict(gpu), "bf16": gpu.bf16, "bitsandbytes": sorted(gpu.bitsandbytes)}


_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "bright_blue", "bright_green", "bright_magenta")


def _show(title: str, found: "Estimate") -> None:
    from rich.table import Table
    from rich.text import Text

    beyond = {
        "fragmentation": found.reserved_bytes - found.peak_bytes,
        "context": found.device_bytes - found.reserved_bytes,
    }
    parts = {**found.parts, **{name: size for name, size in beyond.items() if size}}
    table, bar, console = Table("part", "GB", "share", title=title), Text(), _console()
    width, block = max(20, min(console.width, 100) - 2), "█" if console.encoding.startswith("utf") else "#"
    for (name, size), colour in zip(sorted(parts.items(), key=lambda item: -item[1]), _COLOURS * 2, strict=False):
        table.add_row(Text(name, style=colour), f"{size / 1e9:.2f}", f"{size / found.device_bytes:.0%}")
        bar.append(block * round(width * size / found.device_bytes), style=colour)
    console.print(table)
    console.print("shares of the device's memory that is taken, in the order of the table:")
    console.print(bar)
    console.print(
        f"peak {found.peak_bytes / 1e9:.2f} GB ({found.moment}), reserved {found.reserved_bytes / 1e9:.2f}, "
        f"on the device {found.device_bytes / 1e9:.2f}"
    )
