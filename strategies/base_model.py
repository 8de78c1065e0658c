"""The frozen base: where it is found, what identifies it, and how it is loaded at 4, 8, 16 or 32 bits."""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from protocol.plan import QUANTISED, TASK_TYPES, Objective, Plan, Precision
from strategies import label_head

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "tiny"
_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_HUB_FILES = [*_TOKENIZER_FILES, "*.safetensors"]
# A tokenizer without a template gets this one, at every node alike.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    Attributes:
        name: As the plan calls it.
        folder: Holds ``config.json``, weights and tokenizer.
        digest: SHA-256 over ``config.json`` and every ``*.safetensors``, 64 hex digits: equal files have equal digests
            wherever they lie.
    """

    name: str
    folder: Path
    digest: str


def find(name: str) -> Base:
    """Finds a base by hub name, local folder, name of an installed package that carries a model, or ``tiny``.

    Raises:
        ModelError: It is none of these, or what was found holds no model.
    """
    folder = _folder(name)
    if not (folder / "config.json").is_file() or not _weight_files(folder):
        raise ModelError(f"{name!r}: {folder} holds no model; expected config.json and *.safetensors in it")
    for file in folder.glob("*.safetensors"):
        _check_header(file)
    return Base(name, folder, _digest(folder, _stamp(folder)))


def load(base: Base, plan: Plan) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads the base for the plan's objective at the plan's precision, in evaluation mode, with its tokenizer.

    A new classification head is drawn from torch's global generator: seed it first.

    Raises:
        ModelError: The model cannot do what the objective asks, or this machine cannot hold it that way.
    """
    from safetensors import SafetensorError

    check_objective(base, plan.objective)
    kind, settings = _built_as(plan.objective, plan.data.labels)
    settings |= {"dtype": _dtype(plan.precision), "local_files_only": True}
    if plan.precision in QUANTISED:
        settings["quantization_config"] = _quantisation(base, plan)
    try:
        with _quiet():
            model, loading = kind.from_pretrained(str(base.folder), output_loading_info=True, **settings)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{base.name!r} cannot be loaded for {plan.objective} at {plan.precision}: {error}") from error
    if new := {name.partition(".")[0] for name in loading["missing_keys"]} - {*heads(model, plan.objective)}:
        raise ModelError(
            f"{base.name!r} lacks weights of {', '.join(sorted(new))}, which would be drawn at random at every node and never "
            "travel; use a base that holds them"
        )
    tokenizer = load_tokenizer(base)
    model.config.pad_token_id = tokenizer.pad_token_id
    for module in model.modules():
        # bitsandbytes would repack nf4 weights for inference on some CPUs: only if d_out is a multiple of 32, and with other
        # rounding than in training. One arithmetic for both, on every CPU.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.eval()
    if plan.objective == "classification" and plan.head.init == "label-names":
        label_head.start(model, tokenizer, plan.data.labels or ())
    return model, tokenizer


def skeleton(base: Base, objective: Objective, labels: Sequence[str] | None, **more: Any) -> "PreTrainedModel":
    """The model for an objective without its weights (torch's meta device), from the configuration alone.

    Args:
        base: Whose configuration.
        objective: What for.
        labels: Of a classifier.
        more: What the configuration should say otherwise.

    Raises:
        ModelError: The configuration does not make such a model.
    """
    import torch

    check_objective(base, objective)
    kind, settings = _built_as(objective, labels)
    try:
        with torch.device("meta"):
            made: PreTrainedModel = kind.from_config(configuration(base, **settings, **more))
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{base.folder / 'config.json'}: no {objective} model can be built from it ({error})") from None
    return made


def heads(model: "PreTrainedModel", objective: Objective) -> list[str]:
    """What a model that scores has outside its base model (DistilBERT: two parts): checkpoints lack it, so it trains whole."""
    if TASK_TYPES[objective] != "SEQ_CLS":
        return []
    inner = model.base_model_prefix
    return [name for name, part in model.named_children() if name != inner and any(True for _ in part.parameters())]


def original_weight(base: Base, name: str, prefix: str) -> "Tensor":
    """One weight of the checkpoint in float32 on the CPU, as it was before quantisation; the others are not read.

    Args:
        base: The base.
        name: Of the parameter in the model.
        prefix: Of the model's inner part, which checkpoints of that part alone leave out.

    Raises:
        ModelError: The checkpoint holds none of that name.
    """
    from safetensors import safe_open

    file, key = _where(base, name, prefix)
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key).float()
    return tensor


def check_weights(base: Base, names: Iterable[str], prefix: str) -> None:
    """Makes sure that ``original_weight`` will find each of these; nothing but headers is read.

    Raises:
        ModelError: The checkpoint lacks one.
    """
    for name in names:
        _where(base, name, prefix)


def _where(base: Base, name: str, prefix: str) -> tuple[Path, str]:
    """The file that holds a weight, and its name there."""
    held = _keys(base.folder, _stamp(base.folder))
    for key in (name, name.removeprefix(f"{prefix}.")):
        if key in held:
            return held[key], key
    raise ModelError(
        f"{base.folder}: no weight {name!r} in the checkpoint, with which the plan compares what is trained; choose method "
        "lora with lora.init_lora_weights: default"
    )


