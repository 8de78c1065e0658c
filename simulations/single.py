"""Ordinary fine-tuning: a federation of one client and one round, through the same round code."""

from client.node import Node
from protocol.errors import ConfigurationError, FederationError
from protocol.federation import AggregationSettings, Federation, RoundSettings
from server.ledger import RoundRecord
from simulations.federation import check, federate
from strategies.job import Job


def train_alone(job: Job, *, progress: bool = False) -> RoundRecord:
    """Trains a job; the adapter is in ``OUTPUT/adapter`` afterwards.

    Where weights of the base themselves train (full, freezing), the adapter is their change at the plan's rank; the model
    as it was trained, with nothing left out, is in ``OUTPUT/model``, which can be a ``base_model`` itself.

    Raises:
        UserError: Plan, data and base do not fit together; nothing has been written then.
        FederationError: Training or measuring failed; the reason is in the log.
    """
    plan = job.plan()
    if job.data.train is None:
        raise ConfigurationError("job", ["data.train: missing; name the file with the training rows"])
    node = Node(
        name="local",
        train=job.data.train,
        evaluate=job.data.evaluate,
        folder=job.output,
        whole_model=job.output / "model",
        progress=progress,
    )
    node = node.model_copy(update={"reward_functions": ",".join(plan.rl.reward_functions) or None})
    published = plan.model_copy(update={"data": plan.data.model_copy(update={"train": None, "evaluate": None})})
    merging = AggregationSettings(rank_cap=plan.update_rank)
    federation = Federation(
        name="local",
        plan=published,
        rounds=RoundSettings(count=1),
        aggregation=merging,
        start=job.start and job.start.resolve(),
        output=job.output,
    )
    check(federation, [node])
    record = federate(federation, [node]).rounds[-1]
    if record.evaluation_refused:
        raise FederationError(
            f"trained into {job.output}, but the held-out rows could not be measured: {record.evaluation_refused}"
        )
    return record
