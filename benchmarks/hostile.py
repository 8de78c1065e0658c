"""What a hostile or broken node may send in place of its update: the table behind ``benchmarks.admission`` and its test.

Each case edits the records of a reply that was honest. The reasons are patterns of what the operator must read: which tensor,
what was found, what was expected. Nothing here is random.
"""

import io
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from protocol.codec import CODED, WireFormat
from protocol.records import ARRAYS, CONFIG, METRICS, Offer, offer_records

Q, V = "layers.0.q", "layers.1.v"
MODULES = {Q: (6, 5), V: (4, 5)}
DENSE = {"score.weight": (3, 4), "score.bias": (3,)}
RANK = 3
BASE = "ab" * 32
FLOATS = (f"A|{Q}", f"B|{Q}", f"A|{V}", f"B|{V}", "D|score.weight", "D|score.bias")
ROWS = ("R|score.weight", "R|score.bias")
LONG = "x" * 1_000_000

Array = NDArray[Any]
Records = Any  # a RecordDict, of which mypy does not know what lies under which key


@dataclass(frozen=True)
class Reply:
    """An honest node's records, to be edited in place, and those that it sent in the round before."""

    records: Records
    before: Records


Forge = Callable[[Reply], None]


@dataclass(frozen=True)
class Case:
    """One hostile reply.

    Attributes:
        kind: Its group in the printed table.
        name: Its own; no other case has it.
        reason: Regular expression that the reason for its quarantine matches.
        forge: Edits the records of an honest reply.
    """

    kind: str
    name: str
    reason: str
    forge: Forge


def cases(wire: WireFormat) -> list[Case]:
    """Every case that depends on a wire format, and in fp32 all others as well; names differ."""
    if wire in CODED:
        return list(_coded(wire))
    tables = [_not_finite(), _sizes(wire), _shapes(), _missing(), _dtypes(), _payloads()]
    if wire == "fp32":
        tables += [
            _names(),
            _rows(),
            _ranks(),
            _forgeries(),
            _manifests(),
            _counts(),
            _metrics(),
            _records(),
            _texts(),
            _replays(),
        ]
    return [case for table in (*tables, _outliers()) for case in table]


# Editing ------------------------------------------------------------------------------------------------------------------


def _tensor(key: str, change: Callable[[Array], Array]) -> Forge:
    def forge(reply: Reply) -> None:
        reply.records[ARRAYS][key] = FlowerArray(np.asarray(change(reply.records[ARRAYS][key].numpy()), order="C"))

    return forge


def _payload(key: str, change: Callable[[bytes], bytes], stype: str = "numpy.ndarray") -> Forge:
    def forge(reply: Reply) -> None:
        told = reply.records[ARRAYS][key]
        reply.records[ARRAYS][key] = FlowerArray(dtype=told.dtype, shape=tuple(told.shape), stype=stype, data=change(told.data))

    return forge


def _manifest(**changes: Any) -> Forge:
    def forge(reply: Reply) -> None:
        reply.records[CONFIG] = ConfigRecord({"json": json.dumps(json.loads(reply.records[CONFIG]["json"]) | changes)})

    return forge


def _text(change: Callable[[str], Any]) -> Forge:
    def forge(reply: Reply) -> None:
        reply.records[CONFIG] = ConfigRecord({"json": change(str(reply.records[CONFIG]["json"]))})

    return forge


def _metric(name: str, value: Any) -> Forge:
    def forge(reply: Reply) -> None:
        # Past Flower's own check of types: a node need not run Flower's code.
        reply.records[METRICS].__dict__["_data"][name] = value

    return forge


def _no_record(*keys: str) -> Forge:
    def forge(reply: Reply) -> None:
        for key in keys:
            del reply.records[key]

    return forge


def _only_metric(name: str) -> Forge:
    return _record(METRICS, lambda records: MetricRecord({name: 8}))


def _record(key: str, make: Callable[[Records], Any]) -> Forge:
    def forge(reply: Reply) -> None:
        reply.records[key] = make(reply.records)

    return forge


def _without(*keys: str) -> Forge:
    def forge(reply: Reply) -> None:
        for key in keys:
            del reply.records[ARRAYS][key]

    return forge


