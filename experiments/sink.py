"""The sink: its strength, the residual that carries it, and the effect of removing its dark band.

Question: do heads attend to position 0 whatever the text, and is its residual dark? Does removing the dark
band remove the sink and raise the NLL, more than any random subspace of the same rank?
Design: the attention received at T = 64 is measured by head, and norm and dark share by layer. At the exit
below the strongest sink, the dark band is removed at all tokens, at the first alone and at all but the first,
and it is swapped between texts. The sink-preserving set of bands is compared with the same set without the
tail.
Control: random subspaces of the same rank, at all tokens. The model card states these numbers.
"""

import pandas as pd

import spectral_sinks as ss


def run(study: ss.experiments.Study) -> ss.experiments.Finding:
    # strength of the sink, and the exit below its strongest layer
    model, u = study.model, study.unembedding
    heads = ss.attention_by_head(model, study.windows)
    rate = (heads["attention"] > 0.3).groupby(heads["document"]).mean()
    by_layer = heads.groupby("layer")["attention"].mean()
    layer = int(by_layer.iloc[1:].idxmax()) - 1

    # norm and dark share of the first token and of the others
    energy = ss.energy(model, study.windows, u)
    first = "bos" if study.windows.opens_with_bos else "first"
    exits = energy[(energy["site"] == "exit") & (energy["band"] == u.count)]
    bos = exits[exits["position_class"] == first].set_index(["layer", "document"])
    other = exits[exits["position_class"] == "other"].set_index(["layer", "document"])
    ratio = (bos["norm"] / other["norm"]).drop(model.layers - 1, level="layer")
    top = int(ratio.groupby("layer").mean().idxmax())

    # filters at that exit, and their effect on the NLL and on the sink of the next layer
    dark, site = u.dark(), ss.Site("exit", layer)
    kept = round(0.7 * u.count)
    cells: dict[str, dict[ss.Site, ss.Filter]] = {
        "dark": {site: ss.remove(dark)},
        "dark, first token": {site: ss.remove(dark, tokens="first")},
        "dark, all others": {site: ss.remove(dark, tokens="all-but-first")},
        "dark, swapped": {site: ss.remove(dark, ss.Swap())},
        f"Omega {kept}": {site: ss.omega(u, kept)},
        f"Phi 1:{kept}": {site: ss.phi(u, 1, kept)},
    }
    cells |= {f"random {seed}": {site: ss.rnd(u.d, dark.rank, seed)} for seed in range(study.draws)}
    effects = study.evaluate(cells, "sink")
    base = effects["dark"].baseline_sink_mass
    assert base is not None
    rows = [{"name": "untouched", "delta_nll": 0.0, "low": 0.0, "high": 0.0, "sink_next": base[layer + 1]}]
    for name, effect in effects.items():
        low, high = effect.delta_nll_interval
        mass = effect.sink_mass
        assert mass is not None
        rows.append(
            {"name": name, "delta_nll": effect.delta_nll, "low": low, "high": high}
            | {"sink_next": mass[layer + 1]}
        )
    removal = pd.DataFrame(rows)
    study.save(heads.groupby(["layer", "head"], as_index=False)["attention"].mean(), "sink_heads")
    study.save(removal.assign(layer=layer, rank=dark.rank, convention=u.convention), "sink_removal")
    ss.figures.sink(ss.stats.summarise(heads, ["layer", "head"], "attention"), removal, study.figure("sink"))

    masses = {name: effect.table.set_index("document") for name, effect in effects.items()}
    column = f"sink_mass_{layer + 1}"
    cut = 1 - masses["dark"][column] / masses["dark"][f"baseline_{column}"]
    random_cut = [
        1 - removal.set_index("name")["sink_next"][f"random {s}"] / base[layer + 1]
        for s in range(study.draws)
    ]
    random_nll = [effects[f"random {s}"].delta_nll for s in range(study.draws)]
    spread = f"{study.draws} random: {min(random_nll):+.4f} to {max(random_nll):+.4f}"
    rest = masses["dark, all others"]["delta_nll"]
    swapped = effects["dark, swapped"]
    omega, phi = masses[f"Omega {kept}"]["delta_nll"], masses[f"Phi 1:{kept}"]["delta_nll"]
    return ss.experiments.Finding(
        [
            ss.experiments.answer("NLL, untouched (nats per token)", masses["dark"]["baseline_nll"]),
            ss.experiments.answer("share of (text, head) with attention received > 0.3 at T = 64", rate),
            ss.experiments.answer(f"norm of position 0 / median of others, exit {top}", ratio[top]),
            ss.experiments.answer(
                f"dark share of position 0, exit {layer}",
                bos["share"][layer],
                f"others {other['share'][layer].mean():.3f}, chance {dark.rank / u.d:.3f}",
            ),
            ss.experiments.answer(
                f"sink mass of layer {layer + 1}, untouched",
                heads[heads["layer"] == layer + 1].groupby("document")["attention"].mean(),
                f"uniform {ss.attention.uniform_attention():.4f}",
            ),
            ss.experiments.answer(
                f"sink mass of layer {layer + 1} cut by removing dark at exit {layer}",
                cut,
                f"{study.draws} random: {min(random_cut):.3f} to {max(random_cut):.3f}",
            ),
            ss.experiments.answer(
                "NLL difference, dark removed, all tokens", masses["dark"]["delta_nll"], spread
            ),
            ss.experiments.answer(
                "NLL difference, dark removed, first token alone",
                masses["dark, first token"]["delta_nll"],
                f"all others: {rest.mean():+.4f}",
            ),
            ss.experiments.answer(
                "NLL difference due to the first token (alone, and saved by sparing it: mean of both)",
                (masses["dark, first token"]["delta_nll"] + masses["dark"]["delta_nll"] - rest) / 2,
                f"saved by sparing it: {(masses['dark']['delta_nll'] - rest).mean():+.4f}",
            ),
            ss.experiments.answer("NLL difference, dark swapped between texts", swapped.table["delta_nll"]),
            ss.experiments.answer(f"NLL difference, Omega {kept} (sink-preserving)", omega),
            ss.experiments.answer(f"NLL difference, Phi 1:{kept} (same, tail dropped)", phi),
            ss.experiments.answer(f"Phi 1:{kept} minus Omega {kept}", phi - omega),
        ]
    )
