"""Train a small vision transformer on a folder of labelled images, with or without register tokens.

Question: does an image encoder of this size grow sinks and outlier tokens, and do registers take them over?
Design: the architecture of DINOv2 (Oquab et al. 2024; with registers, Darcet et al. 2024) is trained from
scratch on the classes of the folder, by AdamW with a warm-up and a cosine decay, on random crops and flips. A
tenth of the images is held out, by a hash of their names. Checkpoints have the published format, and a killed
run continues.

    python experiments/training/train_vit.py --images FOLDER --out runs/vit --registers 4
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from PIL.Image import Resampling
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
"""One image in this many is held out."""


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights, which are written to the folder of the run."""

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
    """Side of an image in pixels."""
    batch: int = 64
    steps: int = 4000
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    seed: int = 0
    checkpoints: tuple[int, ...] = (0, 50, 100, 200, 400, 800, 1600)
    """Numbers of steps after which a checkpoint is kept, besides the last one."""
    evaluate_every: int = 200
    """Number of steps between lines of the log. A run can be resumed from each of them."""


def held_out(name: str) -> bool:
    """Decide from the name alone whether an image is kept for evaluation."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def read(recipe: Recipe) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Read pixels `[images, 3, side, side]` (uint8), classes, names of images, and names of classes.

    Raises InputError for images without classes, and for a broken image.
    """
    found = ss.images(recipe.images, broken="refuse")
    if found.labels is None:
        raise ss.InputError(
            f"{recipe.images}: expected one folder of images for each class, and at least two classes"
        )
    size = (recipe.side, recipe.side)
    pixels = [np.asarray(image.resize(size, Resampling.BILINEAR)) for image in tqdm(found, mininterval=5)]
    data = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return data, torch.as_tensor(found.labels), list(found.names), list(found.label_names)


def build(recipe: Recipe, classes: list[str]) -> Any:
    """Return the untrained model.

    Registers start from different random values, since zeros would stay equal. All other weights are the same
    as in a model without registers.
    """
    torch.manual_seed(recipe.seed)
    sizes: dict[str, Any] = {
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "image_size": recipe.side,
        "patch_size": recipe.patch,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: index for index, name in enumerate(classes)},
    }
    if recipe.registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=recipe.registers)
        model: Any = Dinov2WithRegistersForImageClassification(config)
        torch.nn.init.trunc_normal_(model.base_model.embeddings.register_tokens, std=config.initializer_range)
        return model
    return Dinov2ForImageClassification(Dinov2Config(**sizes))


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return normalised crops, shifted by up to an eighth of the side, of which half are mirrored."""
    side = images.shape[-1]
    most = side // 8
    padded = torch.nn.functional.pad((images.float() / 255 - MEAN) / STD, [most] * 4)
    top, left = torch.randint(2 * most + 1, (2, len(images)), generator=generator)
    flips = torch.rand(len(images), generator=generator) < 0.5
    crops = [x[:, t : t + side, s : s + side] for x, t, s in zip(padded, top, left, strict=True)]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips, strict=True)])


def train(recipe: Recipe) -> Any:
    """Train the model, write checkpoints and a log to `recipe.out`, and return the model.

    Raises InputError for images without classes, a broken image, all or none of the images held out, and an
    `out` that holds another run.
    """
    data, labels, names, classes = read(recipe)
    apart = torch.tensor([held_out(name) for name in names])
    if apart.all() or not apart.any():
        raise ss.InputError(f"{apart.sum()} of the {len(apart)} images are held out: give more images")
    begin(recipe, [name for name, kept in zip(names, apart, strict=True) if kept])
    model = build(recipe, classes)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.95)
    )

    def rate(step: int) -> float:
        share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        return min((step + 1) / recipe.warmup, 0.5 * (1 + float(np.cos(np.pi * max(0.0, share)))))

    # continue from the last line of the log, if there is one
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    last, rows = recipe.out / "last.pt", list[dict[str, float]]()
    if last.is_file():
        saved = torch.load(last)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        generator.set_state(saved["generator"])
        rows = saved["log"]
    done = int(rows[-1]["step"]) if rows else 0
    taught, smoothing = (~apart).nonzero().flatten(), recipe.label_smoothing
    for step in (bar := tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, mininterval=5)):
        if step in recipe.checkpoints:
            keep(model, recipe, recipe.out / f"step-{step:06d}")
        chosen = taught[torch.randint(len(taught), (recipe.batch,), generator=generator)]
        model.train()
        logits = model(pixel_values=augmented(data[chosen], generator)).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps:
            found = {"loss": float(loss.detach()), **evaluate(model, data[apart], labels[apart])}
            bar.set_postfix(found)
            rows.append({"step": step + 1, **found})
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"generator": generator.get_state(), "log": rows}, last.with_suffix(".part"))
            last.with_suffix(".part").rename(last)
            pd.DataFrame(rows).to_csv(recipe.out / "log.csv", index=False, float_format="%.6g")
    keep(model, recipe, recipe.out / "model")
    return model.eval()


def begin(recipe: Recipe, held: list[str]) -> None:
    """Write the recipe and the names of the held-out images.

    Raises InputError if the folder already has others.
    """
    recipe.out.mkdir(parents=True, exist_ok=True)
    decides = {name: value for name, value in asdict(recipe).items() if not isinstance(value, Path)}
    for name, text in (("recipe.json", json.dumps(decides, indent=1)), ("heldout.txt", "\n".join(held))):
        file = recipe.out / name
        if file.exists() and file.read_text() != text + "\n":
            raise ss.InputError(f"{file} is of another run: repeat its settings, or choose another --out")
        file.write_text(text + "\n")


def keep(model: Any, recipe: Recipe, folder: Path) -> None:
    """Write a checkpoint with its image processor."""
    model.save_pretrained(folder)
    size = {"height": recipe.side, "width": recipe.side}
    ViTImageProcessorPil(size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3).save_pretrained(folder)


@torch.no_grad()
def evaluate(model: Any, data: Tensor, labels: Tensor) -> dict[str, float]:
    """Measure the NLL in nats and the accuracy on whole images."""
    model.eval()
    logits = torch.cat(
        [model(pixel_values=(part.float() / 255 - MEAN) / STD).logits for part in data.split(250)]
    )
    nll = torch.nn.functional.cross_entropy(logits, labels)
    return {"heldout_nll": float(nll), "accuracy": float((logits.argmax(-1) == labels).float().mean())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(tyro.cli(Recipe, description=__doc__))
