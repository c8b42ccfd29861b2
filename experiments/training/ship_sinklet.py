r"""Put a trained sinklet into the package: weights, tokenizer, default corpus, and the figure of its birth.

Question: how do NLL, attention sink, norm and dark share develop over training, in the shipped run and in the
runs that were not chosen?
Design: the logs of `train_sinklet.py`, with one line per evaluation on held-out text, are drawn in one
figure. The twin, trained with `--no-bos` and otherwise in the same way, becomes the negative control
`sinklet-nobos`.

    python experiments/training/ship_sinklet.py --run runs/sinklet --text FOLDER \
        --twin runs/nobos --others runs/A ...
"""

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors

import spectral_sinks as ss

PACKAGE = Path(ss.__file__).parent / "models" / "embedded"


@dataclass(frozen=True)
class Shipment:
    """Options: the runs, the text, and the folder for the figure."""

    run: Path
    """Folder of the chosen run."""
    text: Path
    """Folder with wiki_heldout.jsonl.gz."""
    twin: Path | None = None
    """Folder of the run without BOS."""
    others: tuple[Path, ...] = ()
    """Folders of runs that were not chosen, for the figure."""
    out: Path = Path("results")
    articles: int = 96
    characters: int = 4000
    """Maximum length of each article, which is cut at the end of a paragraph."""


def birth(run: Path) -> pd.DataFrame:
    """Return the log of a run by step, with the largest norm ratio over layers and the dark shares there."""
    rows = []
    for line in (run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        best = int(np.argmax(row["norm_ratio"]))
        rows.append(
            {key: row[key] for key in ("step", "tokens", "heldout_nll", "sink_rate")}
            | {"norm_ratio": row["norm_ratio"][best], "exit": best}
            | {key: row[key][best] for key in ("dark_share", "other_dark_share")}
        )
    return pd.DataFrame(rows).assign(run=run.name, convention="raw")


def excerpt(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return text[: text.rfind("\n", 0, characters)].rstrip()


def ship(run: Path, folder: Path) -> None:
    """Copy weights, settings and the tokenizer, which opens a text with BOS if the run did so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "recipe.json"):
        shutil.copy(run / "model" / name, folder / name)
    tokenizer = Tokenizer.from_file(str(run / "model" / "tokenizer.json"))
    if not json.loads((folder / "recipe.json").read_text())["bos"]:
        tokenizer.post_processor = processors.Sequence([])
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(load_file(run / "model" / "model.safetensors"), folder / "model.safetensors", {"format": "pt"})


def main(shipment: Shipment) -> None:
    ship(shipment.run, PACKAGE / "sinklet")
    if shipment.twin:
        ship(shipment.twin, PACKAGE / "sinklet-nobos")
    with gzip.open(shipment.text / "wiki_heldout.jsonl.gz", "rt") as lines:
        articles = [json.loads(line) for line in lines][: shipment.articles]
    with (PACKAGE / "corpus.jsonl").open("w") as corpus:
        for row in articles:
            kept = {key: row[key] for key in ("id", "url", "title")}
            text = excerpt(row["text"], shipment.characters)
            corpus.write(json.dumps(kept | {"text": text}, ensure_ascii=False) + "\n")
    log = pd.concat([birth(run) for run in (shipment.run, *shipment.others)], ignore_index=True)
    shipment.out.mkdir(parents=True, exist_ok=True)
    log.to_csv(shipment.out / "birth.csv", index=False, float_format="%.6g")
    ss.figures.birth(log, shipment.out / "birth.png")


if __name__ == "__main__":
    main(tyro.cli(Shipment, description=__doc__))
