"""A table looked at before training: every planted fault is found, and nothing else."""

import csv
import json
import random

import numpy as np
import pytest
import tiny
import training

import glmlora
from glmlora import cli
from glmlora.families.prompt import chat_ids, encode_source
from glmlora.inspection import similar
from glmlora.inspection.lengths import prompt_lengths, suggested_length
from glmlora.task import Task, write_task
from glmlora.tools.plan import plan, products_per_second
from glmlora.tools.project import tiny_directory

TINY = str(tiny_directory())
WORDS = [a + b + c for a in "bdfgklmnprst" for b in ("a", "en", "il", "or") for c in "dklmnrst"]


def text(seed, words=60):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def paper(i, **cells):
    return {
        "uuid": f"p{i}",
        "title": text(f"t{i}", 8).capitalize(),
        "abstract": text(f"a{i}"),
        "label": str(i % 2),
        **cells,
    }


def changed(row, n):
    """The abstract of a row with n of its words replaced."""
    words = row["abstract"].split()
    for k in range(n):
        words[3 + 9 * k] = "changed"
    return " ".join(words)


def planted():
    """(table, test) with one fault of each kind, at known ids."""
    rows = [paper(i) for i in range(200)]
    rows[10] |= {"abstract": ""}
    rows[11] |= {"label": None}
    rows[12] |= {"title": "NaN"}
    for copy, of in ((21, 20), (22, 20), (31, 30)):  # equal but for case and spacing
        title, abstract = rows[of]["title"].upper(), "  ".join(rows[of]["abstract"].split())
        rows[copy] |= {"title": title, "abstract": abstract, "label": rows[of]["label"]}
    rows[41] |= {"title": rows[40]["title"], "abstract": changed(rows[40], 2)}
    rows[41]["label"] = rows[40]["label"]
    rows[51] |= {"title": rows[50]["title"], "abstract": rows[50]["abstract"], "label": "1"}
    rows[61] |= {"title": rows[60]["title"], "abstract": changed(rows[60], 1), "label": "1"}
    for i in range(100, 124):  # 12 %
        rows[i]["abstract"] = text(f"long{i}", 300)
    test = [paper(1000 + i) for i in range(40)]
    for row in test:
        del row["label"]
    test[3] |= {"title": rows[70]["title"], "abstract": rows[70]["abstract"]}
    test[4] |= {"title": rows[80]["title"], "abstract": changed(rows[80], 1)}
    test[5] |= {"abstract": float("nan")}
    return rows, test


def found(report):
    return {
        "missing": report.missing,
        "test missing": report.test.missing,
        "duplicates": report.duplicates,
        "near": [(group.ids, group.labels) for group in report.near_duplicates],
        "conflicts": [(group.ids, group.labels) for group in report.conflicts],
        "leaks": [(leak.test_id, leak.id, leak.similarity == 1) for leak in report.leaks],
        "repeated ids": report.repeated_ids + report.test.repeated_ids,
        "constant": report.constant_columns,
        "spellings": report.label_spellings,
        "sorted": report.sorted_by_label,
    }


EXPECTED = {
    "missing": {"abstract": ["p10"], "label": ["p11"], "title": ["p12"]},
    "test missing": {"abstract": ["p1005"]},
    "duplicates": [["p20", "p21", "p22"], ["p30", "p31"]],
    "near": [(["p40", "p41"], ["0", "0"])],
    "conflicts": [(["p50", "p51"], ["0", "1"]), (["p60", "p61"], ["0", "1"])],
    "leaks": [("p1003", "p70", True), ("p1004", "p80", False)],
    "repeated ids": [],
    "constant": {},
    "spellings": [],
    "sorted": False,
}


def test_planted_faults_are_found_and_no_others():
    rows, test = planted()
    tokenizer = glmlora.AutoTokenizer.from_pretrained(TINY)
    report = glmlora.inspect(rows, test, tokenizer=tokenizer, max_source_length=600)
    missing = {c: ids for c, ids in found(report)["missing"].items()}
    assert found(report) | {"missing": dict(sorted(missing.items()))} == EXPECTED
    assert list(report.cut) == [f"p{i}" for i in range(100, 124)] and not report.test.cut
    assert len(report.cut) / report.rows == 0.12
    prompts = glmlora.inspection.fill_template(report.template, [rows[100]])
    whole = len(encode_source(tokenizer, prompts[0], None, None, 10**6)[0])
    assert report.cut["p100"] == whole - 600 and report.lengths[100] == whole
    values = [row["label"] for row in rows]
    assert report.labels == {"0": values.count("0"), "1": values.count("1")}


