"""A device learns from its own rows: what it keeps, what it gives up, and that being killed changes nothing."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge.runtime import gradient
from edge.runtime.adapting.adapt import Adapted, Device, _verdict, adapt, in_use
from edge.runtime.adapting.budget import Budget, Meter
from edge.runtime.adapting.holdout import apart
from edge.runtime.adapting.learning import Learning, Learnt, Settings, new_adapter
from edge.runtime.adapting.passes import Figures
from edge.runtime.adapting.personal import Personal, on_top, tensors
from edge.runtime.adapting.rows import RowReader
from edge.runtime.adapting.state import State, Trail, alone_in, packed, unpacked
from edge.runtime.manifest import TOKENIZER
from edge.runtime.model import open as opened
from edge.runtime.session import Resources
from edge.runtime.tokens import Tokeniser
from edge.runtime.training_rows import Row
from edge.runtime.verify import content
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, BundleError, ConfigurationError, DataError, DivergenceError, NotNowError

ONE = Resources(threads=1)
QUICK = Settings(learning_rate=0.01, epochs=2, evaluate_every=5, r=4, targets=("q_proj", "v_proj"))
MEANS = {"red": "stop", "green": "go", "amber": "wait", "blue": "sing"}
ROWS = [
    {"prompt": f"What does {color} mean, case {at}?", "answer": f"It means {means}."}
    for at in range(8)
    for color, means in MEANS.items()
]


@pytest.fixture(scope="module")
def bundle(trainable):
    return trainable


def learn(bundle, folder, rows=ROWS, budget=None, settings=QUICK, **more) -> Adapted:
    return adapt(
        bundle[0], rows, budget or Budget(), trusted=bundle[1], device=Device(folder, resources=ONE), settings=settings, **more
    )


def digest(folder):
    return Personal(folder).current()[0].adapter.digest()


@pytest.fixture(scope="module")
def learnt(bundle, tmp_path_factory):
    """What comes of the rows where nothing is in the way."""
    folder = tmp_path_factory.mktemp("learnt")
    return learn(bundle, folder), folder


def test_it_learns_and_answers_as_it_was_taught(bundle, learnt):
    """Held-back rows are other cases of the same colours; before, the base knows nothing of them."""
    made, folder = learnt
    assert (made.version, made.learnt.ended) == (1, "2 passes over the rows")
    assert made.learnt.after.loss < 0.2 * made.learnt.before.loss
    assert made.learnt.after.accuracy > made.learnt.before.accuracy + 0.3
    model = opened(*bundle)
    model.use_adapter("personal", *in_use(bundle[0], model.manifest, folder)[:1])
    answer = model.generate(
        [{"role": "user", "content": "What does green mean, case 3?"}], adapter="personal", max_new_tokens=12
    )
    assert answer.text.strip().startswith("It means")


def test_the_figures_are_those_of_the_adapter_in_the_inference_graph(bundle, learnt):
    """Oracle: log-probabilities from the logits of the graph that answers, over the same held-back rows."""
    made, folder = learnt
    found = gradient.open(*bundle, resources=ONE)
    tokens = Tokeniser(content(bundle[0], found.manifest, TOKENIZER), found.manifest.tokens)
    examples = RowReader(found.manifest, tokens, found.largest_tokens).examples(ROWS)
    learning = Learning(found, examples, QUICK, new_adapter(found, QUICK), Trail(folder))
    model = opened(*bundle)
    model.use_adapter("personal", Personal(folder).current()[0].adapter)
    loss = count = 0
    for (row,) in learning._held_out:
        logits = model.outputs(row.ids, adapter="personal").astype(np.float64)
        logs = (
            logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
        )
        learnt_at = [at for at, label in enumerate(row.labels) if at and label != -100]
        loss -= sum(logs[at - 1, row.labels[at]] for at in learnt_at)
        count += len(learnt_at)
    assert made.learnt.after.loss == pytest.approx(loss / count, rel=1e-4)


def test_a_budget_that_runs_out_every_third_step_changes_nothing_in_the_end(bundle, learnt, tmp_path):
    for _ in range(20):
        made = learn(bundle, tmp_path, budget=Budget(steps=3))
        if made.learnt.ended:
            break
        assert made.learnt.stopped == "steps: 3 of 3"
    assert made.learnt.ended
    assert digest(tmp_path) == digest(learnt[1])
    assert made.learnt.after == learnt[0].learnt.after


KILLED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_adapting import QUICK, ROWS, learn
from protocol.signature import read_public
key = read_public(Path(sys.argv[2]).read_bytes(), Path(sys.argv[2]), "key")
learn((Path(sys.argv[1]), key), Path(sys.argv[3]), watch=lambda step, loss: print(step, flush=True))
"""


