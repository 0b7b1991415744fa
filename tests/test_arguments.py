"""The flags of training: every row of the table, the command line's forms, each refusal."""

import inspect
import json
import re
from pathlib import Path

import pytest

import glmlora
from glmlora.training import arguments
from glmlora.training.arguments import (
    _OTHER_NAMES,
    FLAGS,
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    TrainingArguments,
    call_arguments,
    parse_train_arguments,
)
from glmlora.training.keywords import TrainKeywords

SCRIPT = (
    "--model_name_or_path ../chatglm2-6b --stage sft --use_v2 --do_train --dataset paper_label "
    "--finetuning_type lora --lora_rank 8 --output_dir ./output/label_xfg "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --lr_scheduler_type cosine "
    "--logging_steps 10 --save_steps 1000 --learning_rate 5e-5 --num_train_epochs 3.0 --fp16"
).split()
CLASSES = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "training": lambda **given: TrainingArguments(**{"output_dir": "o", **given}),
}
ALL = [(group, flag) for group, flags in FLAGS.items() for flag in flags]


def parse(*words, **given):
    return parse_train_arguments(list(words) if words else given)


def test_the_workflows_command_line():
    model, data, training, finetuning, notices = parse_train_arguments(SCRIPT)
    assert (model.model_name_or_path, model.use_v2) == ("../chatglm2-6b", True)
    assert data.dataset_names == ["paper_label"]
    assert (data.dataset_dir, data.max_source_length, data.max_target_length) == ("data", 512, 512)
    assert (finetuning.lora_rank, finetuning.lora_alpha, finetuning.lora_dropout) == (8, 32.0, 0.1)
    assert finetuning.lora_target == ["query_key_value"]
    assert (training.output_dir, training.per_device_train_batch_size) == ("./output/label_xfg", 4)
    assert (training.gradient_accumulation_steps, training.learning_rate) == (4, 5e-5)
    assert (training.logging_steps, training.save_steps, training.fp16) == (10, 1000, True)
    assert (training.lr_scheduler_type, training.num_train_epochs, training.seed) == (
        "cosine",
        3.0,
        42,
    )
    assert type(training.save_steps) is int
    assert notices == []


def test_no_flag_stands_twice():
    names = [flag.name for _, flag in ALL]
    assert len(names) == len(set(names)) > 150


@pytest.mark.parametrize("name", arguments.GENERATING)
def test_generating_flags_are_not_accepted(name):
    with pytest.raises(ValueError, match=f"{name} \\(belongs to generation"):
        parse("--output_dir", "o", f"--{name}", "1")


def other_value(flag):
    """A value other than the default."""
    if flag.choices:
        return next(choice for choice in flag.choices if choice != flag.default)
    if flag.kind == "bool":
        return not flag.default
    return {"int": 4, "float": 0.5, "str": "x", "list": "x,y", "words": ["x"]}[flag.kind]


@pytest.mark.parametrize(("group", "flag"), ALL, ids=[flag.name for _, flag in ALL])
def test_every_flag_by_its_mark(group, flag):
    value = other_value(flag)
    if flag.name in ("optim", "stage", "load_best_model_at_end"):  # tested apart
        return
    word = ",".join(value) if isinstance(value, list) else str(value)
    words = ["--output_dir", "o", f"--{flag.name}", word]
    if flag.mark == "R":
        with pytest.raises(ValueError, match=f"^{flag.name}: not supported"):
            CLASSES[group](**{flag.name: value})
        with pytest.raises(ValueError, match=f"^{flag.name}: not supported"):
            parse(*words)
        return
    made = CLASSES[group](**{flag.name: value})
    expected = ["x", "y"] if flag.kind == "list" else value
    assert getattr(made, flag.name) == expected
    assert [notice.split()[0] for notice in made.notices] == (
        [flag.name] if flag.mark == "A" or flag.name == "source_prefix" else []
    )
    if flag.name in ("evaluation_strategy", "eval_strategy", "do_predict"):
        return
    parsed = parse(*words)
    assert (
        getattr(parsed[list(("model", "data", "training", "finetuning")).index(group)], flag.name)
        == expected
    )


