"""Words that people already write in training files, in the words of a plan: Hugging Face's arguments and common sections.

One table says it all. A word that is neither in it nor a plan's own is an error that names the nearest; so is what is said
twice. Old names are taken with a warning, and so are words that have no meaning here.
"""

import copy
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protocol.data_settings import DataSettings
from protocol.errors import shown
from protocol.method_settings import LoraSettings
from protocol.plan import Plan
from protocol.training_settings import TrainingSettings

log = logging.getLogger(__name__)

# A section by another name, and the plan's.
SECTIONS: Mapping[str, str] = {
    "training_args": "training",
    "training_arguments": "training",
    "data_config": "data",
    "data_args": "data",
    "peft_config": "lora",
    "lora_config": "lora",
    "lora_args": "lora",
}
# Another word for a field of the plan, by the section in which it is found; ``""`` is the file itself.
WORDS: Mapping[str, Mapping[str, str]] = {
    "": {
        "model_name_or_path": "base_model",
        "model_name": "base_model",
        "output_dir": "output",
        "deepspeed": "training.deepspeed",
        "max_input_length": "data.max_length",
        "max_seq_length": "data.max_length",
    },
    "training": {
        "output_dir": "output",
        "per_device_train_batch_size": "training.batch_size",
        "train_batch_size": "training.batch_size",
        "per_device_eval_batch_size": "training.eval_batch_size",
        "epochs": "training.num_train_epochs",
        "lr": "training.learning_rate",
        "optimizer": "training.optim",
        "max_input_length": "data.max_length",
        "max_seq_length": "data.max_length",
    },
    "data": {
        "train_file": "data.train",
        "train_path": "data.train",
        "train_data": "data.train",
        "validation_file": "data.evaluate",
        "validation_path": "data.evaluate",
        "eval_file": "data.evaluate",
        "test_file": "data.evaluate",
        "validation_split": "data.evaluate_fraction",
        "test_size": "data.evaluate_fraction",
        "label_list": "data.labels",
        "max_input_length": "data.max_length",
        "max_seq_length": "data.max_length",
    },
    "lora": {"lora_r": "lora.r"},
}
# Words of other tools that stand at the top there, and what to write here. Of a section's own words it is said which section.
ELSEWHERE: Mapping[str, str] = {
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "load_in_4bit": "method: qlora and precision: nf4",
    "load_in_8bit": "method: qlora and precision: int8",
    "quantization_bit": "method: qlora and precision: nf4 or int8",
    "finetuning_type": "method",
    "stage": "objective",
    "task": "objective",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "val_set_size": "data.evaluate_fraction",
    "val_size": "data.evaluate_fraction",
    "micro_batch_size": "training.batch_size",
    "num_epochs": "training.num_train_epochs",
    "sample_packing": "training.packing",
}
# Old names of Hugging Face's arguments and today's.
OLD: Mapping[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "adam_epsilon_value": "adam_epsilon",
}
# Arguments that have no meaning here, and why.
UNUSED: Mapping[str, str] = {
    "overwrite_output_dir": "a training goes on where it was, and a changed one begins anew",
    "do_train": "fedge train trains",
    "do_eval": "held-out rows are always measured",
    "remove_unused_columns": "rows are encoded before",
    "logging_dir": "logs lie beside the checkpoints",
    "logging_strategy": "logging_steps says it",
    "run_name": "output says it",
    "dataloader_num_workers": "rows are encoded before",
    "dataloader_pin_memory": "it is on wherever there is a GPU",
    "use_cpu": "a GPU is used wherever there is one",
    "no_cuda": "a GPU is used wherever there is one",
    "push_to_hub": "nothing is sent anywhere",
    "dataset_text_field": "the objective says which fields are read",
    "completion_only_loss": "there is loss on answers alone",
    "assistant_only_loss": "there is loss on answers alone",
    "length_column_name": "rows are counted when they are encoded",
    "ddp_find_unused_parameters": "it is set where it is needed",
}
# The same of PEFT's.
UNUSED_LORA: Mapping[str, str] = {
    "task_type": "the objective says it",
    "inference_mode": "it trains",
    "fan_in_fan_out": "it is seen from the base",
    "base_model_name_or_path": "base_model says it",
    "revision": "base_model says it",
}
_NOTHING = object()


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _mixed(name: str) -> Callable[[Any], Any]:
    return lambda value: name if _flag(value) else _NOTHING


