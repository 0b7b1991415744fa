"""classify: the exact probabilities of answers, whatever runs beside a row."""

import contextlib
import csv
import itertools
import tracemalloc

import numpy as np
import pytest
from conftest import SHARED
from emulator import built, needs_compiler
from tiny import tiny_model_dir, tiny_tokenizer_dir

import glmlora
from glmlora import cli
from glmlora.families.prompt import encode_target
from glmlora.generation import generate, labels
from glmlora.generation.chat import chat_family
from glmlora.tables import answers as table_answers

GOLDEN = SHARED / "golden"
MODELS = ["chatglm2-tiny", "chatglm2-tiny-bin", "chatglm2-tiny-int8", "chatglm2-tiny-int4"]
MODELS += ["chatglm2-32k-tiny", "chatglm3-tiny", "glm4-9b-tiny"]
BINARY = ["0", "1"]
SHARING = ["paper", "paper title", "a", "a study of cells", "proteins", "0", "01"]
QUESTIONS = [
    f"title:A study of cells {i}, abstract:{'We measure. ' * (5 * i % 13)}" for i in range(9)
]


def model_of(family, folder, **fields):
    fields = {"padded_vocab_size": 640, "seq_length": 512, **fields}
    folder = tiny_model_dir(folder, _name_or_path=f"THUDM/{family}-6b", **fields)
    tiny_tokenizer_dir(folder)
    model = glmlora.AutoModel.from_pretrained(folder)
    return model, glmlora.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["chatglm2", "chatglm3"])
def loaded(request, tmp_path_factory):
    return model_of(request.param, tmp_path_factory.mktemp(request.param))


def by_brute_force(model, tokenizer, query, answers):
    """A model call for each label: the sum of the log-probabilities of its ids."""
    prompt = chat_family(model, tokenizer).chat_ids(tokenizer, query, [], "user")
    ids = [encode_target(tokenizer, answer, 1 << 20, model.prompt_template) for answer in answers]
    return np.array([ids_by_brute_force(model, prompt, answer) for answer in ids])


def ids_by_brute_force(model, prompt, answer):
    logits = model(input_ids=[[*prompt, *answer]]).logits[0].astype(np.float64)
    chances = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return chances[np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), answer].sum()


def check(model, tokenizer, questions=QUESTIONS, answers=SHARING, atol=1e-5, **options):
    got = model.classify(tokenizer, questions, answers, **options)
    want = np.array([by_brute_force(model, tokenizer, q, answers) for q in questions])
    assert np.abs(got.log_likelihood - want).max() <= atol
    return got


@pytest.mark.parametrize("answers", [BINARY, SHARING, ["1"]], ids=["binary", "sharing", "one"])
def test_it_equals_a_model_call_for_each_label(loaded, answers):
    check(*loaded, answers=answers)


def test_no_row_depends_on_what_runs_beside_it(loaded, monkeypatch):
    model, tokenizer = loaded
    alone = [model.classify(tokenizer, [q], SHARING).log_likelihood[0] for q in QUESTIONS]
    for at_once, threads in itertools.product((1, 4, 64), (1, 2)):
        before = glmlora.get_num_threads()
        glmlora.set_num_threads(threads)
        try:
            got = model.classify(tokenizer, QUESTIONS[::-1], SHARING, at_once=at_once)
        finally:
            glmlora.set_num_threads(before)
        assert np.abs(got.log_likelihood[::-1] - alone).max() <= 1e-6
    monkeypatch.setattr(generate, "CACHE_BYTES", 1)
    got = model.classify(tokenizer, QUESTIONS, SHARING[::-1])
    assert np.abs(got.log_likelihood[:, ::-1] - alone).max() <= 1e-6


def test_what_prompts_share_and_equal_rows_are_computed_once(loaded, monkeypatch):
    model, tokenizer = loaded
    fed, shared = [], []
    extend, opening = labels.CachedRow.extend, labels.CachedRow.__init__

    def counted(rows, which, choose=None):
        fed.append(sum(len(rows.ids[i]) - rows.held[i] for i in which))
        return extend(rows, which, choose)

    def opened(self, model, rows, capacity, ids=()):
        shared.append(len(ids))
        opening(self, model, rows, capacity, ids)

    monkeypatch.setattr(labels.CachedRow, "extend", counted)
    monkeypatch.setattr(labels.CachedRow, "__init__", opened)
    questions = [f"{'Is it of the medical field? ' * 5}{word}" for word in ("cells", "graphs")]
    got = model.classify(tokenizer, questions * 3, BINARY)
    prompts = [chat_family(model, tokenizer).chat_ids(tokenizer, q, [], "user") for q in questions]
    assert shared == [generate.shared_length(model, prompts)] and shared[0] > 30
    ids = [encode_target(tokenizer, answer, 99) for answer in BINARY]
    inner = {tuple(i[:n]) for i in ids for n in range(1, len(i))}  # places where an answer goes on
    assert fed == [sum(len(p) - shared[0] for p in prompts)] + [2] * len(inner)
    assert (got.log_likelihood[:2] == got.log_likelihood[4:]).all()