def test_a_clean_table_has_no_finding():
    report = glmlora.inspect([paper(i) for i in range(60)], [paper(90 + i) for i in range(9)])
    assert not report.findings
    assert "!" not in str(report)
    assert report.unit == "characters" and report.forecast is None


def test_frames_and_files_give_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows, test = planted()
    expected = found(glmlora.inspect(rows, test))
    frame, other = pandas.DataFrame(rows), pandas.DataFrame(test)
    assert found(glmlora.inspect(frame, other)) == expected
    (tmp_path / "a.json").write_text(json.dumps(rows))
    other.to_csv(tmp_path / "b.csv", index=False)
    report = glmlora.inspect(tmp_path / "a.json", tmp_path / "b.csv")
    assert found(report) == expected and report.table == "a.json"


def test_near_duplicates_are_those_of_all_pairs():
    """The candidates of the prefix filter lose no pair that a comparison of all pairs finds."""
    draw = random.Random(3)
    texts = []
    for i in range(120):
        words = text(f"n{i % 40}", 20 + i % 40).split()
        for _ in range(draw.randrange(4)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append(" ".join(words[draw.randrange(3) :]))

    def shingles(text):
        words = similar.words_of(text)
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    sets = [shingles(t) for t in texts]
    group = list(range(len(texts)))
    pairs = 0
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) >= similar.THRESHOLD * len(sets[i] | sets[j]):
                pairs += 1
                a, b = sorted((group[i], group[j]))
                group = [a if g == b else g for g in group]
    assert pairs > 30
    result = similar.similar_rows(texts)
    assert result.group.tolist() == group and result.complete


def test_chinese_texts_are_compared_by_character():
    a = "本文研究糖尿病患者的睡眠质量以及胰岛素治疗对其生活质量的影响并给出统计结果"
    rows = [
        a,
        a.replace("统计", "分析"),
        "本文提出一种大规模图上的快速排序算法并证明其复杂度的上界",
    ]
    assert similar.similar_rows(rows).group.tolist() == [0, 0, 2]


def test_labels_in_chinese_stand_in_line():
    rows = [paper(i, label=("医学", "other")[i % 2]) for i in range(20)]
    shown = [line for line in str(glmlora.inspect(rows)).splitlines() if line.endswith("50.0%")]
    assert len(shown) == 2
    assert [line.index("\u2588") for line in shown] == [
        32,
        30,
    ]  # two characters of two columns each
    assert [line[:26].strip() for line in shown] == ["labels", ""]


def test_too_many_alike_are_told(monkeypatch):
    monkeypatch.setattr(similar, "MOST_COMPARED", 10)
    rows = [paper(i, abstract=text("same", 90) + f" word{i}") for i in range(40)]
    report = glmlora.inspect(rows)
    assert not report.all_compared and "not all pairs were compared" in str(report)


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_lengths_by_words_are_those_of_whole_prompts(tmp_path, family):
    tiny.tiny_tokenizer_dir(tmp_path)
    config = {"name_or_path": f"THUDM/{family}-6b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = glmlora.AutoTokenizer.from_pretrained(str(tmp_path))
    draw = random.Random(0)
    parts = [*WORDS[:30], "", "", "\n", "a\nb", "晚上睡不着", "1990.", "[Round 1]", "\t"]
    prompts = [" ".join(draw.choice(parts) for _ in range(draw.randrange(9))) for _ in range(400)]
    whole = [len(encode_source(tokenizer, p, None, None, 10**6)[0]) for p in prompts]
    assert prompt_lengths(tokenizer, prompts).tolist() == whole


def test_pieces_beyond_a_space_are_counted_whole(monkeypatch):
    """A vocabulary whose pieces reach over spaces: counting by words would be wrong."""
    tokenizer = glmlora.AutoTokenizer.from_pretrained(TINY)
    vocabulary = {"of\u2581the": 7, **tokenizer.get_vocab()}
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: vocabulary)

    def text_ids(self, text):
        return [1] * (len(text.split(" ")) - text.count("of the"))

    monkeypatch.setattr(type(tokenizer), "text_ids", text_ids)
    lengths = prompt_lengths(tokenizer, ["a b c d", "a of the d", *["a b c d"] * 150])
    assert lengths[1] == lengths[0] - 1


