"""Which method trains which objective on which kind of base: the page ``docs/matrix.md``.

    python -m tools.matrix > docs/matrix.md

Nothing is trained for it. Each pair is a plan, and the shape of its adapter is read from a base's configuration: whatever
refuses says why. That the others train, save, load and predict is what the tests of the matrix show.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from protocol.adapter import Adapter, Factors
from protocol.configuration import parse
from protocol.errors import ConfigurationError, ModelError
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Method, Objective, Plan
from strategies.base_model import Base, find
from strategies.methods.registry import shape

METHODS: tuple[Method, ...] = get_args(Method)
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
# What a plan needs beside its method's or its objective's name.
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "qlora": {"precision": "nf4"},
    "bitfit": {"bitfit": {"add_missing": True}},
    "classification": {"data": {"labels": ["a", "b"]}},
    "distillation": {"distillation": {"teacher": {"base_model": "tiny"}}},
    "rl": {"rl": {"reward_functions": ["rewards:length"], "max_completion_length": 4}},
}
_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
# Each kind of base as a configuration of it.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "decoder": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "decoder with experts": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_key_value_heads": 2,
    },
    "encoder": {"model_type": "bert", "architectures": ["BertModel"]},
}
_HEAD = """# Methods and objectives

Made by `python -m tools.matrix`; the tests hold it to what the code says, and train every pair that is not refused.

A method says what trains, an objective what is optimised; they combine freely. **yes**: the pair trains, is saved, loads and
predicts what it did. A number: it is refused before anything is loaded, with the reason below.
"""


def plan_of(method: str, objective: str, base_model: str, adapters: Sequence[str] = ("legal", "medical")) -> dict[str, Any]:
    """The smallest plan of a pair, as YAML would hold it; ``adapters`` are what xlora mixes."""
    own = {**NEEDED.get(method, {}), **NEEDED.get(objective, {})}
    if method == "xlora":
        own["xlora"] = {"adapters": list(adapters)}
    data = {"max_length": 64, **own.get("data", {})}
    return {"base_model": base_model, "method": method, "objective": objective, **own, "data": data}


def two_adapters(base: Base, folder: Path) -> list[str]:
    """Folders of two small LoRA adapters of a base that writes."""
    plan = Plan(base_model=base.name)
    module, (d_out, d_in) = next(iter(shape(base, plan).modules.items()))
    made = []
    for seed in range(2):
        drawn = np.random.default_rng(seed).standard_normal((2, max(d_out, d_in), 1)).astype(np.float32)
        adapter = Adapter({module: Factors(drawn[0, :d_in].T, drawn[1, :d_out])})
        made.append(folder / f"lora-{seed}")
        write_adapter(made[-1], adapter, Manifest(base_digest="0" * 64, kind="adapter", method="lora"), plan)
    return [str(place) for place in made]


def refusal(method: str, objective: str, base: Base, adapters: Sequence[str]) -> str | None:
    """Why a pair does not go together on a base; None where it does."""
    try:
        shape(base, parse(plan_of(method, objective, base.name, adapters), Plan, source="plan"))
    except ConfigurationError as error:
        found = "; ".join(problem.removeprefix("(whole file): ") for problem in error.problems)
    except ModelError as error:
        found = str(error)
    else:
        return None
    return re.sub(rf"\b(for|objective) {objective}\b", r"\1 this", found).replace("objective this", "this objective")


def bases(folder: Path) -> Iterator[Base]:
    """A base of each kind, as a configuration without weights; the decoder is the embedded one."""
    for name, own in KINDS.items():
        if name == "decoder":
            yield Base(name, find("tiny").folder, name)
            continue
        place = folder / name.replace(" ", "-")
        place.mkdir()
        (place / "config.json").write_text(json.dumps({**_SHAPE, **own}))
        yield Base(name, place, name)


def page() -> str:
    """The page, as Markdown."""
    reasons: dict[str, int] = {}
    parts = [_HEAD]
    with tempfile.TemporaryDirectory() as scratch:
        for base in bases(Path(scratch)):
            adapters = ["legal", "medical"] if base.name == "encoder" else two_adapters(base, Path(scratch))
            parts += [f"## On {'an' if base.name[0] in 'aeiou' else 'a'} {base.name}\n", *_table(base, adapters, reasons), ""]
    parts += ["## Reasons\n", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    parts += [
        "## What such a plan needs beside the two names\n",
        '- `xlora`: `{"xlora": {"adapters": [FOLDER, FOLDER]}}`',
        *(f"- `{name}`: `{json.dumps(own)}`" for name, own in NEEDED.items()),
    ]
    return "\n".join(parts) + "\n"


def _table(base: Base, adapters: Sequence[str], reasons: dict[str, int]) -> Iterator[str]:
    yield f"| | {' | '.join(OBJECTIVES)} |"
    yield f"|---|{'---|' * len(OBJECTIVES)}"
    for method in METHODS:
        told = (refusal(method, objective, base, adapters) for objective in OBJECTIVES)
        cells = ("yes" if reason is None else str(reasons.setdefault(reason, len(reasons) + 1)) for reason in told)
        yield f"| {method} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(page(), end="")