@pytest.mark.parametrize(("group", "flag"), ALL, ids=[flag.name for _, flag in ALL])
def test_every_flag_refuses_another_type(group, flag):
    with pytest.raises(ValueError, match=f"^{flag.name}: "):
        CLASSES[group](**{flag.name: object()})
    if flag.default is not None:
        with pytest.raises(ValueError, match=f"^{flag.name}: "):
            CLASSES[group](**{flag.name: None})


def test_keywords_for_type_checkers_are_the_fields():
    """One list is read by programs, the other by type checkers: names, order and types agree."""
    fields = {name: flag.annotation for name, flag in arguments.CALL_FLAGS.items()}
    fields["resume_from_checkpoint"] = "StrPath | bool | None"  # True: the last one
    stated = {n: t.__forward_arg__ for n, t in TrainKeywords.__annotations__.items()}
    assert list(stated.items()) == list(fields.items())


def test_every_flag_shows_in_the_signature_of_train():
    shown = inspect.signature(glmlora.train).parameters
    assert set(arguments.CALL_FLAGS) < set(shown) and "model_name_or_path" not in shown
    assert str(shown["lora_rank"]) == "lora_rank: 'int' = 8"
    assert shown["output_dir"].default is inspect.Parameter.empty
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())


def test_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="TrainingArguments.*'learning_rat' .did you mean 'learnin"):
        TrainingArguments(output_dir="o", learning_rat=1e-4)
    with pytest.raises(TypeError, match="FinetuningArguments.*'rank' .did you mean 'lora_rank'"):
        FinetuningArguments(rank=8)
    with pytest.raises(TypeError, match="output_dir"):
        TrainingArguments()


