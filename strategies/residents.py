"""Memory of models that stay beside the one that trains: a teacher of probabilities, a judge of rewards."""

from protocol.plan import Plan
from strategies import architecture
from strategies.base_model import find
from strategies.narrowing import BITS


def resident_bytes(plan: Plan) -> int:
    """Weights of these models on this machine; one behind an endpoint takes none, and one that only writes leaves before.

    Raises:
        ModelError: One is not there, or is of no known architecture.
    """
    teacher = plan.distillation.teacher if plan.distillation and plan.distillation.kind == "logits" else None
    models = [model for model in (teacher, plan.rl.judge) if model and model.base_model]
    bits = sum(architecture.read(find(model.base_model or "").folder).parameters * BITS[model.precision] for model in models)
    return bits // 8