def test_labels_with_many_ids_and_many_labels(loaded):
    model, tokenizer = loaded
    answers = ["cells " * 40, *(str(i) for i in range(60))]
    check(model, tokenizer, QUESTIONS[:2], answers, atol=1e-4)


def test_what_it_returns(loaded):
    model, tokenizer = loaded
    got = model.classify(tokenizer, QUESTIONS, [0, 1, "01"])
    assert len(got) == len(QUESTIONS) and got.labels == ["0", "1", "01"]
    assert got.proba.dtype == np.float64 and got.proba.shape == (len(QUESTIONS), 3)
    assert np.allclose(got.proba.sum(axis=1), 1)
    assert np.allclose(np.log(got.proba), got.log_proba)
    assert got.label == [got.labels[i] for i in got.proba.argmax(axis=1)]
    assert np.allclose(got.margin, np.diff(np.sort(got.proba, axis=1)[:, 1:])[:, 0])
    assert np.allclose(got.mass, np.exp(got.log_likelihood).sum(axis=1))
    one = model.classify(tokenizer, QUESTIONS[:2], ["1"])
    assert one.margin.tolist() == [1, 1] and one.proba.tolist() == [[1], [1]]
    none = model.classify(tokenizer, [], BINARY)
    assert len(none) == 0 and none.label == [] and none.proba.shape == (0, 2)
    assert repr(got) == f"Classification({len(QUESTIONS)} rows of '0', '1', '01')"


def test_ties_and_values_beyond_exp():
    made = labels.Classification(["a", "b"], np.array([[-5000.0, -5000.0], [-9000.0, -8000.0]]))
    assert made.proba.tolist() == [[0.5, 0.5], [0, 1]] and made.label == ["a", "b"]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("x", BINARY), TypeError, "table_or_texts: expected a list of texts"),
        ((["x", 3], BINARY), TypeError, "row 1: expected text, got int"),
        ((["x"], "01"), TypeError, "labels: expected a list of answers"),
        ((["x"], []), ValueError, "labels: expected at least one"),
        ((["x"], ["1", 1]), ValueError, "labels: '1' is there twice"),
        ((["x"], ["1", " "]), ValueError, r"labels\[1\]: expected an answer"),
        ((["x"], [1.0, 0.0]), TypeError, r"labels\[0\]: expected text or a whole number"),
        ((["x"], BINARY, 0), ValueError, "at_once: expected a whole number from 1"),
        ((["a", "x " * 600], BINARY), ValueError, "row 1: a prompt of .* exceed the model's 512"),
    ],
)
def test_bad_arguments(loaded, arguments, error, message):
    model, tokenizer = loaded
    with pytest.raises(error, match=message):
        model.classify(tokenizer, *arguments)


def shake(lora):
    """Weights of the active adapter, which begins as nothing."""
    core, rng = lora.base_model.model.core, np.random.default_rng(0)
    for name in core.names():
        if ".lora_" in name:
            core.write(name, 0.2 * rng.normal(size=core.shape(name)).astype(np.float32))


def test_adapters_prefixes_and_quantized_weights(tmp_path):
    model, tokenizer = model_of("chatglm2", tmp_path / "model")
    lora = glmlora.get_peft_model(model, glmlora.LoraConfig(r=4), seed=1)
    shake(lora)
    got = check(lora, tokenizer)
    with lora.disable_adapter():
        plain = check(lora, tokenizer)
    assert np.abs(got.log_likelihood - plain.log_likelihood).max() > 1e-3
    model, _ = model_of("chatglm2", tmp_path / "prefixed")
    config = glmlora.PrefixTuningConfig(num_virtual_tokens=3)
    prefixed = check(glmlora.get_peft_model(model, config, seed=0), tokenizer)
    assert np.abs(prefixed.log_likelihood - plain.log_likelihood).max() > 1e-3
    for bits in (8, 4):
        model, tokenizer = model_of(
            "chatglm2", tmp_path / f"int{bits}", kv_channels=32, hidden_size=64
        )
        check(model.quantize(bits), tokenizer, QUESTIONS[:3], atol=1e-4)


