"""Convert the DINOv2 backbone of an ONNX graph into a Hugging Face folder.

The graph was exported by torch from a transformers model called `backbone`. Biases, norms and layer scales
keep their hub names. A matrix has only a number for a name and is transposed; its hub name is that of the
MatMul node that reads it. The positions were folded into two constants, which are found by the nodes that
read them and by their shapes. The graph has no mask token, which only pretraining uses; here it is zero.

    python experiments/real/dinov2_onnx.py vit_s_focus.onnx FOLDER
"""

import json
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import tyro
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Model
from tyro.conf import Positional

import spectral_sinks as ss

BACKBONE = "/backbone/"
"""How the names of the backbone's nodes begin; its named tensors begin with `backbone.`."""

TOLERANCE = 1e-4
"""Largest difference allowed between the features of the folder and those of the graph, relative to their
root mean square."""

SIZES = (
    "embeddings.cls_token",
    "embeddings.patch_embeddings.projection.weight",
    "encoder.layer.0.mlp.fc1.bias",
)
"""Tensors whose shapes give the configuration."""

PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""The image processor of facebook/dinov2-small."""


def convert(file: Path, folder: Path) -> float:
    """Write the backbone to `folder`, and return how far its features are from the graph's (see `compare`).

    Raises InputError for a file that is no such graph, and if transformers computes other features from the
    folder than ONNX from the graph.
    """
    try:
        model = onnx.load(file)
    except Exception as error:  # of protobuf, whose class depends on its backend
        raise ss.InputError(f"{file} cannot be read as an ONNX graph: {error}") from error
    tensors, heads = read(model.graph, file.name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", configuration(tensors, heads)), ("preprocessor_config", PROCESSOR)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    difference = compare(model, folder)
    if not difference < TOLERANCE:
        raise ss.InputError(
            f"{file.name} was not converted: the features by transformers differ from the graph's by "
            f"{difference:.1e} of their size, where {TOLERANCE:.0e} is allowed"
        )
    return difference


def read(graph: onnx.GraphProto, name: str = "the graph") -> tuple[dict[str, Tensor], int]:
    """Return the backbone's tensors by their hub names, and the number of attention heads.

    Raises InputError for a graph in which they are not found; `name` is what the message calls it.
    """
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {
        key.removeprefix("backbone."): array for key, array in held.items() if key.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith(BACKBONE) and node.input[1] in held:
            path = node.name.removeprefix(BACKBONE).removesuffix("/MatMul").replace("/", ".")
            found[f"{path}.weight"] = held[node.input[1]].T
    try:
        if lacking := [key for key in SIZES if key not in found]:
            raise LookupError(f"it has no {lacking[0]}")
        found["embeddings.position_embeddings"] = positions(graph, held)
        found["embeddings.mask_token"] = np.zeros_like(found["embeddings.cls_token"][0])
        heads = number_of_heads(graph)
    except LookupError as error:
        raise ss.InputError(
            f"{name} is not a DINOv2 backbone as torch exports one: {error.args[0]}"
        ) from error
    return {key: torch.from_numpy(np.array(array, order="C")) for key, array in found.items()}, heads


def positions(graph: onnx.GraphProto, held: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Join the position of CLS `[1, 1, d]`, which a Concat puts first, and those of the patches `[1, n, d]`,
    which a Reshape lays out as a square.
    """
    inside = [node for node in graph.node if node.name.startswith(f"{BACKBONE}embeddings/")]

    def constant(kind: str, fits: Any) -> NDArray[Any]:
        read = [held[node.input[0]] for node in inside if node.op_type == kind and node.input[0] in held]
        fitting = [
            array for array in read if array.ndim == 3 and array.shape[0] == 1 and fits(array.shape[1])
        ]
        if len(fitting) != 1:
            raise LookupError(f"expected one constant of positions at a {kind}, found {len(fitting)}")
        return fitting[0]

    first = constant("Concat", lambda n: n == 1)
    rest = constant("Reshape", lambda n: n > 1 and isqrt(n) ** 2 == n)
    return np.concatenate([first, rest], axis=1)


def number_of_heads(graph: onnx.GraphProto) -> int:
    """Read the number of heads from the shape to which the queries of the first layer are laid out."""
    made = {output: node for node in graph.node for output in node.output}
    queries = f"{BACKBONE}encoder/layer.0/attention/attention/query/"
    for node in graph.node:
        if (
            node.op_type == "Reshape"
            and node.input[0] in made
            and made[node.input[0]].name.startswith(queries)
        ):
            heads = made[node.input[1]].input[2]  # of batch, tokens, heads, width of a head
            return int(numpy_helper.to_array(made[heads].attribute[0].t).item())
    raise LookupError("the queries of its first layer are not divided into heads")


def configuration(tensors: dict[str, Tensor], heads: int) -> dict[str, Any]:
    """Make the content of config.json from the shapes of the tensors."""
    width, channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    layers = {int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layer.")}
    side = isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1)
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "mlp_ratio": len(tensors["encoder.layer.0.mlp.fc1.bias"]) // width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "dtype": "float32",
    }


@torch.no_grad()
def compare(model: onnx.ModelProto, folder: Path) -> float:
    """Return the largest difference between the features of the folder and of the graph.

    Both read one image of noise, of the graph's size. The features are the tokens after the last norm, and
    the difference is relative to their root mean square. Raises InputError if transformers misses a tensor
    in the folder, or does not know one.
    """
    load: Any = Dinov2Model.from_pretrained
    loaded, report = load(folder, output_loading_info=True, attn_implementation="eager")
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if wrong := sorted(str(key) for kind in kinds for key in report[kind]):
        raise ss.InputError(f"transformers does not read {folder} as DINOv2: {', '.join(wrong)}")
    size = [place.dim_value for place in model.graph.input[0].type.tensor_type.shape.dim][1:]
    pixels = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    there = features(model, pixels.numpy())
    here = loaded.eval()(pixel_values=pixels).last_hidden_state.double().numpy()
    return float(np.abs(here - there).max() / np.sqrt((there**2).mean()))


def features(model: onnx.ModelProto, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
    """Run the graph up to the last node of the backbone by ONNX's reference implementation."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    last = max(place for place, node in enumerate(part.graph.node) if node.name.startswith(BACKBONE))
    output = part.graph.node[last].output[0]
    del part.graph.node[last + 1 :]
    del part.graph.output[:]
    part.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    outputs: Any = ReferenceEvaluator(part).run(None, {part.graph.input[0].name: pixels})
    return outputs[0].astype(np.float64)


@dataclass(frozen=True)
class Options:
    file: Positional[Path]
    """The ONNX file."""
    folder: Positional[Path]
    """The folder to write."""


def main(options: Options) -> None:
    print(f"{options.folder}: features within {convert(options.file, options.folder):.1e} of the graph's")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