def test_keyword_use():
    args = TrainingArguments(output_dir="o", per_device_train_batch_size=4, learning_rate=5e-5)
    assert (args.per_device_train_batch_size, args.max_steps, args.save_safetensors) == (
        4,
        -1,
        True,
    )
    assert "per_device_train_batch_size=4" in repr(args)
    assert args == TrainingArguments("o", per_device_train_batch_size="4")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_eval_batch_size", -1, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("learning_rate", -1e-5, "0 or more"),
        ("learning_rate", float("nan"), "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("learning_rate", "fast", "finite number"),
        ("learning_rate", True, "finite number"),
        ("per_device_train_batch_size", 1.5, "an integer"),
        ("warmup_ratio", 1.5, "from 0 to 1"),
        ("warmup_steps", -1, "0 or more"),
        ("adam_beta1", 1.0, "below 1"),
        ("adam_epsilon", 0, "more than 0"),
        ("max_grad_norm", -1, "0 or more"),
        ("num_train_epochs", 0, "more than 0"),
        ("lr_scheduler_type", "reduce_lr_on_plateau", "one of linear, cosine"),
        ("optim", "adafactor", "adamw_torch"),
        ("evaluation_strategy", "often", "one of no, steps, epoch"),
        ("logging_steps", 0, "above 0"),
        ("save_steps", 1.5, "whole number"),
        ("save_total_limit", 0, "at least 1"),
        ("seed", -1, "from 0"),
        ("fp16", "maybe", "true or false"),
    ],
)
def test_bad_values_name_field_value_and_expectation(field, value, expected):
    with pytest.raises(ValueError, match=f"^{field}: .*{expected}") as caught:
        TrainingArguments(output_dir="o", **{field: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DataArguments, "max_source_length", 2),
        (DataArguments, "max_target_length", 1),
        (DataArguments, "dev_ratio", 1.0),
        (DataArguments, "dev_ratio", -0.1),
        (DataArguments, "max_samples", 0),
        (DataArguments, "truncation", "left"),
        (FinetuningArguments, "lora_rank", 0),
        (FinetuningArguments, "lora_alpha", 0),
        (FinetuningArguments, "lora_dropout", 1),
        (FinetuningArguments, "lora_target", ""),
        (FinetuningArguments, "lora_target", "a,,b"),
        (FinetuningArguments, "num_layer_trainable", 0),
        (FinetuningArguments, "pre_seq_len", 0),
        (FinetuningArguments, "stage", "rm"),
        (FinetuningArguments, "stage", "ppo"),
        (ModelArguments, "quantization_bit", 3),
        (ModelArguments, "family", "bert"),
        (ModelArguments, "threads", 0),
        (ModelArguments, "threads", 1025),
    ],
)
def test_bad_values_of_the_other_groups(kind, field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        kind(**{field: value})


def test_precisions_exclude_each_other():
    with pytest.raises(ValueError, match="fp16 and bf16"):
        TrainingArguments(output_dir="o", fp16=True, bf16=True)
    with pytest.raises(ValueError, match="fp16_full_eval and bf16_full_eval"):
        TrainingArguments(output_dir="o", fp16_full_eval=True, bf16_full_eval=True)


def test_old_and_late_names():
    assert TrainingArguments(output_dir="o", eval_strategy="epoch").evaluation_strategy == "epoch"
    args = TrainingArguments(output_dir="o", evaluation_strategy="steps", logging_steps=7)
    assert (args.eval_strategy, args.do_eval, args.eval_steps) == ("steps", True, 7)
    with pytest.raises(ValueError, match="^eval_strategy: "):
        TrainingArguments(output_dir="o", evaluation_strategy="steps", eval_strategy="epoch")
    assert TrainingArguments(output_dir="o", use_cpu=True).no_cuda
    assert TrainingArguments(output_dir="o", no_cuda=True).use_cpu
    assert TrainingArguments(output_dir="o", optim="adamw_hf").optim == "adamw_torch"


def test_best_model():
    same = {"output_dir": "o", "load_best_model_at_end": True}
    args = TrainingArguments(**same, evaluation_strategy="epoch", save_strategy="epoch")
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    args = TrainingArguments(
        **same,
        evaluation_strategy="steps",
        eval_steps=0.1,
        save_steps=0.3,
        metric_for_best_model="accuracy",
    )
    assert args.greater_is_better is True
    with pytest.raises(ValueError, match="^load_best_model_at_end: .*'no' and 'steps'"):
        TrainingArguments(**same)
    with pytest.raises(ValueError, match="multiple of eval_steps, got 5 and 2"):
        TrainingArguments(**same, evaluation_strategy="steps", eval_steps=2, save_steps=5)
    with pytest.raises(ValueError, match="multiple of eval_steps"):
        TrainingArguments(**same, evaluation_strategy="steps", eval_steps=10, save_steps=5)


@pytest.mark.parametrize("word", ["true", "yes", "1", "t", "y", "True", "YES"])
def test_true_words(word):
    assert parse("--output_dir", "o", "--do_train", word)[2].do_train is True
    assert TrainingArguments(output_dir="o", do_train=word).do_train is True


@pytest.mark.parametrize("word", ["false", "no", "0", "f", "n"])
def test_false_words(word):
    assert (
        parse("--output_dir", "o", "--logging_nan_inf_filter", word)[2].logging_nan_inf_filter
        is False
    )
    assert parse(output_dir="o", logging_nan_inf_filter=word)[2].logging_nan_inf_filter is False


def test_command_line_forms():
    model, data, training, finetuning, _ = parse(
        "--output-dir=o", "--use_v2", "--no_resume_lora_training", "--no-save-safetensors",
        "--max-steps", "-1",
        "--num_layer_trainable=-2", "--source_prefix=a-b=c",
        "--lora_target", "query_key_value, dense", "--checkpoint_dir", "a,b",
    )  # fmt: skip
    assert model.use_v2 and not model.resume_lora_training and not training.save_safetensors
    assert model.model_name_or_path == "THUDM/chatglm2-6b"
    assert model.checkpoint_dir == ["a", "b"]
    assert (training.output_dir, training.max_steps, finetuning.num_layer_trainable) == (
        "o",
        -1,
        -2,
    )
    assert data.source_prefix == "a-b=c"
    assert finetuning.lora_target == ["query_key_value", "dense"]


@pytest.mark.parametrize(
    "words",
    [
        ["--lr_scheduler_type", "sinus"],
        ["--lora_rank", "x"],
        ["--lora_rank"],
        ["--fp16", "perhaps"],
    ],
)
def test_bad_words_show_usage_and_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--output_dir", "o", *words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: glmlora train") and words[0] in error


