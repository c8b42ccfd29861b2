"""Train a small vision transformer on a folder of labelled images, with or without register tokens.

Question: does an image encoder grow sinks and outlier tokens at this size, and do registers take them over?
Design: DINOv2's architecture (Oquab et al. 2024; with registers, Darcet et al. 2024) from scratch on the
classes of the folder, AdamW with a warm-up and a cosine decay, random crops and flips. A tenth of the images,
chosen by a hash of their names, is held out. Checkpoints are in the published format, which `ss.load_vision`
reads; a killed run goes on where it stopped.

    python experiments/train_vit.py --images FOLDER --out runs/vit
    python experiments/train_vit.py --images FOLDER --out runs/vit-registers --registers 4
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTImageProcessorPil,
)

import spectral_sinks as ss

MEAN, STD = 0.5, 0.25
HELD_OUT = 10
"""One image in so many is held out."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; written beside them."""

    images: Path
    """Folder with one folder of images for each class."""
    out: Path
    """Folder for checkpoints, log and the final model."""
    registers: int = 0
    width: int = 128
    layers: int = 6
    heads: int = 4
    patch: int = 4
    """Side of a patch in pixels."""
    side: int = 32
    """Side to which images are resized."""
    batch: int = 64
    steps: int = 4000
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    seed: int = 0
    checkpoints: tuple[int, ...] = (0, 50, 100, 200, 400, 800, 1600)
    """Steps that are kept, beside the last."""


def held_out(name: str) -> bool:
    """Whether an image is kept for evaluation, by its name alone."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def read(recipe: Recipe) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Pixels `[images, 3, side, side]` (uint8), classes, names of the images and of the classes."""
    found = ss.images(recipe.images, broken="refuse")
    if found.labels is None:
        raise ss.InputError(f"{recipe.images} has no folder for each class")
    pixels = [np.asarray(image.resize((recipe.side, recipe.side))) for image in tqdm(found, mininterval=5)]
    data = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return data, torch.as_tensor(found.labels), list(found.names), list(found.label_names)


def build(recipe: Recipe, classes: list[str]) -> Any:
    """The untrained model."""
    torch.manual_seed(recipe.seed)
    sizes: dict[str, Any] = {
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "mlp_ratio": 4,
        "image_size": recipe.side,
        "patch_size": recipe.patch,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }
    if recipe.registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=recipe.registers)
        return Dinov2WithRegistersForImageClassification(config)
    return Dinov2ForImageClassification(Dinov2Config(**sizes))


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crops shifted by up to an eighth of the side, half of them mirrored; normalised."""
    side = images.shape[-1]
    most = side // 8
    padded = torch.nn.functional.pad(normalised(images), [most] * 4)
    top, left = torch.randint(2 * most + 1, (2, len(images)), generator=generator)
    flips = torch.rand(len(images), generator=generator) < 0.5
    crops = [x[:, t : t + side, s : s + side] for x, t, s in zip(padded, top, left, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


def train(recipe: Recipe) -> Any:
    """The trained model, in evaluation mode; checkpoints and a log in `recipe.out`."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    data, labels, names, classes = read(recipe)
    apart = torch.tensor([held_out(name) for name in names])
    listed = [name for name, kept in zip(names, apart, strict=True) if kept]
    (recipe.out / "heldout.txt").write_text("\n".join(listed) + "\n")
    model = build(recipe, classes)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95)
    )

    def rate(step: int) -> float:
        share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return min((step + 1) / recipe.warmup, 0.5 * (1 + float(np.cos(np.pi * max(0.0, share)))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    state, log, done = recipe.out / "last.pt", recipe.out / "log.jsonl", 0
    if state.is_file():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["generator"])
        done = saved["step"]
    taught = (~apart).nonzero().flatten()
    bar = tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, mininterval=5)
    for step in bar:
        if step in recipe.checkpoints:
            keep(model, recipe, recipe.out / f"step-{step:06d}")
        chosen = taught[torch.randint(len(taught), (recipe.batch,), generator=generator)]
        model.train()
        logits = model(pixel_values=augmented(data[chosen], generator)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
            accuracy = evaluate(model, data[apart], labels[apart])
            bar.set_postfix(loss=float(loss.detach()), accuracy=accuracy)
            with log.open("a") as file:
                line = {"step": step + 1, "loss": float(loss.detach()), "accuracy": accuracy}
                file.write(json.dumps(line) + "\n")
            parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
            torch.save(
                {"step": step + 1, "generator": generator.get_state()}
                | {name: part.state_dict() for name, part in parts.items()},
                state,
            )
    keep(model, recipe, recipe.out / "model")
    written = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(recipe).items()}
    (recipe.out / "recipe.json").write_text(json.dumps(written, indent=1) + "\n")
    return model.eval()


def keep(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write a checkpoint with its image processor."""
    model.save_pretrained(folder)
    size = {"height": recipe.side, "width": recipe.side}
    ViTImageProcessorPil(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)


@torch.no_grad()
def evaluate(model: Any, data: Tensor, labels: Tensor) -> float:
    """Accuracy on whole images."""
    model.eval()
    parts = zip(data.split(250), labels.split(250), strict=True)
    right = [model(pixel_values=normalised(x)).logits.argmax(-1) == y for x, y in parts]
    return float(torch.cat(right).float().mean())


def main(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    train(recipe)


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
