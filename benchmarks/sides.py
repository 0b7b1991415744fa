"""What our side and the peers of the benchmarks have in common, each in an interpreter of its own:
nothing but the standard library is imported here."""

import json
import re
import sys
import threading

# Of published models' config.json, what gives shapes; ChatGLM2-6B's.
SIX_B = dict(
    num_layers=28,
    hidden_size=4096,
    ffn_hidden_size=13696,
    kv_channels=128,
    num_attention_heads=32,
    multi_query_group_num=2,
    padded_vocab_size=65024,
    seq_length=32768,
    torch_dtype="float16",
)


# GLM-4-9B-chat, and its copy in the transformers layout.
NINE_B = SIX_B | dict(
    _name_or_path="THUDM/glm-4-9b-chat",
    num_layers=40,
    padded_vocab_size=151552,
    seq_length=131072,
    layernorm_epsilon=1.5625e-07,
    rope_ratio=500,
    torch_dtype="bfloat16",
)
NINE_B_HF = dict(
    model_type="glm",
    architectures=["GlmForCausalLM"],
    num_hidden_layers=40,
    hidden_size=4096,
    intermediate_size=13696,
    head_dim=128,
    num_attention_heads=32,
    num_key_value_heads=2,
    vocab_size=151552,
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-07,
    attention_bias=True,
    partial_rotary_factor=0.5,
    rope_theta=5000000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
EDGE = NINE_B_HF | dict(
    num_hidden_layers=28,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=59264,
    max_position_embeddings=8192,
    rms_norm_eps=1e-05,
    attention_bias=False,
    partial_rotary_factor=1.0,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    pad_token_id=59246,
    eos_token_id=[59246, 59253, 59255],
)
GLM4_32B = NINE_B_HF | dict(
    model_type="glm4",
    architectures=["Glm4ForCausalLM"],
    num_hidden_layers=61,
    hidden_size=6144,
    intermediate_size=23040,
    num_attention_heads=48,
    max_position_embeddings=32768,
    rms_norm_eps=1e-05,
    attention_bias=False,
    rope_theta=10000.0,
)


def glm_fields(c):
    """The fields of a transformers.GlmConfig of the shapes of a config.json, a `glm` one's or
    ChatGLM2's."""
    if "num_hidden_layers" in c:
        own = ("model_type", "architectures", "torch_dtype")
        return {k: v for k, v in c.items() if k not in own} | dict(
            pad_token_id=0, eos_token_id=None
        )
    return dict(
        vocab_size=c["padded_vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["ffn_hidden_size"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["multi_query_group_num"],
        head_dim=c["kv_channels"],
        rms_norm_eps=c.get("layernorm_epsilon", 1e-5),
        max_position_embeddings=c["seq_length"],
        attention_bias=True,
        partial_rotary_factor=0.5,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )


def memory(field="RssAnon"):
    """Bytes of this process: anonymous, or VmRSS."""
    with open("/proc/self/status") as f:
        return 1024 * int(re.search(field + r":\s+(\d+)", f.read()).group(1))


class Peak:
    """`with Peak() as peak`: largest anonymous memory of this process in `peak.bytes`. It is looked
    at every 20 ms, and only in the block: each look costs the timed work on the same cores."""

    def __enter__(self):
        self.bytes, self.over = memory(), threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.02):
            self.bytes = max(self.bytes, memory())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.bytes = max(self.bytes, memory())


class Jobs:
    """A side: one method for each job, which returns what is answered."""

    facts = {}  # beside "ready"

    def do(self, job, **fields):
        return getattr(self, job)(**fields)


def serve(make, *args):
    """make(*args), a Jobs, answers the jobs of this process's input, a line of JSON each; what is
    printed meanwhile goes to stderr."""
    real, sys.stdout = sys.stdout, sys.stderr
    jobs = make(*args)
    print(json.dumps({"ready": True} | jobs.facts), file=real, flush=True)
    for line in sys.stdin:
        try:
            answer = jobs.do(**json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=real, flush=True)
