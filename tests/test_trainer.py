"""Training: what is computed, what is printed, which files are left, what is refused."""

import ast
import json
import os
import signal
import sys
import warnings

import numpy as np
import pytest
from training import QUIET, adapter, dataset_dir, losses, model_dir, records, run

import glmlora
from glmlora import _core
from glmlora.families.prompt import encode_source
from glmlora.generation.chat import chat_family
from glmlora.interrupts import Shield
from glmlora.training import checkpoints, evaluation, loop, methods, plot
from glmlora.training.arguments import FinetuningArguments, TrainingArguments
from glmlora.training.records import encode_records, records_from
from glmlora.training.trainer import run_train

LORA_FILES = {"adapter_config.json", "adapter_model.safetensors"}
ARGUMENT_FILES = {"finetuning_args.json", "training_args.bin", "task.json", "README.md"}
RESUME_FILES = {"optimizer.safetensors", "scheduler.json", "rng_state.json", "trainer_state.json"}
END_FILES = {"trainer_state.json", "train_results.json", "all_results.json", "trainer_log.jsonl"}
TOKENIZER_FILES = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("base"))


def files(directory):
    return {p.name for p in directory.iterdir()}


# What is computed


def test_lora_learns_and_the_model_can_chat(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, num_train_epochs=6)
    first, last = losses(result)[0][1], losses(result)[-1][1]
    assert last < 0.6 * first
    assert isinstance(result.model, glmlora.PeftModel) and not result.model.training
    assert result.model.core.trainable() == []
    answer, history = result.model.chat(result.tokenizer, "title", max_length=64)
    assert isinstance(answer, str) and len(history) == 1
    assert (result.rows, result.rows_skipped, result.rows_cut) == (20, 0, 0)
    assert result.global_step == 30 and not result.stopped_early


def test_one_update_is_the_mean_over_its_tokens(tiny_model, tmp_path):
    """The first logged loss and norm equal those of one call over the same rows."""
    result = run(tiny_model, tmp_path, lora_dropout=0.0, data=records(4), max_steps=1)
    glmlora.set_seed(42)
    model = glmlora.get_peft_model(
        glmlora.AutoModel.from_pretrained(tiny_model),
        glmlora.LoraConfig(r=8, lora_alpha=32),
        seed=42,
    )
    encoded = encode_records(records_from(records(4)), result.tokenizer)
    encoded.ignored_id = 0
    batch = encoded.batch(np.arange(4))
    model.prepare_training()
    rows, targets = batch.rows_and_targets()
    loss = model.core.backward(batch.ids, batch.lengths, rows, targets, dropout=False)
    record = result.log_history[0]
    assert record["loss"] == round(loss, 4)
    assert record["grad_norm"] == pytest.approx(model.core.grad_norm(), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_how_an_update_is_cut_does_not_matter(tiny_model, tmp_path, dropout):
    found = {}
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        out = tmp_path / f"{batch}x{accumulation}"
        result = run(
            tiny_model,
            out,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            lora_dropout=dropout,
            max_steps=6,
        )
        weights = glmlora.load_state_dict(out)
        found[batch] = (losses(result), weights)
    for batch in (4, 1):
        for ours, theirs in zip(found[batch][0], found[8][0], strict=True):
            assert ours[0] == theirs[0]
            # Sums of the same terms in another order, in float32; Adam enlarges what is near 0.
            np.testing.assert_allclose(ours[1:4], theirs[1:4], rtol=5e-4, atol=5e-4)
        for name, array in found[batch][1].items():
            # Single entries may part: a gradient near 1e-9 becomes a full-size step of Adam.
            off = np.abs(array - found[8][1][name])
            assert np.quantile(off, 0.98) < 1e-4 and off.mean() < 5e-5, name


def test_dropout_changes_the_run(tiny_model, tmp_path):
    plain = run(tiny_model, tmp_path / "a", lora_dropout=0.0, max_steps=3)
    dropped = run(tiny_model, tmp_path / "b", lora_dropout=0.3, max_steps=3)
    assert losses(plain) != losses(dropped)


def test_any_number_of_threads_gives_the_same_bytes(tiny_model, tmp_path):
    before = glmlora.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            result = run(tiny_model, tmp_path / str(n), threads=n, max_steps=5)
            found.append((losses(result), adapter(tmp_path / str(n))))
    finally:
        glmlora.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_the_seed_decides(tiny_model, tmp_path):
    bytes_of = {}
    for name, seeds in {
        "a": {"seed": 1},
        "again": {"seed": 1},
        "order": {"seed": 1, "data_seed": 5},
        "all": {"seed": 2},
    }.items():
        run(tiny_model, tmp_path / name, max_steps=3, **seeds)
        bytes_of[name] = adapter(tmp_path / name)
    assert bytes_of["a"] == bytes_of["again"]
    assert len(set(bytes_of.values())) == 3


def test_the_short_tail_of_an_epoch_is_an_update(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, data=records(50), per_device_train_batch_size=4,
                 gradient_accumulation_steps=4, num_train_epochs=3, save_strategy="no")  # fmt: skip
    assert result.global_step == 12
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["epoch"] == 3.0 and state["max_steps"] == 12 and state["num_train_epochs"] == 3
    epochs = [r["epoch"] for r in result.log_history if "loss" in r]
    assert epochs[:4] == [0.31, 0.62, 0.92, 1.0]


def test_schedules_match_the_measured_factors(shared):
    cases = json.loads((shared / "spec" / "vectors.json").read_text())["schedule"]
    for case in cases:
        for k, factor in zip(case["k"], case["factor"], strict=True):
            got = _core.lr_factor(case["name"], k, case["w"], case["N"], 1.0)
            assert got == pytest.approx(factor, abs=1e-6), (case["name"], k)


def test_logged_rate_is_the_one_the_update_used(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, warmup_steps=2, max_steps=5, lr_scheduler_type="linear")
    rates = [r[3] for r in losses(result)]
    np.testing.assert_allclose(rates, [0, 5e-3, 1e-2, 2e-2 / 3, 1e-2 / 3])


def test_loss_in_a_log_is_the_mean_since_the_last(tiny_model, tmp_path):
    single = [r[1] for r in losses(run(tiny_model, tmp_path / "a"))]
    pairs = [r[1] for r in losses(run(tiny_model, tmp_path / "b", logging_steps=2))]
    np.testing.assert_allclose(pairs, np.reshape(single, (-1, 2)).mean(axis=1), atol=1.01e-4)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 4}, [4, 8]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4, 8]),
        ({"logging_steps": 0.3}, [3, 6, 9]),
        ({"logging_strategy": "epoch"}, [5, 10]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_when_logs_are_due(tiny_model, tmp_path, settings, steps):
    result = run(tiny_model, tmp_path, save_strategy="no", **settings)
    assert [r[0] for r in losses(result)] == steps


def test_no_step_allocates(tiny_model, tmp_path):
    counts = []

    class Watch:
        def on_train_begin(self, state):
            counts.append(state.model.core.allocations)

        def on_step_end(self, state):
            counts.append(state.model.core.allocations)

    run(tiny_model, tmp_path, callbacks=[Watch()], save_strategy="no")
    assert len(counts) == 11 and len(set(counts)) == 1


def test_drop_last_and_grouping(tiny_model, tmp_path):
    dropped = run(tiny_model, tmp_path / "a", data=records(7), dataloader_drop_last=True,
                  gradient_accumulation_steps=1, num_train_epochs=1)  # fmt: skip
    assert dropped.global_step == 3
    grouped = run(tiny_model, tmp_path / "b", group_by_length=True, num_train_epochs=1)
    assert losses(grouped) != losses(run(tiny_model, tmp_path / "c", num_train_epochs=1))
    with pytest.raises(ValueError, match="dataloader_drop_last: 1 records"):
        run(tiny_model, tmp_path / "d", data=records(1), dataloader_drop_last=True)


def make_loop(tiny_model, out, masked):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_model)
    encoded = encode_records(records_from(records(6)), tokenizer)
    encoded.source_lengths[masked] = encoded.lengths[masked]
    model = glmlora.AutoModel.from_pretrained(tiny_model)
    trainee = methods.prepare(model, tokenizer, FinetuningArguments(), seed=0)
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    return loop.Loop(trainee, encoded, args)


