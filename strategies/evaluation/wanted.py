"""What a comparison should measure, and what stands in its way: told before any model is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from protocol.errors import ConfigurationError
from protocol.plan import Objective, Plan
from protocol.writer_settings import JudgeSettings, WriterSettings
from strategies.evaluation import harness, texts
from strategies.evaluation.perturbations import KINDS

WRITTEN = (*texts.FIGURES, "cut-answers")
TIMED = ("time-to-first-token", "tokens-per-second")
CALIBRATED = ("ece", "brier")
FIGURES: Mapping[Objective, tuple[str, ...]] = {
    "sft": ("loss", "perplexity", "accuracy", *WRITTEN, *TIMED),
    "distillation": ("loss", "perplexity", "accuracy", *WRITTEN, *TIMED),
    "pretraining": ("loss", "perplexity"),
    "classification": ("loss", "accuracy", "macro-f1", *CALIBRATED),
    "regression": ("mse", "mae", "pearson"),
    "dpo": ("loss", "reward-accuracy", "reward-margin"),
    "kto": ("loss", "reward-desirable", "reward-undesirable"),
    "reward": ("loss", "accuracy"),
    "rl": ("reward", "kl"),
}
_PERTURBED: tuple[Objective, ...] = ("sft", "distillation", "classification", "regression")


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        metrics: Figures, by name; without any, those of ``measure``, calibration, and with ``generate`` those of answers.
        generate: Lets each model write its answers.
        max_new_tokens: Longest answer; without it one token more than the longest given one, so that a right answer has room.
        robustness: Perturbations (``strategies.evaluation.perturbations``) to measure under.
        writer: Paraphrases.
        probe: General rows, to see what was forgotten.
        judge: Compares each model's answers to the first one's.
        harness: Tasks of lm-evaluation-harness.
        harness_folder: Holds tasks of one's own.
        draws: Of the bootstrap.
        seed: Of the bootstrap and of perturbations.
    """

    metrics: tuple[str, ...] = ()
    generate: bool = False
    max_new_tokens: int | None = None
    robustness: tuple[str, ...] = ()
    writer: WriterSettings | None = None
    probe: Path | None = None
    judge: JudgeSettings | None = None
    harness: tuple[str, ...] = ()
    harness_folder: Path | None = None
    draws: int = 1000
    seed: int = 0

    def any_of(self, names: Sequence[str], otherwise: bool) -> bool:
        """Whether one of these figures is to be measured; where none is named, ``otherwise``."""
        return any(name in self.metrics for name in names) if self.metrics else otherwise


def check(plan: Plan, wanted: Wanted) -> None:
    """Refuses what cannot be measured.

    Raises:
        ConfigurationError: All of it at once.
    """
    if problems := [*_figures(plan, wanted), *_rows(plan, wanted), *_others(plan, wanted)]:
        raise ConfigurationError("command line", problems)


def answers(objective: Objective) -> bool:
    """Whether rows of an objective hold answers that written ones can be compared with."""
    return "exact-match" in FIGURES[objective]


def _figures(plan: Plan, wanted: Wanted) -> Iterator[str]:
    objective, known = plan.objective, FIGURES[plan.objective]
    if unknown := [name for name in wanted.metrics if name not in known]:
        yield f"--metrics {', '.join(unknown)}: objective {objective} has {', '.join(known)}"
    if wanted.generate and not answers(objective):
        yield f"--generate is for objective sft, found {objective}, whose rows give no answer to compare with"
    if answers(objective) and wanted.any_of(texts.FIGURES, wanted.generate):
        for library in ("sacrebleu", "rouge_score"):
            if find_spec(library) is None:
                yield f"BLEU and ROUGE need {library}, which is not installed; pip install 'fedge[evaluation]'"


def _rows(plan: Plan, wanted: Wanted) -> Iterator[str]:
    if wanted.robustness and plan.objective not in _PERTURBED:
        yield f"--robustness is for objective {', '.join(_PERTURBED)}, found {plan.objective}"
    if unknown := [kind for kind in wanted.robustness if kind not in KINDS]:
        yield f"--robustness {', '.join(unknown)}: expected {', '.join(KINDS)}"
    if ("paraphrase" in wanted.robustness) != (wanted.writer is not None):
        yield "--robustness paraphrase and --writer go together; --writer names the file that says who paraphrases"
    if wanted.probe and plan.objective == "reward":
        yield "--probe: a reward model knows nothing but pairs; give other pairs as --data"


def _others(plan: Plan, wanted: Wanted) -> Iterator[str]:
    if wanted.judge and (plan.task_type == "SEQ_CLS" or plan.objective == "pretraining"):
        yield f"--judge compares answers to questions, and objective {plan.objective} has none"
    if wanted.harness and plan.task_type == "SEQ_CLS":
        yield f"--harness takes models that write, and objective {plan.objective} trains a head"
    elif wanted.harness:
        yield from harness.missing(wanted.harness, wanted.harness_folder)
