"""MPS, the multi-dimensional preference score (Zhang et al., arXiv 2405.14705), in its `overall` form.

With F the image tokens, T the prompt's tokens and t its pooled vector, C the tokens of a text that names what to look
at, all projected by a CLIP ViT-H/14,

    a_i = max_j T_i C_j,   seen_i = a_i / max(a) > threshold,   G = cross(F, T where seen)
    s = exp(logit_scale) cos(t, G_0)

Departures: the maximum of a is each prompt's own; the published code takes it over the whole batch, so that a score
there depends on its batch mates (at one prompt a call the two agree). fp32 instead of forced fp16. The threshold is
0.3, as in the published evaluation; the published model file has 0.01. Weights are the safetensors port: the original
is a pickle that runs code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.checkpoints import clip_tokenizer
from t2i_align.rewards.files import WeightFile, find_weights, load_strictly, read_weights
from t2i_align.rewards.tower import CLIP_MEAN, CLIP_STD, Preprocessing

PUBLISHED = "RE-N-Y/mpsv1"
PREFIX = "mps."  # of the port's keys
BUFFERS = ("rotary_emb.inv_freq", "position_ids")  # which are computed
OVERALL = (  # github.com/Kwai-Kolors/MPS, MIT
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
LAYERS = {  # of laion/CLIP-ViT-H-14-laion2B-s32B-b79K
    "text_config": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        **{"hidden_act": "gelu", "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
    },
    "vision_config": {
        **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
        **{"hidden_act": "gelu", "image_size": 224, "patch_size": 14},
    },
    "projection_dim": 1024,
}
ROTATION = 10_000.0  # base of the rotary wavelengths


class MPS(Scorer):
    """How well people like the picture for the prompt, all dimensions together.

    Args:
        weights: the port as a local file, or a folder that has it; "" for the hub's. A `config.json` beside a local
            file is the CLIP's.
        condition: the text that names what to look at; the default is the published `overall`.
        threshold: share of the largest relevance below which a token of the prompt is not seen.

    Raises:
        RewardError: weights that are missing or are not those of MPS.
    """

    name = "mps"
    differentiable = True
    needs_prompt = True
    without_std = True
    unit: ClassVar[str] = "log-odds"
    license: ClassVar[str] = "MIT code; the port states none"
    source: ClassVar[str] = PUBLISHED
    files: ClassVar[tuple[WeightFile, ...]] = (WeightFile("model.safetensors", PUBLISHED),)
    summary: ClassVar[str] = "how well people like a picture for a prompt, all dimensions together"
    preprocessing: Preprocessing

    def __init__(self, weights: str = "", condition: str = OVERALL, threshold: float = 0.3) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        path = find_weights(weights, self.files[0], self.name)
        state = {key.removeprefix(PREFIX): value for key, value in read_weights(path).items()}
        own = weights and (path.parent / "config.json").is_file()
        config = CLIPConfig.from_pretrained(path.parent) if own else CLIPConfig(**LAYERS)
        self.model = CLIPModel(config)
        self.cross_model = CrossModel(state)
        load_strictly(self, state, path, BUFFERS)
        side = config.vision_config.image_size
        self.preprocessing = Preprocessing((side, side), CLIP_MEAN, CLIP_STD, floor_crop=True)
        self.tokeniser = clip_tokenizer()
        self.context = config.text_config.max_position_embeddings
        self.condition, self.threshold = condition, threshold

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        tokens, pooled = self._texts(prompts.text)
        (condition,), _ = self._texts([self.condition])
        relevance = (tokens @ condition.T).amax(2)  # (B, tokens)
        top = relevance.amax(1, keepdim=True)
        seen = relevance / torch.where(top == 0, torch.finfo(top.dtype).tiny, top) > self.threshold
        pixels = self.preprocessing(images.float()).to(pooled.dtype)
        picture = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)
        fused = self.cross_model(picture, tokens, seen)[:, 0]
        return self.model.logit_scale.exp() * F.cosine_similarity(pooled, fused)

    def _texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, context, D) and pooled vectors (B, D); padding is seen like any token, as published."""
        unique = list(dict.fromkeys(texts))
        options = {"padding": "max_length", "max_length": self.context, "truncation": True, "return_tensors": "pt"}
        ids = self.tokeniser(unique, **options).input_ids.to(self.model.logit_scale.device)
        with torch.no_grad():
            output = self.model.text_model(input_ids=ids)
            project = self.model.text_projection
            tokens, pooled = project(output.last_hidden_state), project(output.pooler_output)
        rows = [unique.index(text) for text in texts]
        return tokens[rows], pooled[rows]


