"""What policy gradients share: credit by step, and Parrot, Pareto selection among several rewards (arXiv 2401.05675).

    P_k     the images of a prompt told to serve reward k that none of them dominates in all K rewards
    grad J  = sum_k sum_{i in P_k} A_i grad log p(x_i | "<reward k> prompt"),  A_i by reward k alone

`select: pareto` drops the dominated images of each prompt. `tokens` moreover puts a text of one reward before the
prompt, so that the model learns what each reward asks for; all of them before a prompt ask for all (`as_used`). Scorers
read the prompt without them. `expand` has a language model write a longer prompt first (`expansion.py`).

Departures: a prompt of a round serves one reward, the next one in the next round, where the paper draws a batch for
every reward; advantages are those of the method, standardised, where the paper takes rewards as they are; dominance is
by the sign that a reward has in the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils._pytree import tree_leaves

from t2i_align.advantage import gains_by_step
from t2i_align.errors import T2IError
from t2i_align.methods.base import OnPolicy, Rollout, SamplingSettings, Tools, reward_weights
from t2i_align.methods.expansion import Expander, ExpandSettings, expansion_advantage
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer, Scores
from t2i_align.rewards.compose import WeightedSum
from t2i_align.rewards.pareto import non_dominated
from t2i_align.training import Ctx, Term, TrainingError


class PolicyGradientSettings(SamplingSettings):
    """What policy gradients share."""

    clip: float = Field(1e-4, gt=0, description="clip range of the ratio of per-dimension log-probs")
    advantage_clip: float = Field(5.0, gt=0, description="largest absolute advantage")
    select: Literal["all", "pareto"] = Field("all", description="`pareto` trains on the non-dominated images alone")
    tokens: str | None = Field(
        None, description="text before the prompts of images that serve reward {k}: '<reward {k}>'; with select: pareto"
    )
    gae: float | None = Field(
        None,
        ge=0,
        le=1,
        description="steps count by the gain in reward of their x0 estimate, with this lambda: 0 by their own, 1 by "
        "all from them on; null: by the image's reward",
    )
    expand: ExpandSettings | None = Field(None, description="a language model that expands prompts, trained too")

    @model_validator(mode="after")
    def _tokens_fit(self) -> PolicyGradientSettings:
        if self.tokens is None:
            return self
        if self.gae is not None:
            raise T2IError("Expected no gae with tokens, with which images of a round serve different rewards.")
        if self.select != "pareto":
            raise T2IError("Expected select: pareto with tokens, which say what an image is selected for.")
        if "{k}" not in self.tokens:
            raise T2IError(f"Expected tokens with {{k}}, the reward's number, as in '<reward {{k}}>': {self.tokens!r}.")
        return self


class PolicyGradient(OnPolicy):
    """Base of policy gradients: what is told to the network, and which images count."""

    settings: PolicyGradientSettings
    shardable: ClassVar[bool] = True

    def __init__(self, settings: PolicyGradientSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        self.served = list(reward_weights(tools.reward)) if settings.tokens is not None else []
        self.expander: Expander | None = None
        if settings.expand is not None:
            self.expander = Expander(settings.expand).to(next(policy.network.parameters()).device)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raises TrainingError where the text encoder cannot tell two tokens apart."""
        if not self.served:
            return
        names = [self.token(k) for k in range(len(self.served))]
        cond = self.tools.driver.encode(Prompts.of(names))
        read = [[leaf for leaf in tree_leaves(cond.encoded[row]) if isinstance(leaf, Tensor)] for row in cond.rows]
        for first in range(len(names)):
            for second in range(first):
                if all(torch.equal(a, b) for a, b in zip(read[first], read[second], strict=True)):
                    raise TrainingError(
                        f"The text encoder reads {names[second]!r} and {names[first]!r} alike: choose tokens of words "
                        "or numbers that it knows."
                    )

    def token(self, k: int) -> str:
        """The text of a reward, from 0."""
        assert self.settings.tokens is not None
        return self.settings.tokens.replace("{k}", str(k + 1))

    def serving(self, ctx: Ctx, count: int) -> Tensor:
        """Which reward each of a round's prompts serves, (count,)."""
        return (torch.arange(count) + ctx.step // self.updates) % len(self.served)

    def labelled(self, ctx: Ctx, prompts: Prompts, count: int, first: int = 0) -> Prompts:
        """Some of a round's `count` prompts, from number `first` on, with the tokens of the rewards they serve."""
        if not self.served:
            return prompts
        serving = self.serving(ctx, count)[first : first + len(prompts)]
        pairs = zip(serving.tolist(), prompts.text, strict=True)
        return Prompts(tuple(f"{self.token(k)} {text}" for k, text in pairs), prompts.columns)

    def as_used(self, prompts: Prompts) -> Prompts:
        """Expanded, with all tokens."""
        if self.expander is not None:
            prompts = self.expander.expand(prompts)
        every = "".join(f"{self.token(k)} " for k in range(len(self.served)))
        return Prompts(tuple(every + text for text in prompts.text), prompts.columns)

    @property
    def usage(self) -> str:
        said = []
        if self.served:
            every = " ".join(self.token(k) for k in range(len(self.served)))
            said += [f"Put `{every}` before prompts: one for each of {', '.join(self.served)}; fewer ask for fewer."]
        if self.expander is not None:
            said += ["`expander/` has the language model's LoRA, which expands prompts (docs/training.md)."]
        return " ".join(said)

    def save(self, folder: Path) -> None:
        if self.expander is not None:
            self.expander.save(folder / "expander")

    def images(self, ctx: Ctx, prompts: Prompts) -> Rollout:
        """Images of the round; with tokens, each one's total is the reward that it serves."""
        mine = ctx.world.share(len(prompts))
        longer = prompts[mine]
        if self.expander is not None:  # tokens come before what it writes, as in use
            longer = self.expander.expand(longer, ctx.seed, ctx.step, mine.start)
        told = self.labelled(ctx, longer, len(prompts), mine.start)
        data = self.rollout(ctx, prompts, told)
        if not self.served:
            return data
        served = self.serving(ctx, len(prompts)).repeat_interleave(data.group)
        values = signed_parts(self.tools.reward, data.scores)
        own = values.gather(1, served[:, None].to(values.device))[:, 0]
        return replace(data, scores=data.scores._replace(total=own.where(own.isfinite(), torch.nan)), serves=served)

    @property
    def clip(self) -> float:
        return self.settings.clip

    @property
    def previewed(self) -> int:
        if self.settings.gae is None:
            return 0
        return self.trained(self.tools.driver.grid(self.settings.steps, **self.tools.call).steps) + 1

    def by_step(self, data: Rollout, advantage: Tensor) -> Tensor:
        """Advantages (B, N) of steps, the trained ones at least, from those (B,) of images; zero for some."""
        decay = self.settings.gae
        if decay is None:
            steps = advantage[:, None].expand(-1, data.traj.steps)
        else:
            assert data.previews is not None
            steps = gains_by_step(advantage, data.previews.to(advantage.device), data.group, decay)
        factors = data.trust * data.scores.total.isfinite()
        if self.settings.select == "pareto":
            factors = factors * survivors(signed_parts(self.tools.reward, data.scores), data.group).to(factors)
        return steps * factors.to(steps)[:, None]

    def expansion_terms(self, ctx: Ctx, data: Rollout) -> Iterator[Term]:
        """The expander's share of an update, at the first one on a round's images: later ones are off its policy."""
        if self.expander is None or ctx.update:
            return
        groups = data.scores.total.reshape(-1, data.group).nanmean(1).cpu()
        serving = torch.zeros(len(groups)) if data.serves is None else data.serves[:: data.group]
        advantage = expansion_advantage(groups, serving, self.settings.advantage_clip)
        first = data.first // data.group
        yield from self.expander.terms(data.traj.cond.prompts[:: data.group], advantage[first:], len(groups))


def signed_parts(reward: Scorer, scores: Scores) -> Tensor:
    """The rewards of images, (B, K), larger better: those with a negative weight in a sum count the other way."""
    weights = reward_weights(reward) if isinstance(reward, WeightedSum) else dict.fromkeys(scores.parts, 1.0)
    return torch.stack([values if weights.get(name, 1.0) > 0 else -values for name, values in scores.parts.items()], 1)


def survivors(values: Tensor, group: int) -> Tensor:
    """1 for images that no other of their prompt dominates, else 0: rewards (B, K), larger better -> (B,)."""
    return torch.cat([non_dominated(rows) for rows in values.split(group)]).float()
