"""The selector over random tasks, machines and limits: it answers or refuses, always alike, and more is never worse."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from protocol.plan import Plan
from strategies.architecture import read
from strategies.hardware import PROFILES, Gpu, Hardware, rates_of
from strategies.selector import select
from strategies.task import Limits, Task

GIB = 2**30
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
QWEN = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
MODELS = [
    read(LLAMA | {"intermediate_size": 11008, "max_position_embeddings": 4096}),
    read(QWEN | {"intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True}),
    read({"model_type": "gpt2"}),
    read({"model_type": "bert"}),
]
KINDS = st.sampled_from(["generation", "classification", "regression", "question-answering", "code", "pretraining"])


@st.composite
def tasks(draw):
    kind = draw(KINDS)
    answers = kind in ("generation", "question-answering", "code")
    feedback = draw(st.sampled_from(["none", "none", "pairs", "single", "reward", "judge"])) if answers else "none"
    domains = draw(st.sampled_from([1, 1, 3]))
    length = draw(st.integers(1, 5000))
    return Task(
        kind=kind,
        rows=draw(st.integers(1, 1_000_000)),
        classes=draw(st.integers(2, 300)) if kind == "classification" else None,
        input_tokens=length,
        longest_tokens=draw(st.none() | st.integers(length, 9000)),
        median_tokens=draw(st.none() | st.integers(1, length)),
        output_tokens=draw(st.integers(0, 4000)),
        creative=draw(st.booleans()),
        shift=draw(st.sampled_from(["small", "ordinary", "pretraining"])),
        similarity=draw(st.none() | st.floats(0, 1)),
        tasks=draw(st.sampled_from([1, 1, 5])),
        domains=domains,
        one_model=domains > 1 and draw(st.booleans()),
        feedback=feedback,
        preference_pairs=draw(st.integers(1, 10_000)) if feedback == "pairs" else 0,
        private=draw(st.booleans()),
        on_device=draw(st.booleans()),
        quality=draw(st.sampled_from(["draft", "balanced", "critical"])),
        speed=draw(st.sampled_from(["fast", "balanced", "thorough"])),
        expertise=draw(st.sampled_from(["beginner", "intermediate", "expert"])),
        situation=draw(st.sampled_from([None, "prototype", "production"])),
    )


@st.composite
def machines(draw):
    ram = draw(st.integers(1, 512)) * GIB
    host = Hardware((), draw(st.integers(1, 64)), ram, draw(st.integers(2**20, ram)), 500 * GIB)
    if draw(st.booleans()):
        known = PROFILES[draw(st.sampled_from(["h100", "a100-40gb", "t4", "v100", "rtx-4090"]))].gpus[0]
        total = draw(st.integers(1, 192)) * GIB
        gpu = replace(known, total_bytes=total, free_bytes=draw(st.integers(GIB, total)))
        return replace(host, gpus=(gpu,) * draw(st.sampled_from([1, 1, 2, 8])))
    if draw(st.booleans()):
        return host
    total = draw(st.integers(1, 96)) * GIB
    return replace(
        host, gpus=(Gpu("unknown", total, total, draw(st.sampled_from([(6, 1), (7, 5), (8, 6)])), rates_of("unknown")),)
    )


LIMITS = st.builds(
    Limits,
    memory_margin=st.sampled_from([0.0, 0.1, 0.3]),
    hours=st.none() | st.floats(0.01, 1000),
    money=st.none() | st.floats(0.01, 1000),
    gpu_hour=st.just(2.0),
    max_rank=st.none() | st.integers(1, 64),
)


def named(found):
    return {one.name for one in found.feasible}


def answers_or_refuses(task, machine, model, limits):
    found = select(task, machine, model, limits)

    assert found.chosen is not None or found.rejected
    assert all(one.reason for one in found.rejected)
    if found.chosen:
        assert found.chosen is found.feasible[0]
        assert found.chosen.peak_bytes <= min((g.free_bytes for g in machine.gpus), default=machine.ram_free_bytes)
    for one in found.feasible:
        for stage in one.stages:
            assert Plan.model_validate(stage.model_dump()) == stage
            assert stage.lora.r <= (limits.max_rank or 1024)
            assert stage.data.max_length <= max(8, model.context)
    needs = [found.chosen.fits[0].estimate.device_bytes, *(r.needs_bytes for r in found.ladder)] if found.chosen else []
    assert needs == sorted(needs, reverse=True)
    assert select(task, machine, model, limits) == found


def bears_more_memory(task, machine, model, limits, more):
    gpus = tuple(replace(g, total_bytes=int(g.total_bytes * more), free_bytes=int(g.free_bytes * more)) for g in machine.gpus)
    # A GPU of more than 24 GB is no consumer's any more, which changes what rules say; that is not a matter of memory.
    assume(
        (min((g.total_bytes for g in machine.gpus), default=0) <= 26e9)
        == (min((g.total_bytes for g in gpus), default=0) <= 26e9)
    )
    ram = {"ram_total_bytes": int(machine.ram_total_bytes * more), "ram_free_bytes": int(machine.ram_free_bytes * more)}
    larger = replace(machine, gpus=gpus, **ram)

    before, after = select(task, machine, model, limits), select(task, larger, model, limits)

    assert named(before) <= named(after)
    if before.chosen:
        assert after.chosen.value >= before.chosen.value * (1 - 1e-12)


def bears_more_budget(task, machine, model, limits, more, what):
    assume(getattr(limits, what) is not None)
    raised = limits.model_copy(update={what: getattr(limits, what) * more})
    before, after = select(task, machine, model, limits), select(task, machine, model, raised)
    assert named(before) <= named(after)
    if before.chosen:
        assert after.chosen.value >= before.chosen.value * (1 - 1e-12)


ANY = (tasks(), machines(), st.sampled_from(MODELS), LIMITS)
CLAIMS = {
    "it answers or refuses with a reason, and always alike": given(*ANY)(answers_or_refuses),
    "more memory removes nothing and makes no choice worse": given(*ANY, st.floats(1, 8))(bears_more_memory),
    "more time or money removes nothing and makes no choice worse": given(
        *ANY, st.floats(1, 20), st.sampled_from(["hours", "money"])
    )(bears_more_budget),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_some_random_profiles(claim):
    settings(max_examples=40, **QUIET)(CLAIMS[claim])()


@pytest.mark.slow
@pytest.mark.parametrize("claim", CLAIMS)
def test_five_hundred_random_profiles(claim):
    settings(max_examples=500, **QUIET)(CLAIMS[claim])()


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_named_machine_gets_an_answer_for_half_a_billion_parameters(name):
    host = Hardware((), 8, 16 * GIB, 10 * GIB, 100 * GIB)
    machine = (
        replace(PROFILES[name], gpus=PROFILES[name].gpus)
        if not PROFILES[name].gpus
        else replace(host, gpus=PROFILES[name].gpus)
    )
    found = select(Task(input_tokens=256), machine, MODELS[1])
    assert found.chosen is not None, found.rejected