def test_output_dir_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--do_train")
    assert caught.value.code == 2 and "--output_dir" in capsys.readouterr().err
    with pytest.raises(ValueError, match="^output_dir: "):
        parse(do_train=True)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert [flag.name for _, flag in ALL if f"--{flag.name} " not in text] == []


def test_unknown_flags_are_all_listed():
    with pytest.raises(
        ValueError, match=r"--lora_rnk \(did you mean 'lora_rank'\?\), --zzz$"
    ) as caught:
        parse("--output_dir", "o", "--lora_rnk", "4", "--zzz")
    assert "unknown arguments" in str(caught.value)
    for beginning in ("--use_v", "--lora_tar", "--eval_"):  # of one flag today, of two tomorrow
        with pytest.raises(ValueError, match=f"unknown arguments: {beginning} .did you mean"):
            parse("--output_dir", "o", beginning, "5")
    with pytest.raises(ValueError, match="aaa, bbb"):
        parse(output_dir="o", aaa=1, bbb=2)
    with pytest.raises(ValueError, match="unknown arguments: dense$"):
        parse("--output_dir", "o", "--lora_target", "query_key_value", "dense")


@pytest.mark.parametrize("other", sorted(_OTHER_NAMES))
def test_other_programs_names_are_known(other):
    own = _OTHER_NAMES[other]
    with pytest.raises(ValueError, match=f"{other} .did you mean '{own}'"):
        parse("--output_dir", "o", f"--{other}", "1")
    with pytest.raises(TypeError, match=f"'{other}' .did you mean '{own}'"):
        call_arguments(None, {"output_dir": "o", other: 1})


@pytest.mark.parametrize(("value", "kept"), [(True, "last"), (False, None), ("c", "c")])
def test_resuming_is_said_alike_everywhere(value, kept):
    for given in (
        parse(output_dir="o", resume_from_checkpoint=value),
        call_arguments(None, {"output_dir": "o", "resume_from_checkpoint": value})[0],
    ):
        assert given.training.resume_from_checkpoint == kept