def test_several_adapters_together(tmp_path):
    """The mean of what each thinks alone; the active one stays so."""
    model, tokenizer = model_of("chatglm2", tmp_path / "model")
    lora = glmlora.get_peft_model(model, glmlora.LoraConfig(r=4), seed=1)
    lora.add_adapter("other", glmlora.LoraConfig(r=2), seed=2)
    alone = []
    for name in ("default", "other"):
        lora.set_adapter(name)
        shake(lora)
        alone.append(check(lora, tokenizer))
    both = lora.classify(tokenizer, QUESTIONS, SHARING, adapters=["default", "other"])
    assert lora.active_adapter == "other"
    assert np.allclose(both.proba, (alone[0].proba + alone[1].proba) / 2, atol=1e-6)
    assert np.allclose(both.mass, (alone[0].mass + alone[1].mass) / 2, atol=1e-6)
    assert np.abs(alone[0].proba - alone[1].proba).max() > 1e-3
    with pytest.raises(ValueError, match="'othr' is not one of .*did you mean 'other'"):
        lora.classify(tokenizer, QUESTIONS, SHARING, adapters=["othr"])
    with pytest.raises(TypeError, match="adapters: expected a list of names"):
        lora.classify(tokenizer, QUESTIONS, SHARING, adapters="other")


@pytest.mark.parametrize("template", ["auto", "vendored"])
def test_prompts_and_answers_have_the_template_of_the_training(loaded, template, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model, "prompt_template", template)
    check(model, tokenizer, QUESTIONS[:2], BINARY)


@needs_compiler
def test_on_a_device(tmp_path, monkeypatch):
    """The emulator's answer is the processor's."""
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", str(built()))
    model, tokenizer = model_of("chatglm2", tmp_path)
    want = model.classify(tokenizer, QUESTIONS[:4], SHARING).log_likelihood
    model.to("emu")
    assert model.device == "emu:0"
    got = model.classify(tokenizer, QUESTIONS[:4], SHARING).log_likelihood
    assert np.abs(got - want).max() <= 1e-4


def test_equal_ids_and_beginnings_are_refused(loaded):
    model, _ = loaded
    for answers in ([[5, 2], [5, 2]], [[5, 2], [5, 2, 7]], [[5, 2, 7], [5, 2]]):
        with pytest.raises(ValueError, match="labels: the ids of number .*, begin another label's"):
            list(labels.score_ids(model, [[3, 4]], answers))


@pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden is absent: it is not the project's"
)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_of_the_fixtures(name):
    model = glmlora.AutoModel.from_pretrained(GOLDEN / name)
    rng, most = np.random.default_rng(0), model.config.padded_vocab_size
    prompts = [rng.integers(3, most, n).tolist() for n in (5, 17, 1, 30)]
    answers = [[7, 2], [7, 8, 2], [9, 2], [8, 7, 9, 2], [2]]
    for number, row in labels.score_ids(model, prompts, answers, 3):
        want = [ids_by_brute_force(model, prompts[number], ids) for ids in answers]
        assert np.abs(row - want).max() <= 1e-5


# A table


def test_rows_of_a_table(loaded):
    model, tokenizer = loaded
    rows = [{"n": i, "title": question} for i, question in enumerate(QUESTIONS)]
    texts = [f"{row['n']}: {row['title']}" for row in rows]
    want = model.classify(tokenizer, texts, BINARY).log_likelihood
    tables = [rows]
    with contextlib.suppress(ImportError):
        import pandas

        tables.append(pandas.DataFrame(rows))
        with pytest.raises(TypeError, match="template: a table needs one"):
            model.classify(tokenizer, tables[1], BINARY)
    for table in tables:
        got = model.classify(tokenizer, table, BINARY, template="{n}: {title}")
        assert (got.log_likelihood == want).all()
        vectors = model.features(tokenizer, table, template="{n}: {title}")
        assert (vectors == model.features(tokenizer, texts)).all()
    with pytest.raises(ValueError, match="template: 'titel' is no column of the table .did you"):
        model.classify(tokenizer, rows, BINARY, template="{titel}")


