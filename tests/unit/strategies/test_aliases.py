"""Words that people already write: each is taken as the plan's own, twice or unknown is an error that says what to do."""

import dataclasses

import pytest
import yaml

from protocol.configuration import parse
from protocol.data_settings import DataSettings
from protocol.errors import ConfigurationError
from protocol.method_settings import LoraSettings
from protocol.plan import Plan
from protocol.training_settings import TrainingSettings
from strategies.aliases import ELSEWHERE, OLD, UNUSED, UNUSED_LORA, VALUES, WORDS
from strategies.job import Job


def job(text):
    return parse(yaml.safe_load(text), Job, source="job")


def problems(text):
    with pytest.raises(ConfigurationError) as refused:
        job(text)
    return refused.value.problems


def test_a_file_in_hugging_faces_words_is_the_same_job_as_in_the_plans_own(caplog):
    theirs = job("""
        model_name_or_path: tiny
        data_config: {train_file: rows.jsonl, validation_file: held.jsonl}
        max_input_length: 128
        output_dir: runs/x
        training_args:
          per_device_train_batch_size: 4
          per_device_eval_batch_size: 16
          gradient_accumulation_steps: 2
          num_train_epochs: 2
          max_steps: -1
          learning_rate: 1.0e-3
          lr_scheduler_type: linear
          warmup_steps: 5
          weight_decay: 0.01
          optim: adamw_torch
          fp16: false
          bf16: true
          evaluation_strategy: steps
          eval_steps: 20
          save_strategy: epoch
          save_total_limit: 3
          load_best_model_at_end: true
          metric_for_best_model: eval_loss
          greater_is_better: false
          neftune_noise_alpha: 5
          report_to: [tensorboard]
          seed: 7
          overwrite_output_dir: true
    """)
    ours = job("""
        base_model: tiny
        data: {train: rows.jsonl, evaluate: held.jsonl, max_length: 128}
        output: runs/x
        training: {batch_size: 4, eval_batch_size: 16, gradient_accumulation_steps: 2, num_train_epochs: 2,
          learning_rate: 1.0e-3, lr_scheduler_type: linear, warmup_steps: 5, weight_decay: 0.01, mixed_precision: bf16,
          eval_steps: 20, save_steps: epoch, save_total_limit: 3, load_best_model_at_end: true, neftune_noise_alpha: 5,
          tensorboard: true, seed: 7}
    """)
    assert theirs == ours
    assert "training_args.evaluation_strategy: an old name; today it is eval_strategy" in caplog.text
    assert "training_args.overwrite_output_dir: has no meaning here and is left out" in caplog.text


def test_stages_are_written_in_these_words_too():
    found = job("""
        training_args: {learning_rate: 1.0e-3}
        stages:
          - data_config: {train_file: a.jsonl}
          - {objective: dpo, data: {train: b.jsonl}, training_args: {per_device_train_batch_size: 2}}
    """)
    first, second = found.jobs()
    assert (first.data.train.name, first.training.learning_rate) == ("a.jsonl", 1e-3)
    assert (second.training.batch_size, second.training.learning_rate) == (2, 1e-3)


DATA = "data: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "training: {batch_size: 2}\ntraining_args: {per_device_train_batch_size: 4}",
            "training_args.per_device_train_batch_size: says training.batch_size a second time, after training.batch_size",
        ),
        ("max_input_length: 3\ndata_config: {max_length: 4}", "says data.max_length a second time"),
        ("training_args: {fp16: true, bf16: true}", "training_args.bf16: says training.mixed_precision a second time"),
        ("training_args: {eval_strategy: 'no', evaluation_strategy: epoch}", "says eval_strategy a second time"),
        ("training_args: {per_device_train_batchsize: 4}", "did you mean 'per_device_train_batch_size'?"),
        ("training_args: {lerning_rate: 4}", "training_args.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("data_config: {train_fil: x}", "data_config.train_fil: unknown key; did you mean 'train_file'?"),
        ("training: {lerning_rate: 4}", "training.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("training_args: {fp16: maybe}", "training_args.fp16: expected true or false (found 'maybe')"),
        ("training_args: {evaluation_strategy: steps}", "steps needs eval_steps: every how many"),
        ("training_args: {eval_strategy: sometimes}", "found 'sometimes'; expected no, steps or epoch"),
        ("training_args: {metric_for_best_model: bleu}", "the least loss on held-out rows"),
        ("training_args: {report_to: wandb}", "expected tensorboard or none"),
        ("training_args: 3", "training_args: found int; expected a mapping"),
        ("training_args: {per_device_train_batch_size: 0}", "training.batch_size: input should be greater than 0 (found 0)"),
    ],
)
def test_what_is_said_twice_or_is_nobodys_word_is_refused(text, said):
    assert any(said in line for line in problems(text if "data_config" in text else DATA + text)), problems(DATA + text)