def killed(bundle, folder, keys, after):
    """One process that is killed ``after`` seconds behind its first step, or ends before; how many steps it told."""
    script = KILLED.format(path=[str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", script, bundle[0], keys, folder], stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    time.sleep(after if first else 0)
    process.send_signal(signal.SIGKILL)
    return len(process.communicate()[0].split()) + bool(first)


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)], ids=["twice", "fifty-times"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(bundle, learnt, tmp_path, times):
    keys = tmp_path / "key.pub"
    keys.write_bytes(public(bundle[1]))
    generator = np.random.default_rng(times)
    interrupted, folder = 0, tmp_path / "own"
    while interrupted < times:  # killed before its last word was kept, the next one has no step left to tell of
        interrupted += killed(bundle, folder, keys, generator.uniform(0, 0.5)) > 0
        if Personal(folder).current()[0]:  # it came to its end before it was killed
            assert digest(folder) == digest(learnt[1])
            shutil.rmtree(folder)
    learn(bundle, folder)
    assert digest(folder) == digest(learnt[1])


def public(key):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_state_gives_way_to_the_one_before_and_it_is_said(bundle, learnt, tmp_path, harm):
    learn(bundle, tmp_path, budget=Budget(steps=4))
    shutil.rmtree(tmp_path / "adapter-1.state", ignore_errors=True)
    newest = max(tmp_path.glob("training-*.state"), key=lambda path: path.stat().st_mtime_ns)
    held = bytearray(newest.read_bytes())
    held[len(held) // 2] ^= 1
    newest.write_bytes(held if harm == "flip" else held[:-1])
    made = learn(bundle, tmp_path)
    assert any(newest.name in said and "damaged" in said for said in made.learnt.said)
    assert digest(tmp_path) == digest(learnt[1])


def test_what_is_no_better_is_not_kept_and_the_adapter_in_use_stays(bundle, learnt, tmp_path):
    """A rate that is far too high, on labels that contradict what was learnt."""
    folder = tmp_path / "own"
    shutil.copytree(learnt[1], folder)
    before = digest(folder)
    made = learn(bundle, folder, settings=QUICK.model_copy(update={"learning_rate": 1.0}))
    assert made.version is None
    assert "no better" in made.why
    assert digest(folder) == before


def test_a_loss_that_is_no_number_ends_it_and_the_adapter_in_use_stays(bundle, learnt, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(learnt[1], folder)
    before = digest(folder)
    with pytest.raises(DivergenceError), np.errstate(all="ignore"):
        learn(bundle, folder, settings=QUICK.model_copy(update={"learning_rate": 1e30}))
    assert digest(folder) == before
    assert Trail(folder).newest() == (None, [])


def test_an_adapter_beneath_stays_and_what_is_learnt_lies_on_top(bundle, tmp_path):
    """Oracle: central differences of the loss along a random direction of the upper adapter alone."""
    found = gradient.open(*bundle, resources=ONE)
    tokens = Tokeniser(content(bundle[0], found.manifest, TOKENIZER), found.manifest.tokens)
    examples = RowReader(found.manifest, tokens, found.largest_tokens).examples(ROWS[:4])
    generator = np.random.default_rng(5)
    below = Adapter({name: drawn(generator, 2, found.modules[name]) for name in list(found.modules)[:6]})
    upper = Adapter({name: drawn(generator, 3, found.modules[name]) for name in list(found.modules)[3:9]})
    learning = Learning(found, examples, QUICK, upper, Trail(tmp_path), frozen=below)
    rows, own = [row for rows in examples.rows for row in rows], dict[str, np.ndarray]()
    learning._passes.gradient(upper, examples.rows, own)
    assert own.keys() == tensors(upper).keys()
    for name in list(own)[::5]:
        direction = generator.standard_normal(own[name].shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        losses = []
        for sign in (1, -1):
            moved = tensors(upper) | {name: tensors(upper)[name] + sign * np.float32(2e-2) * direction}
            scored = found.score(rows, on_top(below, replaced(upper, moved)))
            losses.append(-scored.log_probabilities.sum() / scored.tokens.sum())
        # Differences of float32 losses: a few parts in a hundred of the slope, or nothing where the slope is nothing.
        assert (losses[0] - losses[1]) / 4e-2 == pytest.approx(float((own[name] * direction).sum()), rel=0.05, abs=2e-4)


def drawn(generator, r, shape):
    d_in, d_out = shape
    A, B = generator.standard_normal((r, d_in)), generator.standard_normal((d_out, r))
    return Factors((A / d_in**0.5).astype(np.float32), (0.1 * B).astype(np.float32), 1.5)


def replaced(adapter, given):
    from edge.runtime.adapting.personal import with_tensors

    return with_tensors(adapter, given)


def test_pairs_are_learnt_by_dpo(bundle, tmp_path):
    rows = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "I cannot say anything about that."} for row in ROWS]
    made = learn(bundle, tmp_path, rows)
    assert made.learnt.before.loss == pytest.approx(np.log(2), abs=1e-3)  # at the reference no answer is preferred
    assert made.learnt.after.loss < 0.3
    assert made.learnt.after.accuracy == 1.0


def test_forward_only_steps_learn_too(bundle, tmp_path):
    """Their estimate is noisy and their steps are many; the same rows in as many gradient steps come far lower."""
    made = learn(
        bundle, tmp_path, settings=QUICK.model_copy(update={"method": "forward-only", "epochs": 6, "learning_rate": 3e-3})
    )
    assert made.learnt.after.loss < 0.97 * made.learnt.before.loss


def test_replayed_rows_are_forgotten_less(bundle, tmp_path):
    """What was learnt first is measured after learning something that contradicts it, with replay and without."""
    first = learn(bundle, tmp_path / "first", settings=QUICK.model_copy(update={"epochs": 4}))
    assert first.version == 1
    other = [{"prompt": row["prompt"].replace("mean", "weigh"), "answer": "Nobody has ever weighed it."} for row in ROWS]
    forgot = {}
    for share in (0.5, 0.0):
        shutil.copytree(tmp_path / "first", tmp_path / f"then-{share}")
        settings = QUICK.model_copy(update={"replay_share": share, "epochs": 4})
        made = learn(bundle, tmp_path / f"then-{share}", other, settings=settings, replay=ROWS)
        before, after = made.learnt.forgot
        forgot[share] = after.loss - before.loss
    assert forgot[0.0] > 0
    assert forgot[0.5] <= 0.5 * forgot[0.0]


def test_a_row_that_measures_never_trains_again_and_is_never_replayed(bundle, tmp_path):
    """Whatever comes later: the same row of a longer list is held back again, and a buffer of all rows replays no such one."""
    found = gradient.open(*bundle, resources=ONE)
    tokens = Tokeniser(content(bundle[0], found.manifest, TOKENIZER), found.manifest.tokens)
    reader = RowReader(found.manifest, tokens, found.largest_tokens)
    rows = [{"prompt": f"Row {number}?", "answer": f"It is {number}."} for number in range(40)]
    settings = QUICK.model_copy(update={"held_out": 0.25})
    few, all_of_them = reader.examples(rows[:20]), reader.examples(rows)

    def learning(examples, replay=None):
        start = new_adapter(found, settings)
        return Learning(found, examples, settings, start, Trail(tmp_path), replay=replay)

    def told(rows):
        return {tuple(each[0].ids) for each in rows}

    first, second = learning(few), learning(all_of_them, replay=few)
    assert len(first._held_out) == 5
    assert len(told(first._held_out) & told(second._training)) <= 1  # a quarter of other rows ends elsewhere
    buffered = learning(few, replay=all_of_them)
    assert told(buffered._replay) | told(buffered._probe) == told(all_of_them.rows) - told(few.rows)
    assert second._replay == second._probe == []


def test_what_forgets_too_much_is_not_kept(bundle, learnt, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(learnt[1], folder)
    other = [{"prompt": row["prompt"].replace("mean", "weigh"), "answer": "Nobody has ever weighed it."} for row in ROWS]
    made = learn(
        bundle, folder, other, settings=QUICK.model_copy(update={"replay_share": 0.0, "most_forgetting": 0.01}), replay=ROWS
    )
    assert (made.version, made.why.split(":")[0]) == (None, "forgets too much")


def test_what_the_device_feels_stops_it_between_micro_batches(bundle, tmp_path):
    found = gradient.open(*bundle, resources=ONE)
    tokens = Tokeniser(content(bundle[0], found.manifest, TOKENIZER), found.manifest.tokens)
    examples = RowReader(found.manifest, tokens, found.largest_tokens).examples(ROWS)
    settings = QUICK.model_copy(update={"accumulation": 4})
    learning = Learning(found, examples, settings, new_adapter(found, settings), Trail(tmp_path))
    now = iter(range(1000))
    made = learning.run(Meter(Budget(seconds=14), clock=lambda: float(next(now))))
    assert (made.steps, made.ended, made.stopped.split(":")[0]) == (1, "", "seconds")


BAD = {
    "rank": (lambda b, f: learn(b, f, settings=QUICK.model_copy(update={"r": 1000})), ConfigurationError, "r: found 1000"),
    "targets": (
        lambda b, f: learn(b, f, settings=QUICK.model_copy(update={"targets": ("nowhere",)})),
        ConfigurationError,
        "nowhere",
    ),
    "adapter": (lambda b, f: learn(b, f, adapter="north"), AdapterError, "north"),
    "row": (lambda b, f: learn(b, f, [*ROWS, {"answer": "no"}]), DataError, "row 33"),
    "replay": (
        lambda b, f: learn(b, f, replay=[{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        ConfigurationError,
        "replay",
    ),
    "labels": (lambda b, f: learn(b, f, labels=("yes", "no")), ConfigurationError, "labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_learnt_is_refused_and_the_adapter_in_use_stays(bundle, learnt, tmp_path, name):
    folder = tmp_path / "own"
    shutil.copytree(learnt[1], folder)
    call, kind, said = BAD[name]
    if name in ("rank", "targets"):  # of a new adapter
        shutil.rmtree(folder)
    with pytest.raises(kind, match=said):
        call(bundle, folder)
    assert name in ("rank", "targets") or digest(folder) == digest(learnt[1])


def test_a_bundle_without_training_graphs_says_so(bundle, tmp_path):
    from small_bundles import KEY
    from small_bundles import bundle as noise

    with pytest.raises(BundleError, match="--trainable"):
        learn((noise(tmp_path / "noise"), KEY.public_key()), tmp_path / "own")


def test_an_adapter_of_another_base_is_not_used(bundle, learnt, tmp_path):
    folder = tmp_path / "own"
    Personal(folder).keep(Personal(learnt[1]).current()[0].adapter, {"base_digest": "00" * 32})
    with pytest.raises(AdapterError, match="another base"):
        in_use(bundle[0], opened(*bundle).manifest, folder)


def test_a_version_of_another_base_is_not_trained_on_and_it_is_said(bundle, learnt, tmp_path):
    """The new one is that of a folder in which nothing was learnt before."""
    Personal(tmp_path).keep(Personal(learnt[1]).current()[0].adapter, {"base_digest": "00" * 32})
    made = learn(bundle, tmp_path)
    assert "version 1 was made for another base; a new adapter is begun" in made.learnt.said
    assert digest(tmp_path) == digest(learnt[1])


def test_a_version_that_lies_on_another_adapter_is_not_trained_without_it(bundle, learnt, tmp_path):
    """Its figures would be of what nobody uses."""
    found = Personal(learnt[1]).current()[0]
    Personal(tmp_path).keep(found.adapter, {**found.facts, "beneath": "north"})
    with pytest.raises(ConfigurationError, match="--adapter north --beneath, or roll back"):
        learn(bundle, tmp_path)
    assert digest(tmp_path) == digest(learnt[1])


def test_a_rank_that_is_not_that_of_the_version_in_use_is_told(bundle, learnt, tmp_path):
    shutil.copytree(learnt[1], tmp_path / "own")
    made = learn(bundle, tmp_path / "own", budget=Budget(steps=1), settings=QUICK.model_copy(update={"r": 16}))
    assert "r: 16 is of a new adapter; version 1 goes on with rank 4" in made.learnt.said


def test_a_second_training_in_the_same_folder_is_refused(bundle, tmp_path):
    with alone_in(tmp_path), pytest.raises(NotNowError, match="another process learns there"):
        learn(bundle, tmp_path)


@pytest.mark.parametrize("harm", ["arrays", "numbers", "facts"])
def test_a_forged_state_is_given_up_and_it_is_said(bundle, learnt, tmp_path, harm):
    """It has the right identity and a sum that holds."""
    learn(bundle, tmp_path, budget=Budget(steps=2))
    for path in [*tmp_path.glob("adapter-*"), tmp_path / "current.json"]:
        path.unlink(missing_ok=True)
    for path in tmp_path.glob("training-*.state"):
        state = unpacked(path.read_bytes())
        facts, arrays = dict(state.facts), dict(state.arrays)
        name = next(name for name in arrays if name.startswith("now|"))
        if harm == "facts":
            facts["before"] = 3
        elif harm == "arrays":
            del arrays[name]
        else:
            arrays[name] = np.full_like(arrays[name], np.nan)
        path.write_bytes(packed(State(facts, arrays)))
    made = learn(bundle, tmp_path)
    assert "the state of the unfinished training is not whole; it is given up" in made.learnt.said
    assert digest(tmp_path) == digest(learnt[1])


def test_a_last_step_that_leaves_no_numbers_is_forgotten(bundle, tmp_path):
    """Its loss was one; kept, its state would end every later call."""
    with pytest.raises(DivergenceError):
        learn(bundle, tmp_path, budget=Budget(steps=1), settings=QUICK.model_copy(update={"learning_rate": 1e38}))
    assert Trail(tmp_path).newest() == (None, [])
    assert learn(bundle, tmp_path, budget=Budget(steps=1)).learnt.steps == 1


def test_a_budget_that_ends_in_the_first_measurement_keeps_it(bundle, tmp_path):
    """Or a device with little time would measure each time and never come to a step."""
    made = learn(bundle, tmp_path, budget=Budget(seconds=1e-9))
    assert (made.version, made.learnt.steps, made.why) == (None, 0, "no step was taken")
    state, wrong = Trail(tmp_path).newest()
    assert (state.facts["step"], wrong) == (0, [])


@pytest.mark.parametrize(("kinds", "share", "held"), [((1, 7), 0.2, 1), ((1, 1, 1, 1), 0.99, 3), ((8,), 0.5, 0)], ids=str)
def test_whatever_the_share_something_trains_and_what_can_be_held_back_is(kinds, share, held):
    for first in range(0, 50, 10):
        rows = [(Row([kind, 1], [kind, 1]),) for kind, count in enumerate(kinds, first) for _ in range(count)]
        measures, trains = apart(rows, share)
        assert len(measures) + len(trains) == len(rows)
        assert len(trains) > 0
        assert (len(measures) > 0) == (held > 0)
        ids = [{tuple(row.ids) for (row,) in some} for some in (measures, trains)]
        assert not ids[0] & ids[1]


def test_figures_that_are_no_numbers_keep_nothing():
    def learnt_of(after, forgot=None):
        return Learnt(Adapter(), Figures(1.0, 0.0), Figures(after, 0.0), forgot, 3, "")

    settings = Settings(most_forgetting=0.1)
    assert not _verdict(learnt_of(math.nan), Figures(math.nan, 0.0), settings, measured=True)[0]
    forgot = Figures(1.0, 0.0), Figures(math.nan, 0.0)
    assert not _verdict(learnt_of(0.5, forgot), Figures(1.0, 0.0), settings, measured=True)[0]
    assert _verdict(learnt_of(0.5), Figures(1.0, 0.0), settings, measured=True)[0]


def test_the_verbs_tell_what_was_learnt(bundle, learnt, tmp_path, capsys):
    from typer.testing import CliRunner

    import fedge

    rows, keys, own = tmp_path / "rows.jsonl", tmp_path / "key.pub", str(tmp_path / "own")
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    keys.write_bytes(public(bundle[1]))
    ask = CliRunner().invoke
    where = ["--folder", own]
    made = ask(
        fedge.app,
        ["edge", "adapt", str(bundle[0]), str(rows), "--key", str(keys), *where, "--steps", "3", "--threads", "1", "--json"],
    )
    assert made.exit_code == 0, made.output
    told = json.loads(made.output.splitlines()[-1])
    assert (told["steps"], told["stopped"], told["version"]) == (3, "steps: 3 of 3", 1)
    status = json.loads(ask(fedge.app, ["edge", "status", str(bundle[0]), *where, "--json"]).output)
    assert (status["in_use"], status["unfinished_step"], status["kept"]) == (1, 3, [1])
    answered = ask(
        fedge.app, ["edge", "run", str(bundle[0]), "What does red mean?", "--key", str(keys), "--own", own, "--json"]
    )
    assert list(json.loads(answered.output)["answers"]) == ["personal"]
    assert "the bundle's own" in ask(fedge.app, ["edge", "rollback", str(bundle[0]), *where]).output


def test_the_page_says_how(bundle, tmp_path, monkeypatch):
    """The commands of docs/edge.md, in their order."""
    import re
    import shlex

    from typer.testing import CliRunner

    import fedge

    page = (Path(__file__).parents[3] / "docs" / "edge.md").read_text()
    (lines,) = (
        each
        for each in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        if "edge adapt bundles/learner own" in each
    )
    shutil.copytree(bundle[0], tmp_path / "bundles" / "learner")
    (tmp_path / "release.pub").write_bytes(public(bundle[1]))
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.chdir(tmp_path)
    told = [CliRunner().invoke(fedge.app, shlex.split(line)[1:], catch_exceptions=False).output for line in lines.splitlines()]
    assert "20 steps" in told[0]
    assert "version 1 is in use" in told[1]
    assert "personal:" in told[2]
    assert "the bundle's own" in told[3]