def _steps(value: Any) -> Any:
    return _NOTHING if value in (-1, None) else value


def _report(value: Any) -> Any:
    names = [value] if isinstance(value, str) else value
    if names in ([], ["none"], None):
        return False
    if names in (["tensorboard"], ["all"]):
        return True
    raise ValueError("expected tensorboard or none")


def _metric(value: Any) -> Any:
    if value not in ("loss", "eval_loss"):
        raise ValueError("the best is the one with the least loss on held-out rows; leave it out")
    return _NOTHING


def _less_is_better(value: Any) -> Any:
    if _flag(value):
        raise ValueError("the best is the one with the least loss on held-out rows; leave it out")
    return _NOTHING


def _by_length(value: Any) -> Any:
    return "group_by_length" if _flag(value) else _NOTHING


def _lora(value: Any) -> Any:
    if str(value).lower() != "lora":
        raise ValueError("expected LORA; other kinds of adapters are a method")
    return _NOTHING


def _no_bias(value: Any) -> Any:
    if value != "none":
        raise ValueError("expected none; biases train by method: bitfit")
    return _NOTHING


# Arguments whose values have other words here too: where they go, and what is made of them.
VALUES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "fp16": ("training.mixed_precision", _mixed("fp16")),
    "bf16": ("training.mixed_precision", _mixed("bf16")),
    "max_steps": ("training.max_steps", _steps),
    "report_to": ("training.tensorboard", _report),
    "group_by_length": ("training.train_sampling_strategy", _by_length),
    "metric_for_best_model": ("", _metric),
    "greater_is_better": ("", _less_is_better),
}
VALUES_LORA: Mapping[str, tuple[str, Callable[[Any], Any]]] = {"peft_type": ("", _lora), "bias": ("", _no_bias)}
_VALUES_OF = {"training": VALUES, "lora": VALUES_LORA}
_UNUSED_OF = {"training": UNUSED, "lora": UNUSED_LORA}
_STRATEGIES = {"eval_strategy": "eval_steps", "save_strategy": "save_steps"}
_KNOWN: Mapping[str, tuple[str, ...]] = {
    "training": tuple(
        dict.fromkeys((*TrainingSettings.model_fields, *WORDS["training"], *VALUES, *_STRATEGIES, *OLD, *UNUSED))
    ),
    "data": (*DataSettings.model_fields, *WORDS["data"]),
    "lora": (*LoraSettings.model_fields, *WORDS["lora"], *VALUES_LORA, *UNUSED_LORA),
}
_OF_A_JOB = ("output", "start", "stages")


def respelt(content: Mapping[str, Any], where: str = "") -> tuple[dict[str, Any], list[str]]:
    """A file's content in the words of a plan, and every problem with the words that it has.

    Args:
        content: Of the file, or of one of its stages.
        where: Comes before each key in problems.
    """
    page = _Page(where)
    for key, value in content.items():
        section = SECTIONS.get(key, key)
        if section in _KNOWN and isinstance(value, Mapping):
            page.section(key, section, value)
        elif key in SECTIONS:
            page.problems.append(f"{where}{key}: found {type(value).__name__}; expected a mapping")
        elif key in WORDS[""]:
            page.put(WORDS[""][key], value, key)
        elif key in Plan.model_fields or key in _OF_A_JOB:
            page.put(key, value, key)
        else:
            page.unknown(key)
    return page.content, page.problems


def _place(section: str, key: str) -> str:
    """Where a section's word goes."""
    return WORDS[section].get(key) or f"{section}.{key}"


