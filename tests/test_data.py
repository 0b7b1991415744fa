"""Data sets to records, records to ids, ids to ragged batches, and the order of training."""

import csv
import hashlib
import json
import re
import sys
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmlora.batch import (
    Batch,
    Encoded,
    epoch_order,
    grouped_epoch_order,
    micro_batches,
    split_dev,
    updates_per_epoch,
)
from glmlora.files.rows import read_rows
from glmlora.training.records import encode_records, load_datasets, records_from

ROWS = [
    {"instruction": "Judge -->", "input": "title:A,abstract:B", "output": "1"},
    {"instruction": "Judge -->", "input": "标题", "output": "0"},
]


def make_set(folder, files, **entry):
    """A data set `d` of the given files; values that are no text are written as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content, ensure_ascii=False, indent=4)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    entry.setdefault("file_name", next(iter(files), "none.json"))
    entry.setdefault("file_sha1", "0" * 40)
    if (folder / entry["file_name"]).is_file() and entry["file_sha1"] == "0" * 40:
        entry["file_sha1"] = hashlib.sha1((folder / entry["file_name"]).read_bytes()).hexdigest()
    info = folder / "dataset_info.json"
    known = json.loads(info.read_text()) if info.exists() else {}
    info.write_text(json.dumps({**known, "d": entry}))
    return folder


def record(prompt="p", query="", response="r", history=()):
    return {"prompt": prompt, "query": query, "response": response, "history": list(history)}


# load_datasets


def test_the_workflows_data_set(tmp_path):
    make_set(tmp_path, {"paper_label.json": ROWS})
    assert load_datasets("d", str(tmp_path)) == [
        record("Judge -->", "title:A,abstract:B", "1"),
        record("Judge -->", "标题", "0"),
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_and_byte_order_mark(tmp_path, name, mark):
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    make_set(tmp_path, {name: mark + lines.encode()})
    assert [r["response"] for r in load_datasets(["d"], tmp_path)] == ["1", "0"]


def test_csv_keeps_text(tmp_path):
    text = '\ufeffinstruction,input,output\r\n"a,""b""","two\nlines",0\r\n\r\nc,,007\r\n'
    make_set(tmp_path, {"a.csv": text})
    assert load_datasets("d", tmp_path) == [
        record('a,"b"', "two\nlines", "0"),
        record("c", "", "007"),
    ]


def test_own_columns(tmp_path):
    rows = [{"q": "a", "x": "b", "a": "c", "h": [["1", "2"]], "input": "not used"}]
    make_set(tmp_path, {"a.json": rows}, columns={"prompt": "q", "response": "a", "history": "h"})
    # A key missing inside `columns` means that there is no such column.
    assert load_datasets("d", tmp_path) == [record("a", "", "c", [["1", "2"]])]


def test_a_csv_history_is_json(tmp_path):
    text = 'prompt,response,history\nb,c,"[[""1"", ""2""]]"\nb,c,\n'
    columns = {"prompt": "prompt", "response": "response", "history": "history"}
    make_set(tmp_path, {"a.csv": text}, columns=columns)
    assert [r["history"] for r in load_datasets("d", tmp_path)] == [[["1", "2"]], []]


def test_a_folder_is_read_by_name(tmp_path):
    make_set(
        tmp_path, {"f/b.json": ROWS[1:], "f/a.json": ROWS[:1], "f/.hidden": "x"}, file_name="f"
    )
    with pytest.warns(UserWarning, match="file_sha1: one sum for 2 files"):
        assert [r["response"] for r in load_datasets("d", tmp_path)] == ["1", "0"]


def test_several_sets_and_max_samples(tmp_path):
    make_set(tmp_path, {"a.json": ROWS})
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps({**info, "e": info["d"]}))
    assert [r["response"] for r in load_datasets(" e , d ", tmp_path)] == ["1", "0", "1", "0"]
    assert [r["response"] for r in load_datasets(["d", "e"], tmp_path, 1)] == ["1", "1"]
    with pytest.raises(ValueError, match="^max_samples: "):
        load_datasets("d", tmp_path, 0)
    with pytest.raises(ValueError, match="^dataset: "):
        load_datasets(" , ", tmp_path)


def test_checksums_only_warn(tmp_path):
    make_set(tmp_path, {"a.json": ROWS}, file_sha1="ab")
    with pytest.warns(UserWarning, match="d: file_sha1: expected ab"):
        assert len(load_datasets("d", tmp_path)) == 2
    make_set(tmp_path, {"a.json": ROWS}, file_sha1=None)
    with pytest.warns(UserWarning, match="no file_sha1, data not checked: d"):
        assert len(load_datasets("d", tmp_path)) == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"hf_hub_url": "a/b", "script_url": "s"},
            "hf_hub_url: not supported: nothing is downloaded",
        ),
        ({"script_url": "s"}, "script_url: not supported: loading scripts are not run"),
        ({"ms_hub_url": "s"}, "ms_hub_url: "),
        ({"cloud_file_name": "s"}, "cloud_file_name: "),
        ({"formatting": "sharegtp"}, "formatting: expected 'alpaca', 'sharegpt' or 'openai'"),
        ({"ranking": True}, "ranking: "),
        ({"subset": "s"}, "subset: "),
        ({"split": "test"}, "split: "),
        ({"folder": "s"}, "folder: "),
        ({"num_samples": 3}, "num_samples: not supported: use max_samples"),
        ({"tags": {"role_tag": "r"}}, "tags: need a column of messages"),
        ({"tags": {"rol_tag": "r"}}, "tags: expected keys .* \\(did you mean 'role_tag'"),
        ({"tags": {"role_tag": 1}}, "tags: role_tag: expected a name, got 1"),
        ({"tags": []}, "tags: expected an object"),
        ({"columns": {"promt": "m"}}, "expected keys from .*'promt' \\(did you mean 'prompt'"),
        ({"columns": {"messages": "m", "prompt": "p"}}, "expected messages or prompt, got both"),
        ({"columns": {"chosen": "c"}}, "columns: chosen: not supported: only the sft"),
        ({"columns": {"images": "c"}}, "columns: images: not supported"),
        ({"columns": {"tools": "c"}}, "columns: tools: not supported"),
        ({"columns": {"prompt": "instruction"}}, "columns: expected the key 'response'"),
        (
            {"columns": {"prompt": 1, "response": "o"}},
            "columns: prompt: expected a column name, got 1",
        ),
        ({"columns": []}, "columns: expected an object"),
        ({"file_name": ""}, "file_name: expected"),
        ({"file_sha1": 1}, "file_sha1: expected text"),
    ],
)
def test_refused_entries(tmp_path, entry, message):
    make_set(tmp_path, {"a.json": ROWS})
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "a.json", **entry}}))
    with pytest.raises(ValueError, match=message) as caught:
        load_datasets("d", tmp_path)
    assert "dataset_info.json: d: " in str(caught.value)