@pytest.mark.parametrize("as_words", [False, True])
def test_json_and_yaml_files(tmp_path, as_words):
    pytest.importorskip("yaml")
    values = {
        "output_dir": "o",
        "do_train": True,
        "learning_rate": 1e-4,
        "lora_target": ["dense"],
        "max_samples": None,
    }
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(values), encoding="utf-8")
    # YAML 1.1 reads 1e-4 as text.
    (tmp_path / "a.yaml").write_text(
        "output_dir: o\ndo_train: true\nlearning_rate: 1e-4\nlora_target: [dense]\nmax_samples:\n"
    )
    for name in ("a.json", "a.yaml"):
        path = str(tmp_path / name)
        parsed = parse_train_arguments([path] if as_words else path)
        assert parsed == parse_train_arguments(values)
        assert (parsed[2].learning_rate, parsed[3].lora_target) == (1e-4, ["dense"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[1]", "an array"),
        ("a.json", '{"lora_rank": 8, "lora_rank": 4}', "'lora_rank' stands twice"),
        ("a.yaml", "lora_rank: 8\nlora_rank: 4\n", "'lora_rank' stands twice"),
        ("a.json", "{", "not JSON"),
        ("a.yaml", "- 1", "mapping"),
        ("a.yaml", "a: [", "not valid YAML"),
        ("a.txt", "{}", "ending in .json or .yaml"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parse_train_arguments(str(tmp_path / name))
    assert name in str(caught.value)


def test_yaml_without_its_library(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("output_dir: o")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(ValueError, match="PyYAML.*json"):
        parse_train_arguments(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_train": True, "predict_with_generate": True}, "^predict_with_generate: .*do_train"),
        ({"do_predict": True}, "^do_predict: needs predict_with_generate"),
        ({"do_train": True, "finetuning_type": "none"}, "^finetuning_type: .*'none'"),
        ({"do_train": True, "do_eval": True}, "^dev_ratio: "),
        ({"do_train": True, "evaluation_strategy": "steps"}, "^dev_ratio: "),
        (
            {"quantization_bit": 8, "finetuning_type": "full"},
            "^quantization_bit: 8 is incompatible.*'full'",
        ),
        (
            {"quantization_bit": 4, "finetuning_type": "freeze"},
            "^quantization_bit: 4 is incompatible.*'freeze'",
        ),
        (
            {"quantization_bit": 4, "finetuning_type": "p_tuning", "fp16": True},
            "conflicts with fp16",
        ),
        ({"dataset": " , "}, "^dataset: "),
        ({"deepspeed": {"zero": 2}}, "^deepspeed: not supported"),
    ],
)
def test_checks_between_groups(given, message):
    with pytest.raises(ValueError, match=message):
        parse_train_arguments({"output_dir": "o", **given})


def test_tokens_are_not_shown():
    with pytest.raises(ValueError) as caught:
        TrainingArguments(output_dir="o", hub_token="secret")
    assert "secret" not in str(caught.value)


def test_notices():
    *_, notices = parse(output_dir="o", run_name="r", cache_dir="c", report_to="none")
    assert parse(output_dir="o", report_to=[]).notices == parse(output_dir="o").notices
    assert [notice.split()[0] for notice in notices] == ["cache_dir", "run_name", "none"]
    *_, notices = parse(output_dir="o", do_train=True, dev_ratio=0.1)
    assert len(notices) == 1 and notices[0].startswith("dev_ratio holds data out")


def test_json_form_makes_the_same_object():
    words = (
        "--output_dir o --do_train --checkpoint_dir a,b --evaluation_strategy epoch --dev_ratio 0.1"
    )
    args = parse(*words.split())[:4]
    for group in args:
        text = group.to_json_string()
        values = json.loads(text)
        assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
        assert type(group)(**values) == group
    assert set(args[3].to_dict()) == {
        "finetuning_type", "num_layer_trainable", "name_module_trainable", "pre_seq_len",
        "prefix_projection", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
    }  # fmt: skip


BEST = {"load_best_model_at_end": True, "save_strategy": "epoch", "evaluation_strategy": "epoch"}
# What a value needs beside it; without that it means nothing, and a notice says so. (flag, value,
# where it has no effect, where it has one)
NEEDS = [
    ("num_layer_trainable", 2, {}, {"finetuning_type": "freeze"}),
    ("name_module_trainable", "qkv", {}, {"finetuning_type": "freeze"}),
    ("pre_seq_len", 8, {}, {"finetuning_type": "p_tuning"}),
    ("prefix_projection", True, {}, {"finetuning_type": "p_tuning"}),
    ("lora_rank", 4, {"finetuning_type": "full"}, {}),
    ("lora_alpha", 16, {"finetuning_type": "freeze"}, {}),
    ("lora_dropout", 0.0, {"finetuning_type": "p_tuning"}, {}),
    ("lora_target", "dense", {"checkpoint_dir": "a"}, {}),
    ("use_dora", True, {"finetuning_type": "full"}, {}),
    ("init_lora_weights", "pissa", {"checkpoint_dir": "a"}, {}),
    ("modules_to_save", "output_layer", {"finetuning_type": "freeze"}, {}),
    ("loraplus_lr_ratio", 4, {"finetuning_type": "p_tuning"}, {}),
    ("pre_seq_len", 8, {"finetuning_type": "p_tuning", "checkpoint_dir": "a"},
     {"finetuning_type": "p_tuning"}),
    ("lora_rank", 4, {"checkpoint_dir": "a"},
     {"checkpoint_dir": "a", "resume_lora_training": False}),
    ("resume_lora_training", False, {}, {"checkpoint_dir": "a"}),
    ("eval_steps", 5, {}, {"evaluation_strategy": "steps", "dev_ratio": 0.1}),
    ("eval_delay", 5, {}, {"evaluation_strategy": "steps", "dev_ratio": 0.1}),
    ("save_steps", 5, {"save_strategy": "epoch"}, {}),
    ("save_total_limit", 5, {"save_strategy": "no"}, {}),
    ("logging_steps", 5, {"logging_strategy": "epoch"}, {}),
    ("metric_for_best_model", "loss", {}, {**BEST, "dev_ratio": 0.1}),
    ("greater_is_better", False, {}, {**BEST, "dev_ratio": 0.1}),
    ("warmup_ratio", 0.1, {"warmup_steps": 2}, {}),
    ("warmup_steps", 2, {"lr_scheduler_type": "constant"},
     {"lr_scheduler_type": "constant_with_warmup"}),
    ("num_train_epochs", 1.0, {"max_steps": 5}, {}),
    ("max_steps", 0, {}, None),
    ("ignore_data_skip", True, {}, {"resume_from_checkpoint": "a"}),
    ("eval_num_beams", 2, {}, {"do_train": False, "do_eval": True, "predict_with_generate": True}),
    ("generation_num_beams", 2, {"eval_num_beams": 2},
     {"do_train": False, "do_eval": True, "predict_with_generate": True}),
    ("dev_ratio", 0.1, {"do_train": False, "do_eval": True}, {"do_eval": True}),
    ("predict_with_generate", True, {"do_train": False}, {"do_train": False, "do_eval": True}),
    ("resume_from_checkpoint", "a", {"do_train": False, "do_eval": True}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value", "without", "with_effect"), NEEDS)
def test_values_that_mean_nothing_beside_others_are_told(flag, value, without, with_effect):
    def told(more):
        notices = parse(**{"output_dir": "o", "do_train": True, **more, flag: value}).notices
        return [n for n in notices if n.startswith(f"{flag} has no effect: ")]

    assert len(told(without)) == 1
    if with_effect is not None:
        assert told(with_effect) == []


def test_no_supported_flag_is_forgotten():
    """Each flag that is said to work is read somewhere beyond its declaration."""
    folder = Path(arguments.__file__).parent
    read = "".join(
        path.read_text(encoding="utf-8")
        for path in folder.glob("*.py")
        if path.name not in ("keywords.py", "arguments.py")
    )
    own = Path(arguments.__file__).read_text(encoding="utf-8").split("def __post_init__", 1)[1]
    own = own.replace(inspect.getsource(arguments.without_effect), "")
    intervals = ("logging_strategy", "save_strategy", "logging_steps", "save_steps", "eval_steps")
    for _, flag in ALL:
        if flag.mark in "WSD" and flag.name not in intervals:  # read as f"{what}_strategy"
            assert re.search(rf"\b{flag.name}\b", read) or f".{flag.name}" in own, flag.name


def test_defaults_are_not_told():
    assert parse(output_dir="o", do_train=True).notices == []


def test_a_flag_given_twice_is_told():
    words = "--output_dir o --do_train --fp16 --lora_rank 8 --lora-rank=4 --no_fp16 false".split()
    notices = parse(*words[:-2]).notices
    assert notices == ["--lora_rank is given twice: 4 is used, not 8"]
    words = "--output_dir o --do_train --save_safetensors --no_save_safetensors --seed 1 --seed 1"
    notices = parse(*words.split()).notices
    assert notices == ["--no_save_safetensors is given twice: false is used, not true"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"do_predict": True, "predict_with_generate": True, "prediction_loss_only": True},
         "^do_predict: needs answers"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other(given, message):
    with pytest.raises(ValueError, match=message):
        parse(output_dir="o", **given)


def test_a_prefix_that_chats_do_not_add_is_told():
    assert "source_prefix" in str(parse("--output_dir", "o", "--source_prefix", "P:").notices)
    assert "source_prefix" not in str(parse("--output_dir", "o").notices)
