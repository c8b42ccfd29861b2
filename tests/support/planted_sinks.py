"""A sink built by hand along a direction of one band."""

import torch
import transformers
from torch import Tensor

import spectral_sinks as ss

D, HEADS, VOCABULARY, BANDS = 40, 5, 90, 20


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sinking(band: int, gain: float | None = None) -> tuple[ss.LanguageModel, ss.Spectrum, ss.Windows]:
    """Every query asks for the first direction of a band of W_U, which token 0 alone carries.

    With a gain, this direction is channel 0, and the final norm multiplies that channel by the gain. No layer
    reads through the final norm, so the sink is the same.
    """
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=48,
        max_position_embeddings=64,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    left = torch.linalg.qr(gaussian(VOCABULARY, D, seed=1).double()).Q
    mixed, place = gaussian(D, D, seed=2).double(), 2 * (band - 1)
    if gain is not None:
        mixed[:, place] = mixed[:, 0]
        mixed[:, 0] = torch.eye(D)[0]  # the first column of Q is this channel
    right = torch.linalg.qr(mixed).Q
    if gain is not None:
        right[:, [0, place]] = right[:, [place, 0]]
    carrier = right[:, place].float()
    slow = torch.zeros(D // HEADS)
    slow[3] = 1.0  # the pair of dimensions that RoPE hardly turns
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.ndim == 2):
            parameter.copy_(0.05 * gaussian(*parameter.shape, seed=10 + index))
        model.lm_head.weight.copy_((left * torch.linspace(10, 1, D, dtype=torch.float64)) @ right.T)
        words = gaussian(VOCABULARY, D, seed=3)
        words -= (words @ carrier).outer(carrier)
        words[0] += 30 * carrier
        model.model.embed_tokens.weight.copy_(words)
        model.model.norm.weight[0] = 1.0 if gain is None else gain
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.zero_()
            attention.q_proj.bias.copy_(slow.repeat(HEADS) * 10)
            attention.k_proj.weight.copy_(slow.repeat(HEADS).outer(carrier))
            for projection in (attention.k_proj, attention.v_proj, attention.o_proj):
                projection.bias.zero_()
    ids = torch.randint(1, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = 0
    loaded = ss.load(model)
    return loaded, ss.read_spectrum(loaded, bands=BANDS), ss.Windows.of_ids(ids, loaded)