def _added(**tensors: Array) -> Forge:
    def forge(reply: Reply) -> None:
        for key, tensor in tensors.items():
            reply.records[ARRAYS][key] = FlowerArray(tensor)

    return forge


def _renamed(old: str, new: str) -> Forge:
    def forge(reply: Reply) -> None:
        for kind in "ABDR":
            if f"{kind}|{old}" in reply.records[ARRAYS]:
                reply.records[ARRAYS][f"{kind}|{new}"] = reply.records[ARRAYS].pop(f"{kind}|{old}")

    return forge


def _both(*forges: Forge) -> Forge:
    def forge(reply: Reply) -> None:
        for one in forges:
            one(reply)

    return forge


def _filled(value: float, at: int | None = None) -> Callable[[Array], Array]:
    """The tensor with ``value`` everywhere, or at one place."""

    def change(tensor: Array) -> Array:
        made = tensor.copy()
        made.reshape(-1)[slice(None) if at is None else at] = value
        return made

    return change


def _times(factor: float) -> Callable[[Array], Array]:
    return lambda tensor: (tensor * factor).astype(tensor.dtype)


def _as(dtype: str) -> Callable[[Array], Array]:
    return lambda tensor: tensor.astype(dtype)


def _zeros(dtype: str) -> Callable[[Array], Array]:
    return lambda tensor: np.zeros(tensor.shape, np.dtype(dtype))


def _where(key: str) -> str:
    """What a reason calls a tensor: by its key while it is read, by its module later."""
    return key.partition("|")[2].replace(".", r"\.")


# Numbers ------------------------------------------------------------------------------------------------------------------


def _not_finite() -> Iterator[Case]:
    for key in FLOATS:
        for what, value in {"NaN": np.nan, "+Inf": np.inf, "-Inf": -np.inf}.items():
            for where, at in {"first": 0, "last": -1, "every": None}.items():
                yield Case(
                    what, f"{what} in the {where} of {key}", rf"{_where(key)}.*NaN or inf", _tensor(key, _filled(value, at))
                )


def _sizes(wire: WireFormat) -> Iterator[Case]:
    for key in FLOATS:
        # Up to 1e4 and no further: fp16 itself ends at 65504.
        for value in (1e9, -1e9, 3e38) if wire == "fp32" else (65504.0, -65504.0, 2e4):
            yield Case("norm 1e9", f"{value:g} in {key}", rf"{_where(key)}.*at most 10000", _tensor(key, _filled(value)))
            yield Case("norm 1e9", f"one {value:g} in {key}", rf"{_where(key)}.*at most 10000", _tensor(key, _filled(value, 1)))
        if wire == "fp32":
            for value in (1e-40, -1e-45):
                change = _filled(value)
                yield Case("subnormal", f"{value:g} in {key}", rf"{_where(key)}.*subnormal", _tensor(key, change))
    for module in MODULES:
        # Each factor within bounds, the product not.
        grown = _both(_tensor(f"A|{module}", _filled(3e3)), _tensor(f"B|{module}", _filled(3e3)))
        yield Case("norm 1e9", f"product of {module}", rf"{_where(f'A|{module}')}.*norm.*at most 10000", grown)


def _outliers() -> Iterator[Case]:
    for times in (3e2, -3e2, 3e3, -3e3):
        for module in MODULES:
            reason = r"norm of the change: found .*expected at most .*median"
            yield Case("scaled", f"{module} {times:+g} times", reason, _tensor(f"B|{module}", _times(times)))
    for key in ("D|score.weight", "D|score.bias"):
        yield Case("scaled", f"{key} at 5000", r"norm of the change", _tensor(key, _filled(5e3)))
    for size, reason in ((20.0, r"size of the directions apart: found .*expected at most .*median"), (5e3, r"at most 10000")):
        # A direction and its negative beside what the node trained: the product, and its change, are an honest node's.
        cancelling = _both(_tensor(f"A|{Q}", _paired(size, 1)), _tensor(f"B|{Q}", _paired(size, -1)))
        yield Case("cancelling", f"directions of entries of {size:g}", reason, cancelling)