def test_suggested_length():
    lengths = np.array([100] * 99 + [700])
    assert suggested_length(lengths, 2048) == 128
    assert suggested_length(np.array([700] * 10), 2048) == 704
    assert suggested_length(np.array([700] * 10), 500) == 500


def test_the_forecast_is_products_over_speed(monkeypatch):
    speeds = {"lora": 1e9, "chat": 4e9}
    where = "glmlora.inspection.lengths.products_per_second"
    monkeypatch.setattr(where, lambda model, method: speeds[method])
    rows = [paper(i) for i in range(30)]
    report = glmlora.inspect(rows, rows[:12], tokenizer=TINY)
    mean, total = report.lengths.mean() + 3, report.lengths.sum() + 3 * 30
    counted = plan(TINY, 1, round(float(mean)), "lora")
    expected = counted.flops / counted.tokens * total / 1e9
    assert report.forecast.epoch_seconds == pytest.approx(expected)
    asked = plan(TINY, 1, round(float(report.test.lengths.mean())), "chat")
    expected_answers = asked.flops / asked.tokens * report.test.lengths.sum() / 4e9
    assert report.forecast.predict_seconds == pytest.approx(expected_answers)
    cut = glmlora.inspect(rows, tokenizer=TINY, max_source_length=64)
    assert cut.forecast.epoch_seconds < 0.7 * expected
    assert report.forecast.predict_rows == 12 and cut.forecast.predict_rows == 30


def test_the_machine_is_measured(tmp_path):
    for method in ("chat", "lora"):
        assert 1e5 < products_per_second(training.model_dir(tmp_path), method, 0.01) < 1e15


def test_notes_that_a_competitor_should_read():
    rows = [paper(i, label="0" if i < 30 else "1", Keywords="tmp") for i in range(60)]
    rows[59]["label"] = "1.0"
    report = glmlora.inspect(rows)
    assert report.sorted_by_label and report.constant_columns == {"Keywords": "tmp"}
    assert report.label_spellings == ["1", "1.0"]
    shown = str(report)
    for part in ("shuffle", "Keywords (always 'tmp')", "'1', '1.0'", "1.0: fewer than 5 rows"):
        assert part in shown
    floats = [row | {"label": float(i % 2)} for i, row in enumerate(rows)]
    assert "! label form" in str(glmlora.inspect(floats)) and "! label form" not in shown
    rows[3]["uuid"] = "p4"
    report = glmlora.inspect(rows)
    assert report.repeated_ids == ["p4"] and report.cut == {}
    rows[7]["abstract"] = None
    assert glmlora.inspect(rows).missing == {"abstract": [7]}  # ids that repeat name no row


def test_text_and_html_hold_every_finding_and_escape_it():
    rows, test = planted()
    rows[20]["uuid"] = rows[20]["uuid"] = "<b>20</b>"
    report = glmlora.inspect(rows, test, tokenizer=glmlora.AutoTokenizer.from_pretrained(TINY))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    flat = " ".join(" ".join(lines).split())
    for part in (
        "<b>20</b> = p21 = p22",
        "p40 ~ p41",
        "p50 (0) = p51 (1)",
        "p60 (0) ~ p61 (1)",
        "p1003 = p70",
        "p1004 ~ p80",
        "a forecast",
    ):
        assert part in flat
    html = report._repr_html_()
    assert "&lt;b&gt;20&lt;/b&gt; = p21 = p22" in html and "<b>20" not in html
    assert html.count("<div") == html.count("</div>") and html.count("<span") == html.count(
        "</span>"
    )


