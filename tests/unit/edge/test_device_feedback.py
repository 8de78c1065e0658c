"""What users say of answers is kept only as they agreed, refused where it would do harm, and learnt from under a guard.

A real server on loopback, a real vault, the tiny bundle with its training graphs.
"""

import contextlib
import json
import logging
import shutil
import time

import httpx
import pytest
import served
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

import fedge
from edge.runtime.adapting.adapt import Device, adapt
from edge.runtime.adapting.feedback import Entry, Limits, Store, counts, guarded, learnable, screen_of
from edge.runtime.adapting.learning import Settings as Learning
from edge.runtime.adapting.personal import Personal
from edge.runtime.adapting.replay import ReplayBuffer
from edge.runtime.adapting.sealing import VaultSeal
from edge.runtime.collecting import Collector, Window
from edge.runtime.listening import RefusedError
from edge.runtime.model import open as opened
from edge.runtime.session import Resources
from protocol.errors import ConfigurationError, DataError, ModelError, VaultError
from protocol.vault import Vault, make_key_file

VAULT = Vault(bytes(range(32)))
CANARY = "zebra-canary"
OPENER = "a-token-of-many-characters"
CLIENT = httpx.Client(trust_env=False, timeout=60)
QUICK = Learning(learning_rate=0.01, epochs=2, evaluate_every=4, r=4, batch_size=8, targets=("q_proj", "v_proj"))
LONGER = QUICK.model_copy(update={"epochs": 8})
MEANS = {"red": "stop", "green": "go", "amber": "wait", "blue": "sing"}
HOSTILE = "Send all your crowns to the man at the door."
ONE = Resources(threads=1)


@pytest.fixture(scope="module")
def model(trainable):
    return opened(*trainable, resources=ONE)


@pytest.fixture(scope="module")
def screen(trainable, model):
    return screen_of(trainable[0], model.manifest)


@contextlib.contextmanager
def serving(model, folder=None, screen=None, window=None, limits=None, **chosen):
    """A server, which collects feedback where there is a folder."""
    store = Store(folder, VAULT, limits or Limits()) if folder else None
    collector = Collector(store, screen, window or Window(words_a_minute=1000)) if store else None
    with served.serving(model, collector, **chosen) as server:
        yield server


@pytest.fixture(scope="module")
def collecting(model, screen, tmp_path_factory):
    folder = tmp_path_factory.mktemp("feedback")
    with serving(model, folder, screen) as server:
        server.folder = folder
        yield server


def ask(server, said="What does red mean?", **more):
    """The completion of one question, of a few tokens; its user agrees."""
    body = {"model": "base", "messages": [{"role": "user", "content": said}], "temperature": 0, "max_tokens": 3, "store": True}
    return CLIENT.post(f"{server.url}/chat/completions", json=body | more)


def say(server, number, **said):
    return CLIENT.post(f"{server.url}/feedback", json={"id": number} | said)


def kept(server):
    return {entry.id: entry for entry in Store(server.folder, VAULT).entries()}


def entry(number, answer="yes", client="one", rating="up", correction=None, prompt="a question"):
    messages = ({"role": "user", "content": f"{prompt} {number}"},)
    return Entry(id=f"chatcmpl-{number}", client=client, messages=messages, answer=answer, rating=rating, correction=correction)


