"""Scores of an original scorer with weights from a seed: run by environment.py in the environment it made.

    python original.py image_reward reduced OUT.json

`image_reward`, `cyclereward`: the wheels' own networks, tokenizers and preprocessing. `hpsv2`: the wheel's network,
preprocessing and tokenizer, in fp32 (the wheel autocasts on CUDA). `pickscore`: the recipe of its model card,
transformers' CLIPModel and CLIPProcessor. `hpsv3`, reduced alone: the wheel's network, message and resizing, on
transformers 4.45.2. `vqascore`, reduced alone: the wheel t2v_metrics' network, words and padding, in fp32.
"""

from __future__ import annotations

import ast
import gzip
import importlib.metadata as metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Optional

import inputs
import torch
from PIL import Image

LIBRARIES = (
    "image-reward",
    "cyclereward",
    "hpsv2",
    "hpsv3",
    "t2v-metrics",
    "transformers",
    "timm",
    "torch",
    "torchvision",
    "pillow",
)


def weights(scorer: str, size: str) -> dict[str, torch.Tensor]:
    drawn = inputs.draw_weights(inputs.shapes_of(scorer, size))
    return {name: torch.from_numpy(value) for name, value in drawn.items()}


def load(model: torch.nn.Module, scorer: str, size: str) -> None:
    """Every weight of the model is given, but for buffers that are counted out."""
    state = weights(scorer, size)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    assert all(name.endswith(("position_ids", "attn_mask", "embed_tokens.weight")) for name in left.missing_keys), (
        left.missing_keys
    )
    model.eval()


def blip(scorer: str, size: str):
    """The network of ImageReward or CycleReward; reduced, its towers are the wheel's classes at smaller widths."""
    vocabulary = Path("bert-base-uncased")  # the wheels ask for this name: a folder of it here is found first
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("\n".join(inputs.bert_vocabulary()) + "\n", encoding="utf-8")
    sizes = {"width": 1024, "layers": 24, "text_width": 768, "text_layers": 12, **inputs.SIZES["blip"][size]}
    config = {"hidden_size": sizes["text_width"], "num_hidden_layers": sizes["text_layers"], "vocab_size": 30524}
    config |= {"num_attention_heads": sizes["text_width"] // 64, "intermediate_size": 4 * sizes["text_width"]}
    config |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "pad_token_id": 0}
    config |= {"add_cross_attention": True, "type_vocab_size": 2, "hidden_dropout_prob": 0.1}
    config |= {"attention_probs_dropout_prob": 0.1, "encoder_width": sizes["width"], "architectures": ["BertModel"]}
    Path("med_config.json").write_text(json.dumps(config))
    if scorer == "image_reward":
        from ImageReward.ImageReward import MLP, ImageReward
        from ImageReward.models.BLIP import blip as parts
        from ImageReward.models.BLIP import blip_pretrain, vit
    else:
        from cyclereward.blip import blip as parts
        from cyclereward.blip import blip_pretrain, vit
        from cyclereward.model import MLP, CycleReward, cyclereward_args

        cyclereward_args["blip_path"] = ""  # its constructor downloads BLIP's own weights, to replace them

    if size == "reduced":

        def create_vit(vit_name, image_size, *options):
            heads, width = sizes["width"] // 64, sizes["width"]
            made = vit.VisionTransformer(image_size, 16, embed_dim=width, depth=sizes["layers"], num_heads=heads)
            return made, width

        parts.create_vit = blip_pretrain.create_vit = create_vit
    if scorer == "image_reward":
        model = ImageReward("med_config.json")
    else:
        model = CycleReward("cpu", med_config="med_config.json", fix_rate=0)
    model.mlp = MLP(sizes["text_width"])
    load(model, scorer, size)
    if scorer == "image_reward":
        return model.score
    return lambda prompt, image: model.score(model.preprocess(image)[None], prompt).item()


