"""Train the Bigram-Backcopy model, whose attention head has one known job and a sink (Guo et al. 2024).

Question: do the tools find what is known beforehand? After one of three triggers the text repeats the token
before it; after any other token it follows a Markov chain, which needs no attention. So the head is active on
triggers and dormant, on BOS, elsewhere; and ReLU attention, which may sum to nothing, needs no sink.
Design: text drawn without end from a random chain; one head per layer, one or three layers. A Llama that
trains in seconds, or, with `--architecture gpt2`, the paper's own architecture and initialisation, in which
three layers grow the peak of the residual norm (`backcopy.py`). Both smaller than the paper's (width 256,
batches of 512 x 256 tokens, 10 000 steps).

    python experiments/training/train_backcopy.py --out runs/bigram
    python experiments/training/train_backcopy.py --out runs/relu --attention relu  # loads by folder
    python experiments/training/train_backcopy.py --out runs/three --architecture gpt2 --layers 3 \
        --schedule constant --width 128 --batch 32 --triggers 0.3 --steps 5000
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

BOS, TRIGGERS = 0, (1, 2, 3)
RELU = "relu"
RATES = {("llama", "adamw"): 0.03, ("llama", "sgd"): 0.3, ("gpt2", "adamw"): 1e-3, ("gpt2", "sgd"): 0.03}

Model = LlamaForCausalLM | GPT2LMHeadModel


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; written beside them."""

    out: Path
    """Folder for the model."""
    architecture: Literal["llama", "gpt2"] = "llama"
    """`gpt2` is the paper's: LayerNorm, learned positions, ReLU MLPs, no biases, embeddings of variance 1."""
    layers: Literal[1, 3] = 1
    optimiser: Literal["adamw", "sgd"] = "adamw"
    attention: Literal["softmax", "relu"] = "softmax"
    learning_rate: float | None = None
    """Where not given: Llama 0.03 by AdamW, 0.3 by SGD (momentum 0.9); GPT-2 0.001 and 0.03."""
    schedule: Literal["decay", "constant"] = "decay"
    """`decay`: warm-up, decay over the last quarter, gradients clipped; `constant`: none of it (paper)."""
    weight_decay: float = 1e-4
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
    checkpoints: tuple[int, ...] = ()
    """Steps after which the weights are kept too, in `step-NNNNNN`; 0 is before the first."""


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


def build(recipe: Recipe) -> Model:
    """The untrained model."""
    torch.manual_seed(recipe.seed)
    model = llama(recipe) if recipe.architecture == "llama" else gpt2(recipe)
    model.set_attn_implementation(RELU if recipe.attention == "relu" else "eager")
    return model


def llama(recipe: Recipe) -> LlamaForCausalLM:
    """Rotary positions, RMSNorm and SwiGLU, as transformers initialises it."""
    return LlamaForCausalLM(
        LlamaConfig(
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
    )


def gpt2(recipe: Recipe) -> GPT2LMHeadModel:
    """The paper's: embeddings drawn from N(0, 1), matrices uniform within 1 / sqrt(inputs), no biases."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=recipe.vocabulary,
            n_positions=recipe.window,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=1,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=None,
        )
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
        elif isinstance(module, Conv1D | torch.nn.Linear):
            inputs = module.weight.shape[0 if isinstance(module, Conv1D) else 1]
            torch.nn.init.uniform_(module.weight, -(inputs**-0.5), inputs**-0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias).requires_grad_(False)
    return model


def optimiser(model: Model, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum."""
    rate = recipe.learning_rate or RATES[recipe.architecture, recipe.optimiser]
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=recipe.weight_decay)


def losses_of(model: Model, ids: Tensor) -> Tensor:
    """NLL of every token but BOS, `windows x (tokens - 1)`."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def train(recipe: Recipe) -> Model:
    """The trained model, in evaluation mode."""
    model, moves = build(recipe), chain(recipe)
    steps = optimiser(model, recipe)
    decays = recipe.schedule == "decay"

    def share(step: int) -> float:
        return min(1.0, (step + 1) / 50, (recipe.steps - step) / (0.25 * recipe.steps)) if decays else 1.0

    rise = torch.optim.lr_scheduler.LambdaLR(steps, share)
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in tqdm(range(recipe.steps), mininterval=5):
        if step in recipe.checkpoints:
            save(model, recipe.out / f"step-{step:06d}")
        losses_of(model, text(moves, recipe.batch, recipe.window, generator)).mean().backward()
        if decays:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        rise.step()
        steps.zero_grad(set_to_none=True)
    return model.eval()


def save(model: Model, folder: Path) -> None:
    """Write a folder that `ss.load` opens."""
    if model.config._attn_implementation == RELU:  # else whoever loads it would take it for a softmax
        model.config.attn_implementation = RELU
    model.save_pretrained(folder)


@torch.no_grad()
def evaluate(model: Model, recipe: Recipe) -> dict[str, float]:
    """Held-out NLL after triggers, which copying brings to 0, and elsewhere, above the chain's own."""
    moves = chain(recipe)
    ids = text(moves, 64, recipe.window, torch.Generator().manual_seed(recipe.seed + 2**20))
    losses, copies = losses_of(model, ids), is_trigger(ids[:, :-1])
    own = -moves[ids[:, :-1], ids[:, 1:]].log()
    return {
        "nll_after_triggers": float(losses[copies].mean()),
        "excess_nll_elsewhere": float((losses - own)[~copies].mean()),
    }


def described(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `recipe.json` holds it: all but where the model is."""
    return json.loads(json.dumps({key: value for key, value in asdict(recipe).items() if key != "out"}))


def finished(recipe: Recipe) -> bool:
    """Whether the folder holds the model of this recipe."""
    file = recipe.out / "recipe.json"
    return file.exists() and described(recipe).items() <= json.loads(file.read_text()).items()


def main(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    model = train(recipe)
    save(model, recipe.out)
    said = described(recipe) | evaluate(model, recipe)
    (recipe.out / "recipe.json").write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said))


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
