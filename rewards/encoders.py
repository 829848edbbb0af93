"""Features of pictures and texts by CLIPs of open_clip and transformers, without work that cannot reach them.

A text's feature is that of its end token, which a causal mask hides from everything behind it: padding is cut off. A
picture's is that of its class token, so that a last block needs that token's query and MLP alone. Results are those of
the libraries' own encoders but for rounding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def open_clip_image(network: Any, pixels: Tensor) -> Tensor:
    """Features (B, D) of prepared pictures (B, 3, H, W) by an open_clip model."""
    visual = network.visual
    if not _ends_in_class_token(visual):
        return network.encode_image(pixels)
    x = visual._embeds(pixels)  # (B, 1 + patches, width)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    normed, token = last.ln_1(x), x[:, :1]
    token = token + last.ls_1(last.attention(normed[:, :1], normed, normed))
    token = token + last.ls_2(last.mlp(last.ln_2(token)))
    return visual.ln_post(token[:, 0]) @ visual.proj


def _ends_in_class_token(visual: Any) -> bool:
    """Whether it is a plain vision transformer whose output is its class token's."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.proj is None:
        return False
    plain = type(visual.transformer.resblocks[-1]) is ResidualAttentionBlock and visual.transformer.batch_first
    return plain and visual.pool_type == "tok" and not visual.transformer.grad_checkpointing


def open_clip_text(network: Any, tokens: Tensor) -> Tensor:
    """Features (B, D) of token ids (B, context) by an open_clip model."""
    from open_clip.model import CLIP

    if type(network) is not CLIP or network.text_pool_type != "argmax" or network.attn_mask is None:
        return network.encode_text(tokens)
    ends = tokens.argmax(1)  # the end token has the largest id
    length = int(ends.max()) + 1
    x = network.token_embedding(tokens[:, :length]).to(network.transformer.get_cast_dtype())
    x = x + network.positional_embedding[:length].to(x.dtype)
    x = network.transformer(x, attn_mask=network.attn_mask[:length, :length])
    x = network.ln_final(x.gather(1, ends[:, None, None].expand(-1, 1, x.shape[2]))[:, 0])
    projection = network.text_projection
    if projection is None:
        return x
    return x @ projection if isinstance(projection, Tensor) else projection(x)


def transformers_image(network: Any, pixels: Tensor) -> Tensor:
    """Features (B, D) of prepared pictures (B, 3, H, W) by a transformers `CLIPModel`."""
    return _pooled(network.get_image_features(pixel_values=pixels))


def transformers_text(network: Any, tokens: Tensor) -> Tensor:
    """Features (B, D) of token ids (B, context) by a transformers `CLIPModel`, which pools at the first end token."""
    end = network.config.text_config.eos_token_id
    ends = tokens.argmax(1) if end == 2 else (tokens == end).int().argmax(1)  # 2: configs from before ids were right
    # All positions are attended to: behind the causal mask, padding after the end does not reach the pooled token.
    return _pooled(network.get_text_features(input_ids=tokens[:, : int(ends.max()) + 1]))


def _pooled(output: Any) -> Tensor:
    """The projected vector: transformers 5 returns an output object, 4 a tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output
