"""glm-tiny's tokenizer and config, in the ChatGLM2 file layout.

    python benchmarks/glm_tiny/make_tokenizer.py CORPUS_DIR OUT_DIR

A SentencePiece BPE model with byte fallback, trained as ChatGLM2's is described in its file: no
normalisation, a dummy
space in front, runs of spaces kept, digits alone, no pad piece.
"""

import argparse
import json
from pathlib import Path

import sentencepiece

PIECES = 6000
CHINESE = (
    "的一是不了在人有我他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能对着事其里所去行过家十用发天如然作方"
    "成者多日都三小军二无同么经法当起与好看学进种将还分此心前面又定见只主没公从知使四明正新因样度本么高长外此物第等电开论文医学领域"
    "判断属于输出问答题目摘要关键词标签请根据以下模型语言很高兴客气谢再什吗呢吧谁"
)
TALK = "你好！我是，。？：；（）、“”《》"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("out")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    letters = "".join(dict.fromkeys(CHINESE + TALK))
    letters += "".join(chr(c) for c in range(33, 127))
    sentencepiece.SentencePieceTrainer.train(
        input=str(Path(args.corpus) / "text.txt"),
        model_prefix=str(out / "tokenizer"),
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=0.9999,
        required_chars=letters,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=20000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    (out / "tokenizer.vocab").unlink()
    config = {
        "_name_or_path": "glmlora/glm-tiny",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": 512,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": 192,
        "kv_channels": 32,
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 6,
        "num_layers": 4,
        "original_rope": True,
        "padded_vocab_size": (PIECES + 5 + 63) // 64 * 64,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 2048,
        "use_cache": True,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    tokenizer_config = {
        "name_or_path": "glmlora/glm-tiny",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "padding_side": "left",
    }
    for name, value in (("config", config), ("tokenizer_config", tokenizer_config)):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