def test_which_columns_are_the_prompt():
    row = {"id": 1, "a": "x y", "b": "z", "label": "1"}
    report = glmlora.inspect([row, row | {"id": 2, "a": "other words"}])
    assert report.text_columns == ["a", "b"] and report.id_column == "id"
    record = {"instruction": "Judge", "input": "x", "output": "1"}
    report = glmlora.inspect([record, record | {"input": "y"}])
    assert report.text_columns == ["instruction", "input"] and report.label_column == "output"
    report = glmlora.inspect([row], template="{b}?", label="a")
    assert report.text_columns == ["b"] and report.label_column == "a"


def test_an_adapter_says_how_it_is_asked(tmp_path):
    """Its template, base and max_source_length, as its classifier would cut them."""
    rows = [paper(i) for i in range(12)]
    write_task(tmp_path, Task(None, "Is {this} medical? ", "{title}", ["title"], ["0", "1"], 30))
    report = glmlora.inspect(rows, adapter=tmp_path)
    asked = ["Is {this} medical? " + row["title"] for row in rows]
    tokenizer = glmlora.AutoTokenizer.from_pretrained(TINY)
    whole = [len(chat_ids(tokenizer, text)) for text in asked]
    assert report.lengths.tolist() == whole and report.max_source_length == 30
    assert report.cut == {f"p{i}": n - 30 for i, n in enumerate(whole) if n > 30} != {}
    other = glmlora.inspect(rows, adapter=tmp_path, template="{abstract}", max_source_length=99)
    assert other.text_columns == ["abstract"] and other.max_source_length == 99
    with pytest.raises(FileNotFoundError, match="task.json: not there"):
        glmlora.inspect(rows, adapter=tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"label": "lable"}, "label: 'lable' is no column of the table (did you mean 'label'?)"),
        (
            {"template": "{titel}"},
            "template: 'titel' is no column of table (did you mean 'title'?)",
        ),
        ({"template": "x"}, "template: names no {column}"),
        ({"template": "{title} {label}"}, "'label' is the label"),
        ({"template": "{title"}, "template: "),
        ({"max_source_length": 1}, "max_source_length: expected a whole number from 3, got 1"),
        ({"test": [{"title": "x"}]}, "template: 'abstract' is no column of test"),
        ({"test": []}, "test: the table has no rows"),
    ],
)
def test_what_cannot_be_looked_at_is_named(words, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("(", r"\(")[:40]) as e:
        glmlora.inspect([paper(1), paper(2)], **words)
    assert message in str(e.value)


def test_other_data_is_named(tmp_path):
    with pytest.raises(TypeError, match="table: expected a DataFrame, .* got int"):
        glmlora.inspect(7)
    with pytest.raises(FileNotFoundError, match="test: .*none.csv"):
        glmlora.inspect([paper(1)], tmp_path / "none.csv")
    with pytest.raises(ValueError, match="table row 1: expected an object of columns, got str"):
        glmlora.inspect([paper(1), "x"])


def test_the_command_writes_findings_and_picture(tmp_path, capsys):
    rows, test = planted()
    for name, table in (("a.json", rows), ("b.json", [r | {"abstract": None} for r in test[:2]])):
        (tmp_path / name).write_text(json.dumps(table))
    out = tmp_path / "found.csv"
    words = ["inspect", tmp_path / "a.json", "--test", tmp_path / "b.json", "--output", out]
    words += ["--model", TINY, "--max-source-length", "600"]
    assert cli.main([str(word) for word in words]) == 0
    assert "label conflicts" in capsys.readouterr().out
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    kinds = {}
    for line in lines:
        kinds.setdefault((line["table"], line["finding"]), []).append(line["row"])
    assert kinds["table", "duplicate"] == ["20", "21", "22", "30", "31"]
    assert kinds["table", "label conflict"] == ["50", "51", "60", "61"]
    assert kinds["table", "cut"] == [str(i) for i in range(100, 124)]
    assert kinds["test", "missing"] == ["0", "1"]
    [near] = [line for line in lines if line["finding"] == "near-duplicate" and line["id"] == "p41"]
    assert near["like"] == "p40" and 0.75 <= float(near["detail"]) < 1
    pytest.importorskip("matplotlib")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([str(word) for word in words]) == 1
    assert "found.csv exists: pass --overwrite" in capsys.readouterr().err
    out.unlink()
    assert cli.main([str(word) for word in words]) == 1
    assert "found.png exists: pass --overwrite" in capsys.readouterr().err
