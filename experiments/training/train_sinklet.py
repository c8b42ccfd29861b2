"""Train sinklet, the language model that ships with the package, and log the birth of its sink.

Question: when does a small Llama grow an attention sink, and is the residual that carries it dark?
Design: a byte-level BPE tokenizer and a Llama are trained from scratch on any folder of text. Every window
opens with BOS. The optimiser is AdamW with a warm-up, a constant phase and a linear decay. With its
checkpoints, a killed run continues exactly where it stopped, and the run can be studied later.

    python experiments/training/train_sinklet.py --text FOLDER --out runs/sinklet
    python experiments/training/train_sinklet.py --text FOLDER --out runs/sinklet --steps 800 --width 64
"""

import gzip
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import eager_mask


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights, which are written to the folder of the model."""

    text: Path
    """Folder of training text: .jsonl, .jsonl.gz (field `text`) or .txt files.
    Files with `heldout` in their names are kept for evaluation."""
    out: Path
    """Folder for tokens, checkpoints, log and the final model."""
    width: int = 128
    layers: int = 6
    heads: int = 4
    feed_forward: int = 384
    vocabulary: int = 2048
    window: int = 256
    """Number of tokens in a window, including BOS. This is also the context of the model."""
    batch: int = 16
    short: float = 0.0
    """Share of the steps, at the start, that use twice as many windows of half the length.
    More windows then open with BOS, and the sink grows stronger than with full windows from the start."""
    steps: int = 11000
    learning_rate: float = 3e-3
    warmup: int = 200
    decay: float = 0.25
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.1
    first: float = 1.0
    """Weight of the loss at position 0, which is the prediction from BOS alone.
    A weight of 1 / 16 makes its share of the loss that of a window of 4096 tokens.
    At full weight, part of BOS stays in the head of the spectrum to make this prediction."""
    bos: bool = True
    """Whether every window contains BOS. Without it, windows start anywhere in the text."""
    position: int = 0
    """Position of BOS in the window: 0, or a later one, at which it is not predicted."""
    softmax: Literal["plain", "off-by-one", "learned", "no-first"] = "plain"
    """Addition to the softmax of attention: none, a logit of 0, or a learned logit for each head.
    With no-first, only the first query sees the first key, so the model loses its sink."""
    start: Path | None = None
    """Folder of a model to fine-tune. Without it, the initial weights are random."""
    seed: int = 0
    evaluate_every: int = 250
    threads: int = 1
    compile: bool = True
    """Compile the loss, which takes a minute or two at the start and then runs several times faster."""


def documents(folder: Path, heldout: bool) -> Iterator[str]:
    """Yield the texts of a folder in the order of file names, either for training or held out."""
    for path in sorted(folder.iterdir()):
        if ("heldout" in path.name) is not heldout:
            continue
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
                yield from (json.loads(line)["text"] for line in lines)
        elif path.suffix == ".txt":
            yield path.read_text()


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with one special token, <bos>, which the tokenizer puts before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents(recipe.text, heldout=False), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", model_max_length=recipe.window)


def tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, heldout: bool) -> np.ndarray:
    """Return all documents as one stream of ids, separated by blank lines; it is cached in the out folder."""
    cache = recipe.out / f"tokens-{'heldout' if heldout else 'train'}.npy"
    if not cache.exists():
        separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        parts = [
            np.array(tokenizer(text, add_special_tokens=False)["input_ids"] + separator, np.uint16)
            for text in tqdm(documents(recipe.text, heldout), desc="tokenize", unit="doc")
        ]
        if not parts:
            raise SystemExit(f"no {'held-out' if heldout else 'training'} text in {recipe.text}")
        np.save(cache, np.concatenate(parts))
    return np.load(cache, mmap_mode="r")


def sample(stream: np.ndarray, recipe: Recipe, step: int) -> torch.Tensor:
    """Return the batch of one step, `batch x window`.

    It depends only on seed and step, so a resumed run has the same batches.
    """
    half = 2 if step < recipe.short * recipe.steps else 1
    span = recipe.window // half - recipe.bos
    draw = np.random.default_rng((recipe.seed, step))
    starts = draw.integers(len(stream) - span, size=recipe.batch * half)
    rows = np.stack([stream[start : start + span] for start in starts]).astype(np.int64)
    return torch.from_numpy(with_bos(rows, recipe))


def with_bos(rows: np.ndarray, recipe: Recipe) -> np.ndarray:
    return np.insert(rows, recipe.position, 0, axis=1) if recipe.bos else rows


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, a constant phase, a linear decay to zero."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min((step + 1) / recipe.warmup, 1.0, left)


def build(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    attention = {"plain": "eager", "no-first": NO_FIRST}.get(recipe.softmax, WITH_SINK)
    if recipe.start:
        return LlamaForCausalLM.from_pretrained(recipe.start, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.window,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
        ),
        attn_implementation=attention,
    )
    if attention == WITH_SINK:
        for layer in model.model.layers:
            logits = torch.zeros(recipe.heads)
            layer.self_attn.sinks = torch.nn.Parameter(logits, requires_grad=recipe.softmax == "learned")
    return model


def attention_with_sink(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute eager attention with an additional logit per head in its softmax, which has no value."""
    scores = query @ key.transpose(2, 3) * options["scaling"] + mask[..., : key.shape[2]]
    sinks = module.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_without_first(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute eager attention in which only the first query sees the first key."""
    scores = query @ key.transpose(2, 3) * options["scaling"] + mask[..., : key.shape[2]]
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    hidden[1:, 0] = True
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


WITH_SINK, NO_FIRST = "eager_with_sink", "eager_without_first"
for _name, _attention in ((WITH_SINK, attention_with_sink), (NO_FIRST, attention_without_first)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, eager_mask)


def optimiser(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def birth(model: LlamaForCausalLM, ids: torch.Tensor, recipe: Recipe) -> dict[str, float | list[float]]:
    """Measure the held-out NLL and the sink at the position of BOS (definitions: spectral_sinks.measure)."""
    model.eval()
    sink = recipe.position
    nll = float(losses_of(model(ids[:, :-1]).logits, ids, recipe).mean())
    out = model(ids[:, :64], output_attentions=True, output_hidden_states=True)
    alpha = torch.stack(
        [a[:, :, sink:, sink].mean(-1) for a in out.attentions], 1
    )  # documents, layers, heads
    dark = torch.linalg.svd(model.lm_head.weight.double(), full_matrices=False)[2]
    dark = dark[-round(0.05 * dark.shape[0]) :].T.float()
    ratio, share, others = [], [], []
    for h in out.hidden_states[1:-1]:  # exits of all layers except the last, which is already normed
        norm = h.norm(dim=-1)
        energy = (h @ dark).pow(2).sum(-1) / norm.pow(2)
        rest = torch.arange(norm.shape[1]) != sink
        ratio.append(float((norm[:, sink] / norm[:, rest].median(dim=1).values).mean()))
        share.append(float(energy[:, sink].mean()))
        others.append(float(energy[:, rest].mean()))
    model.train()
    return {
        "heldout_nll": nll,
        "sink_rate": float((alpha > 0.3).float().mean()),
        "alpha": alpha.mean((0, 2)).tolist(),
        "norm_ratio": ratio,
        "dark_share": share,
        "other_dark_share": others,
    }


def losses_of(logits: torch.Tensor, ids: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the NLL by window and predicted token, without the prediction of BOS itself."""
    nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    if not recipe.bos or recipe.position == 0:
        return nll
    return torch.cat([nll[:, : recipe.position - 1], nll[:, recipe.position :]], dim=1)


def save(state: dict[str, object], path: Path) -> None:
    """Save under a temporary name, then rename, so that a killed run never leaves half a checkpoint."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def main(recipe: Recipe) -> None:
    # the tokenizer, and the tokens of the training text and of the held-out windows
    torch.set_num_threads(recipe.threads)
    recipe.out.mkdir(parents=True, exist_ok=True)
    folder = recipe.out / "tokenizer"
    if not folder.exists():
        train_tokenizer(recipe).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    train, heldout = (tokens(recipe, tokenizer, part) for part in (False, True))
    span = recipe.window - recipe.bos
    rows = heldout[: len(heldout) // span * span].reshape(-1, span)
    rows = rows[:: max(1, len(rows) // 64)][:64].astype(np.int64)
    held = torch.from_numpy(with_bos(rows, recipe))

    # the model and the optimiser, as the last checkpoint left them
    model = build(recipe)
    adam = optimiser(model, recipe)
    first, log = 0, recipe.out / "log.jsonl"
    checkpoint = recipe.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        first = state["step"]
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= first]
        log.write_text("".join(line + "\n" for line in kept))

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        nll = losses_of(logits, ids, recipe)
        return nll.mean() - (1 - recipe.first) * nll[:, 0].mean() / nll.shape[1]

    compiled = torch.compile(loss_of) if recipe.compile else loss_of
    losses: list[float] = []
    began = time.monotonic()
    for step in tqdm(range(first, recipe.steps + 1), initial=first, total=recipe.steps, mininterval=10):
        # evaluate and save, then take a step
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            row = {"step": step, "tokens": step * recipe.batch * recipe.window}
            row |= {"train_nll": float(np.mean(losses)) if losses else math.nan} | birth(model, held, recipe)
            row |= {"seconds": round(time.monotonic() - began, 1)}
            losses = []
            if step > first or step == 0:
                with log.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
            save({"model": model.state_dict(), "adam": adam.state_dict(), "step": step}, checkpoint)
            save({"model": model.state_dict(), "step": step}, recipe.out / f"step-{step:06d}.pt")
        if step == recipe.steps:
            break
        for group in adam.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = compiled(sample(train, recipe, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.item())
    # sink logits are stored separately, since a Llama has no such parameter
    final = recipe.out / "model"
    if recipe.softmax in ("off-by-one", "learned"):
        final.mkdir(exist_ok=True)
        attention: list[Any] = [layer.self_attn for layer in model.model.layers]
        sinks = torch.stack([part.sinks.detach() for part in attention])
        save_file({"sink_logits": sinks}, final / "sinks.safetensors")
        for part in attention:
            del part.sinks
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    described = {key: value for key, value in asdict(recipe).items() if not isinstance(value, Path)}
    (final / "recipe.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
