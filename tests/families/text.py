"""Real tokenizers and text encoders at tiny random size, built without a download."""

import transformers as t
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

BYTES = sorted(ByteLevel.alphabet())
WORDS = ("red", "green", "blue", "circle", "star", "cat")


def numbered(tokens):
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def merges_of(words, end=""):
    """Byte-pair merges that build each word from its left, and the tokens they make."""
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + end]
        for i in range(1, len(parts)):
            merges.append(("".join(parts[:i]), parts[i]))
    merges = list(dict.fromkeys(merges))
    return merges, [left + right for left, right in merges]


def clip_tokenizer(length=16):
    merges, made = merges_of(WORDS, "</w>")
    vocab = numbered(["<|startoftext|>", "<|endoftext|>", *BYTES, *(byte + "</w>" for byte in BYTES), *made])
    return t.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def clip(hidden=32, projection=None, length=16):
    """(tokenizer, text encoder); with a projection of the pooled output where its width is given."""
    tokenizer = clip_tokenizer(length)
    config = t.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or hidden,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer, (t.CLIPTextModelWithProjection if projection else t.CLIPTextModel)(config)


def t5(hidden=32):
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz.,' "))
    pieces = ["▁", *(f"▁{word}" for word in WORDS), *letters]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = special + [(piece, -2.0 - 0.1 * number) for number, piece in enumerate(pieces)]
    tokenizer = t.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)
    config = t.T5Config(
        vocab_size=len(tokenizer), d_model=hidden, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, t.T5EncoderModel(config)


def qwen_tokenizer():
    """With a chat template, as pipelines with a language model use one."""
    merges, made = merges_of(WORDS)
    vocab = numbered(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, *made])
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return t.Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=template)


def qwen_vl_processor():
    tokenizer = qwen_tokenizer()
    images, videos = t.Qwen2VLImageProcessor(), t.Qwen2VLVideoProcessor()
    return t.Qwen2VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def decoder(tokenizer, hidden):
    """Sizes of a tiny language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def qwen3(hidden=16):
    tokenizer = qwen_tokenizer()
    return tokenizer, t.Qwen3Model(t.Qwen3Config(**decoder(tokenizer, hidden)))


def qwen25_vl(hidden=16):
    tokenizer = qwen_tokenizer()
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default", "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": hidden}
    text = decoder(tokenizer, hidden) | {"rope_parameters": rope}
    text.pop("head_dim")
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return tokenizer, t.Qwen2_5_VLForConditionalGeneration(config)


def gemma2(hidden=8):
    letters = [chr(code) for code in range(33, 127)]
    tokenizer = t.GemmaTokenizer(vocab=numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *letters]))
    template = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer, t.Gemma2Model(t.Gemma2Config(**decoder(tokenizer, hidden)))


def safety_checker():
    """Stable Diffusion's checker; with its untrained concepts it flags nothing. (checker, feature extractor)."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    config = t.CLIPConfig(
        text_config=sizes | {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=vision,
        projection_dim=16,
    )
    size = {"height": 32, "width": 32}
    extractor = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return StableDiffusionSafetyChecker(config), extractor
