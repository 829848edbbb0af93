"""What the originals and our modules are compared on: weights from a seed, pictures, prompts, vocabularies.

Read on both sides, by a Python with numpy and Pillow alone, so that the two can have different libraries. Nothing here
depends on a library's random streams: weights come from the raw 64-bit output of PCG64, which NumPy keeps fixed.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SEED = 20250801
PHOTOGRAPHS = ("astronaut", "coffee")  # of scikit-image: NASA, public domain; Rachel Michetti, CC0

PROMPTS = {
    "short": "a red circle left of a blue square",
    "capitals": "An ASTRONAUT, smiling; photo (2019)!",
    "long": "a cup of coffee on a wooden table next to a spoon and a window with a view of the sea at sunset, " * 8,
    "foreign": "Ein grüner Würfel – naïve café, 猫と犬, кошка и собака 🐱",
}
CASES = (  # (picture, prompt); at full size every other one
    ("shapes", "short"),
    ("astronaut", "short"),
    ("astronaut", "capitals"),
    ("coffee", "long"),
    ("tall", "long"),
    ("grey", "foreign"),
    ("wide", "foreign"),
    ("rgba", "short"),
)


def pictures() -> dict[str, Image.Image]:
    """Photographs, shapes, non-square ones, an RGBA one (opaque: what lies under transparency is a matter of taste)."""
    photographs = {name: Image.open(HERE / "images" / f"{name}.png").convert("RGB") for name in PHOTOGRAPHS}
    coffee = photographs["coffee"]
    return {
        **photographs,
        "shapes": _shapes(),
        "wide": coffee.crop((0, 40, 200, 97)),
        "tall": photographs["astronaut"].crop((60, 0, 121, 192)),
        "rgba": coffee.convert("RGBA"),
        "grey": photographs["astronaut"].convert("L"),
    }


def _shapes() -> Image.Image:
    """224 pixels a side, as large as the networks' input; drawn without Pillow, whose outlines change with versions."""
    y, x = np.mgrid[:224, :224]
    pixels = np.full((224, 224, 3), (235, 230, 220), dtype=np.uint8)
    pixels[(x - 60) ** 2 + (y - 100) ** 2 <= 45**2] = (200, 30, 40)
    pixels[(abs(x - 165) <= 40) & (abs(y - 105) <= 40)] = (30, 60, 200)
    pixels[(y >= 160) & (y <= 215) & (2 * abs(x - 112) <= y - 160)] = (20, 140, 60)
    return Image.fromarray(pixels)


def cases(size: str) -> list[tuple[str, str]]:
    """The cases of a size: a forward at full size takes seconds."""
    return list(CASES[::2] if size == "full" else CASES)