class _Page:
    def __init__(self, where: str) -> None:
        self.content: dict[str, Any] = {}
        self.problems: list[str] = []
        self._where = where
        self._said: dict[str, str] = {}
        self._listed: set[str] = set()

    def section(self, said: str, section: str, values: Mapping[str, Any]) -> None:
        if not values:
            self.content.setdefault(section, {})
        values = self._strategies(said, values) if section == "training" else dict(values)
        for key, value in values.items():
            self._word(f"{said}.{key}", section, key, value)

    def unknown(self, key: Any) -> None:
        """A word at the top that is none there; it may have its place in a section."""
        places = [section for section, known in _KNOWN.items() if key in known]
        place = ELSEWHERE.get(key) or next((_place(section, key) for section in places), "")
        if place:
            self.problems.append(f"{self._where}{shown(str(key), 80)}: unknown at the top; write {place}")
        else:
            self._guess(shown(str(key), 80), key, (*Plan.model_fields, *_OF_A_JOB, *SECTIONS, *WORDS[""]), "")

    def _guess(self, said: str, key: Any, known: Sequence[str], section: str) -> None:
        """What a word that nobody knows may have meant; a list of all that are known stands there once."""
        near = difflib.get_close_matches(str(key)[:80], known, n=1)
        if near:
            hint = f"; did you mean {near[0]!r}?"
        else:
            hint = "" if section in self._listed else f"; known here: {', '.join(known)}"
            self._listed.add(section)
        self.problems.append(f"{self._where}{said}: unknown key{hint}")

    def put(self, target: str, value: Any, said: str) -> None:
        if target in self._said:
            self.problems.append(
                f"{self._where}{said}: says {target} a second time, after {self._where}{self._said[target]}; leave one out"
            )
            return
        self._said[target] = said
        *path, last = target.split(".")
        place = self.content
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                return  # the plan itself says what is wrong with that section
        place[last] = copy.deepcopy(value)

    def _word(self, said: str, section: str, key: Any, value: Any) -> None:
        if section == "training" and key in OLD:
            log.warning("%s%s: an old name; today it is %s", self._where, said, OLD[key])
            key = OLD[key]
        unused, values = _UNUSED_OF.get(section, {}), _VALUES_OF.get(section, {})
        if key in unused:
            log.warning("%s%s: has no meaning here and is left out: %s", self._where, said, unused[key])
        elif key in values:
            target, read = values[key]
            try:
                value = read(value)
            except ValueError as error:
                self.problems.append(f"{self._where}{said}: {error} (found {shown(repr(value), 80)})")
                return
            if value is not _NOTHING:
                self.put(target, value, said)
        elif key in WORDS[section]:
            self.put(WORDS[section][key], value, said)
        elif key not in _KNOWN[section]:
            self._guess(said, key, _KNOWN[section], section)
        else:
            self.put(f"{section}.{key}", value, said)

    def _strategies(self, said: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """``eval_strategy`` and ``save_strategy`` say whether ``eval_steps`` and ``save_steps`` count."""
        found = dict(values)
        for old in ("evaluation_strategy",):
            if old in found:
                log.warning("%s%s.%s: an old name; today it is %s", self._where, said, old, OLD[old])
                if OLD[old] in found:
                    self.problems.append(f"{self._where}{said}.{old}: says {OLD[old]} a second time; leave one out")
                found.setdefault(OLD[old], found.pop(old))
        for name, steps in _STRATEGIES.items():
            how = found.pop(name, None)
            if how is None:
                continue
            if how is False or how == "no":  # YAML 1.1 reads no as false
                found.pop(steps, None)
            elif how == "epoch":
                found[steps] = "epoch"
            elif how != "steps":
                self.problems.append(f"{self._where}{said}.{name}: found {shown(repr(how), 80)}; expected no, steps or epoch")
            elif steps not in found:
                self.problems.append(f"{self._where}{said}.{name}: steps needs {steps}: every how many")
        return found