def test_a_masked_micro_batch_adds_nothing(tiny_model, tmp_path):
    with pytest.warns(UserWarning, match="all labels of its records") as caught:
        masked = make_loop(tiny_model, tmp_path, masked=[1, 4])
        masked.run()
    assert len([w for w in caught if "masked" in str(w.message)]) == 1
    assert masked.state.global_step == 6 and masked.core.steps == 4
    with pytest.raises(ValueError, match="all are masked"):
        make_loop(tiny_model, tmp_path, masked=list(range(6))).run()


# Methods and their files


def test_files_of_a_lora_run(tiny_model, tmp_path):
    run(tiny_model, tmp_path)
    checkpoints = {"checkpoint-4", "checkpoint-8"}
    assert files(tmp_path) == LORA_FILES | ARGUMENT_FILES | END_FILES | checkpoints
    assert files(tmp_path / "checkpoint-4") == LORA_FILES | ARGUMENT_FILES | RESUME_FILES
    state_text = (tmp_path / "trainer_state.json").read_text()
    state = json.loads(state_text)
    assert state_text == json.dumps(state, indent=2, sort_keys=True) + "\n"
    assert state["global_step"] == 10 and len(state["log_history"]) == 11
    summary = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    summary |= {"train_loss", "total_flos", "epoch"}
    results = json.loads((tmp_path / "train_results.json").read_text())
    assert set(results) == summary
    assert list(results) == sorted(results)
    assert json.loads((tmp_path / "all_results.json").read_text()) == results
    training = json.loads((tmp_path / "training_args.bin").read_text())
    assert training["learning_rate"] == 0.01
    finetuning = json.loads((tmp_path / "finetuning_args.json").read_text())
    assert finetuning["lora_rank"] == 8
    lines = [json.loads(x) for x in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert [x["current_steps"] for x in lines] == list(range(1, 11))
    assert list(lines[0]) == [
        "current_steps", "total_steps", "loss", "reward", "learning_rate", "epoch", "percentage",
        "elapsed_time", "remaining_time",
    ]  # fmt: skip
    assert lines[-1]["percentage"] == 100.0 and lines[-1]["elapsed_time"].count(":") == 2
    assert np.mean([x["loss"] for x in lines]) == pytest.approx(results["train_loss"], abs=1e-4)


def test_the_log_is_deleted_at_the_start(tiny_model, tmp_path):
    run(tiny_model, tmp_path, max_steps=2)
    run(tiny_model, tmp_path, max_steps=3)
    assert len((tmp_path / "trainer_log.jsonl").read_text().splitlines()) == 3


def test_bin_adapter_on_request(tiny_model, tmp_path):
    run(tiny_model, tmp_path, max_steps=4, save_safetensors=False)
    assert "adapter_model.bin" in files(tmp_path) & files(tmp_path / "checkpoint-4")
    assert "adapter_model.safetensors" not in files(tmp_path)
    base = glmlora.AutoModel.from_pretrained(tiny_model)
    glmlora.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("projection", [False, True])
def test_p_tuning(tiny_model, tmp_path, projection):
    result = run(
        tiny_model, tmp_path, finetuning_type="p_tuning", pre_seq_len=6,
        prefix_projection=projection, num_train_epochs=4, learning_rate=2e-2 if projection else 0.5,
    )  # fmt: skip
    assert losses(result)[-1][1] < losses(result)[0][1]
    weights = {"pytorch_model.bin", "config.json"} | TOKENIZER_FILES
    checkpoint = files(tmp_path / "checkpoint-4")
    assert weights | ARGUMENT_FILES | RESUME_FILES == checkpoint
    assert weights | ARGUMENT_FILES | END_FILES < files(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pre_seq_len"] == 6 and config["prefix_projection"] is projection
    stored = glmlora.load_state_dict(tmp_path / "pytorch_model.bin")
    assert all(n.startswith("transformer.prefix_encoder.") for n in stored)
    assert len(stored) == (5 if projection else 1)
    fresh = glmlora.load_prefix(glmlora.AutoModel.from_pretrained(tiny_model), tmp_path)
    ids = [[5, 6, 7]]
    np.testing.assert_array_equal(fresh(ids).logits, result.model(ids).logits)


@pytest.mark.parametrize(
    ("n", "part", "blocks"), [(1, "mlp", [1]), (-1, "qkv", [0]), (2, "qkv", [0, 1])]
)
def test_freeze_trains_blocks_by_index(tiny_model, tmp_path, n, part, blocks):
    result = run(tiny_model, tmp_path, finetuning_type="freeze", num_layer_trainable=n,
                 name_module_trainable=part, max_steps=4)  # fmt: skip
    weights = {"pytorch_model.bin", "config.json"} | TOKENIZER_FILES
    assert files(tmp_path / "checkpoint-4") == weights | ARGUMENT_FILES | RESUME_FILES
    stored = glmlora.load_state_dict(tmp_path / "pytorch_model.bin")
    inside = ["mlp.dense_4h_to_h.weight", "mlp.dense_h_to_4h.weight"]
    if part == "qkv":
        inside = [f"self_attention.query_key_value.{x}" for x in ("bias", "weight")]
    expected = [f"transformer.encoder.layers.{i}.{name}" for i in blocks for name in inside]
    assert sorted(stored) == expected
    base = glmlora.AutoModel.from_pretrained(tiny_model)
    before = base([[5, 6, 7]]).logits
    base.load_state_dict(stored, strict=False)
    np.testing.assert_array_equal(base([[5, 6, 7]]).logits, result.model([[5, 6, 7]]).logits)
    assert not np.array_equal(before, base([[5, 6, 7]]).logits)


def test_freeze_of_more_blocks_than_there_are(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="num_layer_trainable: expected from 1 to 2.* got 3"):
        run(tiny_model, tmp_path, finetuning_type="freeze", num_layer_trainable=3)


def test_full_leaves_a_model_directory(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, finetuning_type="full", max_steps=4, learning_rate=1e-3)
    weights = {"model.safetensors", "config.json"} | TOKENIZER_FILES
    assert files(tmp_path / "checkpoint-4") == weights | ARGUMENT_FILES | RESUME_FILES
    again = glmlora.AutoModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again([[5, 6]]).logits, result.model([[5, 6]]).logits)
    glmlora.AutoTokenizer.from_pretrained(tmp_path)


def test_the_model_that_is_given_says_what_is_trained(tiny_model, tmp_path):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_model)
    base = glmlora.AutoModel.from_pretrained(tiny_model)
    peft = glmlora.get_peft_model(base, glmlora.LoraConfig(r=2, target_modules=["dense"]), seed=1)
    result = run(peft, tmp_path / "a", tokenizer=tokenizer, max_steps=2)
    assert result.model is peft
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 2 and config["target_modules"] == ["dense"]
    before = adapter(tmp_path / "a")
    run(peft, tmp_path / "b", tokenizer=tokenizer, max_steps=2)  # on with the same adapter
    assert adapter(tmp_path / "b") != before
    full = glmlora.AutoModel.from_pretrained(tiny_model).requires_grad_(True)
    run(full, tmp_path / "c", tokenizer=tokenizer, max_steps=1)
    assert "model.safetensors" in files(tmp_path / "c")
    with pytest.raises(ValueError, match="finetuning_type: the model has 'lora' in it, got 'full'"):
        run(peft, tmp_path / "d", tokenizer=tokenizer, finetuning_type="full")
    alone = glmlora.AutoModel.from_pretrained(tiny_model)
    run(alone, tmp_path / "e", max_steps=1)  # the tokenizer of the directory it came from
    alone = glmlora.AutoModel.from_pretrained(tiny_model)
    alone.name_or_path = None
    with pytest.raises(TypeError, match="tokenizer: needed"):
        run(alone, tmp_path / "f")