def hpsv2(scorer: str, size: str):
    import clip
    import hpsv2 as package

    words = "bpe_simple_vocab_16e6.txt.gz"  # the wheel lacks the vocabulary that it reads; OpenAI's package has it
    shutil.copy(Path(clip.__file__).parent / words, Path(package.__file__).parent / "src" / "open_clip" / words)
    from hpsv2.src.open_clip import get_tokenizer
    from hpsv2.src.open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from hpsv2.src.open_clip.transform import image_transform

    s = inputs.SIZES["clip"][size]
    eye = CLIPVisionCfg(layers=s["layers"], width=s["width"], head_width=s["head"], patch_size=14, image_size=224)
    mind = CLIPTextCfg(width=s["text_width"], heads=s["text_width"] // 64, layers=s["text_layers"])
    model = CLIP(embed_dim=s["embed"], vision_cfg=eye, text_cfg=mind, output_dict=True)
    load(model, scorer, size)
    preprocess = image_transform(model.visual.image_size, is_train=False, resize_longest_max=True)
    tokenizer = get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def score(prompt, image):
        out = model(preprocess(image.convert("RGB"))[None], tokenizer([prompt]))
        return (out["image_features"] @ out["text_features"].T).item()

    return score


def pickscore(scorer: str, size: str):
    import clip
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    write_clip_tokenizer(Path(clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", Path("tokenizer"))
    processor = CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer.from_pretrained("tokenizer"))
    config = inputs.clip_config(**inputs.SIZES["clip"][size])
    model = CLIPModel(CLIPConfig(**config))
    load(model, scorer, size)
    options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}

    @torch.no_grad()
    def score(prompt, image):
        images = model.get_image_features(**processor(images=image, **options))
        texts = model.get_text_features(**processor(text=prompt, **options))
        images = images / torch.norm(images, dim=-1, keepdim=True)
        texts = texts / torch.norm(texts, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (texts @ images.T)[0])[0].item()

    return score


def write_clip_tokenizer(bpe: Path, folder: Path) -> None:
    """OpenAI's merges as the two files of transformers' CLIPTokenizer."""
    from clip.simple_tokenizer import bytes_to_unicode

    lines = gzip.decompress(bpe.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]  # as OpenAI's tokenizer reads it
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: row for row, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def hpsv3(scorer: str, size: str):
    from transformers import (
        AutoTokenizer,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )

    found = next(folder for folder in map(Path, sys.path) if (folder / "hpsv3").is_dir()) / "hpsv3"
    names = {"torch": torch, "nn": torch.nn, "Qwen2VLForConditionalGeneration": Qwen2VLForConditionalGeneration}
    names |= {"Optional": Optional, "List": list}
    run(found / "model" / "qwen2vl_trainer.py", "Qwen2VLRewardModelBT", names)  # its imports want trl and deepspeed
    run(found / "dataset" / "data_collator_qwen.py", "INSTRUCTION", names)
    run(found / "dataset" / "data_collator_qwen.py", "prompt_with_special_token", names)
    place = importlib.util.spec_from_file_location("process_vision", found / "dataset" / "utils.py")
    vision = importlib.util.module_from_spec(place)
    sys.modules["process_vision"] = vision
    place.loader.exec_module(vision)

    for file, content in inputs.qwen_files().items():
        Path(file).write_text(json.dumps(content), encoding="utf-8")
    words = AutoTokenizer.from_pretrained(".", padding_side="right")
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), words, chat_template=inputs.QWEN_CHAT)
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig.from_pretrained(".")
    config.pad_token_id, config._attn_implementation = words.pad_token_id, "sdpa"
    special = words.convert_tokens_to_ids(["<|Reward|>"])
    model = names["Qwen2VLRewardModelBT"](config, output_dim=2, special_token_ids=special, rm_head_type="ranknet")
    model.resize_token_embeddings(len(words))
    load(model, scorer, size)

    @torch.no_grad()
    def score(prompt, image):
        text = names["INSTRUCTION"].format(text_prompt=prompt) + names["prompt_with_special_token"]
        limits = {"min_pixels": 256 * 28 * 28, "max_pixels": 256 * 28 * 28}
        content = [{"type": "image", "image": image, **limits}, {"type": "text", "text": text}]
        message = [[{"role": "user", "content": content}]]
        images, _ = vision.process_vision_info(message)
        asked = processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        batch = processor(text=asked, images=images, padding=True, return_tensors="pt")
        mu, log_sigma = model(return_dict=True, **batch)["logits"][0]
        return mu.item(), log_sigma.exp().item()

    return score


