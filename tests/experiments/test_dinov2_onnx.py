"""DINOv2 out of an ONNX graph: a small one made node by node, with the names that torch gives."""

from pathlib import Path
from typing import Any

import dinov2_onnx
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from transformers import AutoImageProcessor, AutoModel

import spectral_sinks as ss

WIDTH, HEADS, LAYERS, PATCH, SIDE, SEEN = 12, 3, 2, 4, 5, 3
"""The positions are a square of 5 patches; the graph reads images of 3 patches."""

MATRICES = {
    "attention.attention.query": (WIDTH, WIDTH),
    "attention.attention.key": (WIDTH, WIDTH),
    "attention.attention.value": (WIDTH, WIDTH),
    "attention.output.dense": (WIDTH, WIDTH),
    "mlp.fc1": (4 * WIDTH, WIDTH),
    "mlp.fc2": (WIDTH, 4 * WIDTH),
}


def planted() -> dict[str, np.ndarray]:
    """Random tensors by their hub names."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, SIDE**2 + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        inside = f"encoder.layer.{layer}"
        for name, shape in MATRICES.items():
            shapes |= {f"{inside}.{name}.weight": shape, f"{inside}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{inside}.{norm}.weight": (WIDTH,), f"{inside}.{norm}.bias": (WIDTH,)}
        for scale in ("layer_scale1", "layer_scale2"):
            shapes[f"{inside}.{scale}.lambda1"] = (WIDTH,)
    return {name: 0.5 * draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class Graph:
    """A graph that grows node by node; `numbers` are those in the names of tensors without a name."""

    def __init__(self, tensors: dict[str, np.ndarray], numbers: Any, epsilon: float = 1e-6) -> None:
        self.tensors, self.numbers, self.epsilon = tensors, numbers, epsilon
        self.nodes, self.held = list[Any](), dict[str, np.ndarray]()

    def add(self, kind: str, path: str, *inputs: str, **attributes: Any) -> str:
        name = f"/{path}/{kind}_{len(self.nodes)}" if kind not in ("MatMul", "Conv") else f"/{path}/{kind}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_output_0"], name=name, **attributes))
        return f"{name}_output_0"

    def shape(self, path: str, *sizes: int) -> str:
        """A shape, joined from constants as torch does."""
        parts = [
            self.add("Constant", path, value=numpy_helper.from_array(np.array([size], np.int64)))
            for size in sizes
        ]
        return self.add("Concat", path, *parts, axis=0)

    def named(self, name: str) -> str:
        self.held[f"backbone.{name}"] = self.tensors[name]
        return f"backbone.{name}"

    def anonymous(self, kind: str, array: np.ndarray) -> str:
        name = f"onnx::{kind}_{next(self.numbers)}"
        self.held[name] = np.ascontiguousarray(array)
        return name

    def linear(self, name: str, x: str) -> str:
        path = "backbone/" + name.replace(".", "/").replace("layer/", "layer.")
        y = self.add("MatMul", path, x, self.anonymous("MatMul", self.tensors[f"{name}.weight"].T))
        return self.add("Add", path, self.named(f"{name}.bias"), y)

    def norm(self, name: str, x: str) -> str:
        path = "backbone/" + name.replace(".", "/").replace("layer/", "layer.")
        weight, bias = self.named(f"{name}.weight"), self.named(f"{name}.bias")
        return self.add("LayerNormalization", path, x, weight, bias, axis=-1, epsilon=self.epsilon)

    def embeddings(self) -> str:
        inside = "backbone/embeddings"
        patches = "embeddings.patch_embeddings.projection"
        kernel = {"kernel_shape": [PATCH, PATCH], "strides": [PATCH, PATCH]}
        weight, bias = self.named(f"{patches}.weight"), self.named(f"{patches}.bias")
        x = self.add("Conv", f"backbone/{patches.replace('.', '/')}", "input_image", weight, bias, **kernel)
        x = self.add("Reshape", inside, x, self.shape(inside, 1, WIDTH, -1))
        x = self.add("Transpose", inside, x, perm=[0, 2, 1])
        cls = self.add("Expand", inside, self.named("embeddings.cls_token"), self.shape(inside, 1, 1, 1))
        x = self.add("Concat", inside, cls, x, axis=1)
        first, rest = np.split(self.tensors["embeddings.position_embeddings"], [1], axis=1)
        p = self.add(
            "Reshape", inside, self.anonymous("Reshape", rest), self.shape(inside, 1, SIDE, SIDE, WIDTH)
        )
        p = self.add("Transpose", inside, p, perm=[0, 3, 1, 2])
        to = self.shape(inside, 1, WIDTH, SEEN, SEEN)
        cubic = {"coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75, "mode": "cubic"}
        p = self.add("Resize", inside, p, "", "", to, **cubic)
        p = self.add("Transpose", inside, p, perm=[0, 2, 3, 1])
        p = self.add("Reshape", inside, p, self.shape(inside, 1, -1, WIDTH))
        p = self.add("Concat", inside, self.anonymous("Concat", first), p, axis=1)
        return self.add("Add", inside, x, p)

    def attention(self, name: str, x: str) -> str:
        path = f"backbone/{name.replace('.', '/').replace('layer/', 'layer.')}/attention"

        def heads(part: str, perm: list[int]) -> str:
            laid = self.add("Reshape", path, x_of[part], self.shape(path, 1, -1, HEADS, WIDTH // HEADS))
            return self.add("Transpose", path, laid, perm=perm)

        x_of = {part: self.linear(f"{name}.attention.{part}", x) for part in ("key", "value", "query")}
        scale = numpy_helper.from_array(np.array((WIDTH // HEADS) ** -0.5, np.float32))
        scores = self.add(
            "MatMul", f"{path}/scores", heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
        )
        scores = self.add("Mul", path, scores, self.add("Constant", path, value=scale))
        mixed = self.add(
            "MatMul",
            f"{path}/mixed",
            self.add("Softmax", path, scores, axis=-1),
            heads("value", [0, 2, 1, 3]),
        )
        mixed = self.add("Transpose", path, mixed, perm=[0, 2, 1, 3])
        mixed = self.add("Reshape", path, mixed, self.shape(path, 1, -1, WIDTH))
        return self.linear(f"{name}.output.dense", mixed)

    def mlp(self, name: str, x: str) -> str:
        x = self.linear(f"{name}.fc1", x)
        x = self.add("Gelu", "backbone/activation", x)
        return self.linear(f"{name}.fc2", x)

    def model(self) -> Any:
        """Return the whole: the backbone, and a head on its patches."""
        x = self.embeddings()
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            for number, part, make in ((1, "attention", self.attention), (2, "mlp", self.mlp)):
                y = make(f"{name}.{part}", self.norm(f"{name}.norm{number}", x))
                y = self.add("Mul", "backbone", y, self.named(f"{name}.layer_scale{number}.lambda1"))
                x = self.add("Add", "backbone", y, x)
        x = self.norm("layernorm", x)
        x = self.add("MatMul", "decoder", x, self.anonymous("MatMul", np.ones((WIDTH, 1), np.float32)))
        pixels = ["batch", 3, SEEN * PATCH, SEEN * PATCH]
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info("input_image", TensorProto.FLOAT, pixels)],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in self.held.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def saved(model: Any, folder: Path) -> Path:
    onnx.save(model, folder / "tiny.onnx")
    return folder / "tiny.onnx"


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return planted()


@pytest.mark.parametrize("numbers", [range(1000, 2000), range(2000, 1000, -1)], ids=["rising", "falling"])
def test_finds_what_was_planted(tensors: dict[str, np.ndarray], tmp_path: Path, numbers: range) -> None:
    """Whatever numbers nameless tensors have; in transformers every tensor is what it was."""
    file = saved(Graph(tensors, iter(numbers)).model(), tmp_path)
    assert dinov2_onnx.convert(file, tmp_path / "made") < 1e-5
    found, heads = dinov2_onnx.read(onnx.load(file).graph)
    assert heads == HEADS and found.keys() == tensors.keys() | {"embeddings.mask_token"}
    assert all(np.array_equal(found[name].numpy(), tensor) for name, tensor in tensors.items())
    assert not found["embeddings.mask_token"].any()
    loaded, report = AutoModel.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.image_size == SIDE * PATCH and loaded.config.num_hidden_layers == LAYERS
    kept = [tensors[f"encoder.layer.1.attention.attention.{part}.weight"] for part in ("query", "key")]
    attention = loaded.encoder.layer[1].attention
    assert np.array_equal(attention.q_proj.weight.detach().numpy(), kept[0])
    assert np.array_equal(attention.k_proj.weight.detach().numpy(), kept[1])


def test_computes_what_the_graph_does(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Through the head of the graph, which the converter does not read, and on another image."""
    model = Graph(tensors, iter(range(100))).model()
    dinov2_onnx.convert(saved(model, tmp_path), tmp_path / "made")
    pixels = np.random.default_rng(7).standard_normal((1, 3, SEEN * PATCH, SEEN * PATCH)).astype(np.float32)
    output: Any = ReferenceEvaluator(model).run(None, {"input_image": pixels})
    loaded = ss.load_vision(tmp_path / "made").module
    with torch.no_grad():
        tokens = loaded(torch.from_numpy(pixels)).last_hidden_state
    assert torch.allclose(tokens.sum(-1), torch.from_numpy(output[0])[..., 0], atol=1e-4)


