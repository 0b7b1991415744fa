"""Predictions as a submission: what differs from the sample is put right, told or refused."""

import csv
import warnings

import pytest

import glmlora
from glmlora import cli

SAMPLE = [
    {"uuid": "7", "Keywords": "tmp", "label": "0"},
    {"uuid": "3", "Keywords": "tmp", "label": "0"},
    {"uuid": "12", "Keywords": "tmp", "label": "0"},
    {"uuid": "5", "Keywords": "tmp", "label": "0"},
]
LABELS = {"7": "1", "3": "0", "12": "0", "5": "1"}


def predictions(**changes):
    """Rows as they should be; changes: by column, by id."""
    rows = [{"uuid": i, "Keywords": "tmp", "label": label} for i, label in LABELS.items()]
    for column, cells in changes.items():
        for row in rows:
            row[column] = cells.get(row["uuid"], row.get(column, ""))
    return rows


def submit(tmp_path, rows, sample=SAMPLE, **options):
    """(Submission, lines written); a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = glmlora.submit(sample, rows, tmp_path / "out.csv", **options)
    return result, (tmp_path / "out.csv").read_text().splitlines()


GOOD = ["uuid,Keywords,label", "7,tmp,1", "3,tmp,0", "12,tmp,0", "5,tmp,1"]


def test_what_is_right_is_written_as_it_is(tmp_path):
    result, lines = submit(tmp_path, predictions())
    assert lines == GOOD
    assert not result.changed and not result.warnings
    assert result.rows == 4 and result.values["label"] == {"1": 2, "0": 2}
    assert "label: 0 2 (50.0%), 1 2 (50.0%)" in str(result)


def test_order_columns_and_extra_rows_are_put_right_and_told(tmp_path):
    rows = [dict(reversed(row.items())) for row in reversed(predictions())]
    result, lines = submit(tmp_path, rows)
    assert lines == GOOD
    assert result.changed == [
        "columns put into the sample's order: uuid, Keywords, label",
        "rows put into the order of the sample",
    ]
    rows = [row | {"title": "x"} for row in predictions()]
    rows.insert(1, rows[0] | {"uuid": "99"})
    result, lines = submit(tmp_path, rows, overwrite=True)
    assert lines == GOOD
    assert result.changed == [
        "columns left out, which the sample has not: title",
        "1 rows left out whose ids the sample has not: 99",
    ]


def test_numbers_take_the_sample_s_form(tmp_path):
    rows = predictions(label={"7": 1.0, "3": 0.0, "12": "0.0", "5": "1"})
    for row, written in zip(rows, (7.0, "003", "12", 5), strict=True):
        row["uuid"] = written
    result, lines = submit(tmp_path, rows)
    assert lines == GOOD
    assert result.changed == [
        "ids written as in the sample: 7.0 is 7 (2 ids)",
        "label: 1.0 written as 1, as in the sample (3 rows)",
    ]


def test_ids_that_differ_only_in_form_stay_apart(tmp_path):
    """The sample itself tells 7 from 07: nothing is guessed."""
    sample = [*SAMPLE, SAMPLE[0] | {"uuid": "07"}]
    with pytest.raises(ValueError, match=r"1 of 5 ids are missing: 07"):
        submit(tmp_path, predictions(), sample)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (predictions()[:3], "1 of 4 ids are missing: 5 (ids are in 'uuid')"),
        ([*predictions(), predictions()[2]], "1 ids stand twice: 12"),
        (
            [*predictions()[:3], predictions()[0] | {"uuid": "8"}],
            "1 of 4 ids are missing: 5; 1 ids are not in the sample: 8",
        ),
        (predictions(label={"12": ""}), "label: 1 rows have no value: ids 12"),
        (predictions(label={"12": None}), "label: 1 rows have no value: ids 12"),
        (predictions(label={"12": float("nan")}), "label: 1 rows have no value: ids 12"),
        (
            predictions(label={"7": "0.93", "3": "0.2"}),
            "label: the sample has whole numbers, 2 rows have not: id 7 has '0.93': probabilities "
            "where labels are due",
        ),
        (predictions(label={"3": "yes"}), "1 rows have not: id 3 has 'yes'"),
        ([{"uuid": "7", "lable": "1", "Keywords": "tmp"}], "'label' (did you mean 'lable'?)"),
        ([], "predictions: the table has no rows"),
    ],
)
def test_what_would_be_wrong_is_refused_and_nothing_is_written(tmp_path, rows, message):
    (tmp_path / "out.csv").write_text("kept")
    with pytest.raises(ValueError) as error:
        glmlora.submit(SAMPLE, rows, tmp_path / "out.csv", overwrite=True)
    assert message in str(error.value)
    assert (tmp_path / "out.csv").read_text() == "kept"


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    rows = predictions(label={"3": "yes"}, Keywords={"5": ""})
    with pytest.raises(ValueError, match="Keywords: 1 rows .*; label: the sample has whole"):
        submit(tmp_path, rows)


def test_a_sample_whose_ids_repeat_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sample: ids in 'uuid' stand twice: 7"):
        submit(tmp_path, predictions(), [*SAMPLE, SAMPLE[0]])


SHARES = [
    row | {"label": share} for row, share in zip(SAMPLE, "0.5 0.1 0.5 0.5".split(), strict=True)
]
CLASSES = [
    row | {"label": value} for row, value in zip(SAMPLE, ("yes", "no", "yes", "no"), strict=True)
]


@pytest.mark.parametrize(
    ("sample", "rows", "message"),
    [
        (SAMPLE, predictions(label=dict.fromkeys(LABELS, "1")), "one class only"),
        (SAMPLE, SAMPLE, "every value is the sample's own"),
        (SHARES, predictions(), "only 0 and 1, where the sample has probabilities"),
        (
            SHARES,
            predictions(label={"7": "1.5", "3": "0.2"}),
            "1.5 is not between 0 and 1, as all of the sample are (1 rows)",
        ),
        (
            CLASSES,
            predictions(label={"7": "Yes", "3": "no", "12": "no", "5": "no"}),
            "'Yes' is not among the sample's values, 'no', 'yes'",
        ),
    ],
)
def test_what_is_likely_to_be_wrong_is_warned_of(tmp_path, sample, rows, message):
    with pytest.warns(UserWarning) as told:
        result = glmlora.submit(sample, rows, tmp_path / "out.csv")
    assert any(message in str(w.message) for w in told), [str(w.message) for w in told]
    assert any(message in text for text in result.warnings)
    assert (tmp_path / "out.csv").exists()


def test_probabilities_are_written_as_they_are(tmp_path):
    rows = predictions(label={"7": "0.93", "3": 1e-05, "12": "1", "5": "0.50"})
    _, lines = submit(tmp_path, rows, SHARES)
    assert lines[1:] == ["7,tmp,0.93", "3,tmp,1e-05", "12,tmp,1", "5,tmp,0.50"]
    with pytest.raises(ValueError, match="the sample has numbers, 1 rows have not: id 3 has 'inf'"):
        submit(tmp_path, predictions(label={"3": "inf"}), SHARES, overwrite=True)


def test_the_file_s_form_is_kept(tmp_path):
    """Separator, line ends and byte order mark; cells with separators are quoted."""
    text = "\ufeffuuid;Keywords;label\r\n7;tmp;0\r\n3;tmp;0\r\n12;tmp;0\r\n5;tmp;0\r\n"
    (tmp_path / "sample.csv").write_bytes(text.encode())
    rows = predictions(Keywords={"3": 'a;"b"', "7": "晚上"})
    with pytest.warns(UserWarning, match="semicolons"):
        glmlora.submit(tmp_path / "sample.csv", rows, tmp_path / "out.csv")
    written = (tmp_path / "out.csv").read_bytes().decode()
    head = '\ufeffuuid;Keywords;label\r\n7;晚上;1\r\n3;"a;""b""";0\r\n'
    assert written == head + "12;tmp;0\r\n5;tmp;1\r\n"