def _paired(size: float, sign: int) -> Callable[[Array], Array]:
    """The last two directions replaced by one of this size in every entry, and by ``sign`` times the same."""

    def change(tensor: Array) -> Array:
        made = tensor.copy()
        directions = made if len(made) == RANK else made.T
        directions[-2:] = [[size], [sign * size]]
        return made

    return change


# Shapes, names, types -------------------------------------------------------------------------------------------------------


def _shapes() -> Iterator[Case]:
    changes: dict[str, Callable[[Array], Array]] = {
        "one more row": lambda t: np.concatenate([t, t[:1]]),
        "one row less": lambda t: t[1:],
        "one more column": lambda t: np.concatenate([t, t[..., :1]], axis=-1),
        "flat and longer": lambda t: np.resize(t, t.size + 1),
        "doubled": lambda t: np.concatenate([t, t]),
        "no rows": lambda t: t[:0],
        "no columns": lambda t: t[..., :0],
    }
    broadcastable: dict[str, Callable[[Array], Array]] = {
        "one number": lambda t: t.reshape(-1)[0],
        "one entry": lambda t: t.reshape(-1)[:1],
        "one row": lambda t: t[:1],
        "an axis in front": lambda t: t[None],
        "an axis behind": lambda t: t[..., None],
        "64 axes" if np.__version__ >= "2" else "32 axes": lambda t: t.reshape((1,) * (32 - t.ndim) + t.shape),
    }
    for kind, table in (("wrong shape", changes), ("broadcastable", broadcastable)):
        for key in FLOATS:
            for name, change in table.items():
                yield Case(kind, f"{key}: {name}", r"shape|do not fit|rank", _tensor(key, change))
    for key in ("A|" + Q, "B|" + V, "D|score.weight"):
        yield Case("wrong shape", f"{key}: transposed", r"shape|do not fit", _tensor(key, lambda t: t.T))
        yield Case("wrong shape", f"{key}: flat", r"shape|do not fit", _tensor(key, lambda t: t.reshape(-1)))
    swapped = _record(ARRAYS, lambda records: _swapped(records[ARRAYS]))
    yield Case("wrong shape", "A and B change places", r"shape|do not fit", swapped)
    widened = _both(_tensor(f"A|{Q}", lambda t: np.concatenate([t, t], axis=1)), _tensor(f"B|{Q}", lambda t: t))
    yield Case("wrong shape", "d_in twice", rf"{Q}.*shape.*expected", widened)


def _swapped(arrays: Mapping[str, FlowerArray]) -> ArrayRecord:
    sides = {"A": "B", "B": "A"}
    return ArrayRecord({f"{sides.get(key[0], key[0])}{key[1:]}": array for key, array in arrays.items()})


def _names() -> Iterator[Case]:
    pair = {"A": np.ones((RANK, 5), np.float32), "B": np.ones((6, RANK), np.float32)}
    odd = {
        "another module": "layers.9.q",
        "upper case": Q.upper(),
        "a blank behind": Q + " ",
        "a zero-width joiner": Q + "\u200d",
        "a Cyrillic a": "l\u0430yers.0.q",
        "full-width digits": "layers.\uff10.q",
        "right to left": "\u202e" + Q,
        "a line break": Q + "\nround 1: all is well",
        "a terminal's escape": "\x1b[2J" + Q,
        "a null byte": Q + "\0",
        "a path": "../../" + Q,
        "PEFT's prefix": "base_model.model." + Q,
        "a bar": "A|" + Q,
        "a megabyte": LONG,
        "__class__": "__class__",
        "a decomposed accent": "laye\u0301rs.0.q",
    }
    for what, name in odd.items():
        yield Case(
            "unknown name",
            f"module with {what}",
            r"modules: found 1 unknown",
            _added(**{f"{f}|{name}": t for f, t in pair.items()}),
        )
        yield Case("unknown name", f"module renamed to {what}", r"modules: found 1 unknown and 1 missing", _renamed(Q, name))
        yield Case("unknown name", f"tensor with {what}", r"tensors: found 1 unknown", _added(**{f"D|{name}": pair["A"]}))
    for key in ("", "|", "A", "A|", "D|", "X|" + Q, "a|" + Q, "A" + Q, "AB|" + Q, " A|" + Q, "\u0410|" + Q, LONG, "0"):
        yield Case("unknown name", f"key {key[:20]!r}", r"unknown tensor key", _added(**{key: pair["A"]}))
    long_s = _renamed("score.bias", "score.bia\u017f")
    yield Case("unknown name", "a long s", r"tensors: found 1 unknown and 1 missing", long_s)


