"""A genuine `CLIPTokenizer` whose byte-pair merges make every word of the grammar one token.

Words outside the grammar are spelt by letters and prefixes, so no text fails.
"""

from __future__ import annotations

from transformers import CLIPTokenizer

from t2i_align.playground.grammar import vocabulary

CONTEXT = 32  # tokens, start and end included; the longest caption of the grammar takes 14
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the playground's text encoders: ids 0 and 1 start and end a text, 1 also pads."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    tokens = [START, END, *letters, *(letter + "</w>" for letter in letters)]
    merges = []
    # Longer words first: a merge is applied wherever it fits, lowest rank first, and the prefix of a short word
    # (`re` of red) inside a longer one (green) must wait until the longer one's own prefixes have joined.
    for word in sorted(vocabulary(), key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], word[-1] + "</w>"]
        left = pieces[0]
        for piece in pieces[1:]:
            merge = f"{left} {piece}"
            left += piece
            if merge not in merges:
                merges.append(merge)
                tokens.append(left)
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab,
        [tuple(merge.split()) for merge in merges],
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    )