def test_accepted_later_keys(tmp_path):
    make_set(
        tmp_path, {"a.json": ROWS}, formatting="alpaca", ranking=False, split="train", subset=None
    )
    assert len(load_datasets("d", tmp_path)) == 2
    make_set(tmp_path, {"a.json": ROWS}, note="n")
    with pytest.warns(UserWarning, match="unknown keys are not used: note"):
        assert len(load_datasets("d", tmp_path)) == 2


def test_unknown_names_and_files(tmp_path):
    make_set(tmp_path, {"a.json": ROWS})
    with pytest.raises(ValueError, match="'nope' is not in .*dataset_info.json, which has: d"):
        load_datasets("d,nope", tmp_path)
    with pytest.raises(FileNotFoundError, match="dataset_info.json"):
        load_datasets("d", tmp_path / "absent")
    make_set(tmp_path, {}, file_name="absent.json")
    with pytest.raises(FileNotFoundError, match="file_name: .*absent.json"):
        load_datasets("d", tmp_path)
    for content in ('{"d": 1}', "[]"):
        (tmp_path / "dataset_info.json").write_text(content)
        with pytest.raises(ValueError, match="expected an object"):
            load_datasets("d", tmp_path)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({"a.json": {"instruction": 1}}, "a.json", "a.json: expected an array"),
        ({"a.json": "[\n{]"}, "a.json", "a.json: not JSON: .* line 2"),
        ({"a.jsonl": '{"a": 1}\n{'}, "a.jsonl", "a.jsonl: line 2 column"),
        ({"a.json": b'["\xff"]'}, "a.json", "a.json: not UTF-8: byte 0xff at offset 2"),
        ({"a.csv": b"\xef\xbb\xbfa\n\xe4"}, "a.csv", "a.csv: not UTF-8: byte 0xe4 at offset 5"),
        ({"a.csv": ""}, "a.csv", "expected a header"),
        ({"a.csv": "a,b\n1\n"}, "a.csv", "line 2: expected 2 cells as in the header, got 1"),
        ({"a.csv": 'a,b\n1,"2\n'}, "a.csv", "not csv"),
        ({"a.csv": "a,a\n1,2\n"}, "a.csv", "column 'a' stands twice"),
        ({"a.txt": "x"}, "a.txt", "csv, json, jsonl or parquet; got .txt"),
        (
            {"f/a.json": [], "f/a.csv": ""},
            "f",
            "one kind: csv, json, jsonl or parquet; got .csv, .json",
        ),
        ({"f/.x": ""}, "f", "got none"),
        ({"a.json": []}, "a.json", "at least one row"),
        ({"a.json": [1]}, "a.json", "d row 0: expected an object of columns, got int"),
        (
            {"a.json": [{"prompt": "x"}]},
            "a.json",
            "expected a column 'response' or 'output', got prompt; `columns` in",
        ),
        (
            {"a.json": [{**ROWS[0], "instruction": {"a": 1}}]},
            "a.json",
            "d row 0: prompt: expected text, got dict",
        ),
        ({"a.json": '[{"instruction": "\\ud800", "output": "1"}]'}, "a.json", "lone surrogate"),
        ({"a.json": "[" * 100000}, "a.json", "a.json"),
        ({"a.json": "[" + "1" * 5000 + "]"}, "a.json", "a.json: not JSON|expected an object"),
    ],
)
def test_bad_files_are_named(tmp_path, files, name, message):
    make_set(tmp_path, files, file_name=name, file_sha1="ab")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            load_datasets("d", tmp_path)


def test_a_missing_default_input_is_no_error_but_a_named_one_is(tmp_path):
    rows = [{"instruction": "a", "output": "b"}]
    make_set(tmp_path, {"a.json": rows})
    assert load_datasets("d", tmp_path) == [record("a", "", "b")]
    make_set(
        tmp_path,
        {"a.json": rows},
        columns={"prompt": "instruction", "response": "output", "query": "in"},
    )
    with pytest.raises(
        ValueError, match="expected column in, got instruction, output; `columns` in"
    ):
        load_datasets("d", tmp_path)


# records_from