def draw_weights(shapes: dict[str, tuple[int, ...]], seed: int = SEED) -> dict[str, np.ndarray]:
    """fp32 tensors that depend on the seed and on their own name and shape alone.

    Matrices keep the variance of what passes through them, norms are near 1, biases and embeddings small.
    """
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if name.endswith("logit_scale"):
        return np.full(shape, math.log(100), dtype=np.float32)
    key = int.from_bytes(hashlib.sha256(f"{seed} {name} {shape}".encode()).digest()[:8], "little")
    size = math.prod(shape)
    words = np.random.PCG64(key).random_raw((size + 1) // 2).view(np.uint32)[:size]
    values = (words.astype(np.float32) / np.float32(2**31) - np.float32(1)).reshape(shape)  # uniform in [-1, 1)
    embedding = "embed" in name or "token" in name
    if len(shape) >= 2 and not (embedding and "patch" not in name):
        return values * np.float32(math.sqrt(3 / math.prod(shape[1:])))
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + np.float32(0.1) * values
    return np.float32(0.1) * values


def bert_vocabulary() -> list[str]:
    """30,522 tokens like bert-base-uncased's: marks, letters of several scripts, some words, the rest never met."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    letters += [*"äöüßéï–猫犬と", *(chr(code) for code in range(0x430, 0x450))]
    words = ["red", "blue", "green", "circle", "square", "left", "astro", "coffee", "table", "wooden", "spoon", "photo"]
    words += ["of", "on", "next", "to", "and", "the", "with", "view", "sea", "cafe", "naive", "##naut", "##ing", "##s"]
    known = list(dict.fromkeys(marks + letters + [f"##{letter}" for letter in letters] + words))
    return known + [f"[unused{row}]" for row in range(30522 - len(known))]


def blip_shapes(
    width: int = 1024,
    layers: int = 24,
    text_width: int = 768,
    text_layers: int = 12,
    places: tuple[int, ...] = (0, 2, 4, 6, 7),
    side: int = 224,
    words: int = 30524,
) -> dict[str, tuple[int, ...]]:
    """The published state dict of a BLIP reward, with the head's linear layers at `places`."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    eye, mind = "blip.visual_encoder", "blip.text_encoder"
    shapes |= {f"{eye}.cls_token": (1, 1, width), f"{eye}.pos_embed": (1, (side // 16) ** 2 + 1, width)}
    shapes |= {f"{eye}.patch_embed.proj.weight": (width, 3, 16, 16), f"{eye}.patch_embed.proj.bias": (width,)}
    for n in range(layers):
        block = f"{eye}.blocks.{n}"
        norm(f"{block}.norm1", width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    norm(f"{eye}.norm", width)
    shapes |= {f"{mind}.embeddings.word_embeddings.weight": (words, text_width)}
    shapes |= {f"{mind}.embeddings.position_embeddings.weight": (512, text_width)}
    norm(f"{mind}.embeddings.LayerNorm", text_width)
    for n in range(text_layers):
        layer = f"{mind}.encoder.layer.{n}"
        for kind, source in (("attention", text_width), ("crossattention", width)):
            linear(f"{layer}.{kind}.self.query", text_width, text_width)
            linear(f"{layer}.{kind}.self.key", text_width, source)
            linear(f"{layer}.{kind}.self.value", text_width, source)
            linear(f"{layer}.{kind}.output.dense", text_width, text_width)
            norm(f"{layer}.{kind}.output.LayerNorm", text_width)
        linear(f"{layer}.intermediate.dense", 4 * text_width, text_width)
        linear(f"{layer}.output.dense", text_width, 4 * text_width)
        norm(f"{layer}.output.LayerNorm", text_width)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, text_width)
    for place, (one, other) in zip(
        places, ((text_width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True
    ):
        linear(f"mlp.layers.{place}", other, one)
    return shapes


SIZES = {  # reduced: quick enough for every run of the tests; full: as published
    "blip": {"reduced": {"width": 128, "layers": 2, "text_width": 128, "text_layers": 2}, "full": {}},
    "clip": {
        "reduced": {"width": 160, "layers": 2, "text_width": 128, "text_layers": 2, "embed": 64, "head": 80},
        "full": {"width": 1280, "layers": 32, "text_width": 1024, "text_layers": 24, "embed": 1024, "head": 80},
    },
}
HEADS = {"image_reward": (0, 2, 4, 6, 7), "cyclereward": (0, 2, 4, 6, 8)}


def open_clip_shapes(
    width: int, layers: int, text_width: int, text_layers: int, embed: int, head: int
) -> dict[str, tuple[int, ...]]:
    """The state dict of an open_clip CLIP like ViT-H-14 at 224 pixels (HPSv2); `head` does not show in it."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, text_width),
        "text_projection": (text_width, embed),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (257, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, 14, 14),
        "token_embedding.weight": (49408, text_width),
    }
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text_width}
    for part, size, count in (("visual.transformer", width, layers), ("transformer", text_width, text_layers)):
        for n in range(count):
            block = f"{part}.resblocks.{n}"
            norms |= {f"{block}.ln_1": size, f"{block}.ln_2": size}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * size, size), f"{block}.attn.in_proj_bias": (3 * size,)}
            shapes |= {f"{block}.attn.out_proj.weight": (size, size), f"{block}.attn.out_proj.bias": (size,)}
            shapes |= {f"{block}.mlp.c_fc.weight": (4 * size, size), f"{block}.mlp.c_fc.bias": (4 * size,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (size, 4 * size), f"{block}.mlp.c_proj.bias": (size,)}
    return shapes | {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}


def transformers_clip_shapes(
    width: int, layers: int, text_width: int, text_layers: int, embed: int, head: int
) -> dict[str, tuple[int, ...]]:
    """The state dict of a transformers CLIPModel like CLIP ViT-H-14 (PickScore); `head` does not show in it."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_projection.weight": (embed, text_width),
        "visual_projection.weight": (embed, width),
        "text_model.embeddings.token_embedding.weight": (49408, text_width),
        "text_model.embeddings.position_embedding.weight": (77, text_width),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (257, width),
    }
    vectors = {"text_model.final_layer_norm": text_width, "vision_model.pre_layrnorm": width}
    vectors["vision_model.post_layernorm"] = width
    for part, size, count in (("vision_model", width, layers), ("text_model", text_width, text_layers)):
        for n in range(count):
            layer = f"{part}.encoder.layers.{n}"
            vectors |= {f"{layer}.layer_norm1": size, f"{layer}.layer_norm2": size}
            for name in "qkv":
                shapes |= {
                    f"{layer}.self_attn.{name}_proj.weight": (size, size),
                    f"{layer}.self_attn.{name}_proj.bias": (size,),
                }
            shapes |= {f"{layer}.self_attn.out_proj.weight": (size, size), f"{layer}.self_attn.out_proj.bias": (size,)}
            shapes |= {f"{layer}.mlp.fc1.weight": (4 * size, size), f"{layer}.mlp.fc1.bias": (4 * size,)}
            shapes |= {f"{layer}.mlp.fc2.weight": (size, 4 * size), f"{layer}.mlp.fc2.bias": (size,)}
    return shapes | {f"{name}.{part}": (size,) for name, size in vectors.items() for part in ("weight", "bias")}


def clip_config(width: int, layers: int, text_width: int, text_layers: int, embed: int, head: int) -> dict:
    """config.json of that CLIPModel: exact GELU, heads of `head` (picture) and 64 (text) numbers."""
    eye = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    eye |= {"num_attention_heads": width // head, "patch_size": 14, "image_size": 224, "hidden_act": "gelu"}
    mind = {"hidden_size": text_width, "num_hidden_layers": text_layers, "intermediate_size": 4 * text_width}
    mind |= {
        "num_attention_heads": text_width // 64,
        "hidden_act": "gelu",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    }
    return {"model_type": "clip", "projection_dim": embed, "vision_config": eye, "text_config": mind}


def shapes_of(scorer: str, size: str) -> dict[str, tuple[int, ...]]:
    """The published state dict of a scorer, reduced or full."""
    if scorer in HEADS:
        return blip_shapes(**SIZES["blip"][size], places=HEADS[scorer])
    if scorer in ("hpsv3", "vqascore"):
        return hpsv3_shapes() if scorer == "hpsv3" else vqascore_shapes()
    table = open_clip_shapes if scorer.startswith("hpsv2") else transformers_clip_shapes
    return table(**SIZES["clip"][size])


QWEN_MARKS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
QWEN_WORDS = 256 + len(QWEN_MARKS)
QWEN_WIDTH, QWEN_LAYERS = 128, 2
# What Qwen2-VL-Instruct's chat template makes of one user turn of a picture and a text.
QWEN_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_files() -> dict[str, dict]:
    """config.json as Qwen2-VL-7B-Instruct has it, smaller, and a tokenizer whose tokens are single bytes."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
    names = {byte: chr(byte) for byte in letters}
    names |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in names)}
    vocabulary = {name: row for row, name in enumerate(names.values())}
    vocabulary |= {mark: 256 + row for row, mark in enumerate(QWEN_MARKS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = [{"id": vocabulary[mark], "content": mark, **flags} for mark in QWEN_MARKS]
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    tokenizer |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": bytes_, "post_processor": bytes_, "decoder": bytes_}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "fuse_unk": False}
    tokenizer["model"] = {**model, "end_of_word_suffix": "", "byte_fallback": False, "vocab": vocabulary, "merges": []}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings |= {"bos_token": None, "unk_token": None, "model_max_length": 32768, "add_prefix_space": False}
    settings["added_tokens_decoder"] = {str(vocabulary[mark]): {"content": mark, **flags} for mark in QWEN_MARKS}
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu"}
    config |= {"hidden_size": QWEN_WIDTH, "intermediate_size": 2 * QWEN_WIDTH, "num_hidden_layers": QWEN_LAYERS}
    config |= {"num_attention_heads": QWEN_WIDTH // 64, "num_key_value_heads": 1, "max_position_embeddings": 32768}
    config |= {"vocab_size": QWEN_WORDS, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "use_sliding_window": False}
    for mark in ("vision_start", "vision_end", "image", "video"):
        config[f"{mark}_token_id"] = vocabulary[f"<|{mark if 'vision' in mark else mark + '_pad'}|>"]
    eye = {"depth": QWEN_LAYERS, "embed_dim": QWEN_WIDTH, "hidden_size": QWEN_WIDTH, "num_heads": QWEN_WIDTH // 64}
    eye |= {"mlp_ratio": 4, "in_chans": 3, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2}
    config["vision_config"] = {**eye, "spatial_patch_size": 14, "temporal_patch_size": 2}
    return {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def hpsv3_shapes() -> dict[str, tuple[int, ...]]:
    """The published state dict of HPSv3 around that smaller Qwen2-VL, with a row for <|Reward|>."""
    width, hidden, rows = QWEN_WIDTH, 4 * QWEN_WIDTH, QWEN_WORDS + 1
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (width, 3, 2, 14, 14),
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (rows, width),
    }
    vectors = {"visual.merger.ln_q": width}
    linear = {"visual.merger.mlp.0": (hidden, hidden), "visual.merger.mlp.2": (width, hidden)}
    linear |= {"rm_head.0": (1024, width), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    for n in range(QWEN_LAYERS):
        block, layer = f"visual.blocks.{n}", f"model.layers.{n}"
        vectors |= {f"{block}.norm1": width, f"{block}.norm2": width}
        linear |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linear |= {f"{block}.mlp.fc1": (hidden, width), f"{block}.mlp.fc2": (width, hidden)}
        linear |= {f"{layer}.self_attn.q_proj": (width, width)}
        linear |= {f"{layer}.self_attn.{name}_proj": (64, width) for name in "kv"}
        shapes |= {
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.down_proj.weight": (width, 2 * width),
        }
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (2 * width, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {f"{name}.{part}": (size,) for name, size in vectors.items() for part in ("weight", "bias")}
    return shapes | {
        f"{name}.{part}": size if part == "weight" else size[:1]
        for name, size in linear.items()
        for part in ("weight", "bias")
    }


T5_WORDS, T5_WIDTH, T5_LAYERS, EYE_WIDTH, EYE_LAYERS, EYE_SIDE = 207, 64, 2, 64, 3, 336
T5_CONFIG = {
    **{"model_type": "clip_t5", "vocab_size": T5_WORDS + 28, "d_model": T5_WIDTH, "d_kv": 32, "d_ff": 2 * T5_WIDTH},
    **{"num_layers": T5_LAYERS, "num_decoder_layers": T5_LAYERS, "num_heads": 2, "feed_forward_proj": "gated-gelu"},
    **{"tie_word_embeddings": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    **{"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1},
    **{"mm_vision_tower": "openai-clip", "mm_hidden_size": EYE_WIDTH, "mm_vision_select_layer": -2},
    **{"mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"},
}
EYE_CONFIG = {
    **{"model_type": "clip_vision_model", "hidden_size": EYE_WIDTH, "intermediate_size": 4 * EYE_WIDTH},
    **{"num_hidden_layers": EYE_LAYERS, "num_attention_heads": 2, "image_size": EYE_SIDE, "patch_size": 14},
    **{"hidden_act": "quick_gelu", "projection_dim": EYE_WIDTH},
}


def vqascore_shapes() -> dict[str, tuple[int, ...]]:
    """The state dict of a smaller CLIP-FlanT5 with its CLIP; 28 rows of words have no token, as in FlanT5's own."""
    words, d, inner, eye = T5_CONFIG["vocab_size"], T5_WIDTH, 64, EYE_WIDTH
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (words, d), "lm_head.weight": (words, d)}
    for side, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        shapes[f"{side}.final_layer_norm.weight"] = (d,)
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 2)
        for n in range(T5_LAYERS):
            for m, part in enumerate(parts):
                layer = f"{side}.block.{n}.layer.{m}"
                shapes |= {f"{layer}.{part}.{name}.weight": (inner, d) for name in "qkv"}
                shapes |= {f"{layer}.{part}.o.weight": (d, inner), f"{layer}.layer_norm.weight": (d,)}
            layer = f"{side}.block.{n}.layer.{len(parts)}"
            shapes |= {f"{layer}.DenseReluDense.wi_{m}.weight": (2 * d, d) for m in (0, 1)}
            shapes |= {f"{layer}.DenseReluDense.wo.weight": (d, 2 * d), f"{layer}.layer_norm.weight": (d,)}
    shapes |= {"mm_projector.0.weight": (d, eye), "mm_projector.2.weight": (d, d)}
    shapes |= {"mm_projector.0.bias": (d,), "mm_projector.2.bias": (d,)}
    tower, places = "vision_tower.vision_tower.vision_model", (EYE_SIDE // 14) ** 2 + 1
    shapes |= {f"{tower}.embeddings.class_embedding": (eye,)}
    shapes |= {f"{tower}.embeddings.patch_embedding.weight": (eye, 3, 14, 14)}
    shapes |= {f"{tower}.embeddings.position_embedding.weight": (places, eye)}
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    for n in range(EYE_LAYERS):
        layer = f"{tower}.encoder.layers.{n}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (eye, eye), f"{layer}.self_attn.{name}.bias": (eye,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (4 * eye, eye), f"{layer}.mlp.fc1.bias": (4 * eye,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (eye, 4 * eye), f"{layer}.mlp.fc2.bias": (eye,)}
    return shapes | {f"{name}.{part}": (eye,) for name in norms for part in ("weight", "bias")}