def _missing() -> Iterator[Case]:
    for module in MODULES:
        yield Case("missing", f"A of {module}", r"only one of its two factors", _without(f"A|{module}"))
        yield Case("missing", f"B of {module}", r"only one of its two factors", _without(f"B|{module}"))
        yield Case(
            "missing", module, rf"modules: found 0 unknown and 1 missing.*{module}", _without(f"A|{module}", f"B|{module}")
        )
    for name in DENSE:
        yield Case("missing", name, rf"tensors: found 0 unknown and 1 missing.*{name}", _without(f"D|{name}"))
    yield Case("missing", "every factor", r"modules: found 0 unknown and 2 missing", _without(*FLOATS[:4]))
    yield Case("missing", "every tensor", r"tensors: found 0 unknown and 2 missing", _without(*FLOATS[4:]))
    yield Case("missing", "everything", r"2 missing", _without(*FLOATS, *ROWS))


def _dtypes() -> Iterator[Case]:
    for key in (f"A|{Q}", f"B|{V}", "D|score.bias"):
        for dtype in ("f8", "i1", "i4", "i8", "u1", "u8", "?", "c8", "c16", "M8[s]", "S4", "U4", "V4", "f4,f4"):
            yield Case("wrong dtype", f"{key}: {dtype}", r"dtype .*expected", _tensor(key, _zeros(dtype)))


# Payloads -----------------------------------------------------------------------------------------------------------------


def _payloads() -> Iterator[Case]:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "nothing": lambda data: b"",
        "ten bytes": lambda data: data[:10],
        "the header alone": lambda data: data[:128],
        "half": lambda data: data[: len(data) // 2],
        "all but a byte": lambda data: data[:-1],
        "all but the first byte": lambda data: data[1:],
        "zeros": lambda data: bytes(len(data)),
        "a pickle": lambda data: pickle.dumps([1.0]),
        "an object array": lambda data: _npy(np.array([{}], object)),
        "a zip archive": lambda data: _npz(),
        "a huge shape": lambda data: _header((2**40, 5)) + data[128:],
        "a negative shape": lambda data: _header((-3, 5)) + data[128:],
        "a header that is code": lambda data: _raw_header("__import__('os').abort()") + data[128:],
        "a deep header": lambda data: _raw_header("(" * 5000) + data[128:],
        "a later format": lambda data: b"\x93NUMPY\x09\x00" + data[8:],
    }
    for key in (f"A|{Q}", f"B|{V}", "D|score.weight"):
        for what, change in changes.items():
            yield Case("truncated payload", f"{key}: {what}", r"not a tensor|shape|dtype", _payload(key, change))
        for stype in ("", "torch", "pickle", LONG):
            yield Case(
                "truncated payload", f"{key}: stype {stype[:9]!r}", r"not a tensor", _payload(key, lambda data: data, stype)
            )


def _npy(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3, np.float32))
    return buffer.getvalue()


def _header(shape: tuple[int, ...]) -> bytes:
    return _raw_header(repr({"descr": "<f4", "fortran_order": False, "shape": shape}))


def _raw_header(text: str) -> bytes:
    padded = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


# Coded formats: differences to what the node was sent, under a layout (protocol.codec) --------------------------------------


