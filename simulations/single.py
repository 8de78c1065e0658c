"""Ordinary fine-tuning: each stage of a job is a federation of one client and one round, through the same round code."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from client.allowed import everything
from client.node import Node
from client.round import held_out_rows, join
from protocol.errors import FederationError
from protocol.federation import AggregationSettings, Federation, RoundSettings
from protocol.files import read_adapter, whole_folder, write_whole
from protocol.records import Call
from server.events import finite
from server.ledger import Ledger, RoundRecord
from simulations.federation import federate
from strategies.base_model import find
from strategies.data.card import CARD, TEMPLATE
from strategies.data.formats import Feedback, Row
from strategies.job import Job
from strategies.progress import HISTORY
from strategies.training import can_train

log = logging.getLogger(__name__)
ADAPTER, MODEL, MEMORY = "adapter", "model", "memory"
_STAGE = "stage.json"
_FEW = 20
_RECORD = TypeAdapter(RoundRecord)


def train_alone(
    job: Job,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    watch: Callable[[Job, RoundRecord], None] = lambda stage, record: None,
) -> RoundRecord:
    """Trains a job; the adapter, of its last stage, is in ``OUTPUT/adapter`` afterwards.

    Where weights of the base themselves train (full, freezing), the adapter is their change at the plan's rank; the model
    as it was trained, with nothing left out, is in ``OUTPUT/model`` (of a stage: in its own folder), which can be a
    ``base_model`` itself.

    A job that died goes on where it was when it is given again. A stage that is done is not trained again while its plan, its
    data and what it begins with are the same; of one that is not the same nothing is taken over.

    Args:
        job: One or several stages.
        progress: Say on standard error how far training is.
        say: Called with a line before each stage.
        watch: Called with each stage and its round as soon as it is done.

    Returns:
        The last stage's round.

    Raises:
        UserError: Plan, data and base do not fit together; nothing has been written then.
        FederationError: Training or measuring failed; the reason is in the log.
    """
    stages = job.jobs()
    for stage in stages:
        can_train(stage.plan())
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            say(f"stage {number} of {len(stages)}: {stage.objective}, {stage.output}")
        record = _stage(stage, progress=progress, say=say)
        watch(stage, record)
    if len(stages) > 1:
        with whole_folder(job.output / ADAPTER) as draft:
            shutil.copytree(stages[-1].output / ADAPTER, draft, dirs_exist_ok=True)
    return record


def _stage(job: Job, *, progress: bool, say: Callable[[str], None]) -> RoundRecord:
    digest, known = _digest(job), _known(job.output)
    if known.get("digest") == digest and (record := _done(known)) and (job.output / ADAPTER).is_dir():
        say(f"{job.output} is trained already, with the same plan, data and start; it is left as it is")
        return record
    federation, node = _federation(job, progress=progress)
    held_out = held_out_rows(federation.plan, node)  # what is wrong with rows shows before anything heavy is loaded
    join(Call(federation=federation.name, round=0, rounds=1, plan=federation.plan), node, aloud=False)
    for line in _doubts(held_out, job):
        log.warning("%s", line)
    if known and known.get("digest") != digest:
        log.warning("%s was begun with another plan, other data or another start; it begins anew", job.output)
        _end(job.output)
    _note(job.output, {"digest": digest})
    record = federate(federation, [node]).kept[""].record
    if record.evaluation_refused:
        raise FederationError(
            f"trained into {job.output}, but the held-out rows could not be measured: {record.evaluation_refused}"
        )
    own = job.output / federation.name  # the node's own folder
    for path in (own / CARD, own / TEMPLATE, own / "round-0001" / HISTORY):
        if path.is_file():
            shutil.copyfile(path, job.output / ADAPTER / path.name)
    _note(job.output, {"digest": digest, "record": finite(asdict(record))})
    return record


def _doubts(held_out: Sequence[Row], job: Job) -> Iterator[str]:
    """Why figures of the held-out rows will say little."""
    if len(held_out) < _FEW:
        shared = job.data.evaluate is None and not job.data.tasks
        where = f" (data.evaluate_fraction is {job.data.evaluate_fraction:g})" if shared else ""
        yield f"held-out rows: only {len(held_out)}{where}; their figures are rough, so give more in data.evaluate"
    if job.objective == "kto" and len({row.liked for row in held_out if isinstance(row, Feedback)}) == 1:
        yield "held-out rows: all are liked, or none is; one of reward-desirable and reward-undesirable will be missing"


def _federation(job: Job, *, progress: bool) -> tuple[Federation, Node]:
    """One round of one node."""
    plan = job.plan()
    own = Node(
        name="local",
        train=job.data.train,
        evaluate=job.data.evaluate,
        tasks=job.data.tasks,
        replay=job.data.replay,
        probe=job.forgetting and job.forgetting.probe,
        folder=job.output,
        state=job.output / MEMORY,
        whole_model=job.output / MODEL,
        progress=progress,
    )
    published = plan.without_rows()
    start = job.start and job.start.resolve()
    ranks = read_adapter(start)[0].ranks().values() if start else ()
    federation = Federation(
        name="local",
        plan=published,
        rounds=RoundSettings(count=1, retries=0),
        aggregation=AggregationSettings(rank_cap=max([plan.update_rank, *ranks])),
        start=start,
        output=job.output,
    )
    return federation, own.model_copy(update=everything([plan]))


def _digest(job: Job) -> str:
    """SHA-256 of all that decides what a stage makes: its plan, its base, the content of its files and of its start."""
    plan = job.plan()
    digest = hashlib.sha256(f"{plan.model_dump_json()}\0{find(plan.base_model).digest}".encode())
    named = [
        value
        for value in _values(plan.model_dump(include={"data", "forgetting"}, exclude={"data": {"augmentation": {"written"}}}))
        if isinstance(value, Path)
    ]
    named += [Path(plan.rl.reward_model)] if plan.rl.reward_model else []
    for path in [*named, *([job.start] if job.start else [])]:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _values(content: Any) -> Iterator[Any]:
    """Everything in mappings and lists, however deep."""
    if isinstance(content, Mapping | list | tuple):
        for item in content.values() if isinstance(content, Mapping) else content:
            yield from _values(item)
    else:
        yield content


def _known(output: Path) -> dict[str, Any]:
    try:
        found = json.loads((output / _STAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _done(known: Mapping[str, Any]) -> RoundRecord | None:
    try:
        return _RECORD.validate_python(known["record"])
    except (KeyError, ValidationError):
        return None


def _note(output: Path, facts: Mapping[str, Any]) -> None:
    write_whole(output / _STAGE, json.dumps(facts, indent=2))


def _end(output: Path) -> None:
    """What died between its round and its end is over: another training may begin in its folder."""
    if (output / "rounds").is_dir():
        Ledger(output, identity="").end(0, "another plan, other data or another start")
