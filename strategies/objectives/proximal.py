"""FedProx (Li et al. 2020, arXiv:1812.06127, eq. 2): a pull towards where the round began.

Whatever the objective ``F``, a node minimises ``F(w) + mu / 2 * |w - w_start|^2`` over what it trains, so that nodes whose data
differ do not run apart within a round.
"""

from typing import Any

from strategies.objectives.penalty import penalised


def proximal(parent: Any, mu: float) -> Any:
    """A Hugging Face trainer class whose gradient has the pull in it.

    Args:
        parent: ``transformers.Trainer`` or a subclass.
        mu: At least 0.
    """
    begun: list[tuple[Any, Any]] = []

    def pull(model: Any) -> Any:  # noqa: ARG001 - of the parameters that were there when it began
        return mu / 2 * sum((p.float() - start.float()).square().sum() for p, start in begun)

    class Proximal(penalised(parent, pull)):  # type: ignore[misc]
        def train(self, *args: Any, **kwargs: Any) -> Any:
            # Before a checkpoint is read: nothing has moved yet.
            begun[:] = [(p, p.detach().clone()) for p in self.model.parameters() if p.requires_grad]
            return super().train(*args, **kwargs)

    return Proximal