class CrossModel(nn.Module):
    """Blocks of cross and self attention, of the sizes that a state dict has."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        count = len({key.split(".")[2] for key in state if key.startswith("cross_model.layers.")})
        self.layers = nn.ModuleList()
        for n in range(count):
            at = f"cross_model.layers.{n}"
            q, kv = (state[f"{at}.0.fn.{name}.weight"] for name in ("to_q", "to_kv"))
            inner = state[f"{at}.0.fn.ff.2.weight"].shape[1]
            sizes = q.shape[1], q.shape[0], kv.shape[0] // 2, inner
            self.layers.append(nn.ModuleList([Residual(CrossAttention(*sizes)), Residual(SelfAttention(*sizes))]))

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        for block in self.layers:
            cross, own = block.children()
            x = own(cross(x, context, seen))
        return x


class Residual(nn.Module):
    """x + fn(x): a level of the published keys."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.fn(x, *rest)


class CrossAttention(nn.Module):
    """All heads of the picture's tokens attend to one key and value of each text token; a feedforward runs beside."""

    def __init__(self, width: int, inner: int, head: int, ff: int) -> None:
        super().__init__()
        self.head = head
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * ff, bias=False), SwiGLU(), nn.Linear(ff, width, bias=False))

    def forward(self, x: Tensor, context: Tensor, seen: Tensor) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(x), k, v, self.head, seen[:, None, None, :])) + self.ff(x)


class SelfAttention(nn.Module):
    """Queries, one key, one value and the feedforward from one matrix; keys and queries are rotated by position."""

    def __init__(self, width: int, inner: int, head: int, ff: int) -> None:
        super().__init__()
        self.head, self.sizes = head, [inner, head, head, 2 * ff]
        self.norm = Norm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=-1)
        return self.attn_out(_attend(_rotate(q, self.head), _rotate(k, self.head), v, self.head)) + self.ff_out(ff)


class SwiGLU(nn.Module):
    """The first half of the features times silu of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Norm(nn.Module):
    """Layer norm whose bias is a buffer of zeros."""

    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, head: int, seen: Tensor | None = None) -> Tensor:
    """Attention of many query heads (B, n, heads * head) on one head of keys and values (B, m, head)."""
    heads = q.unflatten(-1, (-1, head)).transpose(1, 2)
    k, v = (shared[:, None].expand(-1, heads.shape[1], -1, -1) for shared in (k, v))
    out = F.scaled_dot_product_attention(heads, k, v, attn_mask=seen)
    return out.transpose(1, 2).flatten(2)


def _rotate(x: Tensor, head: int) -> Tensor:
    """Rotary positions on (B, n, heads * head): the first half of each head's features turns with the second."""
    wave = ROTATION ** -(torch.arange(0, head, 2, device=x.device) / head)
    angle = (torch.arange(x.shape[1], device=x.device)[:, None] * wave).repeat(1, 2)[:, None]  # (n, 1, head)
    heads = x.unflatten(-1, (-1, head))
    one, other = heads.chunk(2, dim=-1)
    turned = heads * angle.cos().to(x.dtype) + torch.cat((-other, one), dim=-1) * angle.sin().to(x.dtype)
    return turned.flatten(2)