def _coded(wire: WireFormat) -> Iterator[Case]:
    keys = ("Q|layout", "Q|codes", "Q|scales", *(["Q|marks"] if wire == "top-k" else []))
    kind = f"{wire} payload"
    for key in keys:
        counted = r"expected the layout's|layout.*JSON|marked"
        yield Case(kind, f"no {key}", r"missing", _without(key))
        yield Case(kind, f"{key}: empty", counted, _tensor(key, lambda t: t[:0]))
        yield Case(kind, f"{key}: half", counted, _tensor(key, lambda t: t[: t.size // 2]))
        yield Case(kind, f"{key}: twice", counted, _tensor(key, lambda t: np.concatenate([t, t])))
        yield Case(kind, f"{key}: cut", r"not a tensor", _payload(key, lambda data: data[:-1]))
        for dtype in ("f4", "i1", "i2", "u4", "?", "S1"):
            yield Case(kind, f"{key}: {dtype}", rf"{re.escape(key)}.*expected", _tensor(key, _as(dtype)))
        yield Case(kind, f"{key}: a matrix", rf"{re.escape(key)}.*2 axes", _tensor(key, lambda t: t[None]))
    for name, scale in {"NaN": 0x7FC0, "Inf": 0x7F80, "minus Inf": 0xFF80, "minus one": 0xBF80, "minus zero": 0x8000}.items():
        for where, at in {"first": 0, "last": -1, "every": None}.items():
            yield Case(kind, f"{name} in the {where} scale", r"Q\|scales.*NaN", _tensor("Q|scales", _filled(scale, at)))
    for name, scale in {"1e9": 0x4E6E, "3e38": 0x7F62}.items():
        sizes = r"at most 10000|NaN or inf"
        yield Case(kind, f"a scale of {name}", sizes, _tensor("Q|scales", _filled(scale, 0)))
        yield Case(kind, f"every scale {name}", sizes, _tensor("Q|scales", _filled(scale)))
    yield Case("scaled", "every scale 16", r"norm of the change", _tensor("Q|scales", _filled(0x4180)))
    if wire == "top-k":
        for name, mark in {"none": 0, "all": 255}.items():
            yield Case(kind, f"{name} marked", r"marked, expected", _tensor("Q|marks", _filled(mark)))
    else:
        yield Case(kind, "marks that no one asked for", r"Q\|marks is not part", _added(**{"Q|marks": np.zeros(9, np.uint8)}))
    for key in (f"A|{Q}", "D|score.bias", "Q|more", "Q|", "Q", "layout"):
        yield Case(kind, f"{key} beside", r"unknown tensor key", _added(**{key: np.ones((3, 5), np.float32)}))
    for name, edit, reason in _layouts(wire):
        yield Case(kind, f"layout: {name}", reason, _tensor("Q|layout", _edited(edit)))


def _layouts(wire: WireFormat) -> Iterator[tuple[str, Callable[[dict[str, Any]], object], str]]:
    shapes = r"expected the layout's|expected the reference's|shape|rank|do not fit"
    value: Any
    for at, what in enumerate(("r", "d_out", "d_in")):
        for value in (0, 1, 7, 2**31 - 1):
            yield f"{what} {value}", _setting("factors", Q, at, value), shapes
        for value in (-1, 2**31, 1.5, None, "x", 10**30):
            yield f"{what} {str(value)[:9]!r}", _setting("factors", Q, at, value), r"not a layout"
    for value in ([], [12], [4, 3], [3, 4, 1], [3, 4, 2**30], [1] * 8):
        yield f"a tensor of {value}", _setting("dense", "score.weight", value), shapes
    yield "nine axes", _setting("dense", "score.weight", [1] * 9), r"not a layout"
    others: dict[str, str] = {"int8": "top-k", "top-k": "int8", "nf4": "int8", "int4": "int8"}
    yield f"says {others[wire]}", _setting("wire", others[wire]), r"expected the layout's|part of"
    for value in ("fp32", "", "int2", None, 8, LONG):
        yield f"says {str(value)[:9]!r}", _setting("wire", value), r"not a layout"
    for key in (f"A|{Q}", f"B|{V}", "D|score.weight"):
        yield f"{key} is said to be unchanged", _setting("unchanged", [key]), r"expected the layout's"
    for key in ("A|layers.9.q", "D|lm_head", "", "Q|codes", LONG):
        yield f"{key[:20]!r} is said to be unchanged", _setting("unchanged", [key]), r"unchanged, but this side does not hold"
    yield "an unknown module of rank 0", _setting("factors", "layers.9.q", [0, 6, 5]), r"modules: found 1 unknown"
    yield "an unknown tensor of nothing", _setting("dense", "lm_head", [0]), r"tensors: found 1 unknown"
    yield "a module less", lambda layout: layout["factors"].pop(Q), r"expected the layout's"
    yield "an unknown key", _setting("more", 1), r"not a layout"
    for key in ("wire", "factors", "dense", "unchanged"):
        yield f"no {key}", lambda layout, key=key: layout.pop(key), r"not a layout"  # type: ignore[misc]


def _setting(*path: Any) -> Callable[[dict[str, Any]], object]:
    """Sets the last of ``path`` at the place that the others name."""
    *places, last, value = path

    def edit(layout: Any) -> None:
        for place in places:
            layout = layout[place]
        layout[last] = value

    return edit


def _edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[Array], Array]:
    def change(tensor: Array) -> Array:
        layout = json.loads(tensor.tobytes())
        edit(layout)
        return np.frombuffer(json.dumps(layout).encode(), np.uint8)

    return change


# What is said about the tensors ---------------------------------------------------------------------------------------------


def _rows() -> Iterator[Case]:
    changes: dict[str, Callable[[Array], Array]] = {
        "one too few": lambda t: t[:-1],
        "one too many": lambda t: np.concatenate([t, t[:1]]),
        "a matrix": lambda t: np.ones((3, 4), np.uint8),
        "a column": lambda t: t[:, None],
        "a single one": lambda t: np.array(1, np.uint8),
        "none": lambda t: t[:0],
    }
    for key in ROWS:
        for what, change in changes.items():
            yield Case("rows", f"{key}: {what}", r"rows of .*shape.*expected", _tensor(key, change))
        yield Case("rows", f"{key}: all false", r"rows of .*no row", _tensor(key, np.zeros_like))
        for dtype in ("f4", "i8", "?", "i1"):
            yield Case("rows", f"{key}: {dtype}", r"R\|.*dtype .*expected", _tensor(key, _as(dtype)))
        yield Case("rows", f"{key}: twos", r"R\|.*expected 0 .*1", _tensor(key, _times(2)))
    for name in (Q, "lm_head.weight", "\u202escore.weight"):
        yield Case("rows", f"of {name!r}", r"rows of .*shape", _added(**{f"R|{name}": np.ones(3, np.uint8)}))


def _ranks() -> Iterator[Case]:
    value: Any
    for r in (1, RANK + 1, 0, 99, 10**30):
        yield Case("lying ranks", f"manifest says {r}", rf"r: found {r}, expected {RANK}", _manifest(r=r))
    for value in (-1, 1.5, "3", None, True, [3]):
        yield Case("lying ranks", f"manifest says {value!r}", r"Manifest: r", _manifest(r=value))
    for module in MODULES:
        for r in (RANK + 1, 2 * RANK, 512):
            grown = _both(_at_rank(module, r), _manifest(r=r))
            yield Case("lying ranks", f"{module} of rank {r}", rf"{module}.*rank {r}, expected 1 to the {RANK}", grown)
            yield Case(
                "lying ranks", f"{module} of rank {r}, unsaid", rf"rank {r}|found {RANK}, expected {r}", _at_rank(module, r)
            )
        yield Case("lying ranks", f"{module} of rank 0", rf"{module}.*rank 0, expected 1 to", _at_rank(module, 0))
        yield Case("lying ranks", f"A of {module} of rank 2", r"do not fit", _tensor(f"A|{module}", lambda t: t[:2]))
    nothing = _both(*(_at_rank(module, 0) for module in MODULES), _manifest(r=0))
    yield Case("lying ranks", "every module of rank 0", r"rank 0, expected 1 to", nothing)


def _at_rank(module: str, r: int) -> Forge:
    return _both(
        _tensor(f"A|{module}", lambda t: np.resize(t, (r, t.shape[1]))),
        _tensor(f"B|{module}", lambda t: np.resize(t, (t.shape[0], r))),
    )


# What is said beside the tensors --------------------------------------------------------------------------------------------


def _forgeries() -> Iterator[Case]:
    value: Any
    other = "ef" * 32
    for value in (other, BASE[:-1] + "c"):
        yield Case("forged base", f"base {value[-4:]}", r"base: found .*expected", _manifest(base_digest=value))
    for value in ("", BASE.upper(), BASE[:-1], BASE + "0", BASE + "\n", LONG, None, 0, [BASE]):
        yield Case(
            "forged base",
            f"base {str(value)[-9:]!r} of {type(value).__name__}",
            r"Manifest: base_digest",
            _manifest(base_digest=value),
        )
    for value in ("", other, BASE, LONG, "\x1b[2J", "\u202e"):
        yield Case("forged parent", f"parent {value[-9:]!r}", r"parent: found .*expected", _manifest(parent=value))
    for value in (None, 0, [], {}):
        yield Case("forged parent", f"parent {value!r}", r"Manifest: parent", _manifest(parent=value))
    for value in ("", "another", "Hostile", "hostile ", "h\u043estile", LONG):
        yield Case(
            "other federation", f"federation {value[:9]!r}", r"federation: found .*expected", _manifest(federation=value)
        )


def _manifests() -> Iterator[Case]:
    value: Any
    for value in ("global", "adapter"):
        yield Case("wrong kind", value, r"kind: found .*expected 'update'", _manifest(kind=value))
    for value in ("", "Update", "partial", None, 1):
        yield Case("wrong kind", repr(value), r"Manifest: kind", _manifest(kind=value))
    for value in (0, 2, "1", None, LONG):
        yield Case(
            "wrong kind",
            f"format {str(value)[:9]!r} of {type(value).__name__}",
            r"Manifest: format_version",
            _manifest(format_version=value),
        )
    yield Case("wrong kind", "embeddings", r"embeddings: found 1000 other modules", _manifest(embeddings=["x"] * 1000))
    for field in ("method", "precision"):
        for value in ("full", LONG, "\x1b[2J"):
            yield Case(
                "wrong kind", f"{field} {value[:9]!r}", rf"{field}: found .*expected one of", _manifest(**{field: value})
            )
    for value in (0, 1, 10**6, 10**400):
        # The whole table is played in rounds 2 and later, in each of which this is another round.
        yield Case("wrong round", f"round {str(value)[:9]}", r"round: found .*expected", _manifest(round=value))
    for value in (-1, 2.5, "2", None, True):
        yield Case(
            "wrong round", f"round {str(value)[:9]!r} of {type(value).__name__}", r"Manifest: round", _manifest(round=value)
        )


def _counts() -> Iterator[Case]:
    value: Any
    for value in (0, 9, 10**6, 2**32, 2**53):
        yield Case("num-examples", f"{value} in the manifest", r"num-examples: found .*expected", _counted(value, value))
    for value in (
        -1,
        -(2**63),
        2**53 + 1,
        2**63,
        10**400,
        1.5,
        1e300,
        float("nan"),
        float("inf"),
        True,
        "8",
        None,
        [8],
        {"n": 8},
    ):
        told = repr(value)[:12]
        yield Case(
            "num-examples", f"{told} in the manifest", r"Manifest: num_examples|not a Manifest", _manifest(num_examples=value)
        )
    for value in (-1, 2**53 + 1, 10**400, float("nan"), float("inf"), -float("inf"), 1.5, True, "8", None, [8], b"8"):
        yield Case(
            "num-examples", f"{repr(value)[:12]} among metrics", r"num-examples|whole number", _metric("num-examples", value)
        )
    for value in (1, 7):
        yield Case(
            "num-examples", f"{value} among metrics alone", r"num-examples.*metrics.*manifest", _metric("num-examples", value)
        )
    for name in ("num_examples", "Num-Examples", "num-examples ", "num\u2011examples"):
        yield Case("num-examples", f"{name!r} among metrics", r"num-examples is missing", _only_metric(name))
        twice = _manifest(**{name: 8}) if name != "num_examples" else _manifest(**{"num-examples": 8})
        yield Case("num-examples", f"{name!r} beside the manifest's", r"Manifest: num|Manifest: Num", twice)


def _counted(manifest: int, metric: int) -> Forge:
    return _both(_manifest(num_examples=manifest), _metric("num-examples", metric))


def _metrics() -> Iterator[Case]:
    value: Any
    for value in (10**400, -(10**400), 1e308, -1e308, 1e31):
        yield Case("metrics", f"loss {str(value)[:6]}", r"metric", _metric("train-loss", value))
    for name in (LONG, "\x1b[2J", "a\nb", "\u202eloss", ""):
        yield Case("metrics", f"named {name[:9]!r}", r"metric", _metric(name, 1.0))
    many = _both(*(_metric(f"m{at}", 1.0) for at in range(1000)))
    yield Case("metrics", "a thousand", r"metric", many)


def _records() -> Iterator[Case]:
    for key, kind in ((CONFIG, "fedge"), (ARRAYS, "adapter"), (METRICS, "metrics")):
        yield Case("wrong record", f"no {key}", kind, _no_record(key))
        others: dict[str, Callable[[Records], Any]] = {
            "ArrayRecord": lambda records: ArrayRecord({"a": FlowerArray(np.ones(2, np.float32))}),
            "ConfigRecord": lambda records: ConfigRecord({"a": "b"}),
            "MetricRecord": lambda records: MetricRecord({"a": 1.0}),
        }
        for name, make in others.items():
            yield Case(
                "wrong record",
                f"{name} under {key}",
                r"fedge|adapter|metrics|unknown tensor key|num-examples",
                _record(key, make),
            )
    yield Case("wrong record", "nothing at all", r"fedge", _no_record(CONFIG, ARRAYS, METRICS))
    yield Case("wrong record", "no tensor", r"missing", _record(ARRAYS, lambda records: ArrayRecord({})))
    yield Case("wrong record", "one more", r"more.*expected", _record("more", lambda records: records[ARRAYS]))
    offer = Offer(name="x", base_digest=BASE, method="lora", precision="fp32", r=RANK, modules=MODULES, dense=DENSE)
    answer = offer_records(offer)[CONFIG]
    yield Case(
        "wrong record", "an offer", r"Manifest", _both(_no_record(ARRAYS, METRICS), _record(CONFIG, lambda records: answer))
    )
    yield Case("wrong record", "an offer in the manifest's place", r"Manifest", _record(CONFIG, lambda records: answer))
    yield Case("wrong record", "an evaluation", r"fedge", _no_record(ARRAYS, CONFIG))


def _texts() -> Iterator[Case]:
    texts: dict[str, Callable[[str], Any]] = {
        "empty": lambda text: "",
        "null": lambda text: "null",
        "a list": lambda text: f"[{text}]",
        "a number": lambda text: "1",
        "cut": lambda text: text[:-1],
        "twice": lambda text: text + text,
        "a hundred thousand deep": lambda text: "[" * 100_000,
        "deep and closed": lambda text: '{"a":' * 50_000 + "1" + "}" * 50_000,
        "a deep field": lambda text: text[:-1] + ',"parent":' + "[" * 10_000 + "]" * 10_000 + "}",
        "a lone surrogate": lambda text: text.replace('"hostile"', '"\\ud800"'),
        "a byte-order mark": lambda text: "\ufeff" + text,
        "YAML": lambda text: "base_digest: x",
        "ten megabytes": lambda text: '{"a":"' + "x" * 10_000_000 + '"}',
        "a hundred thousand entries": lambda text: text[:-1] + ',"embeddings":[' + "0," * 100_000 + "0]}",
        "an unknown key": lambda text: text[:-1] + ',"trust":true}',
        "a megabyte of key": lambda text: text[:-1] + f',"{LONG}":1}}',
        "bytes": lambda text: text.encode(),
        "a whole number": lambda text: 7,
        "a list of texts": lambda text: [text],
    }
    for what, change in texts.items():
        yield Case("not JSON", what, r"no text under|not a Manifest", _text(change))
    yield Case("not JSON", "another key", r"no text under", _record(CONFIG, lambda records: ConfigRecord({"yaml": "x"})))


def _replays() -> Iterator[Case]:
    def replay(reply: Reply) -> None:
        reply.records.clear()
        reply.records.update(reply.before)

    def dressed(reply: Reply) -> None:
        """Tensors of the round before in this round's manifest would be honest work; the parent gives it away."""
        told = json.loads(reply.before[CONFIG]["json"]) | {"round": json.loads(reply.records[CONFIG]["json"])["round"]}
        reply.records[CONFIG] = ConfigRecord({"json": json.dumps(told)})

    yield Case("replay", "the reply of the round before", r"round: found .*expected", replay)
    yield Case("replay", "the same under this round's number", r"parent: found .*expected", dressed)
