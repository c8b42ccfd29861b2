"""Train the Bigram-Backcopy model, whose attention head has one known job and a sink (Guo et al. 2024).

Question: do the tools find what is known beforehand? After one of three triggers, the text repeats the token
before the trigger. After any other token, it follows a Markov chain, which needs no attention. The head
should thus be active on triggers, and dormant with its attention on BOS elsewhere. ReLU attention, whose
weights may sum to zero, needs no sink.
Design: the text is drawn from a random chain without end. The model has one head per layer, and one or three
layers. It is a Llama that trains in seconds, or, with `--architecture gpt2`, the architecture and
initialisation of the paper, in which three layers grow the peak of the residual norm (`backcopy.py`). Both
are smaller than the model of the paper (width 256, batches of 512 x 256 tokens, 10 000 steps).

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
    """All settings that determine the weights, which are written to the folder of the model."""

    out: Path
    """Folder for the model."""
    architecture: Literal["llama", "gpt2"] = "llama"
    """`gpt2` is that of the paper: LayerNorm, learned positions, ReLU MLPs, no biases, N(0, 1) embeddings."""
    layers: Literal[1, 3] = 1
    optimiser: Literal["adamw", "sgd"] = "adamw"
    attention: Literal["softmax", "relu"] = "softmax"
    learning_rate: float | None = None
    """By default 0.03 (AdamW) and 0.3 (SGD, momentum 0.9) for Llama, and 0.001 and 0.03 for GPT-2."""
    schedule: Literal["decay", "constant"] = "decay"
    """`decay` has a warm-up, a decay over the last quarter, and clipped gradients.
    The value `constant` has none of them, like the paper."""
    weight_decay: float = 1e-4
    width: int = 32
    vocabulary: int = 32
    """Number of tokens: BOS, three triggers, and by default 28 others."""
    triggers: float = 0.15
    """Probability of a trigger after any token that follows the chain."""
    window: int = 64
    """Number of tokens in a window, including BOS."""
    batch: int = 16
    steps: int = 900
    seed: int = 0
    checkpoints: tuple[int, ...] = ()
    """Numbers of steps after which the weights are also saved, in `step-NNNNNN`; 0 is the untrained model."""


def chain(recipe: Recipe) -> Tensor:
    """Return transition probabilities, `vocabulary x vocabulary`.

    Each token has a few likely successors, and BOS is never one.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    plain = torch.rand(recipe.vocabulary, recipe.vocabulary, generator=generator).pow(-1.0)
    plain[:, : len(TRIGGERS) + 1] = 0
    moves = (1 - recipe.triggers) * plain / plain.sum(1, keepdim=True)
    moves[:, list(TRIGGERS)] = recipe.triggers / len(TRIGGERS)
    moves[BOS, list(TRIGGERS)] = 0  # there is no token to copy yet
    return moves / moves.sum(1, keepdim=True)


def text(moves: Tensor, windows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw windows of token ids, `windows x tokens`, each of which opens with BOS."""
    ids = torch.full((windows, tokens), BOS)
    copies = is_trigger(torch.arange(len(moves)))
    for i in range(1, tokens):
        last = ids[:, i - 1]
        drawn = torch.multinomial(moves[last], 1, generator=generator).squeeze(1)
        ids[:, i] = torch.where(copies[last], ids[:, max(i - 2, 0)], drawn)
    return ids


def is_trigger(ids: Tensor) -> Tensor:
    """Return a mask of the tokens that are triggers."""
    return torch.isin(ids, torch.tensor(TRIGGERS))


def relu_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention with weights `relu(score) / number of visible keys`, whose rows need not sum to 1.

    The signature and the result are those of an attention function of transformers.
    """
    seen = mask[..., : key.shape[2]] == 0
    scores = query @ key.transpose(2, 3) * options["scaling"]
    weights = torch.where(seen, scores.relu() / seen.sum(-1, keepdim=True), 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(RELU, relu_attention)
AttentionMaskInterface.register(RELU, eager_mask)


def build(recipe: Recipe) -> Model:
    """Return the untrained model."""
    torch.manual_seed(recipe.seed)
    model = llama(recipe) if recipe.architecture == "llama" else gpt2(recipe)
    model.set_attn_implementation(RELU if recipe.attention == "relu" else "eager")
    return model


def llama(recipe: Recipe) -> LlamaForCausalLM:
    """Return a Llama (rotary positions, RMSNorm, SwiGLU) as transformers initialises it."""
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
    """Return the model of the paper.

    Embeddings are drawn from N(0, 1) and matrices uniformly within 1 / sqrt(inputs). There are no biases.
    """
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
    """Return AdamW, or SGD with momentum."""
    rate = recipe.learning_rate or RATES[recipe.architecture, recipe.optimiser]
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=recipe.weight_decay)


def losses_of(model: Model, ids: Tensor) -> Tensor:
    """Return the NLL of every token except BOS, `windows x (tokens - 1)`."""
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def train(recipe: Recipe) -> Model:
    """Train the model, save its checkpoints, and return it in evaluation mode."""
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
    if model.config._attn_implementation == RELU:  # otherwise it would be loaded with softmax attention
        model.config.attn_implementation = RELU
    model.save_pretrained(folder)


@torch.no_grad()
def evaluate(model: Model, recipe: Recipe) -> dict[str, float]:
    """Measure the held-out NLL after triggers, and its excess over the chain's own NLL elsewhere.

    A model that copies has an NLL of 0 after triggers.
    """
    moves = chain(recipe)
    ids = text(moves, 64, recipe.window, torch.Generator().manual_seed(recipe.seed + 2**20))
    losses, copies = losses_of(model, ids), is_trigger(ids[:, :-1])
    own = -moves[ids[:, :-1], ids[:, 1:]].log()
    return {
        "nll_after_triggers": float(losses[copies].mean()),
        "excess_nll_elsewhere": float((losses - own)[~copies].mean()),
    }


def described(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as it is stored in `recipe.json`, without the folder."""
    return json.loads(json.dumps({key: value for key, value in asdict(recipe).items() if key != "out"}))


def finished(recipe: Recipe) -> bool:
    """Test whether the folder holds the model of this recipe."""
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