def test_lists_of_dicts():
    assert records_from([{"prompt": "p", "response": "0"}]) == [record(response="0")]
    assert records_from(ROWS)[0]["query"] == "title:A,abstract:B"
    pairs = [{"prompt": "p", "query": None, "response": "r", "history": [("a", "b")]}]
    assert records_from(pairs) == [record(history=[["a", "b"]])]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_files(tmp_path, name):
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("instruction,input,output\nJudge -->,x,1\n")
    else:
        row = json.dumps({"instruction": "Judge -->", "input": "x", "output": "1"})
        path.write_text(f"[{row}]" if name == "a.json" else row)
    assert records_from(str(path)) == records_from(path) == [record("Judge -->", "x", "1")]


def test_data_frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"instruction": ["a", "b"], "output": ["0", "1"], "uuid": [1, 2]})
    assert records_from(frame) == [record("a", "", "0"), record("b", "", "1")]
    with pytest.warns(
        UserWarning, match="2 rows had a number as answer, converted to text: DataFrame row 0, Data"
    ):
        assert [r["response"] for r in records_from(frame.assign(output=[0, 1]))] == ["0", "1"]
    with pytest.warns(UserWarning) as found:
        kept = records_from(frame.assign(output=[1, None]))
    assert [r["response"] for r in kept] == ["1.0"]
    texts = sorted(str(warning.message) for warning in found)
    assert texts[1] == "1 row skipped, answer empty or missing: DataFrame row 1"
    assert len(texts) == 4 and "all answers look like '1.0'" in texts[2]
    assert texts[3] == "DataFrame: columns not used: uuid (2 rows)"
    with pytest.warns(UserWarning, match="prompt empty"):
        assert len(records_from(frame.assign(instruction=["a", pandas.NA]))) == 1
    with pytest.raises(
        ValueError,
        match="DataFrame: expected a column 'response' or 'output', got instruction, uuid",
    ):
        records_from(frame.drop(columns="output"))
    with pytest.raises(ValueError, match="'uuid' stands twice"):
        records_from(pandas.concat([frame, frame[["uuid"]]], axis=1))
    with pytest.raises(ValueError, match="at least one row"):
        records_from(frame[:0])


def test_answers_as_float_text_are_told():
    with pytest.warns(UserWarning, match="floats.*drop rows without a label"):
        records_from([{"prompt": "p", "response": "1.0"}, {"prompt": "p", "response": "0.0"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records_from([{"prompt": "p", "response": "1.0"}, {"prompt": "p", "response": "yes"}])


def test_one_warning_per_kind_with_the_first_rows():
    rows = [
        {"prompt": "p", "response": answer} for answer in ["", None, float("nan"), [], "x", 1, True]
    ]
    with pytest.warns(UserWarning) as found:
        assert [r["response"] for r in records_from(rows)] == ["x", "1", "True"]
    assert sorted(str(warning.message) for warning in found) == [
        "2 rows had a number as answer, converted to text: data row 5, data row 6",
        "4 rows skipped, answer empty or missing: data row 0, data row 1, data row 2, ...",
    ]
    assert {warning.filename for warning in found} == {__file__}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"prompt": "p", "response": ""}], "all 1 rows"),
        ([{"prompt": "p"}], "'response' or 'output', got prompt"),
        ([{"a": "p"}], "'prompt' or 'instruction', got a"),
        (
            [{"prompt": "p", "instruction": "i", "output": "o"}],
            "one of the columns prompt and instruction",
        ),
        (["text"], "data row 0: expected an object of columns, got str"),
        ([{"prompt": "p", "response": b"x"}], "answer: expected text, got bytes"),
        ([{"prompt": "p", "response": "r", "history": "no json"}], "history: expected a JSON list"),
        ([{"prompt": "p", "response": "r", "history": 3}], "history: expected a list"),
        ([{"prompt": "p", "response": "r", "history": [["a"]]}], "history: expected pairs"),
        ([{"prompt": "p", "response": "r", "history": ["ab"]}], "history: expected pairs"),
    ],
)
def test_bad_rows(rows, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            records_from(rows)


@pytest.mark.parametrize("data", [None, 3, {"prompt": ["p"]}, b"x"])
def test_other_data(data):
    with pytest.raises(TypeError, match="expected a DataFrame, a list of dicts or a file name"):
        records_from(data)


GOOD = {
    ".json": json.dumps(ROWS, ensure_ascii=False).encode(),
    ".jsonl": "\n".join(json.dumps(row) for row in ROWS).encode(),
    ".csv": 'instruction,input,output\n"a,""b""",题,0\nc,,1\n'.encode(),
}


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kind=st.sampled_from(sorted(GOOD)), data=st.data())
def test_mutated_files_give_records_or_a_value_error(tmp_path, kind, data):
    content = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        how = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if how == "set" and content:
            content[place] = data.draw(st.integers(0, 255))
        elif how == "insert":
            content[place:place] = data.draw(st.binary(max_size=4))
        elif how == "delete":
            del content[place : place + data.draw(st.integers(1, 20))]
        else:
            del content[place:]
    path = tmp_path / f"x{kind}"
    path.write_bytes(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            records = records_from(path)
        except ValueError:
            return
    assert all(r["prompt"] and r["response"] and isinstance(r["query"], str) for r in records)


# Ids


def encoded():
    """Two records: ids 10 11 | 12 0 2 and 20 | 21 2."""
    return Encoded(
        np.array([10, 11, 12, 0, 2, 20, 21, 2], np.int32),
        np.array([0, 5, 8]),
        np.array([2, 1], np.int32),
        0,
    )


def test_batches_of_records():
    data = encoded()
    assert (len(data), data.lengths.tolist()) == (2, [5, 3])
    assert (data.source(0).tolist(), data.target(1).tolist()) == ([10, 11], [21, 2])
    batch = data.batch([1, 0])
    assert batch.ids.tolist() == [20, 21, 2, 10, 11, 12, 0, 2]
    assert batch.labels.tolist() == [-100, 21, 2, -100, -100, 12, 0, 2]
    rows, targets = batch.rows_and_targets()
    assert (rows.tolist(), targets.tolist()) == ([0, 1, 4, 5, 6], [21, 2, 12, 0, 2])
    assert rows.dtype == targets.dtype == batch.ids.dtype == batch.lengths.dtype == np.int32
    assert (batch.n_tokens, batch.n_segments, batch.n_targets) == (8, 2, 5)
    data.ignored_id = 0
    ignoring = data.batch([0])
    assert ignoring.labels.tolist() == [-100, -100, 12, -100, 2]
    assert ignoring.rows_and_targets()[1].tolist() == [12, 2]


def test_pieces_are_laid_out_in_order(monkeypatch):
    from glmlora.training import records as module

    calls = []

    class Prompts:
        @staticmethod
        def encode_source(tokenizer, prompt, query, history, limit, **options):
            calls.append((tokenizer, prompt, query, history, limit, options))
            return [ord(letter) for letter in prompt], len(prompt) > 1

        @staticmethod
        def encode_target(tokenizer, response, limit, template):
            calls.append(template)
            return [ord(letter) for letter in response[: limit - 1]] + [2]

    monkeypatch.setattr(module, "prompts", Prompts)
    records = [record("ab", "q", "xyz", [["h", "i"]]), record("c", "", "w")]
    data = encode_records(records, "tok", 9, 3, "vendored", "P:", "vendored")
    assert data.ids.tolist() == [97, 98, 120, 121, 2, 99, 119, 2]
    assert (data.offsets.tolist(), data.source_lengths.tolist()) == ([0, 5, 8], [2, 1])
    assert data.n_cut == 1
    assert calls[1] == "vendored"  # ChatGLM3's own answers begin with a line of metadata
    options = {"truncation": "vendored", "source_prefix": "P:", "template": "vendored"}
    options["system"] = None
    assert calls[0] == ("tok", "ab", "q", [["h", "i"]], 9, options)
    with pytest.raises(ValueError, match="^records: "):
        encode_records([], "tok")


@pytest.fixture
def tokenizer(shared):
    from glmlora.tokenization import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(shared / "golden/tokenizer-chatglm2"))


