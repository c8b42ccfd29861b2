"""Tables of MLP neurons, ranked by what they do."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray


def ranked_neurons(
    columns: Mapping[int, Mapping[str, Float[NDArray[np.floating], "neurons"]]],
    by: str,
    count: int | None = None,
) -> pd.DataFrame:
    """Return one row per neuron, the largest value of the column `by` first, and of these the first `count`.

    Args:
        columns: the columns of each layer, with one value per neuron.
        by: the column by which the neurons are ranked; equal ones are in the order of layers and neurons.
        count: the number of rows; by default all.

    """
    rows = [
        pd.DataFrame({"layer": layer, "neuron": range(len(values[by])), **values})
        for layer, values in columns.items()
    ]
    ranked = pd.concat(rows).sort_values([by, "layer", "neuron"], ascending=[False, True, True])
    return ranked.head(len(ranked) if count is None else count).reset_index(drop=True)
