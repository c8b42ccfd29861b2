"""Train the Bigram-Backcopy model, whose attention head has one known job and a sink (Guo et al. 2024).

Question: do the tools find what is known beforehand? After one of three triggers the text repeats the token
before it; after any other token it follows a Markov chain, which needs no attention. So the head is active on
triggers and dormant, on BOS, elsewhere; and ReLU attention, which may sum to nothing, needs no sink.
Design: text drawn without end from a random chain; a Llama of one head and one or three layers. Smaller than
the paper's (width 256, 10 000 steps), so that it trains in seconds.

    python experiments/train_backcopy.py --out runs/backcopy
    python experiments/train_backcopy.py --out runs/relu --attention relu   # ss.load knows it by its folder
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask

BOS, TRIGGERS = 0, (1, 2, 3)
RELU = "relu"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; written beside them."""

    out: Path
    """Folder for the model."""
    layers: Literal[1, 3] = 1
    optimiser: Literal["adamw", "sgd"] = "adamw"
    attention: Literal["softmax", "relu"] = "softmax"
    learning_rate: float | None = None
    """0.03 for AdamW and 0.3 for SGD (momentum 0.9) where not given."""
    width: int = 32
    vocabulary: int = 32
    """BOS, three triggers and 28 other tokens."""
    triggers: float = 0.15
    """Probability of a trigger after any token that follows the chain."""
    window: int = 64
    """Tokens per window, BOS included."""
    batch: int = 16
    steps: int = 900
    seed: int = 0


def chain(recipe: Recipe) -> Tensor:
    """Transition probabilities, `vocabulary x vocabulary`: a token has a few likely successors, never BOS."""
    generator = torch.Generator().manual_seed(recipe.seed)
    plain = torch.rand(recipe.vocabulary, recipe.vocabulary, generator=generator).pow(-1.0)
    plain[:, : len(TRIGGERS) + 1] = 0
    moves = (1 - recipe.triggers) * plain / plain.sum(1, keepdim=True)
    moves[:, list(TRIGGERS)] = recipe.triggers / len(TRIGGERS)
    moves[BOS, list(TRIGGERS)] = 0  # nothing to copy yet
    return moves / moves.sum(1, keepdim=True)


def text(moves: Tensor, windows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Windows of token ids, `windows x tokens`, each opened by BOS."""
    ids = torch.full((windows, tokens), BOS)
    for i in range(1, tokens):
        last = ids[:, i - 1]
        drawn = torch.multinomial(moves[last], 1, generator=generator).squeeze(1)
        ids[:, i] = torch.where(is_trigger(last), ids[:, max(i - 2, 0)], drawn)
    return ids


def is_trigger(ids: Tensor) -> Tensor:
    """Which tokens are triggers."""
    return torch.isin(ids, torch.tensor(TRIGGERS))


def relu_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Weights `relu(score) / number of keys seen`: rows sum to what they like, also to nothing."""
    seen = mask[..., : key.shape[2]] == 0
    scores = query @ key.transpose(2, 3) * options["scaling"]
    weights = torch.where(seen, scores.relu() / seen.sum(-1, keepdim=True), 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(RELU, relu_attention)
AttentionMaskInterface.register(RELU, eager_mask)


def build(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=recipe.window,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
    )
    config._attn_implementation = RELU if recipe.attention == "relu" else "eager"
    return LlamaForCausalLM(config)


def optimiser(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum."""
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate or 0.03, betas=(0.9, 0.99))
    return torch.optim.SGD(model.parameters(), lr=recipe.learning_rate or 0.3, momentum=0.9)


def losses_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """NLL of every token but BOS, `windows x (tokens - 1)`."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def train(recipe: Recipe) -> LlamaForCausalLM:
    """The trained model, in evaluation mode."""
    model, moves = build(recipe), chain(recipe)
    steps = optimiser(model, recipe)
    rise = torch.optim.lr_scheduler.LambdaLR(
        steps, lambda step: min(1.0, (step + 1) / 50, (recipe.steps - step) / (0.25 * recipe.steps))
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in tqdm(range(recipe.steps), mininterval=5):
        losses_of(model, text(moves, recipe.batch, recipe.window, generator)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        rise.step()
        steps.zero_grad(set_to_none=True)
    return model.eval()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, recipe: Recipe) -> dict[str, float]:
    """Held-out NLL after triggers, which copying brings to 0, and elsewhere, above the chain's own."""
    moves = chain(recipe)
    ids = text(moves, 64, recipe.window, torch.Generator().manual_seed(recipe.seed + 2**20))
    losses, copies = losses_of(model, ids), is_trigger(ids[:, :-1])
    own = -moves[ids[:, :-1], ids[:, 1:]].log()
    return {
        "nll_after_triggers": float(losses[copies].mean()),
        "excess_nll_elsewhere": float((losses - own)[~copies].mean()),
    }


def main(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    model = train(recipe)
    if recipe.attention == "relu":  # else whoever loads the folder would take it for a softmax
        model.config.attn_implementation = RELU
    model.save_pretrained(recipe.out)
    described = {key: value for key, value in asdict(recipe).items() if key != "out"} | evaluate(
        model, recipe
    )
    (recipe.out / "recipe.json").write_text(json.dumps(described, indent=1) + "\n")
    print(json.dumps(described))


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