def test_encodings_as_measured(shared, tokenizer):
    for case in json.loads((shared / "spec/vectors.json").read_text())["sft"]:
        with pytest.warns(UserWarning, match="skipped"):
            records = records_from(case["rows"])
        data = encode_records(
            records,
            tokenizer,
            case["max_source_length"],
            case["max_target_length"],
            truncation="vendored",
            source_prefix=case["source_prefix"],
        )
        assert len(data) == len(case["items"]) == 3
        assert (data.ids.dtype, data.offsets.dtype, data.source_lengths.dtype) == (
            np.int32,
            np.int64,
            np.int32,
        )
        for row, item in enumerate(case["items"]):
            batch = data.batch([row])
            assert batch.ids.tolist() == item["input_ids"]
            assert batch.labels.tolist() == item["labels"]
        assert data.n_cut == (3 if case["max_source_length"] == 16 else 0)


def test_generation_sources_as_measured(shared, tokenizer):
    for case in json.loads((shared / "spec/vectors.json").read_text())["sft_generate"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = encode_records(records_from(case["rows"]), tokenizer, truncation="vendored")
        assert [data.source(i).tolist() for i in range(3)] == [
            item["input_ids"] for item in case["items"]
        ]


# Batches


def test_padding_is_dropped_as_measured(shared):
    case = json.loads((shared / "spec/vectors.json").read_text())["batch_v2"]
    batch, row, column = Batch.from_padded(**case)
    assert batch.lengths.tolist() == [33, 22] and batch.positions is None
    assert batch.ids.tolist() == case["input_ids"][0] + case["input_ids"][1][11:]
    assert batch.rows_and_targets()[1].tolist() == [30910, 30939, 2, 30910, 30940, 2]
    back = np.zeros((2, 33), int)
    back[row, column] = batch.ids
    assert back.tolist() == case["input_ids"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    left=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_padding_on_any_side(lengths, left):
    width = max(n + pad for n, pad in zip(lengths, left, strict=False))
    mask = np.zeros((len(lengths), width), bool)
    for i, n in enumerate(lengths):
        mask[i, left[i] : left[i] + n] = True
    ids = np.arange(mask.size).reshape(mask.shape)
    batch, row, column = Batch.from_padded(ids, mask, labels=ids)
    assert batch.lengths.tolist() == lengths
    assert np.array_equal(ids[row, column], batch.ids) and np.array_equal(ids[mask], batch.ids)
    rows, targets = batch.rows_and_targets()
    assert len(rows) == sum(lengths) - len(lengths)
    assert np.array_equal(targets, batch.ids[rows] + 1)


def test_no_mask_and_positions():
    batch, _, _ = Batch.from_padded([[1, 2], [3, 4]])
    assert batch.ids.tolist() == [1, 2, 3, 4] and batch.labels is None and batch.n_targets == 0
    batch, _, _ = Batch.from_padded([[0, 1, 2]], [[0, 1, 1]], position_ids=[[0, 0, 1]])
    assert batch.positions is None
    batch, _, _ = Batch.from_padded([[0, 1, 2]], [[0, 1, 1]], position_ids=[[0, 1, 2]])
    assert batch.positions.tolist() == [1, 2]


def test_all_labels_masked():
    batch, _, _ = Batch.from_padded([[1, 2, 3]], labels=[[5, -100, -100]])
    # The label of the first token has no position that predicts it.
    assert batch.n_targets == 0


@pytest.mark.parametrize(
    ("given_arrays", "message"),
    [
        ({"input_ids": [1, 2]}, r"^input_ids: expected shape \(rows, tokens\), got \(2,\)"),
        ({"input_ids": [[]]}, "^input_ids: expected shape"),
        ({"input_ids": [[1, 2], [3]]}, "^input_ids: expected rows of one length"),
        ({"input_ids": [[1.0, 2.0]]}, "^input_ids: expected integers, got float64"),
        ({"input_ids": [[-1, 2]]}, "^input_ids: .*got -1"),
        ({"input_ids": [[2**31, 2]]}, "^input_ids: .*got 2147483648"),
        ({"attention_mask": [[1, 1, 1]]}, r"^attention_mask: expected shape \(2, 3\)"),
        ({"attention_mask": [[1, 1, 2], [1, 1, 1]]}, "^attention_mask: expected values 0 and 1"),
        ({"attention_mask": [[1, 1, 1], [0, 0, 0]]}, "^attention_mask: row 1 is padding alone"),
        (
            {"attention_mask": [[1, 0, 1], [1, 1, 1]]},
            "^attention_mask: row 0 has zeros between ones",
        ),
        ({"labels": [[1, 2, 3]]}, "^labels: expected shape"),
        ({"labels": [[1, 2, -3], [1, 2, 3]]}, "^labels: expected ids or -100, got -3"),
        ({"labels": [[1.5, 2, 3], [1, 2, 3]]}, "^labels: expected integers"),
        ({"position_ids": [[0, 1, 2]]}, "^position_ids: expected shape"),
        ({"position_ids": [[0, 1, -2], [0, 1, 2]]}, "^position_ids: .*got -2"),
    ],
)
def test_bad_arrays(given_arrays, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_padded(**{"input_ids": [[1, 2, 3], [4, 5, 6]], **given_arrays})


def test_a_batch_is_checked():
    with pytest.raises(ValueError, match="^lengths: .*3 together"):
        Batch(np.array([1, 2, 3]), np.array([2, 2]))
    with pytest.raises(ValueError, match="^lengths: "):
        Batch(np.array([1, 2, 3]), np.array([3, 0]))
    with pytest.raises(ValueError, match="^labels: "):
        Batch(np.array([1, 2, 3]), np.array([3]), np.array([1]))


# Order


def test_order_depends_on_seed_epoch_and_n_only():
    assert np.array_equal(epoch_order(50, 1, 42), epoch_order(50, 1, 42))
    orders = [epoch_order(50, *key).tolist() for key in [(0, 42), (1, 42), (0, 43), (1, 43)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    # Pinned: raw Philox words are the same in every NumPy, so a resumed run keeps its order.
    assert epoch_order(8, 0, 42).tolist() == PINNED
    assert epoch_order(0, 0, 1).tolist() == []


PINNED = [7, 1, 6, 4, 3, 5, 0, 2]


def test_grouping_puts_like_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 400, 1000)
    order = grouped_epoch_order(lengths, 0, 42, 4)
    assert sorted(order) == list(range(1000))
    assert lengths[order[0]] == lengths.max()

    def padding(order):
        return sum(lengths[b].max() * len(b) - lengths[b].sum() for b in micro_batches(order, 4))

    assert padding(order) < 0.2 * padding(epoch_order(1000, 0, 42))
    assert not np.array_equal(order, grouped_epoch_order(lengths, 1, 42, 4))
    assert grouped_epoch_order([3, 9, 1], 0, 1, 8).tolist() == [1, 0, 2]


def test_splits_as_measured(shared):
    for case in json.loads((shared / "spec/vectors.json").read_text())["split"]:
        train, dev = split_dev(case["n"], case["ratio"], 42)
        assert (len(train), len(dev)) == (case["train"], case["test"])
        assert sorted([*train, *dev]) == list(range(case["n"]))


def test_splits():
    assert [len(part) for part in split_dev(100, 0.07, 1)] == [93, 7]
    assert [len(part) for part in split_dev(5, 1e-7, 1)] == [5, 0]
    assert [len(part) for part in split_dev(5, 2e-6, 1)] == [4, 1]
    assert split_dev(100, 0.1, 1)[1].tolist() != split_dev(100, 0.1, 2)[1].tolist()
    with pytest.raises(ValueError, match="^dev_ratio: 0.5 of 1 records"):
        split_dev(1, 0.5, 1)
    with pytest.raises(ValueError, match="^dev_ratio: "):
        split_dev(10, 1.0, 1)


@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "micro", "updates"),
    [(50, 4, 4, 13, 4), (6000, 4, 4, 1500, 375), (1, 8, 4, 1, 1)],
)
def test_updates(n, batch, accumulation, micro, updates):
    batches = micro_batches(np.arange(n), batch)
    assert len(batches) == micro and np.concatenate(batches).tolist() == list(range(n))
    assert updates_per_epoch(n, batch, accumulation) == updates


def test_drop_last():
    assert [b.tolist() for b in micro_batches(np.arange(5), 2, drop_last=True)] == [[0, 1], [2, 3]]
    assert updates_per_epoch(50, 4, 4, drop_last=True) == 3
    assert len(micro_batches(np.arange(4), 2, drop_last=True)) == 2


def test_pandas_stays_out(tmp_path):
    import subprocess

    make_set(tmp_path, {"a.json": ROWS, "b.csv": "prompt,response\na,b\n"})
    code = (
        "import sys\n"
        "from glmlora.training import arguments, metrics, records as data\n"
        f"data.load_datasets('d', {str(tmp_path)!r})\n"
        f"data.records_from({str(tmp_path / 'b.csv')!r})\n"
        "unwanted = {'pandas', 'torch', 'transformers', 'yaml', 'argparse', 'jieba'}\n"
        "assert not unwanted & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_stand_as_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n0,1.0\n")
    assert read_rows(tmp_path / "a.csv") == [{"a": "0", "b": "1.0"}]
    with pytest.raises(ValueError, match="ending in .csv, .json, .jsonl or .parquet"):
        read_rows("a.xlsx")


def _rows(tmp_path, name, data):
    """(rows, texts of the warnings) of a file."""
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rows = read_rows(tmp_path / name)
    return rows, " | ".join(str(w.message) for w in told)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("a,b\n1," + "x" * 140_000 + "\n", ""),
        ('a,b\nThe "best" one,"2""3"\n', ""),
        ('a,b\n"He said "no" twice",2\n', "line 2: .* read as pandas does|pandas"),
        ("a,b\r1,2\r3,4", ""),
        ('a,b\r\n1,"2\r\n3"\r\n\r\n', ""),
        ("a,b,,\n1,2,,\n3,4,,\n", ""),
        ("a,b,Unnamed: 2\n1,2,\n", ""),
        (",a,b\n0,1,2\n", ""),
        ("a,b\n  \n1,2\n", ""),
        ("\ufeffa,b\n1,2\n", ""),
        ("标题,b\n摘要,2\n".encode("gb18030"), "read as GB18030"),
        ("标题,b\n摘要,2\n".encode("utf-16"), "UTF-16"),
        ("a\tb\n1\t2,3\n", "separated by tabs"),
        ("a;b\n1;2,5\n", "separated by semicolons"),
    ],
)
def test_csv_as_pandas_reads_it(tmp_path, data, told):
    pandas = pytest.importorskip("pandas")
    rows, said = _rows(tmp_path, "a.csv", data)
    assert bool(said) == bool(told) and (not told or re.search(told, said)), said
    encoding = {"read as GB18030": "gb18030", "UTF-16": "utf-16"}.get(told, "utf-8-sig")
    delimiter = {"separated by tabs": "\t", "separated by semicolons": ";"}.get(told, ",")
    frame = pandas.read_csv(
        tmp_path / "a.csv", dtype=str, encoding=encoding, sep=delimiter, keep_default_na=False
    )
    blank = [n for n in frame.columns if n.startswith("Unnamed") and not frame[n].any()]
    assert rows == frame.drop(columns=blank).to_dict("records")


