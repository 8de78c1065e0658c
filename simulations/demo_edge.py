"""What the demonstration's federation has learnt, on a device: a signed bundle that answers without PyTorch."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.make import Request, make_bundle
from edge.runtime.model import open as opened
from protocol.plan import Plan
from protocol.signature import make_key, read_private, write_private, write_public
from simulations.demo import FEDERATION
from simulations.federation import Say
from simulations.institutions import INSTITUTIONS, rows
from simulations.scenario import write_rows

ADAPTER, PROFILE = "global", "q8"
_LONGEST_ANSWER = 48  # tokens


@dataclass(frozen=True)
class OnDevice:
    """What the bundle answers.

    Attributes:
        bundle: Its folder.
        size_bytes: Of all its files.
        accuracy: By institution, share of its held-out questions that are answered word for word.
        example: A question and its answer, by institution.
    """

    bundle: Path
    size_bytes: int
    accuracy: Mapping[str, float]
    example: Mapping[str, tuple[str, str]]


def answer_on_device(output: Path, say: Say) -> OnDevice:
    """Exports the base with the federation's adapter, and asks the bundle every held-out question.

    Args:
        output: The demonstration's; ``bundle`` and the keys appear in it, the bundle anew.
        say: Called with a line before each stage.
    """
    bundle, private = output / "bundle", output / "bundle-key"
    if not private.exists():
        key = make_key()
        write_private(private, key)
        write_public(private.with_suffix(".pub"), key.public_key(), "demo")
    key = read_private(private)
    if bundle.exists():
        shutil.rmtree(bundle)
    adapter, asked = output / "adapter", output / "data" / "questions.jsonl"
    some: list[dict[str, object]] = [
        dict(row) for institution in INSTITUTIONS for row in list(rows(institution.name, "test"))[::3]
    ]
    write_rows(asked, some)  # for the parity gate, which reads slowly: one text at a time
    plan = Plan.model_validate(FEDERATION["plan"])
    request = Request(plan.base_model, bundle, key, {ADAPTER: adapter}, profile=PROFILE, name="demo", plan=plan, rows=asked)
    model = opened(make_bundle(request, say), key.public_key(), state=None)
    model.load_adapter(ADAPTER)
    say("asking the bundle every held-out question")
    accuracy, example = {}, {}
    for institution in INSTITUTIONS:
        held_out = list(rows(institution.name, "test"))
        questions = [[{"role": "user", "content": row["input_text"]}] for row in held_out]
        told = model.generate_all(questions, adapter=ADAPTER, max_new_tokens=_LONGEST_ANSWER, batch_size=16)
        answers = [each.text.strip() for each in told]
        right = [answer == row["target_text"] for answer, row in zip(answers, held_out, strict=True)]
        accuracy[institution.name] = sum(right) / len(right)
        example[institution.name] = (held_out[0]["input_text"], answers[0])
    return OnDevice(bundle, model.manifest.size_bytes, accuracy, example)
