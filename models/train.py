#!/usr/bin/env python3
"""Trains the four tiny models, which differ in their attention alone, and writes them as model files.

    python3 -m venv build/torch && build/torch/bin/pip install torch==2.15.0 transformers==5.24.0
    build/torch/bin/python models/train.py build/corpus.txt

They begin as one: MQA is the case of the other three in which all heads read the same key and value, so its weights,
repeated (MHA, GQA) or in other places (MLA), are theirs. From there each is trained for itself, on the same batches in
the same order. A checkpoint is written every few minutes, and the same command goes on from there. What comes of it:
tokenizer.bin, models/tiny-{mha,mqa,gqa,mla}.safetensors, and in build/train/ the loss curves, the checkpoints and the
models as transformers reads them. Needed by nobody who runs the models: they are in the repository.
"""

import argparse
import hashlib
import json
import math
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import export  # noqa: E402

END = "<|endoftext|>"  # begins and ends a story
VOCAB_SIZE, CONTEXT = 2048, 512
HEADS, HEAD_DIM, LAYERS = 4, 32, 5
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 3 * HEADS * HEAD_DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
KV_HEADS = {"mha": HEADS, "gqa": 2, "mqa": 1}
MLA = {  # a token's latent and rotated key take as many bytes as MQA's value and key
    "q_lora_rank": None,
    "kv_lora_rank": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "rope_interleave": False,
    "first_k_dense_replace": LAYERS,  # no layer has experts
}
VARIANTS = ("mha", "mqa", "gqa", "mla")

TOGETHER, APART = 1305, 150  # steps as one model, and as four
BATCH, WARMUP = 16, 20  # stories, steps
RATE, MATRIX_RATE = 4e-3, 0.02
HELD_OUT = 20  # every 20th story
SAVE_EVERY = 180  # seconds


def create(variant: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if variant == "mla":
        return DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE, **MLA, num_key_value_heads=HEADS))
    return LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=HEAD_DIM, num_key_value_heads=KV_HEADS[variant]))


def read_corpus(path: Path) -> list[str]:
    stories = [text for text in path.read_text(encoding="utf-8").split("\n\n") if text]
    if len(stories) < HELD_OUT * BATCH:
        raise ValueError(
            f"{path}: {len(stories)} stories, {HELD_OUT * BATCH} are needed: make it with models/corpus.py"
        )
    return stories