@pytest.mark.parametrize(
    ("name", "data", "expected", "told"),
    [
        ("a.csv", "a,b\n1,2,,\n", [{"a": "1", "b": "2"}], ""),
        ("a.csv", '[{"a": 1}]', [{"a": 1}], "holds JSON"),
        ("a.jsonl", '[{"a": 1},\n{"a": 2}]', [{"a": 1}, {"a": 2}], ""),
        ("a.json", '{"a": 1}\n', [{"a": 1}], ""),
        ("a.json", '{"a": "好"}\n'.encode("gbk"), [{"a": "好"}], "GB18030"),
        ("a.json", '{"v": 1, "data": [{"a": 1}]}', [{"a": 1}], "list 'data' is read; not used: v"),
        (
            "a.json",
            '{"messages": [{"role": "user", "content": "x"}]}',
            [{"messages": [{"role": "user", "content": "x"}]}],
            "",
        ),
        # A single row, on one line or several, whatever its cells.
        ("a.json", '{"a": "b", "history": []}', [{"a": "b", "history": []}], ""),
        (
            "a.json",
            '{"a": "b",\n "history": [["q", "r"]]}',
            [{"a": "b", "history": [["q", "r"]]}],
            "",
        ),
        (
            "a.json",
            '{"id": "1", "x": "", "y": "", "conversations": [{"from": "human", "value": "q"}]}',
            [{"id": "1", "x": "", "y": "", "conversations": [{"from": "human", "value": "q"}]}],
            "",
        ),
    ],
)
def test_rows_are_read_where_it_is_certain(tmp_path, name, data, expected, told):
    rows, said = _rows(tmp_path, name, data)
    assert rows == expected and bool(said) == bool(told) and told in said


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", "a,b\ncafé,é\n".encode("cp1252"), "not UTF-8: byte 0xe9 at offset 7; save"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: expected 2 cells as in the header, got 3"),
        ("a.csv", 'a,b\n1,2\n"x,1\ny,2\n', "line 3: a quote is opened and never closed"),
        ("a.csv", "a,b\n1,\0\n", "line 2: not text: has a NUL"),
        ("a.csv", b"PK\x03\x04\0", "an Excel workbook; save it as CSV"),
        ("a.json", '{"a": ["x"], "b": ["y"]}', "an object of columns; .*orient='records'"),
        ("a.json", '{"a": {"0": "x"}}', "an object of columns"),
        ("a.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', "with several: a, b; save each"),
        (
            "a.csv",
            "a,b\n你好,您好\n".encode() + "你好,您好\n".encode("gbk"),
            "not UTF-8: byte 0xc4",
        ),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', "line 2: .*key 'a' stands twice"),
        ("a.json", " ", "the file is empty"),
    ],
)
def test_rows_that_are_refused(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        _rows(tmp_path, name, data)


def test_the_limit_of_cells_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    _rows(tmp_path, "a.csv", "a\n" + "x" * (before + 1))
    assert csv.field_size_limit() == before


def test_columns_cost_no_more_than_their_number(tmp_path):
    """20,000 columns: comparing each with each would be 400 million steps."""
    names = ["instruction", "output", *(f"c{i}" for i in range(20_000))]
    data = ",".join(names) + "\n" + ",".join("1" for _ in names) + "\n"
    (tmp_path / "a.csv").write_text(data)
    with pytest.warns(UserWarning, match="not used: c0 .1 row., .*20000 columns in all"):
        assert records_from(tmp_path / "a.csv") == [record("1", "", "1")]


# Conversations, and what is not used


def _conversation(*turns, role="role", content="content"):
    return [{role: who, content: text} for who, text in turns]


ROUND = (("user", "q"), ("assistant", "a"))
USER = _conversation(*ROUND)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": USER}, record("q", "", "a")),
        ({"conversations": USER, "id": None}, record("q", "", "a")),
        (
            {"conversations": _conversation(("human", "q"), ("gpt", "a"), role="from",
                                            content="value")},
            record("q", "", "a"),
        ),
        ({"messages": json.dumps(USER)}, record("q", "", "a")),  # a cell of a csv
        (
            {"messages": _conversation(("system", "s"), *ROUND)},
            {**record("q", "", "a"), "system": "s"},
        ),
        ({"messages": USER, "system": "s"}, {**record("q", "", "a"), "system": "s"}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, USER[1]]},
         record("q", "", "a")),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": _conversation(*ROUND)},
            {**record("q", "", "a", [["q", "a"]]), "system": "s"},
        ),
        ({"query": "q", "response": "a"}, record("q", "", "a")),
        ({"content": "q", "summary": "a"}, record("q", "", "a")),
        ({"question": "q", "answer": "a"}, record("q", "", "a")),
        ({"prompt": "q", "completion": "a"}, record("q", "", "a")),
        ({"instruction": "q", "input": "i", "answer": "x", "output": "a"}, record("q", "i", "a")),
    ],
)  # fmt: skip
def test_forms_of_records(row, expected, tmp_path):
    """Alike from a list, from a file, and from a data set whose entry says nothing."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    make_set(tmp_path, {"b.json": [row]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if "answer" in row and "output" in row else "error")
        assert records_from([row]) == [expected]
        assert records_from(tmp_path / "a.jsonl") == [expected]
        assert load_datasets("d", tmp_path) == [expected]


@pytest.mark.parametrize(
    ("row", "told", "kept"),
    [
        ({"messages": _conversation(*ROUND, *ROUND)}, "1 row has several answers", [["q", "a"]]),
        (
            {"messages": _conversation(*ROUND, ("user", "x"))},
            "1 row ends in a question without",
            [],
        ),
        ({"messages": [{**USER[0], "weight": 0}, USER[1]]}, "1 row has 'weight' in messages", []),
        (
            {"messages": [{**m, "loss": True} for m in USER]},
            "1 row has 'loss' in messages",
            [],
        ),
        # The form of ChatGLM3's own tool data: the message has no content.
        ({"messages": [USER[0], {"role": "tool", "name": "t"}]}, "skipped, a 'tool' message", None),
        ({"messages": _conversation(("tool", "x"), *ROUND)}, "skipped, a 'tool' message", None),
        ({"messages": [USER[0], {**USER[1], "tool_calls": [1]}]}, "skipped, calls of tools", None),
        ({"messages": _conversation(*reversed(ROUND))}, "skipped, an assistant message", None),
        ({"messages": _conversation(ROUND[0], *ROUND)}, "skipped, a user message stands", None),
        ({"messages": USER[:1]}, "skipped, answer empty or missing", None),
        ({"messages": []}, "skipped, answer empty or missing", None),
        ({"messages": _conversation(ROUND[0], ("assistant", ""))}, "skipped, answer empty", None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, USER[1]]},
            "skipped, messages with a part of type 'image_url'",
            None,
        ),
        ({"messages": USER, "tools": ["t"]}, "columns not used: tools .1 row", []),
    ],
)
def test_what_is_not_learnt_from_is_told(row, told, kept):
    rows = [row, {"messages": USER}]
    with pytest.warns(UserWarning, match=told):
        records = records_from(rows)
    assert [r["history"] for r in records] == ([] if kept is None else [kept]) + [[]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, "row 0: messages: expected a list of messages, got 'x'"),
        ({"messages": {"a": 1}}, "messages: expected a list of messages, got dict"),
        ({"messages": ["x"]}, r"messages\[0\]: expected a message, got str"),
        ({"messages": [{"rol": "user"}]}, r"\[0\]: expected a message with 'role' or 'from'"),
        ({"messages": [{"role": "user"}]}, "expected a message with 'content' or 'value'"),
        ({"messages": _conversation(("User", "x"))}, "got 'User' \\(did you mean 'user'"),
        ({"messages": _conversation(("usr", "x"))}, "got 'usr' \\(did you mean 'user'"),
        ({"messages": USER, "conversations": USER}, "messages and conversations, got both"),
        ({"instruktion": "q", "output": "a"}, "'instruktion' \\(did you mean 'instruction'"),
        ({"Instruction": "q", "Output": "a"}, "'Instruction' \\(did you mean 'instruction'"),
        ({"prompt": "p", "response": "r", "history": [{"role": "user", "content": "x"}]},
         "history: expected whole rounds of user and assistant: answer empty"),
    ],
)  # fmt: skip
def test_bad_conversations(row, message):
    with pytest.raises(ValueError, match=message):
        records_from([row])


def test_entries_of_conversations(tmp_path):
    rows = [{"talk": _conversation(("u", "q"), ("a", "r"), role="who", content="what"), "sys": "s"}]
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "u", "assistant_tag": "a"}
    columns = {"messages": "talk", "system": "sys"}
    make_set(tmp_path, {"a.json": rows}, formatting="sharegpt", columns=columns, tags=tags)
    assert load_datasets("d", tmp_path) == [{**record("q", "", "r"), "system": "s"}]
    make_set(tmp_path, {"b.json": ROWS}, formatting="sharegpt")
    with pytest.raises(ValueError, match="expected column conversations, got input"):
        load_datasets("d", tmp_path)


def test_columns_that_are_not_used_are_counted(tmp_path):
    rows = [*ROWS, {**ROWS[0], "note": "n"}, {**ROWS[0], "note": "", "uuid": 3}]
    text = "columns not used: note \\(1 row\\), uuid \\(1 row\\)"
    with pytest.warns(UserWarning, match=f"data: {text}"):
        records_from(rows)
    make_set(tmp_path, {"a.json": rows})
    with pytest.warns(UserWarning, match=f"d: {text}"):
        load_datasets("d", tmp_path)
    columns = {"prompt": "instruction", "response": "output"}
    make_set(tmp_path, {"a.json": rows}, columns=columns)
    with pytest.warns(UserWarning, match="not used: input \\(4 rows\\), note"):
        load_datasets("d", tmp_path)


@pytest.mark.parametrize(
    ("extra", "near"),
    [("histroy", "history"), ("Input", "input"), ("system_prompt", "system"), ("uuid", None)],
)
def test_a_column_that_is_nearly_a_field_is_told(extra, near, tmp_path):
    pandas = pytest.importorskip("pandas")
    row = {"instruction": "q", "output": "a", extra: "x"}
    make_set(tmp_path, {"a.json": [row]})
    text = f"not used: {extra} (1 row)" + (f" (did you mean {near!r}?)" if near else "")
    for read in (
        lambda: records_from([row]),
        lambda: records_from(pandas.DataFrame([row])),
        lambda: load_datasets("d", tmp_path),
    ):
        with pytest.warns(UserWarning, match=f"{re.escape(text)}$") as told:
            read()
        assert all(w.filename == __file__ for w in told)


def test_dicts_and_data_sets_of_other_libraries():
    with pytest.raises(TypeError, match="got dict; pandas.DataFrame"):
        records_from({"instruction": ["i"], "output": ["a"]})

    class Dataset:
        """As of the library datasets: an iterable of dicts with the names of its columns."""

        column_names = ("instruction", "output")

        def __iter__(self):
            return iter([{"instruction": "q", "output": "a"}])

        def __len__(self):
            return 1

    assert records_from(Dataset()) == [record("q", "", "a")]
    with pytest.raises(TypeError, match=r"one of its data sets, e.g. data\['train'\]"):
        records_from({"train": Dataset()})


@pytest.mark.parametrize("history", [[], [["h", "i"]]])
def test_a_system_message_is_in_the_prompt(shared, history):
    """As the family's chats have it; whole too where the prompt is cut."""
    from glmlora.tokenization import AutoTokenizer

    for family in ("v2", "v3"):
        place = str(shared / "golden/tokenizer-chatglm2")
        tokenizer = AutoTokenizer.from_pretrained(place, family=family)
        messages = [
            {"role": "system", "content": "be kind"},
            *(m for q, a in history for m in _conversation(("user", q), ("assistant", a))),
            {"role": "user", "content": "who?"},
        ]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        row = {**record("who?", "", "x", history), "system": "be kind"}
        data = encode_records([row], tokenizer)
        assert data.source(0).tolist() == list(expected)
        row["prompt"] *= 100
        cut = tokenizer.decode(encode_records([row], tokenizer, 60).source(0).tolist())
        assert "be kind" in cut and cut.count("who?") > 5