def test_checkpoint_dir_continues_or_merges(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "one", lora_rank=4, max_steps=3)
    went_on = run(tiny_model, tmp_path / "two", checkpoint_dir=str(tmp_path / "one"), max_steps=2)
    # The adapter's own rank counts, whatever the flags say.
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["r"] == 4
    first = losses(run(tiny_model, tmp_path / "new", max_steps=2))[0][1]
    assert losses(went_on)[0][1] < first
    fresh = run(tiny_model, tmp_path / "off", checkpoint_dir=str(tmp_path / "one"), max_steps=1,
                resume_lora_training=False, lora_dropout=0.0)  # fmt: skip
    assert json.loads((tmp_path / "off" / "adapter_config.json").read_text())["r"] == 8
    assert losses(fresh)[0][1] < first
    both = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    merged = run(tiny_model, tmp_path / "three", checkpoint_dir=both, max_steps=1,
                 resume_lora_training=False)  # fmt: skip
    assert json.loads((tmp_path / "three" / "adapter_config.json").read_text())["r"] == 8
    assert losses(merged)[0][1] < first
    only = run(tiny_model, tmp_path / "only", checkpoint_dir=str(tmp_path / "two"), max_steps=1,
               resume_lora_training=False)  # fmt: skip
    assert losses(merged)[0] != losses(only)[0]  # both adapters are in it
    with pytest.raises(ValueError, match="checkpoint_dir: expected one directory for full"):
        run(tiny_model, tmp_path / "four", checkpoint_dir=both, finetuning_type="full")


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("lora", "freeze", "lora: expected weights of the model, found an adapter"),
        ("p_tuning", "freeze", "p_tuning: not of this model: .*prefix_encoder"),
        ("lora", "full", "found an adapter"),
        ("lora", "p_tuning", "not a P-Tuning checkpoint"),
        ("freeze", "lora", "it is a model or a P-Tuning directory"),
    ],
)
def test_a_checkpoint_of_another_method_is_refused(tiny_model, tmp_path, first, then, message):
    """And not passed over, which would train from the base."""
    settings = {"max_steps": 1, "pre_seq_len": 2, "num_layer_trainable": 1}
    run(tiny_model, tmp_path / first, finetuning_type=first, **settings)
    with pytest.raises(ValueError, match=message):
        run(
            tiny_model,
            tmp_path / "out",
            finetuning_type=then,
            checkpoint_dir=str(tmp_path / first),
            **settings,
        )