@pytest.fixture
def place(tmp_path):
    """A table, and the words of a prediction that weighs labels."""
    table = tmp_path / "t.csv"
    rows = "\n".join(f"{i},{q.split(',')[0]}" for i, q in enumerate(QUESTIONS))
    table.write_text(f"id,title\n{rows}\n", encoding="utf-8")
    model = model_of("chatglm2", tmp_path / "model")
    words = ["predict", "--model", model[0].name_or_path, "--template", "Is it? {title}"]
    words += ["--input", str(table), "--output", str(tmp_path / "o.csv"), "--labels", "0,1"]
    return words, model, tmp_path / "o.csv"


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_of_labels_with_probabilities(place, capsys):
    words, (model, tokenizer), output = place
    assert cli.main([*words, "--proba"]) == 0
    got = model.classify(tokenizer, [f"Is it? {q.split(',')[0]}" for q in QUESTIONS], BINARY)
    rows = rows_of(output)
    assert list(rows[0]) == ["id", "title", "label", "proba_0", "proba_1"]
    assert [row["label"] for row in rows] == got.label
    found = np.array([[float(row["proba_0"]), float(row["proba_1"])] for row in rows])
    assert np.abs(found - got.proba).max() <= 1e-6
    assert cli.main([*words, "--overwrite", "--columns", "id"]) == 0
    assert [*rows_of(output)[0]] == ["id", "label"]


def test_weighed_labels_go_on_from_the_journal(place, capsys, monkeypatch):
    words, _, output = place
    assert cli.main([*words, "--proba"]) == 0
    whole = output.read_bytes()
    output.unlink()
    monkeypatch.setattr(labels, "AT_ONCE", 2)
    asked, score = [], table_answers.score_rows

    def stopped(model, tokenizer, queries, *args, **options):
        asked.append(len(queries))
        for count, found in enumerate(score(model, tokenizer, queries, *args, 2, **options)):
            if len(asked) == 1 and count == 4:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(table_answers, "score_rows", stopped)
    assert cli.main([*words, "--proba"]) == 130
    other = [word.replace("0,1", "0,1,2") for word in words]
    assert cli.main(other) == 1 and "settings" in capsys.readouterr().err
    assert cli.main([*words, "--proba"]) == 0
    assert asked == [9, 5] and output.read_bytes() == whole


def test_a_row_that_cannot_be_weighed(place, capsys):
    words, _, output = place
    table = output.with_name("t.csv")
    table.write_text(f"{table.read_text(encoding='utf-8')}9,{'x ' * 600}\n", encoding="utf-8")
    assert cli.main([*words, "--proba"]) == 1
    assert "row 9" in capsys.readouterr().err
    rows = rows_of(output)
    assert rows[9]["label"] == rows[9]["proba_0"] == "" and rows[8]["label"] in BINARY


@pytest.mark.parametrize(
    "more, message",
    [
        (["--temperature", "0.5"], "--temperature: has no effect with --labels"),
        (["--top-p", "0.5"], "--top-p: has no effect with --labels"),
        (["--choices", "0,1"], "--choices: has no effect with --labels"),
        (["--labels", "0,,1"], "--labels[1]: expected an answer"),
        (["--labels", "0,1,0"], "--labels: '0' is there twice"),
    ],
)
def test_flags_that_do_not_go_together(place, capsys, more, message):
    words, _, output = place
    words = words[:-2] if "--labels" in more else words
    assert cli.main([*words, *more]) != 0
    assert message in capsys.readouterr().err and not output.exists()


def test_prompts_that_wait_take_four_bytes_an_id(loaded, monkeypatch):
    """What grows with the rows of a table, beside the caller's own."""
    model, tokenizer = loaded
    ids = list(range(300, 340)) * 10
    monkeypatch.setattr(labels, "_walk", lambda rows, prompts, tree: Ends(len(prompts)))
    monkeypatch.setattr(labels, "prompt_writer", lambda *_: lambda row, _: [row + 300, *ids])
    peaks = []
    for rows in (100, 500):
        tracemalloc.start()
        found = dict(labels.score_rows(model, tokenizer, ["x"] * rows, BINARY))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(found) == rows
    assert peaks[1] - peaks[0] < 400 * (len(ids) * 10 + 1000)  # lists and tuples take 16 and more


class Ends(dict):
    """Any end of a tree -> zeros for so many rows."""

    def __init__(self, rows):
        self.rows = rows

    def __missing__(self, end):
        return np.zeros(self.rows)