def test_missing_files_are_named_with_the_nearest(tmp_path):
    make_set(tmp_path / "data", {"rows.json": ROWS})
    for directory, name, message in (
        ("dat", "d", "dataset_dir: .*dat/dataset_info.json: .*did you mean 'data'"),
        ("data/x/y", "d", "there is no .*data/x"),
        ("data", "rows.json", "not in .*; for that file, add an entry with file_name 'rows.json'"),
        ("data", "dd", "not in .*did you mean 'd'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_datasets(name, tmp_path / directory)
    with pytest.raises(FileNotFoundError, match="data: .*row.json.*did you mean 'rows.json"):
        records_from(tmp_path / "data/row.json")
    make_set(tmp_path / "data", {}, file_name="row.json")
    with pytest.raises(FileNotFoundError, match="row.json does not exist .did you mean 'rows.json"):
        load_datasets("d", tmp_path / "data")


def test_cut_answers_are_told(tokenizer, capsys):
    from types import SimpleNamespace

    from glmlora.training.arguments import DataArguments
    from glmlora.training.records import encode

    fits, longer = record(response="1 2 3"), record(response="1 2 3 4")
    length = len(encode_records([fits], tokenizer).target(0))
    data = encode_records([fits, longer], tokenizer, max_target_length=length)
    assert data.n_answers_cut == 1 and len(data.target(1)) == length
    config = SimpleNamespace(seq_length=2048, padded_vocab_size=65024)
    encode([fits, longer], tokenizer, DataArguments(max_target_length=length), config, "data")
    assert "1 of 2 answers were longer than max_target_length" in capsys.readouterr().out