def test_what_is_said_of_an_answer_is_kept_sealed_and_becomes_rows(collecting, screen):
    """Oracle: the rows by hand, from what was asked, answered and said."""
    replies = {rating: ask(collecting, f"What does {rating} mean?").json() for rating in ("up", "down", "both")}
    answers = {rating: reply["choices"][0]["message"]["content"] for rating, reply in replies.items()}
    assert say(collecting, replies["up"]["id"], rating="up").json()["kept"] == "accepted"
    assert say(collecting, replies["down"]["id"], rating="down").json()["kept"] == "rejected"
    told = say(collecting, replies["both"]["id"], rating="down", correction="It means both.").json()
    assert told == {"id": replies["both"]["id"], "object": "feedback", "kept": "corrected"}
    entries = [each for number, each in kept(collecting).items() if number in {reply["id"] for reply in replies.values()}]
    prompts = {rating: [{"role": "user", "content": f"What does {rating} mean?"}] for rating in replies}
    found = learnable(entries, screen)
    assert found.rows == [
        {"prompt": prompts["up"], "answer": answers["up"]},
        {"prompt": prompts["both"], "answer": "It means both."},
    ]
    assert (found.silent, sum(found.refused.values())) == (1, 0)
    pairs = learnable(entries, screen, pairs=True)
    assert pairs.rows == [{"prompt": prompts["both"], "chosen": "It means both.", "rejected": answers["both"]}]
    assert counts(entries) | {"size_bytes": 0} == {"accepted": 1, "corrected": 1, "rejected": 1, "clients": 1, "size_bytes": 0}


def test_a_streamed_answer_can_be_spoken_of_and_the_last_word_counts(collecting):
    reply = ask(collecting, "Stream it", stream=True)
    number = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))["id"]
    assert say(collecting, number, rating="up").status_code == 200
    assert say(collecting, number, correction="Better.").status_code == 200
    assert (kept(collecting)[number].kind, kept(collecting)[number].learnt) == ("corrected", "Better.")


@pytest.mark.parametrize("consent", [{"store": False}, {"store": None}, {"store": "true"}, {"store": 1}, {"metadata": {}}])
def test_without_the_users_consent_nothing_is_remembered(collecting, consent):
    body = {"store": None} | consent
    number = ask(collecting, CANARY, **body).json()["id"]
    assert say(collecting, number, rating="up").status_code == 404
    assert all(CANARY not in waiting[1].model_dump_json() for waiting in collecting.collector._waiting.values())


def test_a_server_that_was_not_started_so_remembers_nothing(model):
    with serving(model) as server:
        number = ask(server).json()["id"]
        assert say(server, number, rating="up").status_code == 404
        assert CLIENT.delete(f"{server.url}/feedback").status_code == 404


@pytest.fixture(scope="module")
def answered(collecting):
    return ask(collecting, "To be spoken of").json()["id"]


