"""Reading rows: the same rows from every format, and for what cannot be read one DataError that never quotes it."""

import csv
import json
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.errors import DataError
from strategies.data.files import raise_all, read, stream

CANARY = "Zanzibar-4711"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = st.lists(st.fixed_dictionaries({"input_text": TEXT, "target_text": TEXT}), min_size=1, max_size=8)
ENDINGS = (".json", ".jsonl", ".csv", ".parquet")


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    return path


def refusal(path):
    with pytest.raises(DataError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text
    assert CANARY not in text
    return text.replace(str(path), "PATH")


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_every_format_gives_back_the_rows_that_were_written(tmp_path, ending, rows):
    assert [dict(row) for _, row in read(write(tmp_path / f"rows{ending}", rows))] == rows


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path, ending):
    path = write(tmp_path / f"rows{ending}", [{"text": "北京", "label": "a"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert dict(read(path)[0][1]) == {"text": "北京", "label": "a"}


def test_an_ending_in_capitals_is_the_same_ending(tmp_path):
    assert len(read(write(tmp_path / "rows.jsonl", [{"a": "b"}]).rename(tmp_path / "ROWS.JSONL"))) == 1


def test_jsonl_rows_bear_their_line_though_lines_are_blank(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n   \n{"a": 2}\n')
    assert read(path) == [(2, {"a": 1}), (5, {"a": 2})]


def test_csv_rows_bear_their_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    assert [line for line, _ in read(path)] == [2, 3]


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_json_and_parquet_rows_are_counted_from_one(tmp_path, ending):
    assert [line for line, _ in read(write(tmp_path / f"rows{ending}", [{"a": "x"}, {"a": "y"}]))] == [1, 2]


def test_a_long_document_fits_into_a_csv_cell(tmp_path):
    rows = [{"input_text": "x" * 200_000, "target_text": "y"}]
    assert [dict(row) for _, row in read(write(tmp_path / "rows.csv", rows))] == rows


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_file_is_named(tmp_path, ending):
    assert "no such file" in refusal(tmp_path / f"rows{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_is_no_data_file(tmp_path, ending):
    (tmp_path / f"rows{ending}").mkdir()
    refusal(tmp_path / f"rows{ending}")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.jsonl.gz"])
def test_an_unknown_ending_names_the_known_ones(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert all(ending in refusal(tmp_path / name) for ending in ENDINGS)


@pytest.mark.parametrize(
    ("ending", "content"), [(".jsonl", ""), (".jsonl", "\n \n"), (".json", "[]"), (".csv", ""), (".csv", "a,b\n")]
)
def test_a_file_without_rows_says_so(tmp_path, ending, content):
    path = tmp_path / f"rows{ending}"
    path.write_text(content)
    assert "no rows" in refusal(path)


def test_a_parquet_file_without_rows_says_so(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    assert "no rows" in refusal(tmp_path / "rows.parquet")


def test_broken_json_lines_are_named_by_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"{CANARY}": \n{{"a": 2}}\n["{CANARY}"]\n')
    text = refusal(path)
    assert "2 of 4 rows" in text
    assert "line 2" in text
    assert "line 4: a JSON list" in text


@pytest.mark.parametrize(
    "content",
    [f'{{"text": "{CANARY}"}}', f'["{CANARY}"]', f'[{{"text": "{CANARY}"}}', "null", f'"{CANARY}"', "[" * 100_000],
    ids=["object", "list of text", "not closed", "null", "text", "nested without end"],
)
def test_json_that_is_no_list_of_objects_is_refused(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    refusal(path)


def test_a_jsonl_line_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 100_000 + "\n")
    assert "line 1" in refusal(path)


@pytest.mark.parametrize("line", [f"{CANARY},2,3", CANARY])
def test_csv_rows_with_other_columns_than_the_first_line_are_named(tmp_path, line):
    path = tmp_path / "rows.csv"
    path.write_text(f"a,b\n1,2\n{line}\n")
    text = refusal(path)
    assert "line 3" in text
    assert "2 columns" in text


def test_a_csv_quote_that_never_ends_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'a,b\n1,"{CANARY}\n2,3\n')
    assert "broken CSV" in refusal(path)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_bytes_that_are_not_utf8_are_refused_with_the_remedy(tmp_path, ending):
    path = write(tmp_path / f"rows{ending}", [{"text": f"{CANARY} 北京", "label": "a"}])
    path.write_bytes(path.read_text(encoding="utf-8").encode("gb18030"))
    assert "UTF-8" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_parquet_file_is_refused(tmp_path, share):
    path = write(tmp_path / "rows.parquet", [{"text": CANARY}] * 100)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "Parquet" in refusal(path)


@pytest.mark.parametrize("ending", ENDINGS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text(alphabet=string.printable, max_size=200).map(str.encode))
def test_any_bytes_are_rows_or_a_data_error(tmp_path, ending, content):
    path = tmp_path / f"rows{ending}"
    path.write_bytes(content)
    try:
        rows = read(path)
    except DataError:
        return
    assert rows
    assert all(isinstance(row, dict) for _, row in rows)


@given(count=st.integers(1, 30), total=st.integers(30, 99))
def test_a_report_shows_five_problems_and_counts_them_all(count, total):
    problems = [(line, "what") for line in range(1, count + 1)]
    with pytest.raises(DataError) as caught:
        raise_all("PATH", problems, total)
    text = str(caught.value)
    assert f"{count} of {total} rows" in text
    assert text.count("what") == min(count, 5)
    assert (f"{count - 5} more" in text) == (count > 5)


def test_no_problem_raises_nothing():
    raise_all("PATH", [], 3)


def test_a_number_without_end_and_two_columns_of_one_name_are_told_as_what_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": ' + "9" * 5000 + "}\n" + "[" * 100_000 + "\n")
    assert [why for _, why in stream(tmp_path / "a.jsonl")] == [
        "not JSON (a number of thousands of digits)",
        "not JSON (nested too deep)",
    ]
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert [why for _, why in stream(tmp_path / "a.csv")] == [
        "two columns have the same name in the first line; expected a name each"
    ]
