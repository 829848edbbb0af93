"""Prompt expansion by a causal language model that learns with the images (Parrot's expansion network, 2401.05675).

    text ~ p_phi(. | prompt),  loss = - mean over prompts of A log p_phi(text | prompt)

A is the mean reward of the prompt's images, standardised over the round's prompts that serve the same reward. A LoRA of
the language model is trained. Departures: the standardised A, where the paper takes the reward; no fine-tuning on pairs
of prompts comes first, so start from a model that has had it. Drawn tokens are keyed by round and prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import Tensor, nn

from t2i_align.config import Settings
from t2i_align.errors import T2IError
from t2i_align.keys import generator, key
from t2i_align.prompts import Prompts
from t2i_align.training.method import Term

WRITTEN = "expansion"  # the column with the tokens that were written: (those read, those drawn)


class ExpandSettings(Settings):
    """Which language model expands prompts, and how."""

    use: str = Field(description="hub id or folder of a causal language model of transformers")
    template: str = Field("{prompt}", description="what it reads")
    keep: bool = Field(True, description="put what it writes behind the prompt; else in its place")
    tokens: int = Field(32, gt=0, description="most tokens that it writes")
    temperature: float = Field(1.0, gt=0, description="of its draws in training; otherwise the likeliest is taken")
    rank: int = Field(8, gt=0, description="of its LoRA")


class Expander(nn.Module):
    """The language model.

    Args:
        settings: which, and how.
        adapter: a folder that `save` wrote, to expand with; a new LoRA if None.
        seed: of a new LoRA.

    Raises:
        T2IError: no such model.
    """

    def __init__(self, settings: ExpandSettings, adapter: str | Path | None = None, seed: int = 0) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__()
        self.settings = settings
        try:
            model = AutoModelForCausalLM.from_pretrained(settings.use)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.use)
        except (OSError, ValueError) as error:
            raise T2IError(f"Cannot open the language model {settings.use}: {' '.join(str(error).split())}") from error
        model.requires_grad_(False)
        self.model: Any
        if adapter is not None:
            self.model = PeftModel.from_pretrained(model, str(adapter))
        else:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft corrects it for GPT-2's layers
                torch.manual_seed(key(seed, "expander"))
                lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear")
                self.model = get_peft_model(model, lora)
        self.eval()  # drawing and training must be one function: no dropout

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def expand(self, prompts: Prompts, seed: int = 0, step: int | None = None, first: int = 0) -> Prompts:
        """Longer prompts, with the column `expansion` of what was read and written.

        Args:
            prompts: what to expand.
            seed: of the draws.
            step: of the round, by which draws are keyed; None for the likeliest tokens.
            first: place of these prompts in the round.
        """
        texts, written = [], []
        for place, prompt in enumerate(prompts.text, start=first):
            read = self.tokenizer(self.settings.template.replace("{prompt}", prompt))["input_ids"]
            drawn = self._write(read, None if step is None else (seed, "expand", step, place))
            text = self.tokenizer.decode(drawn, skip_special_tokens=True).strip()
            texts.append((f"{prompt} {text}".strip() if self.settings.keep else text) or prompt)
            written.append((tuple(read), tuple(drawn)))
        return Prompts(tuple(texts), {**prompts.columns, WRITTEN: tuple(written)})

    def _write(self, read: list[int], name: tuple[int | str, ...] | None) -> list[int]:
        """Draw tokens until the end of the text or the limit; the likeliest ones where `name` is None."""
        drawn: list[int] = []
        while len(drawn) < self.settings.tokens:
            tokens = torch.tensor([[*read, *drawn]], device=self.device)
            scores = self.model(tokens).logits[0, -1].float().cpu() / self.settings.temperature
            if name is not None:  # argmax of scores with Gumbel noise: a draw from their softmax
                uniform = torch.rand(len(scores), generator=generator(*name, len(drawn)))
                scores = scores - (-uniform.clamp(min=1e-20).log()).log()
            drawn.append(int(scores.argmax()))
            if drawn[-1] == self.tokenizer.eos_token_id:
                break
        return drawn

    def log_prob(self, read: tuple[int, ...], drawn: tuple[int, ...]) -> Tensor:
        """Log-probability of what was written, nats, with its graph."""
        tokens = torch.tensor([[*read, *drawn]], device=self.device)
        scores = self.model(tokens).logits[0, len(read) - 1 : -1].float() / self.settings.temperature
        return scores.log_softmax(-1).gather(1, tokens[0, len(read) :, None]).sum()

    def terms(self, told: Prompts, advantage: Tensor, count: int) -> Iterator[Term]:
        """Loss terms of this process's prompts: their advantages (>= len(told),) among `count` in all."""
        for (read, drawn), value in zip(told.columns[WRITTEN], advantage.tolist(), strict=False):
            if value:
                log_prob = self.log_prob(read, drawn)
                yield Term(-value * log_prob / count, {"expansion_log_prob": log_prob.detach()})

    def save(self, folder: Path) -> None:
        """Write the LoRA as peft does."""
        self.model.save_pretrained(folder)


def expansion_advantage(rewards: Tensor, serving: Tensor, clip: float) -> Tensor:
    """Rewards (P,) of prompts, standardised among those that serve the same one; 0 for one alone, and for NaN."""
    rewards, serving = rewards.cpu().double(), serving.cpu()
    out = torch.zeros_like(rewards)
    for k in serving.unique():
        mine = serving == k
        values = rewards[mine]
        centred = values - values.nanmean()
        out[mine] = centred / (centred.square().nanmean().sqrt() + 1e-4)
    return out.nan_to_num(nan=0.0).clamp(-clip, clip)