def vqascore(scorer: str, size: str):
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, T5Tokenizer

    found = next(folder for folder in map(Path, sys.path) if (folder / "t2v_metrics").is_dir()) / "t2v_metrics"
    for part in ("", ".models", ".models.vqascore_models", ".models.vqascore_models.clip_t5"):  # without their imports
        package = types.ModuleType(f"t2v_metrics{part}")
        package.__path__ = [str(found.parent / f"t2v_metrics{part}".replace(".", "/"))]
        sys.modules[package.__name__] = package
    module = importlib.import_module("t2v_metrics.models.vqascore_models.clip_t5.model")
    constants = importlib.import_module("t2v_metrics.constants")
    names = {"torch": torch, "Image": Image, **vars(constants)}
    for file, wanted in (
        ("mm_utils.py", ("expand2square", "t5_tokenizer_image_token")),
        ("clip_t5_model.py", ("default_question_template", "default_answer_template", "format_question")),
        ("clip_t5_model.py", ("format_answer",)),
    ):
        for name in wanted:
            run(found / "models" / "vqascore_models" / file, name, names)
    names |= {"VQAScoreModel": object, "HF_CACHE_DIR": "", "List": list, "CLIP_T5_MODELS": {}}
    run(found / "models" / "vqascore_models" / "clip_t5_model.py", "CLIPT5Model", names)

    eye = Path("openai-clip")
    CLIPVisionModel(CLIPVisionConfig(**inputs.EYE_CONFIG)).save_pretrained(eye)
    side = {"height": inputs.EYE_SIDE, "width": inputs.EYE_SIDE}
    CLIPImageProcessor(size={"shortest_edge": inputs.EYE_SIDE}, crop_size=side).save_pretrained(eye)
    judge = names["CLIPT5Model"].__new__(names["CLIPT5Model"])
    judge.tokenizer = T5Tokenizer(str(inputs.HERE / "spiece.model"), extra_ids=100, model_max_length=2048)
    assert len(judge.tokenizer) == inputs.T5_WORDS
    network = module.CLIPT5ForConditionalGeneration(module.CLIPT5Config(**inputs.T5_CONFIG))
    load(network, scorer, size)
    network.resize_token_embeddings(len(judge.tokenizer))
    judge.model, judge.device, judge.image_loader = network.eval(), "cpu", lambda image: image.convert("RGB")
    judge.image_processor, judge.image_aspect_ratio = network.get_vision_tower().image_processor, "pad"
    judge.conversational_style = "t5_chat"

    def load_images(images):  # the original takes paths alone
        mean = tuple(int(x * 255) for x in judge.image_processor.image_mean)
        squares = [names["expand2square"](image.convert("RGB"), mean) for image in images]
        return torch.stack(
            [judge.image_processor.preprocess(s, return_tensors="pt")["pixel_values"][0] for s in squares]
        )

    judge.load_images = load_images
    return lambda prompt, image: judge.forward([image], [prompt]).item()


def run(file: Path, name: str, names: dict) -> None:
    """Define one class or constant of a file of the wheel, without the file's imports."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if getattr(node, "name", None) == name or name in [
            getattr(t, "id", None) for t in getattr(node, "targets", [])
        ]:
            exec(compile(ast.Module([node], []), str(file), "exec"), names)


SCORERS = {
    "hpsv3": hpsv3,
    "vqascore": vqascore,
    "image_reward": blip,
    "cyclereward": blip,
    "hpsv2": hpsv2,
    "pickscore": pickscore,
}


def main(scorer: str, size: str, out: str) -> None:
    target = Path(out).resolve()
    pictures = inputs.pictures()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        score = SCORERS[scorer](scorer, size)
        cases = []
        for picture, prompt in inputs.cases(size):
            value = score(inputs.PROMPTS[prompt], pictures[picture])
            value, *std = value if isinstance(value, tuple) else (value,)
            cases.append({"picture": picture, "prompt": prompt, "score": value} | ({"std": std[0]} if std else {}))
        os.chdir(target.parent)
    here = {
        found.metadata["Name"].lower().replace("_", "-"): found.version
        for found in reversed(list(metadata.distributions()))
    }
    versions = {name: here[name] for name in LIBRARIES if name in here}
    facts = {"scorer": scorer, "size": size, "seed": inputs.SEED, "libraries": versions, "cases": cases}
    target.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
