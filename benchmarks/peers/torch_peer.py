"""torch + transformers (native GLM class) + peft, answering the jobs of benchmarks/worker.py.

    python benchmarks/peers/torch_peer.py DIRECTORY [--whole 28] [--dtype bfloat16] [--threads N]
    python benchmarks/peers/torch_peer.py --cold DIRECTORY

DIRECTORY: a config.json, ChatGLM2's or one of `model_type` glm, gives the shapes; weights are
random. A job's "seconds" are those of `--whole` layers: the last layer is timed on its own inside
the run, forward and backward, and counted for each layer that the directory lacks; the same for
memory. LoRA: rank 8 on q_proj, k_proj and v_proj, which the fused query_key_value is in this class;
batches are padded on the left, as the model's generation wants it. --cold: of a directory that the
job `save` wrote: open it and feed 8 tokens.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sides import Jobs, Peak, glm_fields, memory, serve  # noqa: E402

warnings.filterwarnings("ignore")


def build(directory, dtype):
    """The model with random weights in `dtype`, filled in place: no second copy at any time."""
    c = json.loads((Path(directory) / "config.json").read_text())
    config = transformers.GlmConfig(**glm_fields(c))
    with torch.device("meta"):
        model = transformers.GlmForCausalLM(config).to(dtype)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            else:
                for piece in p.view(-1).split(len(block)):
                    piece.copy_(block[: len(piece)])
    rotary = model.model.rotary_emb  # its buffers were on the meta device
    model.model.rotary_emb = type(rotary)(config)
    return model.eval()


class LayerClock:
    """What the last layer takes: `seconds` forward and backward since `reset`, `kept` bytes that it
    saved for the way back."""

    def __init__(self, model):
        model.layers[-1].register_forward_pre_hook(self.enter)
        model.norm.register_forward_pre_hook(self.leave)
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.reset()

    def reset(self):
        self.seconds, self.kept, self.saving = 0.0, 0, None

    def enter(self, module, args):
        if args[0].requires_grad:
            args[0].register_hook(self.leave_backward)
            self.seen = set(self.weights)
            self.saving = torch.autograd.graph.saved_tensors_hooks(self.save, lambda t: t)
            self.saving.__enter__()
        self.begun = time.perf_counter()

    def save(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.kept += storage.nbytes()
        return tensor

    def leave(self, module, args):
        self.seconds += time.perf_counter() - self.begun
        if self.saving:
            self.saving.__exit__()
            self.saving = None
            args[0].register_hook(self.enter_backward)

    def enter_backward(self, grad):
        self.begun = time.perf_counter()

    def leave_backward(self, grad):
        self.seconds += time.perf_counter() - self.begun


class Worker(Jobs):
    """A model, and one method for each job; each returns what is answered."""

    def __init__(self, directory, dtype, whole):
        self.dtype = dtype
        self.model = build(directory, dtype)
        self.more = max(0, whole - self.model.config.num_hidden_layers)
        self.clock = LayerClock(self.model.model) if self.more else None
        self.vocab = self.model.config.vocab_size
        self.weights = sum(p.nbytes for p in self.model.parameters())
        self.facts = {"weights": self.weights}
        self.base = memory()
        self.mats, self.trained = {}, None

    def ids(self, *shape):
        return torch.randint(3, self.vocab, shape)

    def timed(self, function, *args, **kwargs):
        """(result, {"seconds": of the whole model, "measured"})."""
        if self.clock:
            self.clock.reset()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        measured = time.perf_counter() - start
        missing = self.more * self.clock.seconds if self.clock else 0.0
        return result, {"seconds": measured + missing, "measured": measured}

    def save(self, directory):
        self.model.save_pretrained(directory)
        return {"seconds": 0.0}

    def gemm(self, rows, out, inp, kind, what):
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.bfloat16}[kind]
        if (out, inp, dtype) not in self.mats:
            self.mats[out, inp, dtype] = torch.randn(out, inp).to(dtype)
        w = self.mats[out, inp, dtype]
        x = torch.randn(rows, out if what == "dx" else inp).to(dtype)
        start = time.perf_counter()
        if what == "dx":
            torch.matmul(x, w)
        else:
            torch.nn.functional.linear(x, w)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "measured": seconds}

    @torch.inference_mode()
    def prefill(self, tokens):
        return self.timed(self.model, self.ids(1, tokens), logits_to_keep=1)[1]

    @torch.inference_mode()
    def decode(self, rows, context, steps):
        done = self.model(self.ids(rows, context), use_cache=True, logits_to_keep=1)
        times = []
        for _ in range(steps):
            ids = self.ids(rows, 1)
            done, took = self.timed(
                self.model, ids, past_key_values=done.past_key_values, use_cache=True
            )
            times.append(took)
        seconds = statistics.median(t["seconds"] for t in times)
        return {"seconds": seconds, "measured": sum(t["measured"] for t in times)}

    @torch.inference_mode()
    def predict(self, lengths, new, opening=0, batch=4):
        """The common opening is computed with each prompt, as `generate` does."""
        total = {"seconds": 0.0, "measured": 0.0}
        for begin in range(0, len(lengths), batch):
            ids, mask = self.padded(lengths[begin : begin + batch])
            took = self.continued(ids, mask, new)
            total = {k: total[k] + took[k] for k in total}
        return total

    @torch.inference_mode()
    def generate(self, tokens):
        ids = self.ids(1, 8)
        return self.continued(ids, torch.ones_like(ids), tokens)

    def continued(self, ids, mask, new):
        return self.timed(
            self.model.generate,
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )[1]

    def padded(self, lengths):
        width = max(lengths)
        ids, mask = self.ids(len(lengths), width), torch.ones(len(lengths), width).long()
        for row, n in enumerate(lengths):
            ids[row, : width - n] = 0
            mask[row, : width - n] = 0
        return ids, mask

    def lora(self, lengths, labelled, checkpointing, steps=1, scored=False):
        """scored: logits at the labelled rows only, which a training loop of one's own can ask
        for."""
        import peft

        if self.trained is None:
            config = peft.LoraConfig(
                r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"]
            )
            self.trained = peft.get_peft_model(self.model, config)
            self.trained.enable_input_require_grads()
            parameters = [p for p in self.trained.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=5e-5)
        model = self.trained.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        ids, mask = self.padded(lengths)
        labels = torch.full_like(ids, -100)
        labels[:, -labelled:] = ids[:, -labelled:]
        rows = dict(logits_to_keep=labelled + 1 if scored else 0)  # the first is ahead of them
        rows["labels"] = labels[:, -labelled - 1 :] if scored else labels

        def run():
            for _ in range(steps):
                model(ids, attention_mask=mask, use_cache=False, **rows).loss.backward()
                trained = [p for p in model.parameters() if p.requires_grad]
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()

        gc.collect()
        with Peak() as peak:
            _, took = self.timed(run)
        took = {k: seconds / steps for k, seconds in took.items()}
        model.eval()
        beyond = peak.bytes - self.base
        if self.clock:
            beyond += self.more * self.clock.kept // steps
        return took | {"tokens": sum(lengths), "beyond_weights": beyond}


def cold(directory):
    """Open a directory and feed 8 tokens: what a user waits for after starting Python."""
    model = transformers.GlmForCausalLM.from_pretrained(directory, dtype="auto")
    with torch.inference_mode():
        model(torch.arange(3, 11)[None], logits_to_keep=1)


def fast_dtype():
    """bfloat16 where the processor multiplies it; torch's fallback elsewhere takes minutes."""
    with open("/proc/cpuinfo") as f:
        flags = f.read()
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--whole", type=int, default=28)
    parser.add_argument("--dtype", default=fast_dtype(), choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if args.cold:
        return cold(args.directory)
    serve(Worker, args.directory, getattr(torch, args.dtype), args.whole)


if __name__ == "__main__":
    main()
