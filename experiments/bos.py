"""(b) The residual of BOS: its norm and dark share by layer, and the components that write it.

Question: at which layer does the residual of the first token become large and dark, which component writes
it, and when is it erased (Cancedda 2024, section 5)?
Design: the norm and the dark share of the residual are measured at the embedding and at each exit. What
attention and MLP add in each layer is split into a dark norm and a light norm (all other bands).
Control: the other tokens of the same texts, and the chance share r/d.
"""

import numpy as np
import pandas as pd

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    model, u = study.model, study.unembedding
    sites = [ss.Site("embedding")]
    for layer in range(model.layers):
        sites += [ss.Site("attention", layer), ss.Site("mlp", layer), ss.Site("exit", layer)]
    shares = ss.energy(model, study.windows, u, sites)
    dark = shares[shares["band"] == u.count].rename(columns={"share": "dark share"})
    dark = dark.assign(
        **{
            "dark norm": dark["norm"] * np.sqrt(dark["dark share"]),
            "light norm": dark["norm"] * np.sqrt(1 - dark["dark share"]),
        }
    )
    keys = ["site", "layer", "position_class"]
    table = pd.concat(
        ss.stats.summarise(dark, keys, quantity).assign(quantity=quantity)
        for quantity in ("norm", "dark share", "dark norm", "light norm")
    )
    by_band = shares.groupby([*keys, "band"], sort=False, as_index=False)["share"].mean()
    table, by_band = (part.assign(convention=u.convention) for part in (table, by_band))
    study.save(table, "bos")
    study.save(by_band, "bos_bands")
    chance = u.dark().rank / u.d
    ss.figures.bos(table, chance, study.figure("bos"))

    # the exit with the largest dark norm, and the component that writes most into the dark band
    first = next(name for name in table["position_class"].unique() if name != "other")
    here = dark[(dark["position_class"] == first)]
    exits, others = here[here["site"] == "exit"], dark[(dark["position_class"] == "other")]
    strongest = int(exits.groupby("layer")["dark norm"].mean().idxmax())
    written = here[here["site"].isin(["attention", "mlp"])]
    writer, layer = written.groupby(["site", "layer"])["dark norm"].mean().idxmax()
    last = model.layers - 1

    def one(frame: pd.DataFrame, layer: int, column: str) -> pd.Series:
        return frame[frame["layer"] == layer].groupby("document")[column].mean()

    stream = others[others["site"] == "exit"]
    share = written[(written["site"] == writer)]
    return ss.experiments.Finding(
        [
            ss.experiments.answer(
                f"dark share of the first token, exit {strongest} (largest dark norm)",
                one(exits, strongest, "dark share"),
                f"others {one(stream, strongest, 'dark share').mean():.3f}, chance {chance:.3f}",
            ),
            ss.experiments.answer(
                f"norm of the first token, exit {strongest}",
                one(exits, strongest, "norm"),
                f"others {one(stream, strongest, 'norm').mean():.3g}",
            ),
            ss.experiments.answer(
                f"dark norm written by {writer} {layer} (the largest writer)",
                one(share, layer, "dark norm"),
                f"its light norm {one(share, layer, 'light norm').mean():.3g}",
            ),
            ss.experiments.answer(
                f"dark share of the first token, exit {last} (the last)",
                one(exits, last, "dark share"),
                f"others {one(stream, last, 'dark share').mean():.3f}",
            ),
        ]
    )