@lru_cache(maxsize=32)
def _keys(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> dict[str, Path]:  # noqa: ARG001
    """The file of every weight of a checkpoint; ``stamp`` as for ``_digest``."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="numpy") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def configuration(base: Base, **settings: Any) -> Any:
    """The base's transformers configuration.

    Raises:
        ModelError: It is not one that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(base.folder), local_files_only=True, **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{base.folder / 'config.json'}: not a configuration that transformers knows ({error})") from None


def check_objective(base: Base, objective: Objective) -> None:
    """Refuses to train an encoder for answers: it would read ahead to the answer that it should give.

    Raises:
        ModelError: The objective needs a model that writes, and the base is not a decoder.
    """
    built = getattr(configuration(base), "architectures", None) or ()
    if TASK_TYPES[objective] == "CAUSAL_LM" and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in built):
        raise ModelError(
            f"{base.name!r} is built as {', '.join(built) or 'nothing that it names'}, which gives no answers for {objective}; "
            "use objective: classification, regression or reward, or a decoder (…ForCausalLM)"
        )


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """The base's tokenizer, with padding and a chat template.

    Raises:
        ModelError: There is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base.folder), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelError(f"{base.name!r} has no tokenizer that can be read: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokenizer_of(name: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a base whose weights need not be here, nor are fetched; None where there is none to read.

    Args:
        name: As for ``find``, or a ``config.json``, beside which it is looked for.
    """
    try:
        folder = Path(name).parent if name.endswith(".json") else _folder(name, _TOKENIZER_FILES)
        found = [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("spiece*")]
        return load_tokenizer(Base(name, folder, "")) if found else None
    except (ModelError, OSError):
        return None


def _folder(name: str, files: Sequence[str] = ()) -> Path:
    if name == EMBEDDED:
        return _embedded()
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return path
    except OSError as error:
        raise ModelError(
            f"{name!r}: {error.strerror}; expected a folder, an installed package, a hub name, or {EMBEDDED!r}"
        ) from None
    if path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name!r}: no such folder; expected a folder with config.json and *.safetensors")
    return _in_package(name) or _from_hub(name, files or _HUB_FILES)


def _embedded() -> Path:
    # A Flower app bundle carries no weights, so its own copy of this package may lack them: look further along the path.
    for entry in (str(Path(__file__).parent.parent), *sys.path):
        folder = Path(entry, "strategies", "tiny_model")
        if (folder / "model.safetensors").is_file():
            return folder
    raise ModelError("the embedded model is not here; install fedge itself (pip install fedge), not only its Flower app")


def _in_package(name: str) -> Path | None:
    module = name.replace("-", "_")
    if not module.isidentifier():
        return None
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a module that was not imported by its name, such as __main__
        return None
    for place in (spec.submodule_search_locations or []) if spec else []:
        for config in sorted(Path(place).glob("**/config.json")):
            if _weight_files(config.parent):
                return config.parent
    return None


def _from_hub(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name!r} is no folder, no installed package with a model and could not be fetched from the hub "
            f"({type(error).__name__}); give a folder, an installed package, a hub name, or {EMBEDDED!r}"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _check_header(file: Path) -> None:
    """A file that was cut off is found here, before a federation is joined, and not when its weights are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}); fetch the model again") from None


def _identity(folder: Path) -> list[Path]:
    return [folder / "config.json", *_weight_files(folder)]


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file of a base does."""
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _identity(folder))


@lru_cache(maxsize=32)
def _digest(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:  # noqa: ARG001
    """``stamp`` (names, sizes, times) is part of the cache's key: a file that changed is read again."""
    sha = hashlib.sha256()
    for file in _identity(folder):
        with file.open("rb") as stream:
            sha.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()


def _built_as(objective: Objective, labels: Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """The transformers class for an objective and its settings."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if TASK_TYPES[objective] == "CAUSAL_LM":
        return AutoModelForCausalLM, {}
    if objective != "classification":
        return AutoModelForSequenceClassification, {"num_labels": 1} | (
            {"problem_type": "regression"} if objective == "regression" else {}
        )
    rows = dict(enumerate(labels or ()))
    label2id = {label: row for row, label in rows.items()}
    return AutoModelForSequenceClassification, {"num_labels": len(rows), "id2label": rows, "label2id": label2id}


def _dtype(precision: Precision) -> Any:
    import torch

    quantised = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, quantised)


def _quantisation(base: Base, plan: Plan) -> Any:
    from transformers import BitsAndBytesConfig

    # What is about to be trained whole must stay in full precision.
    whole = [f"(.*\\.)?{re.escape(name)}" for name in plan.lora.modules_to_save]
    head = heads(skeleton(base, plan.objective, plan.data.labels), plan.objective)
    keep = ["lm_head", *head, *whole]
    if plan.precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(plan.precision),
        llm_int8_skip_modules=keep,
    )


def _quiet() -> Any:
    """Transformers reports a new head as missing weights; here that is what was asked for."""
    from contextlib import contextmanager

    from transformers.utils import logging

    @contextmanager
    def quiet() -> Any:
        before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(before)
            if bars:
                logging.enable_progress_bar()

    return quiet()
