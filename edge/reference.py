"""What PyTorch puts out for token ids: the base with or without one adapter, as this project's training leaves it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge import probes, tokenizer
from edge.described import missing_head
from edge.gate import BASE
from edge.parity import Array, Kind, Outputs, Probe
from edge.runtime.model import Model
from protocol.configuration import parse
from protocol.files import Stored
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.adapters.merge import task
from strategies.base_model import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Torch:
    """A base and its adapters in PyTorch, which a bundle is compared with (``edge.gate.Original``).

    Attributes:
        base: As it was published.
        kind: What the bundle answers.
        plans: To use the base and each adapter in float32.
        stored: Adapters; that of ``base`` is the one that a bundle has merged into its base.
        words: The base's tokenizer.
        pooling: Of an embedder.
    """

    base: Base
    kind: Kind
    plans: Mapping[str, Plan]
    stored: Mapping[str, Stored]
    words: "PreTrainedTokenizerBase"
    pooling: str | None
    against: str = "PyTorch in float32"

    def outputs(self, name: str) -> Outputs:
        """Of the base, or of the base with an adapter."""
        return outputs(self.base, self.kind, self.plans[name], self.stored.get(name), self.pooling)

    def own(self, context_tokens: int) -> list[Probe]:
        """Our own texts, as the model reads them."""
        said = partial(probes.said_ids, self.words) if self.kind == "decoder" else None
        return probes.default(partial(probes.plain_ids, self.words), said, context_tokens)

    def given(self, rows: Path, context_tokens: int, name: str | None = None) -> list[Probe]:
        """Rows of a file, as they were encoded to train one of the adapters; without a name the first of them."""
        plan = self.plans[name or next(iter(self.stored), BASE)]
        return probes.given(self.kind, rows, plan, self.words, context_tokens)

    def read(self, rows: Path | None, context_tokens: int) -> dict[str, list[Probe]]:
        """What each is compared on. Rows have labels, and a base whose head nobody trained has no say in them."""
        if rows is None:
            return {BASE: self.own(context_tokens)}
        names = self.plans if self.kind == "decoder" else self.stored
        found = {name: self.given(rows, context_tokens, name) for name in names}
        return found if BASE in found else {BASE: self.own(context_tokens), **found}

    def unbound(self) -> dict[str, frozenset[str]]:
        """Of a head that was drawn at random the likeliest label says nothing, nor do rows of a task that adapters have learnt.

        A base that cannot do the task guesses: its perplexity there is of tens of thousands, and rounding moves it at random.
        """
        if self.kind == "decoder" and self.stored.keys() - {BASE}:
            return {BASE: frozenset({"perplexity_ratio", "metric_loss"})}
        trained = self.kind != "classifier" or BASE in self.stored or not missing_head(self.base)
        return {} if trained else {BASE: frozenset({"top1"})}

    def check_words(self, model: Model) -> None:
        """Makes sure that a bundle reads texts as transformers does.

        Raises:
            BundleError: It does not.
        """
        tokenizer.check(self.words, model.tokens, model.manifest.chat, probes.TEXTS)


def torch_of(
    base: Base,
    kind: Kind,
    labels: Sequence[str],
    stored: Mapping[str, Stored],
    plan: Plan | None,
    words: "PreTrainedTokenizerBase",
    pooling: str | None,
) -> Torch:
    """The base and adapters of a bundle; arguments as of ``plan_of`` and ``Torch``."""
    plans = {name: plan_of(base, kind, each, plan, labels) for name, each in {BASE: None, **stored}.items()}
    return Torch(base, kind, plans, stored, words, pooling)


def plan_of(base: Base, kind: Kind, stored: Stored | None, plan: Plan | None, labels: Sequence[str]) -> Plan:
    """A float32 plan that uses the base as the bundle does.

    Args:
        base: The base.
        kind: What is exported.
        stored: An adapter, or None for the base as it is.
        plan: That adapters were trained with, if it is known: gives a classifier's labels, and how rows are read.
        labels: Of the base's own head.
    """
    if plan and plan.task_type == "CAUSAL_LM" and plan.objective != "pretraining":
        plan = plan.model_copy(update={"objective": "sft"})  # others need teachers or rewards, which nobody asks here
    if stored is not None:
        return stored.on(task(base, stored, plan))
    told: dict[str, Any] = {"objective": "sft" if kind == "decoder" else "reward"}
    if kind == "decoder" and plan:
        told = plan.model_dump(include={"objective", "data"})
    if kind == "classifier" and len(labels) > 1:
        told = {"objective": "classification", "data": {"labels": list(labels)}}
    return parse({"base_model": base.name, **told}, Plan, source="parity")


def outputs(base: Base, kind: Kind, plan: Plan, stored: Stored | None, pooling: str | None = None) -> Outputs:
    """A function from token ids to logits ``(tokens, vocabulary)`` or ``(labels,)``, or to an embedding ``(hidden,)``.

    Args:
        base: The base; loaded here, in float32.
        kind: What is exported.
        plan: Of ``plan_of``.
        stored: The adapter, or None.
        pooling: Of an embedder: ``mean`` or ``cls``.
    """
    import torch

    model: Any = with_adapter(plan, base, stored.adapter if stored else None)[0]
    inner = _inner(model) if kind == "embedder" else model

    def read(ids: Sequence[int]) -> Array:
        given = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            told = inner(input_ids=given, attention_mask=torch.ones_like(given))
            if kind != "embedder":
                return _numpy(told.logits[0])
            states = told.last_hidden_state[0]
            pooled = states[0] if pooling == "cls" else states.mean(0)
            return _numpy(torch.nn.functional.normalize(pooled, dim=0))

    return read


def _inner(model: Any) -> Any:
    """The encoder under a head, with whatever PEFT has put into it."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    return whole.base_model


def _numpy(tensor: Any) -> Array:
    found: Array = tensor.float().cpu().numpy()
    return found
