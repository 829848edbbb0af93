"""Scorers on language models at tiny size: real classes, random weights, files with the originals' names and keys."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from benchmarks.parity.inputs import HEADS, bert_vocabulary, blip_shapes, draw_weights
from t2i_align.rewards.cyclereward import CycleReward
from t2i_align.rewards.hpsv3 import HPSv3, question
from t2i_align.rewards.image_reward import ImageReward
from t2i_align.rewards.vlm_judge import VLMJudge
from t2i_align.rewards.vqascore import VQAScore

WORDS = 400
BLIP = {"width": 64, "layers": 2, "text_width": 64, "text_layers": 2, "side": 32, "words": WORDS}


def blip_state(scorer):
    """A state dict under the published names, with the buffer that older files have."""
    drawn = draw_weights(blip_shapes(**BLIP, places=HEADS[scorer]))
    state = {name: torch.from_numpy(np.array(value)) for name, value in drawn.items()}
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}


def write_blip(folder, scorer, file):
    (folder / "vocab.txt").write_text("\n".join(bert_vocabulary()[: WORDS - 2]) + "\n", encoding="utf-8")
    torch.save(blip_state(scorer), folder / file)
    return str(folder)


def image_reward(folder):
    return ImageReward(write_blip(folder, "image_reward", "ImageReward.pt"))


def cyclereward(folder):
    return CycleReward(write_blip(folder, "cyclereward", "CycleReward-Combo.pth"))


def t5_tokenizer():
    """A T5 tokenizer whose pieces are letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["▁Yes", "▁yes", "▁red", "▁circle", "▁figure", "▁show", "▁answer", "▁a"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    return T5Tokenizer(vocab=[*pieces, *((one, -4.0) for one in letters), *((one, -1.0) for one in words)], extra_ids=0)


def write_vqascore(folder):
    """CLIP-FlanT5 as its repository has it: two shards, the projector and the eye under their own names."""
    torch.manual_seed(0)
    words = t5_tokenizer()
    words.save_pretrained(folder / "tokenizer")
    eye = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    eye.image_size, eye.patch_size = 28, 7
    vision = CLIPVisionModel(eye)
    vision.save_pretrained(folder / "vision")
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "is_gated_act": True}
    config = T5Config(vocab_size=len(words) + 6, **shape, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = T5ForConditionalGeneration(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["lm_head.weight"] = 0.3 * torch.randn_like(state["shared.weight"])  # FlanT5's is not tied to the words
    del state["decoder.embed_tokens.weight"]
    state |= {"embed_tokens.weight": state["shared.weight"].clone()}
    for place, (rows, columns) in {0: (32, 32), 2: (32, 32)}.items():
        state |= {
            f"mm_projector.{place}.weight": torch.randn(rows, columns) / 2,
            f"mm_projector.{place}.bias": torch.randn(rows),
        }
    folder.joinpath("weights").mkdir()
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: state[name] for name in held}, folder / "weights" / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "weights" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    facts = {**config.to_dict(), "model_type": "clip_t5", "mm_hidden_size": 32}
    (folder / "weights" / "config.json").write_text(json.dumps(facts))
    return {
        "weights": str(folder / "weights"),
        "tokenizer": str(folder / "tokenizer"),
        "vision": str(folder / "vision"),
    }


def vqascore(folder):
    return VQAScore(**write_vqascore(folder), dtype="float32")


def qwen_tokenizer():
    """A byte-level tokenizer that has learnt the instruction's words."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator(
        [question("a red circle")], trainers.BpeTrainer(vocab_size=700, initial_alphabet=letters)
    )
    facts = json.loads(learnt.to_str())["model"]
    words = Qwen2Tokenizer(vocab=facts["vocab"], merges=[tuple(merge) for merge in facts["merges"]])
    marks = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    words.add_special_tokens({"additional_special_tokens": marks})
    return words


def write_hpsv3(folder):
    """HPSv3.safetensors under the published names, and the backbone's configuration and tokenizer beside it."""
    torch.manual_seed(0)
    words = qwen_tokenizer()
    words.save_pretrained(folder)
    rows = len(words) + 1  # one for <|Reward|>
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "num_key_value_heads": 1, "vocab_size": rows, "max_position_embeddings": 4096}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    eye = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=eye)
    model = Qwen2VLModel(config)
    for layer in model.language_model.layers:  # or no word would listen to another
        layer.self_attn.q_proj.weight.data.mul_(30)
        layer.self_attn.o_proj.weight.data.mul_(30)
    config.save_pretrained(folder)
    state = {
        name.replace("language_model.", "model.", 1): value.contiguous() for name, value in model.state_dict().items()
    }
    for place, (high, wide) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        state |= {
            f"rm_head.{place}.weight": torch.randn(high, wide) / wide**0.5,
            f"rm_head.{place}.bias": torch.randn(high),
        }
    state["lm_head.weight"] = torch.zeros(rows, 32)
    save_file(state, folder / "HPSv3.safetensors")
    return {"weights": str(folder), "backbone": str(folder)}


def hpsv3(folder):
    return HPSv3(**write_hpsv3(folder), dtype="float32")


class Judge(ThreadingHTTPServer):
    """An endpoint that really looks at the picture: it likes smooth ones."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.requests, self.replies = [], []  # what came; what to answer instead, one after the other
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status, reply = self.server.replies.pop(0) if self.server.replies else (200, judge(body))
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


def likes(*words):
    """A reply of one token with these (token, probability)."""
    top = [{"token": token, "logprob": float(np.log(p))} for token, p in words]
    content = [{"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}]
    return {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": {"content": content}}]}


def says(text):
    return {"choices": [{"message": {"content": text}}]}


def judge(body):
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    rough = np.abs(np.diff(np.asarray(image, dtype=float), axis=0)).mean() / 255
    yes = 0.9 * np.exp(-4 * rough)
    return likes(("Yes", yes), ("No", 0.95 - yes)) if body.get("logprobs") else says(f"Final Score: {1 + 4 * yes:.2f}")


def vlm_judge(folder):
    return VLMJudge("smooth", Judge().url, cache=False)


VLM = {
    "image_reward": image_reward,
    "cyclereward": cyclereward,
    "vqascore": vqascore,
    "hpsv3": hpsv3,
    "vlm_judge": vlm_judge,
}
