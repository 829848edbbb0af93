"""Published scorers at tiny size: real classes, random weights, files with the keys and names of the originals."""

import json

import open_clip
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from t2i_align.playground.tokenizer import build_tokenizer
from t2i_align.rewards.aesthetic import Aesthetic
from t2i_align.rewards.aesthetic_v25 import AestheticV25
from t2i_align.rewards.clip import CLIP
from t2i_align.rewards.clip_iqa import ClipIQA
from t2i_align.rewards.heads import Readout
from t2i_align.rewards.hpsv2 import HPSv2, HPSv21
from t2i_align.rewards.mps import MPS
from t2i_align.rewards.pickscore import PickScore
from t2i_align.rewards.subject import Subject
from t2i_align.rewards.trained import write_ensemble, write_scorer
from t2i_align.rewards.vlm_rm import VLMRM

SIDE, WIDTH = 32, 24  # pixels of the networks' input; features of the embedding
VOCABULARY = 49408  # of all published CLIPs


def hf_clip(folder, words=False, side=SIDE, width=WIDTH):
    """A transformers CLIP; with the playground's tokenizer and its image processor if `words`."""
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small = {"vocab_size": 185, "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    large = {"vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1, "bos_token_id": VOCABULARY - 2}
    text = {**layers, "hidden_act": "gelu", **(small if words else large)}
    vision = {**layers, "hidden_act": "gelu", "image_size": side, "patch_size": side // 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
    model.save_pretrained(folder)
    if words:
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
            folder
        )
        build_tokenizer().save_pretrained(folder)
    return model


def open_clip_model(name, folder, resnet=False):
    """A model of open_clip with the published vocabulary, whose architecture open_clip knows by `name` afterwards."""
    torch.manual_seed(0)
    vit = {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    res = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}
    config = {"embed_dim": WIDTH, "vision_cfg": res if resnet else vit, "text_cfg": text, "quick_gelu": resnet}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return open_clip.create_model(name)


def pickscore(folder):
    hf_clip(folder)
    return PickScore(str(folder))


def hpsv2(folder, version="v2"):
    model = open_clip_model("tiny-hps", folder)
    state = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / f"HPS_{version}_compressed.pt")
    return (HPSv2 if version == "v2" else HPSv21)(str(folder), model="tiny-hps", size=SIDE)


def head(width=WIDTH, places=(0, 2, 4, 6, 7), prefix="layers"):
    """State dict of an aesthetic head: published places, other widths."""
    sizes = (width, 16, 12, 8, 4, 1)
    torch.manual_seed(1)
    layers = [torch.nn.Linear(one, other) for one, other in zip(sizes, sizes[1:], strict=False)]
    return {
        f"{prefix}.{place}.{part}": getattr(layer, part).detach().clone()
        for place, layer in zip(places, layers, strict=True)
        for part in ("weight", "bias")
    }


def aesthetic(folder):
    hf_clip(folder, words=True)
    torch.save(head(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return Aesthetic(weights=str(folder), name=str(folder))


def aesthetic_v25(folder):
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**layers, image_size=SIDE, patch_size=8)).save_pretrained(folder)
    state = head(32, (0, 2, 4, 6, 8), "scoring_head")
    torch.save({name: value.bfloat16() for name, value in state.items()}, folder / "aesthetic_predictor_v2_5.pth")
    return AestheticV25(str(folder), str(folder))


def clip_iqa(folder):
    model = open_clip_model("tiny-resnet", folder, resnet=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "weights.safetensors")
    return ClipIQA(weights=str(folder / "weights.safetensors"), model="tiny-resnet")


def mps_state(model, heads=4, head=8, ff=20, layers=2):
    """The port's state dict around a CLIP: names and shapes of the published modules."""
    width = model.config.projection_dim
    inner = heads * head
    shapes = {
        "0.fn.norm.weight": (width,),
        "0.fn.to_q.weight": (inner, width),
        "0.fn.to_kv.weight": (2 * head, width),
        "0.fn.to_out.weight": (width, inner),
        "0.fn.ff.0.weight": (2 * ff, width),
        "0.fn.ff.2.weight": (width, ff),
        "1.fn.norm.weight": (width,),
        "1.fn.fused_attn_ff_proj.weight": (inner + 2 * head + 2 * ff, width),
        "1.fn.attn_out.weight": (width, inner),
        "1.fn.ff_out.1.weight": (width, ff),
    }
    generator = torch.Generator().manual_seed(2)
    state = {f"mps.model.{name}": value for name, value in model.state_dict().items()}
    for n in range(layers):
        at = f"mps.cross_model.layers.{n}."
        state |= {at + name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
        state |= {f"{at}{block}.fn.norm.bias": torch.zeros(width) for block in (0, 1)}
        state[at + "1.fn.rotary_emb.inv_freq"] = 10_000.0 ** -(torch.arange(0, head, 2) / head)
    state["mps.model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state


def mps(folder):
    model = hf_clip(folder)
    save_file({name: value.contiguous() for name, value in mps_state(model).items()}, folder / "model.safetensors")
    return MPS(str(folder))


def clip(folder):
    hf_clip(folder, words=True)
    return CLIP(str(folder))


def vlm_rm(folder):
    hf_clip(folder, words=True)
    return VLMRM(baseline="two stars", name=str(folder))


def dino(folder):
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**layers, image_size=SIDE, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def subject(folder):
    dino(folder)
    return Subject(name=str(folder))


def trained(folder):
    """An ensemble of two heads with a std of their own, as `t2i-align train` writes it, on a transformers CLIP."""
    hf_clip(folder / "base", words=True)
    tower = CLIP(str(folder / "base")).tower
    for number in (0, 1):
        torch.manual_seed(number)
        made = Readout(WIDTH, "both", (8,), "quantile")
        torch.nn.init.normal_(made.output.quantiles.linear.weight, std=0.1)
        base = {"use": "clip", "options": {"name": str(folder / "base")}}
        write_scorer(folder / f"member-{number}", f"heads.{number}", tower, made, base=base, learns="scores")
    write_ensemble(folder, "heads", ["member-0", "member-1"])
    return folder


TINY = {
    "clip": clip,
    "pickscore": pickscore,
    "hpsv2": hpsv2,
    "hpsv2.1": lambda folder: hpsv2(folder, "v2.1"),
    "mps": mps,
    "aesthetic": aesthetic,
    "aesthetic_v2.5": aesthetic_v25,
    "clip_iqa": clip_iqa,
    "vlm_rm": vlm_rm,
    "subject": subject,
}