def test_frames(tmp_path):
    pandas = pytest.importorskip("pandas")
    sample = pandas.DataFrame({"uuid": [7, 3, 12, 5], "label": [0, 0, 0, 0]})
    frame = pandas.DataFrame({"uuid": [3, 7, 5, 12], "label": [0.0, 1.0, 1.0, 0.0]})
    result, lines = submit(tmp_path, frame, sample)
    assert lines == ["uuid,label", "7,1", "3,0", "12,0", "5,1"]
    assert len(result.changed) == 2
    frame.loc[0, "label"] = None
    with pytest.raises(ValueError, match="label: 1 rows have no value: ids 3"):
        submit(tmp_path, frame, sample, overwrite=True)


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "out.csv").write_text("kept")
    with pytest.raises(FileExistsError, match="out.csv exists"):
        submit(tmp_path, predictions())
    with pytest.raises(FileNotFoundError, match="no folder"):
        glmlora.submit(SAMPLE, predictions(), tmp_path / "none" / "out.csv")


def test_the_command(tmp_path, capsys):
    for name, rows in (("sample.csv", SAMPLE), ("p.csv", predictions()[::-1])):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    paths = {n: str(tmp_path / f"{n}.csv") for n in ("sample", "p", "out")}
    words = ["submit", "--sample", paths["sample"], "--predictions", paths["p"]]
    assert cli.main([*words, "--output", paths["out"]]) == 0
    shown = capsys.readouterr().out
    assert "4 rows, in the order and form of the sample" in shown and "rows put into" in shown
    assert (tmp_path / "out.csv").read_text().splitlines() == GOOD
    for taken in ("sample", "p"):
        assert cli.main([*words, "--output", paths[taken], "--overwrite"]) == 1
        assert "is the input" in capsys.readouterr().err
