"""Train glm-tiny from nothing with this project's own `train`, full-parameter: first on running
text, then on judgements.

    python benchmarks/glm_tiny/corpus.py WORDNET_DIR CORPUS_DIR
    python benchmarks/glm_tiny/make_tokenizer.py CORPUS_DIR MODEL_DIR
    python benchmarks/glm_tiny/train.py CORPUS_DIR MODEL_DIR [--judge N] [--language N]

MODEL_DIR (tokenizer and config) receives model.safetensors in float16. About half an hour on two
cores. The corpora hold
WordNet's text only; see NOTICE for its licence.
"""

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np

import glmlora
from glmlora import _core, families
from glmlora.families.family import PLAIN_ARCH
from glmlora.files.checkpoint import Tensor, read_safetensors, write_safetensors


def random_start(directory, config, seed=1):
    """Weights as GPT-2 starts: normal(0, 0.02), branches' last linears smaller by sqrt(2 *
    layers), norms 1, biases 0."""
    kv = config["kv_channels"]
    arch = PLAIN_ARCH | dict(
        layers=config["num_layers"],
        hidden=config["hidden_size"],
        ffn=config["ffn_hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["multi_query_group_num"],
        head_dim=kv,
        vocab=config["padded_vocab_size"],
        max_positions=1,
        rotary_dim=kv // 2,
        eps=config["layernorm_epsilon"],
        rope_base=10000.0,
        rope_divisor=1.0,
        qkv_bias=1,
        prefix_input=1,
    )
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in _core.Model(arch, names=families.default().tensor_names).shapes().items():
        if len(shape) == 1:
            value = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
        else:
            last = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            value = rng.normal(0, 0.02 / (np.sqrt(2 * arch["layers"]) if last else 1), shape)
        weights[name] = value.astype(np.float32)
    write_safetensors(Path(directory) / "model.safetensors", weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("model")
    parser.add_argument("--language", type=int, help="only the first N records")
    parser.add_argument("--judge", type=int, help="only the first N records")
    args = parser.parse_args()
    model = Path(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        start, first, second = (Path(scratch) / n for n in ("start", "language", "judge"))
        shutil.copytree(model, start)
        random_start(start, json.loads((model / "config.json").read_text()))
        common = dict(
            finetuning_type="full",
            lr_scheduler_type="cosine",
            warmup_ratio=0.05,
            adam_beta2=0.98,
            weight_decay=0.01,
            num_train_epochs=1.0,
            per_device_train_batch_size=16,
            logging_steps=50,
            save_strategy="no",
            max_source_length=400,
            max_target_length=400,
        )
        judge = json.loads((Path(args.corpus) / "judge.json").read_text(encoding="utf-8"))
        language = json.loads((Path(args.corpus) / "language.json").read_text(encoding="utf-8"))
        random.Random(1).shuffle(language)
        # some judgements among the text keep the answers' form in the model from the start
        text = language[: args.language] + judge[-2000:]
        glmlora.train(str(start), text, output_dir=str(first), learning_rate=2e-3, **common)
        judge = judge[:-2000][: args.judge]
        glmlora.train(str(first), judge, output_dir=str(second), learning_rate=1e-3, **common)
        weights = {
            name: tensor.numpy().astype(np.float16)
            for name, tensor in read_safetensors(second / "model.safetensors").items()
        }
    write_safetensors(model / "model.safetensors", {n: Tensor(w) for n, w in weights.items()})
    print(f"{model / 'model.safetensors'}: {sum(w.size for w in weights.values())} parameters")


if __name__ == "__main__":
    main()