def test_errors_of_eval_data_name_them(tiny_model, tmp_path):
    for data, message in (
        ([{"instruction": "a", "ouput": "b"}], "eval_data: .*did you mean 'output'"),
        ("nope.json", "eval_data: data: 'nope.json'"),
        (3, "eval_data: data: expected a DataFrame"),
    ):
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            run(tiny_model, tmp_path, eval_data=data, do_eval=True)


# Evaluation


def test_evaluation_while_training(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, eval_data=records(6), evaluation_strategy="steps",
                 eval_steps=2, lora_dropout=0.0)  # fmt: skip
    evaluated = [r for r in result.log_history if "eval_loss" in r]
    assert [r["step"] for r in evaluated] == [2, 4, 6, 8, 10]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    # The log's last record, the result and the file are one evaluation of one state.
    assert evaluated[-1]["eval_loss"] == results["eval_loss"] == result.metrics["eval_loss"]
    everything = json.loads((tmp_path / "all_results.json").read_text())
    assert {"eval_loss", "train_loss"} < set(everything)
    encoded = encode_records(records_from(records(6)), result.tokenizer)
    encoded.ignored_id = 0
    total = count = 0
    for i in range(6):
        batch = encoded.batch([i])
        n = batch.n_targets
        total += result.model([batch.ids], labels=[batch.labels]).loss * n
        count += n
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_evaluation_per_epoch_with_held_out_rows(tiny_model, tmp_path):
    result = run(tiny_model, tmp_path, dev_ratio=0.25, eval_strategy="epoch", save_strategy="no")
    assert result.rows == 15 and result.rows_skipped == 0
    assert len([r for r in result.log_history if "eval_loss" in r]) == 2


def test_the_best_checkpoint_is_loaded_and_kept(tiny_model, tmp_path):
    class Spoil:
        def on_step_end(self, state):
            if state.global_step == 5:
                core = state.model.core
                name = core.trainable()[-1]
                core.write(name, core.read(name) + np.float32(3.0))

    result = run(
        tiny_model, tmp_path, eval_data=records(6), evaluation_strategy="steps", eval_steps=2,
        save_steps=2, load_best_model_at_end=True, save_total_limit=1, callbacks=[Spoil()],
    )  # fmt: skip
    evaluated = {r["step"]: r["eval_loss"] for r in result.log_history if "eval_loss" in r}
    assert min(evaluated, key=evaluated.get) == 4
    assert result.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert result.best_metric == evaluated[4]
    kept = {p for p in files(tmp_path) if p.startswith("checkpoint")}
    assert kept == {"checkpoint-4", "checkpoint-10"}
    assert adapter(tmp_path) == adapter(tmp_path / "checkpoint-4")
    assert result.metrics["eval_loss"] == pytest.approx(evaluated[4])


def test_save_total_limit_keeps_the_newest(tiny_model, tmp_path):
    run(tiny_model, tmp_path, save_steps=1, save_total_limit=2)
    assert {p for p in files(tmp_path) if p.startswith("checkpoint")} == {
        "checkpoint-9", "checkpoint-10",
    }  # fmt: skip


# The command


def command(model, data, out, *more):
    return [
        "--model_name_or_path", model, "--stage", "sft", "--use_v2", "--dataset", "paper_label",
        "--dataset_dir", str(data), "--output_dir", str(out), "--disable_tqdm", *more,
    ]  # fmt: skip