BAD = {
    "no JSON": (b"{", 400),
    "nothing": (b"", 400),
    "a list": (b"[]", 400),
    "half a surrogate": (b'{"id": "ID", "correction": "\\ud800"}', 400),
    "no UTF-8": (b'{"id": "ID", "correction": "\xff"}', 400),
    "nested": (b'{"id": "ID", "correction": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    "no id": (b'{"rating": "up"}', 400),
    "another id": (b'{"id": "chatcmpl-000000000000000000000000", "rating": "up"}', 404),
    "an id that is a path": (b'{"id": "../../../etc/passwd", "rating": "up"}', 400),
    "an id and a line": (b'{"id": "ID\\n", "rating": "up"}', 400),
    "an id that is a number": (b'{"id": 7, "rating": "up"}', 400),
    "says nothing": (b'{"id": "ID"}', 400),
    "a rating that is none": (b'{"id": "ID", "rating": "superb"}', 400),
    "a rating that is a number": (b'{"id": "ID", "rating": 1}', 400),
    "good and corrected": (b'{"id": "ID", "rating": "up", "correction": "other"}', 400),
    "an empty correction": (b'{"id": "ID", "correction": ""}', 400),
    "a blank correction": (b'{"id": "ID", "correction": " \\n "}', 400),
    "a correction that is a list": (b'{"id": "ID", "correction": ["CANARY"]}', 400),
    "words of its own": (b'{"id": "ID", "rating": "up", "answer": "CANARY"}', 400),
    "a conversation of its own": (b'{"id": "ID", "rating": "up", "messages": [{"role": "system", "content": "CANARY"}]}', 400),
    "a control token": (b'{"id": "ID", "correction": "CANARY CONTROL"}', 400),
    "a control character": (b'{"id": "ID", "correction": "CANARY\\u0000"}', 400),
    "a terminal's": (b'{"id": "ID", "correction": "CANARY\\u001b[2J"}', 400),
    "a private character": (b'{"id": "ID", "correction": "CANARY\\ue000"}', 400),
    "a loop": (b'{"id": "ID", "correction": "' + b"CANARY " * 60 + b'"}', 400),
    "too long": (b'{"id": "ID", "correction": "' + b"x" * 20_000 + b'"}', 400),
    "too long together": (b'{"id": "ID", "correction": "' + b"".join(b"%d " % at for at in range(3498)) + b'"}', 400),
    "more than a body": (b'{"id": "ID", "correction": "' + b"x" * 2**20 + b'"}', 413),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_feedback_is_refused_and_nothing_is_kept_or_repeated(collecting, answered, model, screen, name, caplog):
    caplog.set_level(logging.DEBUG)
    body, status = BAD[name]
    control = sorted(each.content for each in model.tokens._tokenizer.get_added_tokens_decoder().values() if each.special)
    name_of = next(each for each in control if screen._tokens.holds_control(each))
    body = body.replace(b"ID", answered.encode()).replace(b"CANARY", CANARY.encode()).replace(b"CONTROL", name_of.encode())
    before = kept(collecting)
    reply = CLIENT.post(f"{collecting.url}/feedback", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    assert CANARY not in reply.text
    assert kept(collecting) == before
    assert all(CANARY not in record.getMessage() for record in caplog.records)


def test_refusals_say_the_number(collecting, answered):
    assert "20000" not in say(collecting, answered, correction="x" * 20_000).text  # read strictly before it is looked at
    for said, figure in (
        ("ha " * 100, "deflates to 0.0"),
        ("a\x07b\x07", "2 characters"),
        ("".join(f"{at} " for at in range(3498)), "expected at most 16384"),
    ):
        assert figure in say(collecting, answered, correction=said).json()["error"]["message"]


def test_other_methods_and_pages_of_others_are_refused(collecting):
    url = f"{collecting.url}/feedback"
    assert CLIENT.get(url).status_code == 405
    assert CLIENT.put(url).status_code == 501
    assert CLIENT.post(url, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert CLIENT.delete(url, headers={"Host": "evil.example"}).status_code == 403
    assert CLIENT.delete(f"{collecting.url}/models").status_code == 501
    assert CLIENT.delete(f"{url}?all=1").status_code == 501


def test_with_a_token_nobody_else_speaks_or_wipes(model, screen, tmp_path):
    with serving(model, tmp_path, screen, token=OPENER) as server:
        assert say(server, "chatcmpl-" + "0" * 24, rating="up").status_code == 401
        assert CLIENT.delete(f"{server.url}/feedback").status_code == 401


def test_wiping_takes_away_what_is_kept_and_what_waits(model, screen, tmp_path):
    with serving(model, tmp_path, screen) as server:
        numbers = [ask(server, CANARY).json()["id"] for _ in range(2)]
        assert say(server, numbers[0], rating="up").status_code == 200
        assert CLIENT.delete(f"{server.url}/feedback").json() == {"object": "feedback", "deleted": True}
        assert not (tmp_path / "feedback.sealed").exists()
        assert [say(server, number, rating="up").status_code for number in numbers] == [404, 404]
        assert Store(tmp_path, VAULT).entries() == []


def test_neither_files_nor_logs_nor_errors_hold_what_was_said(model, screen, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(model, tmp_path, screen) as server:
        number = ask(server, f"My name is {CANARY}", user=CANARY).json()["id"]
        assert say(server, number, correction=f"Hello {CANARY}.").status_code == 200
        damaged = (tmp_path / "feedback.sealed").read_bytes()
        assert CANARY.encode() not in damaged
        (tmp_path / "feedback.sealed").write_bytes(damaged[:-1])
        broken = say(server, number, rating="down")
        assert (broken.status_code, CANARY in broken.text) == (500, False)
        assert "feedback cannot be kept here" in broken.text
        assert "feedback.sealed" not in broken.text
        assert (tmp_path / "feedback.sealed").read_bytes() == damaged[:-1]
    ours = "\n".join(record.getMessage() for record in caplog.records)
    assert "/v1/feedback 200" in ours
    assert "feedback.sealed: does not open" in ours
    assert CANARY not in ours
    assert all(CANARY.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_another_key_is_told_when_the_server_starts(tmp_path, screen):
    Store(tmp_path, VAULT).add(entry(1), screen)
    with pytest.raises(VaultError):
        Collector(Store(tmp_path, Vault(bytes(32))), screen)


def test_answers_wait_within_bounds_and_words_come_so_many_a_minute(screen, tmp_path):
    """A clock of ours; each question below has 10 characters and its answer 10."""
    now = [0.0]
    window = Window(answers=5, characters=80, seconds=100, words_a_minute=7)
    collector = Collector(Store(tmp_path, VAULT), screen, window, clock=lambda: now[0])

    def held(first, last):
        for number in range(first, last):
            collector.hold(f"chatcmpl-{number:024x}", [{"role": "user", "content": "q" * 10}], "a" * 10, "one")
        return [int(number.removeprefix("chatcmpl-"), 16) for number in collector._waiting]

    assert held(0, 6) == [2, 3, 4, 5]
    collector.hold("chatcmpl-" + "f" * 24, [{"role": "user", "content": "q" * 17_000}], "a", "one")
    assert len(collector._waiting) == 4
    now[0] = 101.0
    assert held(6, 8) == [6, 7]
    said = json.dumps({"id": f"chatcmpl-{6:024x}", "rating": "up"}).encode()
    for _ in range(7):
        collector.take(said)
    with pytest.raises(RefusedError, match="7 words of feedback"):
        collector.take(said)
    now[0] = 161.5
    assert collector.take(said)["kept"] == "accepted"
    now[0] = 202.0
    collector.let_go()
    assert (len(collector._waiting), collector._characters) == (0, 0)


def test_what_waits_is_forgotten_in_time_where_nobody_asks(model, screen, tmp_path):
    with serving(model, tmp_path, screen, Window(seconds=0.1)) as server:
        ask(server, CANARY)
        assert any(not server.collector._waiting or time.sleep(0.02) for _ in range(500))


def test_one_client_and_all_of_them_have_so_much_room(tmp_path, screen):
    """Of 8 rows one client has 4; which it is stands nowhere in the open, nor in the file."""
    store = Store(tmp_path, VAULT, Limits(rows=8))
    for number in range(4):
        store.add(entry(number, f"answer {number}", client="one"), screen)
    with pytest.raises(DataError, match=r"5 entries .* one client, expected at most 4"):
        store.add(entry(4, "answer 4", client="one"), screen)
    store.add(entry(3, "changed", client="one"), screen)
    for number in range(10, 14):
        store.add(entry(number, f"answer {number}", client="two"), screen)
    with pytest.raises(DataError, match=r"9 entries .* all clients, expected at most 8"):
        store.add(entry(20, "answer 20", client="three"), screen)
    assert len(store.entries()) == 8
    assert {each.client for each in store.entries()}.isdisjoint({"one", "two"})
    with pytest.raises(DataError, match="bytes of all clients"):
        Store(tmp_path / "small", VAULT, Limits(size_bytes=200)).add(entry(1, "x y z " * 30, rating="down"), screen)


def test_the_same_words_are_taught_so_often_and_no_more(tmp_path, screen):
    """Case, spaces and compatible letters make no other words. What is turned down teaches nothing."""
    store = Store(tmp_path, VAULT)
    for number, answer in enumerate([HOSTILE, HOSTILE.upper(), f" {HOSTILE}", HOSTILE.replace(" ", "\n"), HOSTILE]):
        store.add(entry(number, answer), screen)
    for number, other in ((5, HOSTILE), (6, HOSTILE.replace("S", "Ｓ"))):
        with pytest.raises(DataError, match="the same answer: 5 rows"):
            store.add(entry(number, other), screen)
    with pytest.raises(DataError, match="the same answer"):
        store.add(entry(7, "fine", rating=None, correction=HOSTILE), screen)
    store.add(entry(8, HOSTILE, rating="down"), screen)
    assert len(store.entries()) == 6


def test_rows_are_looked_at_again_before_they_are_learnt_from(screen):
    """Thirty rows of one hostile answer, which reached the store in some other way: five are left, and it is said."""
    found = learnable([entry(number, HOSTILE) for number in range(30)] + [entry(30, "ha " * 200)], screen)
    assert (len(found.rows), found.refused) == (5, {"the same answer": 25, "a loop": 1})
    assert "feedback: 25 rows refused: the same answer" in found.said()
    with pytest.raises(DataError, match="5 rows to learn from, expected at least 8"):
        guarded(QUICK, len(found.rows))
    assert (guarded(QUICK, 8).most_forgetting, guarded(QUICK, 8).held_out) == (0.1, 0.2)
    assert guarded(QUICK.model_copy(update={"most_forgetting": 0.5}), 8).most_forgetting == 0.5


def test_what_people_write_is_not_refused(screen):
    for said in (
        "Ja, natürlich – 12 € bitte!",
        "数据保护很重要。",
        "👩‍👩‍👧 fine\tand\r\nso on",
        "".join(f"Plan {at}: the fee is {3 * at} crowns, to be paid by the {at % 28 + 1}th.\n" for at in range(40)),
        "for i in range(10):\n    print(i)\n" * 4,
        "no " * 20,
    ):
        assert screen.problem([{"role": "user", "content": said}], [said], said) == ""


def test_a_bundle_without_conversations_collects_nothing(trainable, model):
    for change in ({"chat": None}, {"kind": "classifier"}):
        with pytest.raises(ModelError, match="feedback is on answers"):
            screen_of(trainable[0], model.manifest.model_copy(update=change))


def rows(mean, colors=MEANS, cases=4):
    return [
        {"prompt": f"What does {color} mean, case {at}?", "answer": mean(means, at)}
        for at in range(cases)
        for color, means in colors.items()
    ]


@pytest.fixture(scope="module")
def personal(trainable, tmp_path_factory):
    """A folder with a sealed adapter that has learnt the colours, and a buffer with what it learnt."""
    folder = tmp_path_factory.mktemp("personal")
    buffer = ReplayBuffer(folder / "replay", VAULT)
    buffer.add(rows(lambda means, at: f"It means {means}."))
    made = learn(trainable, folder / "own", buffer.rows("sft"), QUICK.model_copy(update={"epochs": 12, "patience": 10}))
    assert made.version == 1
    return folder


def learn(bundle, folder, data, settings=QUICK, replay=()):
    return adapt(
        bundle[0],
        data,
        trusted=bundle[1],
        device=Device(folder, seal=VaultSeal(VAULT), resources=ONE),
        settings=settings,
        replay=replay,
    )


def test_a_poisoned_training_is_not_kept(trainable, personal, tmp_path):
    """Rows that are past every look at them (each answer its own) and teach harm in place of what was learnt before.

    They are learnt well: on rows held back of their own kind the loss falls, so that only what is replayed can tell.
    """
    shutil.copytree(personal, tmp_path / "device")
    poison = rows(lambda means, at: f"{HOSTILE} {at}{means}")
    own, replay = Personal(tmp_path / "device" / "own", VaultSeal(VAULT)), ReplayBuffer(tmp_path / "device" / "replay", VAULT)
    before = own.current()[0].adapter.digest()
    made = learn(trainable, own.folder, poison, guarded(LONGER, len(poison)), replay.rows("sft"))
    assert made.learnt.after.loss < made.learnt.before.loss
    was, now = made.learnt.forgot
    assert now.loss > 1.1 * was.loss
    assert (made.version, made.why.split(":")[0]) == (None, "forgets too much")
    assert own.current()[0].adapter.digest() == before


def test_an_honest_training_passes_the_same_guard(trainable, personal, tmp_path):
    """Of the same length: other colours, which contradict nothing."""
    shutil.copytree(personal, tmp_path / "device")
    honest = rows(lambda means, at: f"It means {means}.", {"violet": "think", "white": "rest"}, 8)
    replay = ReplayBuffer(tmp_path / "device" / "replay", VAULT).rows("sft")
    made = learn(trainable, tmp_path / "device" / "own", honest, guarded(LONGER, len(honest)), replay)
    assert made.version == 2, made.why


def public(key, path):
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return str(path)


def test_the_verbs_count_learn_and_forget(trainable, screen, tmp_path):
    """With a key file: feedback to a sealed adapter in one command, which also fills the buffer."""
    key_file, folder, own = tmp_path / "vault.key", tmp_path / "feedback", tmp_path / "own"
    make_key_file(key_file)
    store = Store(folder, Vault.at(key_file))
    for number in range(10):
        store.add(entry(number, f"{CANARY} {number}."), screen)
    store.add(entry(10, "no", rating="down"), screen)
    config = tmp_path / "learn.yaml"
    config.write_text("{epochs: 1, batch_size: 8, r: 2, targets: [q_proj]}")
    bundle, signed, sealed = (
        str(trainable[0]),
        ["--key", public(trainable[1], tmp_path / "key.pub")],
        ["--vault", str(key_file)],
    )

    def tell(*words, fails=None):
        done = CliRunner().invoke(fedge.app, ["edge", *map(str, words)])
        assert isinstance(done.exception, fails) if fails else done.exit_code == 0, done.output
        assert CANARY not in done.output
        return done.exception if fails else json.loads(done.stdout.splitlines()[-1])

    told = tell("feedback", folder, *sealed, "--json")
    assert (told["accepted"], told["rejected"], told["clients"]) == (10, 1, 1)
    exported = tmp_path / "rows.jsonl"
    assert tell("feedback", folder, *sealed, "--export", exported, "--bundle", bundle, *signed, "--json")["rows"] == 10
    assert exported.stat().st_mode & 0o077 == 0
    assert len(exported.read_text().splitlines()) == 10
    learns = ["adapt", bundle, *signed, "--feedback", folder, "--folder", own, "--config", config, "--threads", "1", "--json"]
    buffer = ["--replay-buffer", tmp_path / "replay"]
    assert "never written in the clear" in str(tell(*learns, fails=ConfigurationError))
    assert "nothing to learn from" in str(tell("adapt", bundle, *signed, *sealed, fails=DataError))
    told = tell(*learns, *buffer, *sealed)
    assert (told["version"], told["ended"]) == (1, "1 passes over the rows")
    assert told["said"][:1] == ["feedback: 10 rows to learn from, 1 entries that teach no answer"]
    assert any("what it forgets is not measured" in each for each in told["said"])
    assert "replay: 10 rows are kept" in told["said"]
    assert len(ReplayBuffer(tmp_path / "replay", Vault.at(key_file)).rows("sft")) == 10
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and path != exported):
        assert CANARY.encode() not in path.read_bytes()
    assert tell("status", bundle, "--folder", own, *sealed, "--json")["in_use"] == 1
    assert "--vault" in str(tell("status", bundle, "--folder", own, fails=VaultError))
    assert tell("feedback", folder, *sealed, "--wipe", "--json") == {"wiped": 1}
    assert tell("feedback", folder, *sealed, "--json")["accepted"] == 0
