"""The verb ``fedge generate``: answers of a base and of adapters."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from protocol.plan import Plan

Json = Annotated[bool, typer.Option("--json", help="One JSON line instead of tables.")]


def mount(app: typer.Typer) -> None:
    """Adds the verbs to the command."""
    app.command()(generate)


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
    from protocol.errors import ConfigurationError
    from protocol.files import base_model_of, read_stored
    from protocol.plan import QUANTISED
    from strategies.adapters.serving import Served
    from strategies.base_model import EMBEDDED, find

    if odd := [at for at, question in enumerate(questions, 1) if re.search("[\ud800-\udfff]", question)]:
        raise ConfigurationError("command line", [f"question {at}: is not UTF-8; send it as UTF-8" for at in odd])
    name = base_model or (base_model_of(adapter[0]) if adapter else EMBEDDED)
    method = "qlora" if precision in QUANTISED else "lora"
    told = {"base_model": name, "precision": precision, "method": method, "data": {"max_length": max_new_tokens}}
    plan = parse(told, Plan, source="command line")
    base = find(name)
    stored = {str(folder): read_stored(folder, base_digest=base.digest) for folder in adapter or []}
    for each in stored.values():
        each.on(plan)  # what does not fit is refused before the base is loaded
    served = Served(plan, base)
    answers = {"base": served.answer(None, questions, max_new_tokens)}
    for who, each in stored.items():
        served.add(who, each)
        answers[who] = served.answer(who, questions, max_new_tokens)
    if as_json:
        typer.echo(json.dumps({"questions": questions, "answers": answers}, ensure_ascii=False))
        return
    for at, question in enumerate(questions):
        typer.echo(f"? {question}")
        for who, texts in answers.items():
            typer.echo(f"  {who}: {texts[at]}")