def test_standard_output_in_order(tiny_model, tmp_path, capsys):
    data = dataset_dir(tmp_path)
    argv = command(
        tiny_model, data, tmp_path / "out", "--do_train", "--finetuning_type", "lora",
        "--lora_rank", "8", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "4", "--lr_scheduler_type", "cosine",
        "--logging_steps", "1", "--save_steps", "1000", "--num_train_epochs", "3.0", "--fp16",
        "--plot_loss",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="fp16: no GPU is used, the CPU computes"):
        result = run_train(argv)
    out = capsys.readouterr().out
    marks = [
        "'lora_rank': 8", "Loading dataset paper_label...", "no file_sha1",
        "trainable params: ", "input_ids:\n[", "inputs:\n", "label_ids:\n[-100, ", "labels:\n",
        "{'loss': ", "***** train metrics *****", "train_loss ",
    ]  # fmt: skip
    places = [out.index(mark) for mark in marks]
    assert places == sorted(places)
    dicts = [ast.literal_eval(x) for x in out.splitlines() if x.startswith("{'loss'")]
    assert [list(d) for d in dicts] == [["loss", "grad_norm", "learning_rate", "epoch"]] * 3
    assert result.global_step == 3
    model = methods.unwrapped(result.model)
    trained = sum(8 * (32 + 64) for _ in range(2))
    total = model.num_parameters()
    line = f"trainable params: {trained} || all params: {total} || trainable%: "
    assert f"{line}{100 * trained / total:.4f}\n" in out
    ids = ast.literal_eval(out.split("input_ids:\n")[1].splitlines()[0])
    labels = ast.literal_eval(out.split("label_ids:\n")[1].splitlines()[0])
    assert len(ids) == len(labels) and labels[-3:] == ids[-3:] and set(labels[:-3]) == {-100}
    written = files(tmp_path / "out")
    assert written == LORA_FILES | ARGUMENT_FILES | END_FILES | {"training_loss.png"}
    assert (tmp_path / "out" / "training_loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_and_prediction_without_training(tiny_model, tmp_path, capsys):
    data = dataset_dir(tmp_path, n=5)
    run(tiny_model, tmp_path / "lora", max_steps=2)
    adapter_flags = ("--checkpoint_dir", str(tmp_path / "lora"))
    out = tmp_path / "eval"
    assert run_train(command(tiny_model, data, out, "--do_eval", *adapter_flags)) is None
    assert "***** eval metrics *****" in capsys.readouterr().out
    keys = {"loss", "runtime", "samples_per_second", "steps_per_second"}
    results = json.loads((out / "eval_results.json").read_text())
    assert set(results) == {f"eval_{key}" for key in keys}
    found = []
    for name in ("a", "b"):
        out = tmp_path / name
        run_train(
            command(
                tiny_model,
                data,
                out,
                "--do_predict",
                "--predict_with_generate",
                "--max_target_length",
                "8",
                *adapter_flags,
            )  # fmt: skip
        )
        results = json.loads((out / "predict_results.json").read_text())
        assert {"predict_accuracy", "predict_bleu-4", "predict_runtime"} < set(results)
        found.append((out / "generated_predictions.jsonl").read_bytes())
    assert found[0] == found[1]  # the seed decides
    lines = [json.loads(line) for line in found[0].decode().split("\n")]
    assert [line["label"] for line in lines] == ["0", "1", "0", "1", "0"]
    assert all(list(line) == ["label", "predict"] for line in lines)


def test_evaluating_the_base_model_warns(tiny_model, tmp_path):
    with pytest.warns(UserWarning, match="no checkpoint_dir is given"):
        run_train(command(tiny_model, dataset_dir(tmp_path), tmp_path / "o", "--do_eval"))


def test_cut_prompts_are_counted(tiny_model, tmp_path, capsys):
    result = run(tiny_model, tmp_path, max_source_length=50, max_steps=1)
    assert 0 < result.rows_cut < 20
    said = f"{result.rows_cut} of 20 prompts were longer than max_source_length 50 and were cut"
    assert said in capsys.readouterr().out


# Data of every kind


def test_frames_files_and_lists_are_the_same_data(tiny_model, tmp_path):
    pandas = pytest.importorskip("pandas")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(records()), encoding="utf-8")
    kinds = {"list": records(), "frame": pandas.DataFrame(records()), "file": str(file)}
    kinds["iterator"] = iter(records())
    found = set()
    for name, data in kinds.items():
        run(tiny_model, tmp_path / name, data=data, max_steps=2)
        found.add(adapter(tmp_path / name))
    assert len(found) == 1


def test_skipped_rows_are_counted(tiny_model, tmp_path):
    data = records(6) + [{"instruction": "x", "input": "", "output": ""}]
    with pytest.warns(UserWarning, match="1 row skipped"):
        result = run(tiny_model, tmp_path, data=data, max_steps=1)
    assert (result.rows, result.rows_skipped) == (6, 1)


# Callbacks


def test_callbacks(tiny_model, tmp_path):
    events, logs = [], []

    class Observer:
        def on_train_begin(self, state):
            events.append(("begin", state.global_step))

        def on_step_end(self, state):
            events.append(("step", state.global_step))
            state.should_stop = state.global_step == 5

        def on_save(self, state):
            events.append(("save", state.global_step))

        def on_train_end(self, state):
            events.append(("end", state.global_step))

    result = run(tiny_model, tmp_path, callbacks=[Observer(), logs.append])
    assert result.stopped_early and result.global_step == 5
    assert events == [("begin", 0), *(("step", i) for i in range(1, 5)), ("save", 4),
                      ("step", 5), ("end", 5)]  # fmt: skip
    assert [record["step"] for record in logs] == [1, 2, 3, 4, 5]
    assert adapter(tmp_path)  # what was learnt is written