def test_reads_images_as_the_published_one(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    dinov2_onnx.convert(saved(Graph(tensors, iter(range(100))).model(), tmp_path), tmp_path / "made")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "made", backend="pil")
    grey = np.full((300, 400, 3), 128, np.uint8)
    made = processor(images=grey, return_tensors="np")["pixel_values"]
    assert made.shape == (1, 3, 224, 224)
    expected = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert np.allclose(made, expected[None, :, None, None], atol=1e-5)


def test_a_graph_that_computes_something_else(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """One with a larger epsilon than DINOv2's has the same tensors, and other features."""
    file = saved(Graph(tensors, iter(range(100)), epsilon=0.1).model(), tmp_path)
    with pytest.raises(ss.InputError, match=r"tiny\.onnx was not converted: the features .* differ"):
        dinov2_onnx.convert(file, tmp_path / "made")


def test_a_graph_of_something_else(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ss.InputError, match=r"text\.onnx cannot be read as an ONNX graph"):
        dinov2_onnx.convert(tmp_path / "text.onnx", tmp_path / "made")
    for lost, message in (
        ("onnx::Reshape", "one constant of positions at a Reshape, found 0"),
        ("onnx::Concat", "one constant of positions at a Concat, found 0"),
        ("backbone.embeddings.cls_token", "it has no embeddings.cls_token"),
    ):
        model = Graph(tensors, iter(range(100))).model()
        kept = [tensor for tensor in model.graph.initializer if not tensor.name.startswith(lost)]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        with pytest.raises(
            ss.InputError, match=f"is not a DINOv2 backbone as torch exports one: .*{message}"
        ):
            dinov2_onnx.convert(saved(model, tmp_path), tmp_path / "made")
    model = Graph(tensors, iter(range(100))).model()
    kept = [tensor for tensor in model.graph.initializer if not tensor.name.endswith("norm2.bias")]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    with pytest.raises(ss.InputError, match=r"does not read .* as DINOv2: .*norm2\.bias"):
        dinov2_onnx.convert(saved(model, tmp_path), tmp_path / "made")
