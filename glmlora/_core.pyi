"""The C core. Arrays are NumPy, C-contiguous; integers int32; no function parses a file.

Every call that computes drops the interpreter lock and reacts to Ctrl-C (KeyboardInterrupt)
within a second; a model that is
busy in one thread raises RuntimeError in another. Errors: ValueError (argument, with its name),
MemoryError (bytes
asked), FloatingPointError (non-finite value, with layer and row), RuntimeError (called at the
wrong time), OSError (a mapped file that weights lie in changed).
N = tokens of a ragged batch, S = segments (rows of the user's batch), M = rows of logits asked
for, L = layers,
H = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np

def map_file(fd: int, path: str | bytes | PathLike[str]) -> np.ndarray:
    """All of an open file as a read-only uint8 array, mapped: nothing is read yet, and `fd` may be
    closed. OSError as the system refuses it, MemoryError."""

def guard(on: bool) -> None:
    """Begin (True) or end reads of mapped files in this thread; calls nest. In between, a page that
    its file no longer has reads as zeros, which `check_mapped` tells afterwards, in place of a
    signal that ends the process."""

def check_mapped(array: np.ndarray) -> bool:
    """Whether an array lies in a file mapped by map_file. OSError naming the file where that was
    written to or became shorter since."""

def drop_pages(array: np.ndarray) -> None:
    """Give back the memory of a mapped file's pages below a contiguous array; reading them again
    reads the file. Other arrays stay."""

def set_num_threads(n: int) -> None:
    """Threads of every model; n >= 1. The default follows OMP_NUM_THREADS, then the cores the
    process may use."""

def get_num_threads() -> int: ...
def cpu_variants() -> str:
    """Instruction sets of the core this processor runs, best first, e.g. "avx2,generic"."""

def cpu_kernels() -> dict[str, tuple[bool, bool]]:
    """Every instruction set that the core has kernels for, best first: whether this build has
    them (its compiler may have lacked the set), whether this processor runs them."""

def op_table(backend: str) -> dict[str, int]:
    """For tests: addresses of the ops and of their context ("cx"), and "real_size"."""

def op_signatures() -> dict[str, str]:
    """For tests: the parameters of every op, as csrc/ops.h has them."""

def backend_name(name: str) -> str:
    """The whole name of a backend: "cuda" is "cuda:0/float32"."""

def device_info(name: str) -> dict[str, Any]:
    """Of "cuda[:N]" or "emu[:N]": count (0: there is none, and why says so), why, name, capability
    (major, minor), multiprocessors, driver and runtime (1000 * major + 10 * minor), free and total
    bytes. ValueError where there is no library for it, or no device N."""

def device_library(name: str) -> dict[str, str]:
    """The library of "cuda" or "emu": path, how it was built, and the cublas that it finds.
    ValueError where there is none."""

def memory_available() -> int:
    """Bytes this process could still get (MemAvailable and the control group's limit)."""

def lr_factor(
    kind: str, step: int, warmup_steps: int, total_steps: int, learning_rate: float = 5e-5
) -> float:
    """Factor on the learning rate after `step` finished updates (spec: transformers' schedules)."""

def convert(array: np.ndarray, from_dtype: str, to_dtype: str) -> np.ndarray:
    """Copy in another dtype ("F32" "F16" "BF16" "F64"); BF16 arrays are uint16."""

def quantize(
    array: np.ndarray, dtype: str, bits: int, group: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Integers int8 and scales float16 of a matrix (see glmlora/model/quantization.py). A row or
    group that cannot be quantized has a scale that is not finite."""

def ggml_blocks(array: np.ndarray, bits: int) -> np.ndarray:
    """A float32 matrix (rows, columns) as ggml's Q8_0 (bits 8) or Q4_0 (4): bytes uint8 (rows,
    columns / 32 * 34 or 18). ValueError where the columns are no multiple of 32, a value is not
    finite, or a scale is beyond float16."""

def adjust_logits(
    logits: np.ndarray,
    context: np.ndarray,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    suppress: Sequence[int] = (),
) -> None:
    """In place on float32 (V,): repetition penalty over the distinct ids of context, n-gram
    bans, suppressed ids to -inf."""

def warp_logits(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_keep: int = 1
) -> np.ndarray:
    """Probabilities float32 (V,) after temperature, top-k (0 = off), top-p (1 = off) and
    softmax; logits are unchanged."""

def sample(
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stream: int,
    index: int,
) -> int:
    """One draw: warp_logits, then the counter-based uniform of (seed, stream, index).
    temperature 0: argmax, lowest id."""

def open_checked(check: Callable[[str, int], None], path: str, flags: int) -> int:
    """Open a file: its number. check(path, st_mode), which raises, looks at what is there before
    and at what was opened. Never waits for a FIFO. OSError as `os.open`."""

class Descriptor:
    """A file or folder opened by `os.open`, closed by close() or with its last reference: nothing
    stays open where Ctrl-C comes before the number has a name. OSError as `os.open`."""

    def __init__(self, path: str | PathLike[str], flags: int, mode: int = 0o666) -> None: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def __enter__(self) -> Descriptor: ...
    def __exit__(self, *error: object) -> None: ...

class Cache:
    """Keys and values of `rows` sequences; made by Model.cache. Positions of a row go 0, 1, ..
    whatever the prefixes."""

    rows: int
    capacity: int
    lengths: list[int]  # own tokens held by each row
    shared_length: (
        int  # tokens of the prompt prefix common to all rows (P-Tuning prefix not counted)
    )
    nbytes: int
    current: bool  # filled with the weights as they are now; else only an empty one can be extended
    def rewind(self, row: int, length: int) -> None:
        """Forget everything of the row after its first `length` own tokens."""
    def copy(self, source: int, row: int, length: int, /) -> None:
        """`row` begins with the first `length` own tokens of row `source`, which has the same
        adapter, and has no others."""
    def adapt(self, row: int, adapter: int, /) -> None:
        """An empty row, or with -1 all rows and the shared prefix, computes with an adapter that
        `keep_lora` put aside; 0: with what is attached."""
    def grow(self, capacity: int) -> None:
        """Room for at least `capacity` tokens in each row; what is held stays. MemoryError names
        the bytes."""
    def reorder(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of what row parents[i] was (beam search)."""

class Model:
    """One GLM model: base weights bound by name, at most one LoRA set, at most one P-Tuning
    prefix, a trainable set.

    arch keys: layers, hidden, ffn, heads, kv_heads, head_dim, vocab, max_positions, rotary_dim
    (ints), eps, rope_base,
    rope_divisor (floats), qkv_bias (bool), half_rope_table (bool, decision 13), split_qkv (bool:
    queries, keys and values are linears of their own), branch_norms (bool: what attention and MLP
    yield is normed before it is added), tied_head (bool: the output layer is the embeddings),
    prefix_input (int: columns of a P-Tuning embedding that a projection reads); and
    linear_bias, layer_norm, gelu, qkv_by_head, half_rope_frequencies (bools), residual_scale
    (float, 0: none), rope_2d (bool) and with it sop, gmask, mask (ids) and sop_in_place (bool):
    struct glm_arch in csrc/glm.h. With rope_2d positions follow from the ids, a row of a cache
    begins with its whole context in one call and keeps it whole, and nothing is shared.
    names: what the checkpoint calls its modules (glmlora/families), to which ".weight", ".bias",
    ".lora_A.weight" and ".lora_B.weight" are added. Keys: word_embeddings, final_layernorm,
    output_layer; layer, with one "{}" for its number; input_layernorm, post_attention_layernorm,
    dense, dense_h_to_4h, dense_4h_to_h, and query_key_value, or with split_qkv query, key, value,
    below the layer, with branch_norms post_self_attn_layernorm and post_mlp_layernorm, too;
    prefix_encoder.
    """

    def __init__(
        self, arch: dict[str, Any], backend: str = "cpu", *, names: dict[str, str]
    ) -> None: ...
    backend: str
    allocations: int  # calls of the backend's allocator so far

    # base weights; names as in the checkpoint
    # ("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight")
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every base weight that must be bound, with its shape."""
    def bind(
        self,
        name: str,
        array: np.ndarray,
        dtype: str,
        scale: np.ndarray | None = None,
        group: int = 0,
    ) -> None:
        """Use the array in place (kept alive, never written). dtype "F32" "F16" "BF16" (uint16)
        or "F64"; for a linear layer also "I8" and "I4" (int8), with float16 scales for each row, or
        for each `group` columns of it."""
    def missing(self) -> list[str]:
        """Base weights not bound yet."""

    # adapters
    def move(self, backend: str, left: Sequence[str]) -> None:
        """Go to another backend. left: weights that are unbound there; all that were bound and not
        changed must be among them. Caches made before are of no more use. On failure (MemoryError
        with the bytes) nothing has changed."""
    def add_lora(
        self,
        module: str,
        A: np.ndarray,
        B: np.ndarray,
        scale: float,
        dropout: float,
        B_bias: np.ndarray | None = None,
        magnitude: np.ndarray | None = None,
    ) -> None:
        """module: e.g. "transformer.encoder.layers.0.self_attention.query_key_value". A (R, in),
        B (out, R) float32, copied. B_bias (out,): y += scale * B_bias (lora_bias); magnitude
        (out,): of DoRA. One of them at most.

        Afterwards the weights are named module + ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
        and ".lora_magnitude_vector".
        """
    def remove_lora(self) -> None: ...
    def enable_lora(self, on: bool) -> None:
        """off: forward as if no adapter were there (disable_adapter)."""
    def keep_lora(self) -> int:
        """Put what is attached aside, for rows of caches (`Cache.adapt`); its number, from 1 on.
        RuntimeError where nothing is attached, or it is trained. The model stays on its backend."""
    def merge_lora(self) -> None:
        """W += scale * B A in the dtype of W for every adapted linear (owned copies), then
        remove_lora."""
    def set_prefix(self, arrays: dict[str, np.ndarray], dropout: float) -> None:
        """P-Tuning v2. Keys "transformer.prefix_encoder.embedding.weight" (P, 2*L*KV) and, with
        projection,
        ".trans.0.weight" (H, 2*L*KV), ".trans.0.bias", ".trans.2.weight" (2*L*KV, H),
        ".trans.2.bias"; float32, copied.
        """
    def remove_prefix(self) -> None: ...
    def prefix_kv(self) -> np.ndarray:
        """(2*L, P, KV) float32: keys and values the prefix encoder yields, layer 0 key, layer 0
        value, layer 1 key .."""

    # trainables
    def set_trainable(self, names: Sequence[str]) -> None:
        """Weights (base, LoRA or prefix names) to train, float32 from now on; [] ends training.
        Values are kept;
        gradients, moments and the optimiser's step count start at zero."""
    def trainable(self) -> list[str]:
        """Names, in the order of the flat block (that of set_trainable)."""
    def names(self) -> list[str]:
        """All weights present: base, LoRA, prefix."""
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(
        self, name: str, what: Literal["value", "grad", "exp_avg", "exp_avg_sq"] = "value"
    ) -> np.ndarray:
        """A copy in float32 (float64 of the ref_f64 backend). grad: the token mean of what is
        accumulated."""
    def write(
        self,
        name: str,
        array: np.ndarray,
        what: Literal["value", "exp_avg", "exp_avg_sq"] = "value",
    ) -> None:
        """Set a trainable (or LoRA, prefix) weight or its moments."""

    # running; ids (N) flat, lengths (S) tokens of each segment, positions default 0.. within
    # each segment
    def plan(
        self, n_tokens: int, n_segments: int, n_rows: int, training: bool, budget: int = 0
    ) -> dict[str, int]:
        """Bytes: weights (bound, mapped), owned, trainable (parameters, gradients, moments),
        activations, held (of the activations, taken already), total; and kept_layers (layers whose
        activations are kept rather than recomputed). budget: 0 = the default (README of csrc)."""
    def counts(self) -> dict[str, Any]:
        """Of a device or of the backend "plan..", since the last call of this: live, peak,
        scratch (of products), uploaded, downloaded bytes; uploads, downloads, syncs (waits for the
        device), launches,
        products (calls of cuBLAS), graphs (recorded sequences launched); "plan" also calls (by op)
        and flops (of products and attention). Models share a backend. ValueError for others."""
    def reserve(
        self, n_tokens: int, n_segments: int, n_rows: int, training: bool, budget: int = 0
    ) -> None:
        """Take the planned memory now: no later call with at most these sizes allocates.
        MemoryError names the bytes. A training budget holds for later calls too."""
    def forward(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        positions: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        hidden_states: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits float32 (M, V) at flat indices `rows` (default: all tokens), and hidden states
        (L+1, N, H), before the final
        norm, or None. Dropout is off."""
    def hidden_states(
        self, ids: np.ndarray, lengths: np.ndarray, layers: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Float32 (len(layers), N, H): what goes into these layers, ascending numbers; L: what
        comes out of the last, before the final norm. No layer runs that none of these needs.
        Dropout is off."""
    def loss(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        rows: np.ndarray,
        targets: np.ndarray,
        positions: np.ndarray | None = None,
    ) -> np.ndarray:
        """Negative log-likelihoods float32 (M): of targets[m] given the tokens up to flat index
        rows[m]. No gradient."""
    def backward(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        rows: np.ndarray,
        targets: np.ndarray,
        positions: np.ndarray | None = None,
        dropout_seed: int = 0,
        dropout: bool = True,
        noise: float = 0.0,
        numbers: np.ndarray | None = None,
    ) -> float:
        """Forward and backward; adds gradients of the summed loss and M to the token count.
        Returns the mean loss of this
        call. noise: NEFTune's alpha, of noise on the embeddings of the size alpha / sqrt(tokens of
        the row * H). Dropout masks and noise are functions of (dropout_seed, update number, row
        within the update, position), so they do
        not depend on how an update's rows are split into calls. numbers: which row of the update
        each segment is; default the next ones, from accumulated_rows on."""
    def zero_grad(self) -> None: ...
    accumulated_tokens: int  # labelled tokens since zero_grad; settable with the gradients
    accumulated_rows: int  # segments since zero_grad; settable
    gradient_size: int  # how many numbers the gradients of all trained weights are
    def read_gradients(self, array: np.ndarray, first: int = 0) -> None:
        """Gradients from number `first` on into a contiguous float32 (float64 of ref_f64) array
        (n): sums over the labelled tokens since zero_grad. In the same order in all models that
        train the same weights. ValueError where there are fewer."""
    def write_gradients(self, array: np.ndarray, first: int = 0) -> None:
        """Put such sums in their place; accumulated_tokens says of how many tokens they are."""
    def grad_norm(self) -> float:
        """Global L2 norm of the token-mean gradient."""
    def step(
        self,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        lora_B_ratio: float = 1.0,
    ) -> float:
        """Clip (max_grad_norm 0 = off; factor max / (norm + 1e-6)), AdamW, zero_grad. Returns
        the norm before clipping. Weights lora_B have lora_B_ratio times the rate.
        Weight decay is not applied to biases and norm weights. Non-finite norm:
        FloatingPointError, nothing changed."""
    steps: int  # finished updates; settable, for resuming

    # generation
    def cache(self, rows: int, capacity: int, shared_capacity: int = 0) -> Cache:
        """Room for `rows` sequences of at most `capacity` own tokens each, after a prefix of
        shared_capacity tokens."""
    def extend(
        self, cache: Cache, rows: Sequence[int], ids: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """Append ids (flat; lengths[i] >= 1 tokens to rows[i]); logits float32 (len(rows), V)
        after the last token of each.
        Prefill and decoding are this one call. Non-finite logits: FloatingPointError."""
    def next(
        self,
        cache: Cache,
        rows: Sequence[int],
        ids: np.ndarray,
        lengths: np.ndarray,
        choice: dict[str, Any] = ...,
    ) -> np.ndarray:
        """As extend, but int32 (len(rows),): the id chosen after each row, on the device. Without
        `choice` that of the largest logit; else its keys are draws, uint64 (len(rows), 3) of seed,
        stream and index of each row's random number, and where they differ from these: temperature
        (0: the largest), top_k (0), top_p (1), and of scores that change: context, int32, the ids
        before each row's next one, one row after another, context_lengths, repetition_penalty (1),
        no_repeat_ngram_size (0), suppress (ids), min_length (of context, up to which they are
        suppressed). ValueError when no token is allowed."""
    def go_on(
        self,
        cache: Cache,
        rows: Sequence[int],
        ids: np.ndarray,
        lengths: np.ndarray,
        most: int,
        ends: Sequence[int],
    ) -> np.ndarray:
        """As next of one id for each row, and again of those that were chosen: int32 (times,
        len(rows)). It ends after `most` times, after one in which an id is one of `ends`, and after
        some milliseconds."""
    def extend_shared(self, cache: Cache, ids: np.ndarray) -> None:
        """Append ids to the prefix common to all rows; only while no row has own tokens."""