def train_tokenizer(stories: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def batches(stories: list[list[int]], first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless, from step `first` on: stories of about the same length together, in another order each epoch."""
    per_epoch = len(stories) // BATCH
    for step in range(first, sys.maxsize):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            rng = random.Random(epoch)
            order = sorted(rng.sample(stories, per_epoch * BATCH), key=len)
            order = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
            rng.shuffle(order)
        yield padded(order[place])


def padded(stories: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and the tokens that follow them [B, T]; -100 where nothing is to be learned."""
    longest = max(map(len, stories))
    inputs = torch.tensor([story + [0] * (longest - len(story)) for story in stories])
    targets = torch.tensor([story + [-100] * (longest - len(story)) for story in stories])
    return inputs[:, :-1], targets[:, 1:]


def loss_of(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor, reduction="mean") -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model: PreTrainedModel, stories: list[list[int]]) -> float:
    """A token, END included."""
    nats, tokens = 0.0, 0
    stories = sorted(stories, key=len)
    for i in range(0, len(stories), BATCH):
        inputs, targets = padded(stories[i : i + BATCH])
        nats += loss_of(model, inputs, targets, "sum").item()
        tokens += int((targets >= 0).sum())
    return math.exp(nats / tokens)


class Trainee:
    """A model and its two optimizers: Muon turns a matrix as a whole, the rest is AdamW's."""

    def __init__(self, variant: str):
        self.model = create(variant)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        ]

    def step(self, batch, rate: float) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.model, *batch)
        loss.backward()
        for optimizer, full in zip(self.optimizers, (MATRIX_RATE, RATE), strict=True):
            optimizer.param_groups[0]["lr"] = full * rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def state(self) -> dict:
        return {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def branch(variant: str, trunk: PreTrainedModel) -> Trainee:
    """The MQA model as this variant: MHA and GQA compute the same as it, MLA about the same."""
    trainee = Trainee(variant)
    weights = trainee.model.state_dict()
    for name, value in trunk.state_dict().items():
        if variant == "mla" and "self_attn" in name and "o_proj" not in name:
            continue
        repeated = KV_HEADS[variant] if variant != "mla" and ("k_proj" in name or "v_proj" in name) else 1
        weights[name].copy_(value.repeat(repeated, 1) if repeated > 1 else value)
    if variant == "mla":
        for ours, theirs in zip(trainee.model.model.layers, trunk.model.layers, strict=True):
            begin_mla(ours.self_attn, theirs.self_attn, theirs.input_layernorm.weight)
    return trainee


@torch.no_grad()
def begin_mla(mla, mqa, norm: torch.Tensor) -> None:
    """K is the rotated key, V the latent, from which each head's value is V again. Unlike MQA's V the latent is
    normalised: its mean length comes back with the value. Heads' own keys begin as noise that no query reads yet."""
    queries = mla.q_proj.weight.view(HEADS, 2, HEAD_DIM, -1)  # [H, nope and rope, d, dim]
    queries[:, 0] = 0
    queries[:, 1] = mqa.q_proj.weight.view(HEADS, HEAD_DIM, -1) * math.sqrt(2)  # scores are divided by sqrt(2 d)
    mla.kv_a_proj_with_mqa.weight.copy_(torch.cat([mqa.v_proj.weight, mqa.k_proj.weight]))
    length = (mqa.v_proj.weight * norm).norm(dim=1).square().mean().sqrt()
    mla.kv_b_proj.weight.view(HEADS, 2, HEAD_DIM, -1)[:, 1] = length * torch.eye(HEAD_DIM)  # [H, nope and v, d, latent]


class Training:
    def __init__(self, stories: list[list[int]], folder: Path):
        self.stories, self.folder = stories, folder
        self.corpus = hashlib.sha256(json.dumps(stories).encode()).hexdigest()

    def train(self, name: str, trainees: dict[str, Trainee], first: int, steps: int, rate: Callable[[int], float]):
        """Steps first to first + steps of each, from the checkpoint on; rate: at a step counted from 0."""
        curve = self.load(name, trainees, steps)
        begun, started = len(curve), time.monotonic()
        saved_at = started
        for step, batch in zip(range(begun, steps), batches(self.stories, first + begun), strict=False):
            curve.append([trainee.step(batch, rate(step)) for trainee in trainees.values()])
            now = time.monotonic()
            if now - saved_at > SAVE_EVERY or step + 1 == steps:
                self.save(name, trainees, curve)
                saved_at = now
            if step % 20 == 19:
                left = (now - started) / (step + 1 - begun) * (steps - step - 1) / 60
                mean = (sum(losses) / 20 for losses in zip(*curve[-20:], strict=True))
                losses = "  ".join(f"{name} {loss:.3f}" for name, loss in zip(trainees, mean, strict=True))
                print(f"step {step + 1} of {steps}  loss: {losses}  {left:.0f} min left", file=sys.stderr)

    def save(self, name: str, trainees: dict[str, Trainee], curve: list[list[float]]) -> None:
        checkpoint = {"corpus": self.corpus, "curve": curve, "trainees": {k: t.state() for k, t in trainees.items()}}
        lines = [",".join(trainees), *(",".join(f"{loss:.4f}" for loss in row) for row in curve)]
        part = self.folder / "unfinished"
        try:
            torch.save(checkpoint, part)
            part.replace(self.folder / f"{name}.pt")
            part.write_text("\n".join(lines) + "\n")
            part.replace(self.folder / f"{name}.csv")
        finally:
            part.unlink(missing_ok=True)

    def load(self, name: str, trainees: dict[str, Trainee], steps: int) -> list[list[float]]:
        """The curve so far; the trainees become what they were then."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return []
        try:
            checkpoint = torch.load(path, weights_only=True)
            corpus, curve = checkpoint["corpus"], checkpoint["curve"]
        except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path}: not a checkpoint of train.py: remove it") from error
        if corpus != self.corpus or len(curve) > steps:
            wrong = f"{len(curve)} steps are done, not {steps}" if corpus == self.corpus else "made from another corpus"
            raise ValueError(f"{path}: {wrong}: give another --folder, or remove it")
        for key, trainee in trainees.items():
            trainee.load(checkpoint["trainees"][key])
        return curve


def write_model(name: str, model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """As a Hugging Face folder, and from there by export.py; the tokenizer is the same each time."""
    model.to(torch.bfloat16).save_pretrained(folder / name)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder / name)
    output = ROOT / "models" / f"tiny-{name}.safetensors"
    if export.main([str(folder / name), "-o", str(output)]):
        raise ValueError(f"{folder / name}: was not exported")
    output.with_suffix(".tokenizer.bin").replace(ROOT / "tokenizer.bin")


def run(options: argparse.Namespace) -> None:
    texts = read_corpus(options.corpus)
    options.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([text for i, text in enumerate(texts) if i % HELD_OUT])
    stories = [[*story.ids, 0] for story in tokenizer.encode_batch(texts)]
    learned, held_out = [story for i, story in enumerate(stories) if i % HELD_OUT], stories[::HELD_OUT]
    print(f"{len(learned)} stories, {sum(map(len, learned))} tokens; {len(held_out)} held out", file=sys.stderr)

    training, trunk = Training(learned, options.folder), Trainee("mqa")
    together, apart = options.together, options.apart
    training.train("together", {"mqa": trunk}, 0, together, lambda step: min(1, (step + 1) / WARMUP))
    trainees = {variant: branch(variant, trunk.model) for variant in VARIANTS}
    training.train("apart", trainees, together, apart, lambda step: min((step + 1) / WARMUP, (apart - step) / apart))
    for name, trainee in trainees.items():
        write_model(name, trainee.model, tokenizer, options.folder)
        count = sum(p.numel() for p in trainee.model.parameters())
        print(f"{name}: {count} parameters, held-out perplexity {perplexity(trainee.model.float(), held_out):.2f}")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="what models/corpus.py filter prints")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "train", help="checkpoints and loss curves")
    parser.add_argument("--together", type=positive, default=TOGETHER, metavar="STEPS")
    parser.add_argument("--apart", type=positive, default=APART, metavar="STEPS")
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"train.py: {error.filename or options.folder}: {error.strerror}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
