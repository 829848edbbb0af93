"""Diffusion-DPO (arXiv 2311.12908) on pairs of images, given or drawn, with three relatives.

    M     = mean over dimensions of |network(x_t) - target|^2, winner and loser at one t and with one noise
    dpo     loss = -log sigmoid(-(beta / 2) [(M_w - M_w^ref) - (M_l - M_l^ref)])
    simpo   loss = -log sigmoid(-(beta / 2) (M_w - M_l) - margin)                 without a reference (arXiv 2405.14734)
    kto     loss = 1 - sigmoid(+-(g - z)), g = -(beta / 2) (M - M^ref), + for liked images, - for others,
            z = max(0, mean g), without a gradient: images one by one (arXiv 2402.01306, 2404.04465)
    + sft M_w, on top of each

Epsilon, v and flow networks alike, each by its own target. Two traps. beta is on the mean over dimensions: 5000 there
is 5000 / D = 0.3 on the sum over the D = 16384 numbers of a 512-pixel latent, so that beta depends on the size. The
learning rate of the paper, (2000 / beta) 2.048e-8, is a thousandth of that of the released launchers, 1e-8 times 2048
pairs, which made the published weights; for LoRA sweep around 1e-4. Departures: the latents of given images are the
means of the encoder's posterior, images are cropped to their centre and never flipped; ties are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid

from t2i_align.advantage import unequal_pairs
from t2i_align.errors import T2IError
from t2i_align.methods.base import Rollout, Tools, gather
from t2i_align.methods.forward import ForwardProcess, ForwardSettings, Noised, finished
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.latents import LatentCache
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scores
from t2i_align.training import Ctx, Term

SHOWN = 3  # images that cannot be opened, in a note


class DPOSettings(ForwardSettings):
    """Settings of Diffusion-DPO."""

    group: int = Field(2, gt=0, description="images per row: 2 of given pairs, 1 of single images, more if online")
    online: bool = Field(False, description="draw images and rank them by the reward, instead of given pairs")
    pairs: Literal["extremes", "all"] = Field(
        "extremes", description="of drawn images: best and worst of a prompt, or all unequal pairs"
    )
    loss: Literal["dpo", "simpo", "kto"] = Field("dpo", description="against the base, without it, or image by image")
    beta: float = Field(2000.0, gt=0, description="strength, on errors that are means over dimensions")
    margin: float = Field(0.0, ge=0, description="by which `simpo` wants winners ahead")
    sft: float = Field(0.0, ge=0, description="weight of the winners' own error")
    drop_captions: float = Field(0.0, ge=0, lt=1, description="share of rows trained without a prompt; published 0.2")

    @model_validator(mode="after")
    def _captions_are_read(self) -> DPOSettings:
        if self.online and self.drop_captions:
            raise T2IError("Expected no drop_captions with online, where images are drawn and trained by one prompt.")
        return self


class DiffusionDPO(ForwardProcess):
    """Preference optimisation of the denoising error."""

    settings: DPOSettings

    def __init__(self, settings: DPOSettings, policy: Policy, tools: Tools) -> None:
        super().__init__(settings, policy, tools)
        self.latents = LatentCache(tools.driver, settings.batch_size, **tools.call)
        self.told: set[str] = set()

    @classmethod
    def refuse(cls, settings: DPOSettings, columns: Collection[str]) -> str | None:
        """Given pairs need two images a row, single ones one; nothing else is needed online."""
        if settings.online:
            return None if settings.group > 1 else "method.group: expected at least 2 images per prompt to compare"
        if settings.discount:
            return "method.discount: expected 0 for given preferences, which have no std, or method.online=true"
        if {"better", "worse"} <= set(columns):
            return None if settings.group == 2 else f"method.group: expected 2 for pairs but got {settings.group}"
        if {"image", "liked"} <= set(columns):
            if settings.loss != "kto":
                return "prompts: expected pairs of images, as they are single ones: use method.loss=kto"
            return (
                None if settings.group == 1 else f"method.group: expected 1 for single images but got {settings.group}"
            )
        return "prompts: expected pairs of images: use: pairs with path, or method.online=true to draw and rank them"

    @property
    def learns_reward(self) -> bool:
        return self.settings.online

    def collect(self, ctx: Ctx, prompts: Prompts) -> tuple[Rollout, Tensor]:
        """Images, and of all processes (M, 2): winners and losers; of `kto` images and whether they are liked."""
        s = self.settings
        data = self.rollout(ctx, prompts) if s.online else self.given(ctx, prompts)
        values = data.scores.total.cpu()
        if data.group == 1:
            known = (~values.isnan()).nonzero()[:, 0]
            return data, torch.stack([known, (values[known] > 0.5).long()], 1)
        pairs = unequal_pairs(values, data.group, extremes=s.pairs == "extremes")
        if s.loss == "kto":
            pairs = torch.stack([pairs, torch.tensor([1, 0]).expand_as(pairs)], 2).reshape(-1, 2)
        return data, pairs

    def given(self, ctx: Ctx, prompts: Prompts) -> Rollout:
        """The images of this process's rows, scored 1 (better, liked) or 0; nan where they cannot be opened."""
        mine = ctx.world.share(len(prompts))
        table, group = prompts[mine], self.settings.group
        if group == 2:
            sides = zip(table.columns["better"], table.columns["worse"], strict=True)
            names, scores = [name for row in sides for name in row], [1.0, 0.0] * len(table)
        else:
            names, scores = list(table.columns["image"]), [float(liked) for liked in table.columns["liked"]]
        found = self.latents(names)
        self._tell()
        like = next(iter(found.values()), torch.zeros(1))
        device = ctx.device
        x = torch.stack([found.get(name, torch.zeros_like(like)) for name in names]).to(device)
        total = torch.tensor([score if name in found else torch.nan for name, score in zip(names, scores, strict=True)])
        cond = self.tools.driver.encode(self._captions(ctx, table, mine.start)).repeat(group)
        data = Rollout(finished(x, cond), Scores(total, {}), group, mine.start * group)
        return Rollout(data.traj, gather(ctx, data.scores), group, data.first)

    def report(self, batch: tuple[Rollout, Tensor]) -> dict[str, float]:
        """Of drawn images what on-policy methods report; of all the number of pairs, or of single images."""
        drawn = super().report(batch) if self.settings.online else {}
        return drawn | {"pairs": len(batch[1])}

    def losses(self, ctx: Ctx, batch: tuple[Rollout, Tensor]) -> Iterator[Term]:
        """One term per noise level and batch of pairs."""
        (data, units), s = batch, self.settings
        order = torch.randperm(len(units), generator=ctx.round_generator("order", ctx.update // s.minibatches))
        dealt = units[order][ctx.update % s.minibatches :: s.minibatches]
        mine = dealt[dealt[:, 0] // len(data) == data.first // len(data)]  # a row's images are all in one process
        share = 1 / max(1, len(dealt) * s.levels)
        if s.loss == "kto":
            yield from self.one_by_one(ctx, data, mine, share)
            return
        for part in mine.split(max(1, s.batch_size // 2)) if len(mine) else ():
            both = part.T.flatten() - data.first  # winners, then losers
            for number in range(s.levels):
                noised, cond = self._noised(ctx, data, both, part[:, 0].tolist() * 2, number)
                base = self.base_error(noised, cond) if s.loss == "dpo" else torch.zeros(len(both), device=both.device)
                error = self.process.error(noised, cond)
                (win, lose), (base_win, base_lose) = error.chunk(2), base.to(error).chunk(2)
                ahead = lead(win, lose, base_win, base_lose, s.beta) - s.margin * (s.loss == "simpo")
                trust = data.trust[part].prod(1).to(ahead)  # of drawn images; given ones are all trusted
                loss = trust * (s.sft * win - logsigmoid(ahead))
                stats = {"lead": ahead, "accuracy": (ahead > 0).float(), "error": win}
                yield Term(loss.sum() * share, stats)

    def one_by_one(self, ctx: Ctx, data: Rollout, mine: Tensor, share: float) -> Iterator[Term]:
        """KTO's terms: a first pass without gradients finds the mean gain of the update, a second one learns."""
        s = self.settings
        parts = mine.split(s.batch_size) if len(mine) else ()
        base, gains = {}, 0.0
        with torch.no_grad():
            for i, part in enumerate(parts):
                for number in range(s.levels):
                    noised, cond = self._noised(ctx, data, part[:, 0] - data.first, part[:, 0].tolist(), number)
                    base[i, number] = self.base_error(noised, cond)
                    gains -= s.beta / 2 * float((self.process.error(noised, cond) - base[i, number]).sum())
        z = max(0.0, ctx.world.total(gains) * share)
        for i, part in enumerate(parts):
            for number in range(s.levels):
                noised, cond = self._noised(ctx, data, part[:, 0] - data.first, part[:, 0].tolist(), number)
                error = self.process.error(noised, cond)
                liked = part[:, 1].to(error)
                gain = -s.beta / 2 * (error - base[i, number])
                loss = data.trust[part[:, 0]].to(gain) * (kto_loss(gain, liked, z) + s.sft * liked * error)
                yield Term(loss.sum() * share, {"lead": gain * (2 * liked - 1), "error": error})

    @torch.no_grad()
    def base_error(self, noised: Noised, cond: Cond) -> Tensor:
        """M (B,) of the base model."""
        with self.policy.reference():
            return self.process.error(noised, cond)

    def _noised(self, ctx: Ctx, data: Rollout, rows: Tensor, places: list[int], number: int) -> tuple[Noised, Cond]:
        return self.process.keyed(ctx, data.traj.x[rows, -1], places, number), data.traj.cond[rows.tolist()]

    def _captions(self, ctx: Ctx, table: Prompts, first: int) -> Prompts:
        """The prompts, some of them empty, keyed by their place."""
        share = self.settings.drop_captions
        draws = [float(torch.rand((), generator=ctx.generator("caption", first + i))) for i in range(len(table))]
        return Prompts(tuple("" if draw < share else text for draw, text in zip(draws, table.text, strict=True)))

    def _tell(self) -> None:
        """Say once of every image that it is left out."""
        fresh = [said for name, said in self.latents.problems.items() if name not in self.told]
        self.told |= set(self.latents.problems)
        if fresh:
            more = f" and {len(fresh) - SHOWN} more" if len(fresh) > SHOWN else ""
            print(f"note: pairs are left out: {' '.join(fresh[:SHOWN])}{more}", file=sys.stderr)


def lead(win: Tensor, lose: Tensor, base_win: Tensor, base_lose: Tensor, beta: float) -> Tensor:
    """-(beta / 2) [(M_w - M_l) - (M_w^ref - M_l^ref)] (M,): how much more than the base the policy prefers winners."""
    return -beta / 2 * ((win - lose) - (base_win - base_lose))


def kto_loss(gain: Tensor, liked: Tensor, z: float) -> Tensor:
    """1 - sigmoid(+-(gain - z)) (B,): + for liked images (1), - for others (0)."""
    return 1 - torch.sigmoid((2 * liked - 1) * (gain - z))