def test_words_of_other_tools_at_the_top_are_told_their_place_and_a_list_stands_there_once():
    found = problems("""
        train_file: rows.jsonl
        learning_rate: 1.0e-3
        lora_alpha: 16
        lora_r: 8
        load_in_4bit: true
        packing: true
        report_to: none
        zzzz: 1
        qqqq: 2
    """)
    for key, place in {
        "train_file": "data.train",
        "learning_rate": "training.learning_rate",
        "lora_alpha": "lora.lora_alpha",
        "lora_r": "lora.r",
        "load_in_4bit": "method: qlora and precision: nf4",
        "packing": "training.packing",
        "report_to": "training.report_to",
    }.items():
        assert f"{key}: unknown at the top; write {place}" in found
    (listed,) = [line for line in found if "known here" in line]
    assert {"training_args", "data_config", "model_name_or_path", "output_dir"} <= set(listed.replace(",", "").split())
    assert "qqqq: unknown key" in found


def test_a_lora_config_of_peft_and_grouping_by_length_are_taken(caplog):
    found = job(
        DATA
        + "peft_config: {peft_type: LORA, task_type: CAUSAL_LM, r: 4, lora_alpha: 8, bias: none, target_modules: [q_proj]}\n"
        "training_args: {group_by_length: true}"
    )
    assert (found.lora.r, found.lora.lora_alpha, found.lora.target_modules) == (4, 8, ("q_proj",))
    assert found.training.train_sampling_strategy == "group_by_length"
    assert "peft_config.task_type: has no meaning here" in caplog.text
    assert any("method: bitfit" in line for line in problems(DATA + "peft_config: {bias: all}"))


def test_no_evaluation_and_no_checkpoints_in_their_words():
    found = job(DATA + "training_args: {eval_strategy: 'no', eval_steps: 5, save_strategy: 'no', save_steps: 5}")
    assert (found.training.eval_steps, found.training.save_steps) == (None, None)


def test_a_plan_with_every_possible_mistake_at_once_lists_them_all():
    found = problems("""
        base_model: ""
        objective: sftt
        method: loraa
        data_config: {train_fil: x, max_length: -1, evaluate_fraction: 2}
        training_args: {lerning_rate: 1, per_device_train_batch_size: many, fp16: true, bf16: true, warmup_ratio: 7}
        training: {seed: -1, early_stopping_patience: 3}
        outputs: x
        stages: [{objective: dpo, dpo: {beta: -1}, loar: {r: 3}}]
    """)
    for part in (
        "base_model",
        "objective",
        "method",
        "data_config.train_fil",
        "data.max_length",
        "data.evaluate_fraction",
        "training_args.lerning_rate",
        "training.batch_size",
        "training_args.bf16",
        "training.warmup_ratio",
        "training.seed",
        "outputs: unknown key; did you mean 'output'?",
        "stages.0.dpo.beta",
        "stages.0.loar: unknown key; did you mean 'lora'?",
        "early_stopping_patience needs eval_steps",
    ):
        assert sum(part in line for line in found) == 1, (part, found)


def test_the_table_leads_to_fields_that_there_are():
    """Every word's target is a field of a job, and no word is a field's own name in its section."""
    sections = {"training": TrainingSettings, "data": DataSettings, "lora": LoraSettings}
    targets = {target for words in WORDS.values() for target in words.values()} | {target for target, _ in VALUES.values()}
    for target in targets - {""}:
        section, _, field = target.partition(".")
        assert field in sections[section].model_fields if field else section in Job.model_fields, target
    for section, words in WORDS.items():
        assert not set(words) & set((sections[section] if section else Plan).model_fields)
    assert not set(UNUSED) & set(TrainingSettings.model_fields)
    assert not set(UNUSED_LORA) & set(LoraSettings.model_fields)
    for place in ELSEWHERE.values():
        section, _, field = place.partition(":")[0].partition(".")
        assert field in sections[section].model_fields if field else section in Plan.model_fields, place
    assert not set(OLD) & set(TrainingSettings.model_fields)


def test_every_argument_of_hugging_faces_that_people_write_is_known():
    """The oracle is the library's own class: a word that is in this list and not known here must not be one of its fields."""
    from transformers import TrainingArguments

    from strategies.aliases import _KNOWN

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {"batch_size", "eval_batch_size", "mixed_precision", "tensorboard", "divergence_factor", "early_stopping_patience"}
    own |= {"packing"}  # TRL's
    ours = {"restart_warmup_ratio", "proximal_mu", "gradient_checkpointing", "example_privacy"}
    names = set(TrainingSettings.model_fields) - own - ours
    assert names - theirs <= {"warmup_ratio"}, "fields carry the library's names"
    written = {"per_device_train_batch_size", "fp16", "bf16", "eval_strategy", "save_strategy", "report_to", "output_dir"}
    assert written <= theirs & set(_KNOWN["training"])