# What is refused, and what is said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"evaluation_strategy": "epoch"}, "evaluation_strategy: 'epoch' needs evaluation data"),
        ({"evaluation_strategy": "epoch", "dev_ratio": 1e-9}, "needs evaluation data"),
        ({"callbacks": [3]}, "callbacks: expected a function"),
        ({"callbacks": [dict]}, "callbacks: expected an object, got the class dict"),
        ({"tokenizer_name": "nowhere"}, "^tokenizer_name: 'nowhere'"),
        ({"config_name": "nowhere"}, "^config_name: 'nowhere'"),
        (
            {
                "evaluation_strategy": "epoch",
                "save_strategy": "epoch",
                "dev_ratio": 0.3,
                "load_best_model_at_end": True,
                "metric_for_best_model": "rouge-1",
            },
            "metric_for_best_model: expected 'loss'",
        ),
    ],
)
def test_what_cannot_be_is_told_before_the_model_is_loaded(
    tiny_model, tmp_path, overrides, message, monkeypatch
):
    monkeypatch.setattr("glmlora.training.trainer._load", lambda *args: pytest.fail("loaded"))
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        run(tiny_model, tmp_path, **overrides)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"lora_ranks": 4}, TypeError, "'lora_ranks' .did you mean 'lora_rank'"),
        ({"output_dir": ...}, TypeError, "output_dir is missing"),
        ({"finetuning_type": "none"}, ValueError, "finetuning_type: expected lora"),
        ({"max_source_length": 400, "max_target_length": 400}, None, ""),
        ({"predict_with_generate": True}, ValueError, "predict_with_generate: cannot be used"),
        ({"quantization_bit": 8, "finetuning_type": "full"}, ValueError, "8 is incompatible"),
        ({"stage": "ppo"}, ValueError, "stage: 'ppo'"),
        ({"lora_target": "nothing"}, ValueError, "target_modules"),
    ],
)
def test_arguments(tiny_model, tmp_path, kwargs, error, text):
    settings = {"output_dir": str(tmp_path), "max_steps": 1, **QUIET, **kwargs}
    settings = {k: v for k, v in settings.items() if v is not ...}
    if error is None:
        glmlora.train(tiny_model, records(3), settings)
        return
    with pytest.raises(error, match=text):
        glmlora.train(tiny_model, records(3), **settings)


@pytest.mark.parametrize("method", ["lora", "p_tuning", "freeze", "full"])
def test_chats_are_in_the_template_of_the_training(tmp_path, method):
    directory = model_dir(tmp_path, _name_or_path="THUDM/chatglm3-6b")
    settings = {"finetuning_type": method, "max_steps": 1, "pre_seq_len": 2, **QUIET}
    settings |= {"num_layer_trainable": 1, "output_dir": str(tmp_path / "out")}
    result = glmlora.train(directory, records(3), template="vendored", **settings)
    tokenizer = result.tokenizer
    want, _ = encode_source(tokenizer, "ping", "", [], 99, template="vendored")

    def prompt(model):
        return chat_family(methods.unwrapped(model), tokenizer).chat_ids(
            tokenizer, "ping", [], "user"
        )

    assert prompt(result.model) == want
    place = tmp_path / "out" if method == "full" else directory
    base = glmlora.AutoModel.from_pretrained(place)
    again = base if method == "full" else methods.attach(base, method, [str(tmp_path / "out")])
    assert prompt(again) == want
    again.chat(tokenizer, "ping", max_new_tokens=2)
    if method == "lora":
        again.load_adapter(tmp_path / "out", "b")
        with again.disable_adapter():
            assert prompt(again) != want
        again.set_adapter("b")
        assert prompt(again) == want
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert prompt(glmlora.AutoModel.from_pretrained(tmp_path / "merged")) == want
    # a training that fails before it begins leaves the model's chats as they were
    fresh = glmlora.AutoModel.from_pretrained(directory)
    wrong = {**settings, "max_steps": 10**20, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match="max_steps, num_train_epochs"):
        glmlora.train(fresh, records(3), template="vendored", **wrong)
    assert prompt(fresh) != want
    # trained further in the family's own template: told, and kept
    data = {"output_dir": str(tmp_path / "next"), "checkpoint_dir": str(tmp_path / "out")}
    with pytest.warns(UserWarning, match="trained with 'vendored', this run has 'auto'"):
        result = glmlora.train(directory, records(3), **{**settings, **data})
    assert prompt(result.model) != want
    (tmp_path / "out" / "prompt_template.json").write_text('{"template": "other"}')
    with pytest.raises(ValueError, match="prompt_template.json: template: expected one of auto"):
        methods.attach(
            glmlora.AutoModel.from_pretrained(directory), method, [str(tmp_path / "out")]
        )


@pytest.mark.parametrize("target", ["all-linear", "all", ["all-linear"], r".*\.\d+\..*dense.*"])
def test_targets_of_an_adapter(tiny_model, tmp_path, target):
    glmlora.train(
        tiny_model, records(3), output_dir=str(tmp_path), max_steps=1, lora_target=target, **QUIET
    )
    config = glmlora.LoraConfig.from_pretrained(tmp_path)
    model = glmlora.AutoModel.from_pretrained(tiny_model)
    kinds = {n.rpartition(".")[2] for n in config.targets(model)}
    assert len(kinds) == (4 if "all" in str(target) else 3)


