"""The verb ``fedge label``: rows that models make, written to a file and not trained on."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def mount(app: typer.Typer) -> None:
    """Adds the verb to the command."""
    app.command()(label)


def label(
    config: Annotated[Path, typer.Argument(help="The YAML file of a job with ai_feedback, or with a teacher of kind text.")],
    output: Annotated[Path | None, typer.Option(help="JSONL file to write; else labelled.jsonl in the job's output.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line instead of text.")] = False,
) -> None:
    """Has prompts answered, and the answers judged, as a job would before it trains; writes the rows."""
    from protocol.adapter import Adapter
    from protocol.configuration import load
    from protocol.errors import ConfigurationError
    from protocol.files import read_adapter, write_whole
    from strategies.base_model import find
    from strategies.data.ai_feedback import made
    from strategies.data.prepared import file_rows
    from strategies.job import Job

    job = load(config, Job).beside(config)
    if job.data.train is None or (job.ai_feedback is None and (job.distillation is None or job.distillation.kind != "text")):
        raise ConfigurationError(str(config), ["ai_feedback: missing, and no distillation of kind text; name who labels"])
    plan, base = job.plan(), find(job.base_model)
    present = read_adapter(job.start, base_digest=base.digest)[0] if job.start else Adapter()
    found = made(file_rows(plan, job.data.train)[0], plan, base, present, training=True)
    path = output or job.output / "labelled.jsonl"
    write_whole(path, "".join(json.dumps(_written(row), ensure_ascii=False) + "\n" for row in found.rows))
    told = {"rows": len(found.rows), "file": str(path), **found.metrics}
    lines = [f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}" for name, value in told.items()]
    typer.echo(json.dumps(told) if as_json else "\n".join(lines))


def _written(row: Any) -> dict[str, Any]:
    from strategies.data.formats import Preference

    prompt = list(row.prompt)
    if isinstance(row, Preference):
        return {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}
    return {"messages": [*prompt, {"role": "assistant", "content": row.answer}]}
