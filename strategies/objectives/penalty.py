"""A term that is minimised beside an objective's loss, whatever the objective."""

from collections.abc import Callable
from typing import Any


def penalised(parent: Any, term: Callable[[Any], Any]) -> Any:
    """A Hugging Face trainer class whose gradient has the term's in it, once per optimizer step.

    The term goes backward by itself after the last micro-batch of a step: through ``accelerator.backward``, so that a
    gradient scaler (fp16) scales it as it scales the rest, and before gradients are clipped, since it is part of what is
    minimised. In ``compute_loss`` it would be taken once per micro-batch, with a weight that depends on how the loss is
    averaged over them. What the trainer reports as loss is the objective alone, comparable with and without the term.

    Args:
        parent: ``transformers.Trainer`` or a subclass.
        term: From the model to a scalar tensor.
    """

    class Penalised(parent):  # type: ignore[misc]
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            if self.accelerator.sync_gradients:
                # It divides by its own count of micro-batches.
                self.accelerator.backward(term(model) * self.accelerator.gradient_accumulation_steps)
            return loss

    return Penalised