def test_arguments_object_and_overrides(tiny_model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, disable_tqdm=True)
    result = glmlora.train(tiny_model, records(3), args, max_steps=2, plot_loss=False)
    assert result.global_step == 2
    with pytest.raises(TypeError, match="args: expected TrainingArguments or a dict"):
        glmlora.train(tiny_model, records(3), "out")
    with pytest.raises(TypeError, match="model_or_path: expected a directory or a model"):
        run(3, tmp_path)


def test_records_longer_than_the_model(tiny_model, tmp_path):
    data = [{"instruction": "x " * 400, "output": "1"}]
    with pytest.raises(ValueError, match="record 0 has .* positions for 256"):
        run(tiny_model, tmp_path, data=data)


def test_too_little_memory_is_said_before_the_first_step(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(_core, "memory_available", lambda: 60_000)
    with pytest.raises(MemoryError, match="not enough memory") as caught:
        run(tiny_model, tmp_path)
    text = str(caught.value)
    for part in ("24576 bytes for parameters", "activations of the largest", "60000 bytes are",
                 "per_device_train_batch_size", "max_source_length"):  # fmt: skip
        assert part in text
    monkeypatch.setattr(_core, "memory_available", lambda: 10_000)
    with pytest.raises(MemoryError, match="24576 bytes for parameters.* 10000 bytes are available"):
        run(tiny_model, tmp_path)


def test_output_dir_that_cannot_be_written(tiny_model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="output_dir: cannot be written") as caught:
            run(tiny_model, out)
        assert str(out) in str(caught.value)


def test_disk_full_while_saving_leaves_the_last_checkpoint(tiny_model, tmp_path, monkeypatch):
    write = checkpoints.write_safetensors

    def full(path, tensors):
        if "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(tiny_model, tmp_path)
    assert files(tmp_path) == {"checkpoint-4", "trainer_log.jsonl"}


def test_a_value_that_is_not_finite_stops_the_run(tiny_model, tmp_path):
    class Spoil:
        def on_step_end(self, state):
            if state.global_step == 5:
                core = state.model.core
                name = core.trainable()[0]
                core.write(name, np.full(core.shape(name), np.nan, np.float32))

    with pytest.raises(FloatingPointError, match="update 6 of 10: .*NaN.*has the records") as e:
        run(tiny_model, tmp_path, callbacks=[Spoil()])
    assert "layer" in str(e.value)
    assert files(tmp_path) == {"checkpoint-4", "trainer_log.jsonl"}


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match=r"glmlora\[plot"):
        assert plot.plot_loss(tmp_path, [{"step": 1, "loss": 2.0}]) == []


def test_plot_smooths_and_warns_of_nothing_to_draw(tmp_path):
    np.testing.assert_allclose(plot.smoothed([1.0, 0.0, 0.0]), [1.0, 0.9, 0.81])
    with pytest.warns(UserWarning, match="No metric eval_loss to plot"):
        assert plot.plot_loss(tmp_path, [], ["eval_loss"]) == []


def test_the_bar_is_on_standard_error(tiny_model, tmp_path, capsys):
    run(tiny_model, tmp_path, disable_tqdm=None, max_steps=2)
    captured = capsys.readouterr()
    assert "2/2" in captured.err and "tok/s" in captured.err
    assert "tok/s" not in captured.out and captured.out.count("{'loss'") == 2


