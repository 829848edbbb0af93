"""The training of a scorer as a `Method`: rankings of pictures in, the negative log-likelihood or error out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_align.keys import generator
from t2i_align.rewards.heads import Readout
from t2i_align.scorer_training.data import Examples, Pictures
from t2i_align.scorer_training.losses import bradley_terry, compare, plackett_luce, turn_labels
from t2i_align.scorer_training.model import Model, start_eta
from t2i_align.training import Ctx, Method, Term

LEAST = 1e-3  # eta: at 0 a tie would have no chance, and an infinite loss


class Chunk(NamedTuple):
    """Rankings that are backpropagated together.

    `pictures`: pixels (N, 3, H, W), or features (N, D) where the CLIP is frozen; `texts`: token ids (P, context), or
    features (P, D). `owner`, `place`: (N,) the ranking of each picture and its place there. `merits`: (P, K), NaN where
    there is none. `labels`, `counted`: (P, K, K) of `compare`.
    """

    pictures: Tensor
    texts: Tensor
    owner: Tensor
    place: Tensor
    merits: Tensor
    labels: Tensor
    counted: Tensor


class ScorerTraining(Method):
    """Train a model on examples.

    Args:
        model: the scorer.
        examples: what it learns from.
        objective: `bradley_terry`, `plackett_luce`, `regression`, `hl_gauss` or `quantile`.
        ties: see `losses.bradley_terry`.
        micro_batch: rankings in a chunk; None: all of an update.
        noise: largest standard deviation of noise on a picture.
        label_noise: share of the pairs that are turned round, always the same ones.
        seed: names them.
        pictures: prepared ones that are shared, if any.
    """

    def __init__(
        self,
        model: Model,
        examples: Examples,
        objective: str = "bradley_terry",
        ties: str = "half",
        micro_batch: int | None = None,
        noise: float = 0.0,
        label_noise: float = 0.0,
        seed: int = 0,
        pictures: Pictures | None = None,
    ) -> None:
        super().__init__()
        self.model, self.examples, self.objective, self.ties = model, examples, objective, ties
        self.micro_batch, self.noise = micro_batch, noise
        self.pictures = pictures or Pictures(examples.pictures, model.tower.preprocessing)
        self.eta = start_eta() if objective == "bradley_terry" and ties == "rao_kupper" else None
        self.tokens: dict[str, Tensor] = {}
        self.features: dict[int, Tensor] = {}  # of pictures, where the CLIP is frozen
        self.turned: list[Tensor] | None = None
        if label_noise:
            draws = generator(seed, "label noise")
            tables = (examples.table([row]) for row in range(len(examples)))
            self.turned = [turn_labels(compare(table)[0], label_noise, draws)[0] for table in tables]

    def collect(self, ctx: Ctx, rows: Sequence[int]) -> tuple[list[Chunk], int]:
        """Chunks of the rankings `rows`, and how many decisions or scores are in all of them."""
        size = self.micro_batch or len(rows)
        draws = ctx.generator("noise")
        chunks = [
            self.chunk(list(rows[first : first + size]), ctx.device, draws) for first in range(0, len(rows), size)
        ]
        return chunks, max(1, sum(self.count(chunk) for chunk in chunks))

    def chunk(self, rows: list[int], device: torch.device, draws: torch.Generator) -> Chunk:
        """Everything that the loss of some rankings needs; a picture that cannot be read has no merit."""
        examples = self.examples
        merits = examples.table(rows)
        there = ~merits.isnan()
        images = [image for row in rows for image in examples.images[row]]
        owner, place = there.nonzero(as_tuple=True)
        pictures = self.encoded(images, device) if self.model.frozen else self.pictures.get(images)
        broken = pictures.flatten(1).isnan().any(1).cpu()
        pictures = pictures.nan_to_num()
        merits[owner[broken], place[broken]] = float("nan")
        if self.noise:
            pictures = disturb(pictures, self.noise, draws)
        labels, counted = compare(merits)
        if self.turned is not None:
            wide = merits.shape[1]
            turned = [F.pad(t, (0, wide - len(t), 0, wide - len(t))) for t in (self.turned[row] for row in rows)]
            labels = torch.stack(turned) * (labels != 0)
        texts = self.texts([examples.prompts[row] for row in rows], device)
        return Chunk(*(part.to(device) for part in (pictures, texts, owner, place, merits, labels, counted)))

    def texts(self, prompts: list[str], device: torch.device) -> Tensor:
        """Token ids, or features where the CLIP is frozen."""
        tower = self.model.tower
        if self.model.frozen:
            with torch.autocast(device.type, enabled=False):
                return tower.text_features(prompts)
        new = [text for text in dict.fromkeys(prompts) if text not in self.tokens]
        if new:
            self.tokens |= dict(zip(new, tower.tokenise(new), strict=True))
        return torch.stack([self.tokens[text] for text in prompts])

    @torch.no_grad()
    def encoded(self, images: Sequence[int], device: torch.device) -> Tensor:
        """Features (N, D) of pictures by a frozen CLIP, each encoded once; NaN for those that cannot be read.

        On a CPU, where features depend on the size of a batch, one by one: a resumed run has others to encode.
        """
        new = [row for row in dict.fromkeys(images) if row not in self.features]
        size = 1 if device.type == "cpu" else 64
        for first in range(0, len(new), size):
            some = new[first : first + size]
            with torch.autocast(device.type, enabled=False):
                found = self.model.encode_images(self.pictures.get(some).to(device))
            self.features |= dict(zip(some, found, strict=True))
        return torch.stack([self.features[row] for row in images])

    def count(self, chunk: Chunk) -> int:
        """Decisions, or scores, that a chunk teaches."""
        if self.objective == "plackett_luce":
            return int(plackett_luce(torch.zeros_like(chunk.merits), chunk.merits)[1].sum())
        if self.objective == "bradley_terry":
            counted = chunk.counted if self.ties != "drop" else chunk.labels.triu(1) != 0
            return int(counted.sum())
        return int((~chunk.merits.isnan()).sum())

    def losses(self, ctx: Ctx, batch: tuple[list[Chunk], int]) -> Iterator[Term]:
        chunks, count = batch
        for chunk in chunks:
            image = chunk.pictures if self.model.frozen else self.model.encode_images(chunk.pictures)
            text = chunk.texts if self.model.frozen else self.model.encode_texts(chunk.texts)
            text = text[chunk.owner]
            if self.objective in ("bradley_terry", "plackett_luce"):
                loss, stats = self.comparison(chunk, image, text)
            else:
                loss, stats = self.error(chunk, image, text)
            yield Term(loss / count, stats)

    def comparison(self, chunk: Chunk, image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The summed loss of comparisons, and the share of decided pairs that are in order."""
        values = self.model.head(image, text)
        assert isinstance(values, Tensor)
        scores = values.new_zeros(chunk.merits.shape).index_put((chunk.owner, chunk.place), values)
        if self.objective == "plackett_luce":
            loss, _ = plackett_luce(scores, chunk.merits)
        else:
            eta = None if self.eta is None else F.softplus(self.eta) + LEAST
            loss, _ = bradley_terry(scores, chunk.labels, chunk.counted, self.ties, eta)
        margins = (chunk.labels * (scores[:, :, None] - scores[:, None, :]))[chunk.labels != 0]
        stats: dict[str, Tensor | float] = {"agrees": (margins > 0).float()}
        return loss.sum(), stats if self.eta is None else stats | {"eta": float(F.softplus(self.eta) + LEAST)}

    def error(self, chunk: Chunk, image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The summed loss of scores, and the mean absolute error in the unit of the data."""
        head = self.model.head
        assert isinstance(head, Readout)
        targets = chunk.merits[chunk.owner, chunk.place]
        known = ~targets.isnan()
        outputs, targets = head.outputs(image, text)[known], targets[known]
        loss = head.output.loss(outputs, (targets - head.offset) / head.factor)
        off = head.factor * head.output.mean(outputs.detach()) + head.offset - targets
        return loss.sum(), {"error": off.abs()}

    @torch.no_grad()
    def score(
        self, examples: Examples, pictures: Pictures, batch_size: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (N,) of all pictures of examples, and their std where the head has one; NaN for unreadable ones."""
        rows, prompts, _, _ = examples.flat()
        found: list[tuple[Tensor, ...]] = []
        for first in range(0, len(rows), batch_size):
            some = slice(first, first + batch_size)
            pixels = pictures.get(rows[some])
            broken = pixels.flatten(1).isnan().any(1)
            said = {text: number for number, text in enumerate(dict.fromkeys(prompts.text[some]))}
            texts = self.texts(list(said), device).to(device)
            texts = texts if self.model.frozen else self.model.encode_texts(texts)
            text = texts[[said[prompt] for prompt in prompts.text[some]]]
            value = self.model.head(self.model.encode_images(pixels.nan_to_num().to(device)), text)
            parts = value if isinstance(value, tuple) else (value,)
            found.append(tuple(part.float().cpu().masked_fill(broken, float("nan")) for part in parts))
        mean, *std = (torch.cat(parts) for parts in zip(*found, strict=True))
        return mean, std[0] if std else None


def disturb(images: Tensor, most: float, draws: torch.Generator) -> Tensor:
    """Add noise of a standard deviation drawn per picture from [0, most]; images (B, 3, H, W) in [0, 1]."""
    sd = most * torch.rand(len(images), 1, 1, 1, generator=draws)
    return (images + sd * torch.randn(images.shape, generator=draws)).clamp(0, 1)