def test_ctrl_c_waits_for_the_end_of_a_shield():
    done = []
    with pytest.raises(KeyboardInterrupt), Shield():
        os.kill(os.getpid(), signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_family_is_detected(tiny_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny_model, tmp_path, use_v2=True, max_steps=1)
    with pytest.warns(UserWarning, match="use_v2: .* is of family v3"):
        run(tiny_model, tmp_path, use_v2=True, family="chatglm3", max_steps=1)


@pytest.mark.parametrize(
    ("method", "bits", "group"), [("lora", 8, None), ("lora", 4, 32), ("p_tuning", 4, None)]
)
def test_quantized_base(tiny_model, tmp_path, method, bits, group):
    settings = {"output_dir": str(tmp_path / "a"), "max_steps": 2, **QUIET}
    settings |= {"finetuning_type": method, "quantization_bit": bits}
    trained = glmlora.train(tiny_model, records(4), **settings)
    config = trained.model.config
    assert (config.quantization_bit, config.quantization_group_size) == (bits, group)
    settings["output_dir"] = str(tmp_path / "b")
    again = glmlora.train(tiny_model, records(4), **settings)
    assert again.log_history[-1]["train_loss"] == trained.log_history[-1]["train_loss"]


def test_what_fits_is_kept_and_gradient_checkpointing_keeps_little(tiny_model, monkeypatch):
    model = glmlora.AutoModel.from_pretrained(tiny_model)
    mapped = sum(t.nbytes for t in model.stored_tensors())

    def budget(available, checkpointing=False, held=0):
        monkeypatch.setattr(_core, "memory_available", lambda: available)
        return model.activation_budget(checkpointing, held)

    gib = 1 << 30
    assert budget(20 * gib + mapped) == int(0.7 * 20 * gib)
    assert budget(18 * gib + mapped, held=2 * gib) == int(0.7 * 20 * gib)
    assert budget(20 * gib, checkpointing=True) == 0  # the core's default, 1 GiB
    assert budget(gib) == 0
    model.quantize(8)  # what is quantized is in memory already, the rest is mapped still
    left = sum(t.nbytes for t in model.stored_tensors() if not hasattr(t, "integers"))
    assert left < mapped and budget(20 * gib + left) == int(0.7 * 20 * gib)


def test_backward_takes_its_memory_when_batches_grow(tiny_model, monkeypatch):
    model = glmlora.AutoModel.from_pretrained(tiny_model)
    config = glmlora.LoraConfig(r=2, target_modules=["query_key_value"])
    model = glmlora.get_peft_model(model, config)
    base = model.get_base_model()
    asked = []
    monkeypatch.setattr(
        type(base), "activation_budget", lambda self, c, held=0: asked.append((c, held)) or 0
    )

    def step(tokens):
        ids = np.ones((2, tokens), np.int64)
        model.backward(input_ids=ids, labels=ids)

    step(8)
    step(6)
    assert len(asked) == 1 and asked[0] == (False, 0)
    allocations = base.core.allocations
    step(8)
    assert base.core.allocations == allocations
    step(20)
    assert len(asked) == 2 and asked[1][1] > 0
    base.gradient_checkpointing_enable()
    step(4)
    assert asked[2][0] is True


@pytest.mark.parametrize(
    "length",
    [
        {"max_steps": 10**12, "save_steps": 10**12, "warmup_steps": 10**11},
        {"num_train_epochs": 1e9, "group_by_length": True},
        {"num_train_epochs": 1e9, "dataloader_drop_last": True, "lr_scheduler_type": "cosine"},
    ],
    ids=["steps", "grouped", "dropped"],
)
def test_an_endless_run_starts_at_once(tiny_model, tmp_path, length):
    """Counted, not timed: of a run of billions of epochs few orders are made before it starts."""
    made = []

    class Stop:
        def on_step_end(self, state):
            state.should_stop = True

    def order(*args):
        made.append(args)
        assert len(made) <= 2000
        return np.arange(20)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("glmlora.training.loop.epoch_order", order)
        patched.setattr("glmlora.training.loop.grouped_epoch_order", order)
        result = run(tiny_model, tmp_path, callbacks=[Stop()], **length)
    assert result.global_step == 1 and made


@pytest.mark.parametrize("length", [{"max_steps": 10**20}, {"num_train_epochs": 1e300}])
def test_a_run_that_cannot_be_counted_is_refused(tiny_model, tmp_path, length):
    with pytest.raises(ValueError, match=r"max_steps, num_train_epochs.* got \d"):
        run(tiny_model, tmp_path, **length)


def test_a_larger_batch_than_looked_for_takes_its_memory(tiny_model, tmp_path, monkeypatch):
    whole = run(tiny_model, tmp_path / "a", num_train_epochs=4)
    monkeypatch.setattr("glmlora.training.loop.LOOK_AHEAD", 1)
    again = run(tiny_model, tmp_path / "b", num_train_epochs=4)
    assert losses(again) == losses(whole)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"dataset": "d"}, "dataset has no effect: the data are those that are given"),
        ({"config_name": "c"}, "config_name has no effect: the model is given"),
        ({"lora_rank": 4}, "lora_rank has no effect: the model was made ready for lora"),
        ({"tokenizer_name": "t"}, "tokenizer_name has no effect: a tokenizer is given"),
        ({"do_eval": True}, "do_eval has no effect: there are no eval_data"),
        ({"do_train": False}, "do_train has no effect: train.. trains"),
        ({"dev_ratio": 0.2, "eval_data": records(2)}, "dev_ratio has no effect"),
        ({"eval_data": records(2)}, "eval_data have no effect: neither evaluation_strategy nor"),
        ({"dev_ratio": 0.2}, "dev_ratio holds data out, but neither evaluation_strategy nor"),
    ],
)
def test_flags_that_mean_nothing_in_a_call_are_told(tmp_path, overrides, told):
    directory = model_dir(tmp_path)
    model = glmlora.AutoModel.from_pretrained(directory)
    if "lora_rank" in overrides:
        model = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2))
    for name in ("config_name", "tokenizer_name"):
        if name in overrides:
            overrides = {name: directory}
    tokenizer = glmlora.AutoTokenizer.from_pretrained(directory)
    with pytest.warns(UserWarning, match=told):
        run(model, tmp_path / "o", max_steps=1, tokenizer=tokenizer, **overrides)


def test_data_that_are_evaluated_are_not_told(tiny_model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny_model, tmp_path, max_steps=1, dev_ratio=0.2, do_eval=True)
        run(tiny_model, tmp_path, max_steps=1, eval_data=records(2), evaluation_strategy="epoch")


def test_max_samples_in_a_call(tmp_path):
    result = run(model_dir(tmp_path), tmp_path / "o", max_samples=3, max_steps=1)
    assert (result.rows, result.rows_skipped) == (3, 0)


@pytest.mark.parametrize("loss_only", [False, True])
def test_predictions_that_are_stopped_are_kept(
    tiny_model, tmp_path, monkeypatch, capsys, loss_only
):
    data, out = dataset_dir(tmp_path, 4), tmp_path / "o"
    real = evaluation.generate_rows

    def stopped(*args):
        yield next(real(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "generate_rows", stopped)
    words = ["--predict_with_generate", "--max_target_length", "4"]
    if loss_only:  # nothing is generated
        run_train(command(tiny_model, data, out, "--do_eval", "--prediction_loss_only", *words))
        assert "eval_loss" in json.loads((out / "eval_results.json").read_text())
        return
    with pytest.raises(KeyboardInterrupt):
        run_train(command(tiny_model, data, out, "--do_predict", *words))
    lines = (out / "generated_predictions.partial.jsonl").read_text().splitlines()
    assert len(lines) == 1 and set(json.loads(lines[0])) == {"label", "predict"}
    assert "1 of 4 answers are kept in" in capsys.readouterr().err
