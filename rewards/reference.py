"""What the base model scores: K samples per prompt, and their cache on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.keys import key
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.expression import RewardError

MAD_TO_SD = 1.4826  # 1 / Phi^-1(3/4): the median absolute deviation of a Gaussian is sd / 1.4826
FLOOR = 0.5  # of the global sd, below which no prompt's scale falls


class Reference:
    """Scores of samples of the base model, by prompt; NaN is left out.

    Args:
        samples: K or fewer finite scores of every prompt, in the scorer's unit.
        source: where they come from, for messages.

    Raises:
        RewardError: no prompts, or a prompt without a finite score.
    """

    def __init__(self, samples: Mapping[str, Sequence[float]], source: str = "the reference") -> None:
        kept = {prompt: [v for v in values if math.isfinite(v)] for prompt, values in samples.items()}
        empty = [prompt for prompt, values in kept.items() if not values]
        if empty or not kept:
            raise RewardError(f"Expected {source} to have scores for {empty[:1] or 'a prompt'} but it has none.")
        self.source = source
        self.row = {prompt: row for row, prompt in enumerate(kept)}
        rows = [torch.tensor(values, dtype=torch.float64) for values in kept.values()]
        self.all_samples = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)  # (P, K)
        self.means = self.all_samples.nanmean(1)
        self.medians = _median(self.all_samples)
        deviations = (self.all_samples - self.medians[:, None]).abs()
        variance = (self.all_samples - self.means[:, None]).square().nanmean(1)  # ddof 0
        self.global_sd = float(variance.mean().sqrt())
        self.scales = (MAD_TO_SD * _median(deviations)).clamp(min=FLOOR * self.global_sd)

    def samples(self, prompts: Prompts) -> Tensor:
        """(B, K) base scores of each row's prompt, NaN where a prompt has fewer than K."""
        return self.all_samples[self._rows(prompts)]

    def mean(self, prompts: Prompts) -> Tensor:
        """(B,) mean base score of each row's prompt."""
        return self.means[self._rows(prompts)]

    def median(self, prompts: Prompts) -> Tensor:
        """(B,) median base score of each row's prompt."""
        return self.medians[self._rows(prompts)]

    def scale(self, prompts: Prompts) -> Tensor:
        """(B,) 1.4826 times the median absolute deviation of each row's prompt, at least half the global sd.

        Raises:
            RewardError: the scores do not vary within any prompt.
        """
        if not self.global_sd:
            raise RewardError(f"The scores in {self.source} do not vary within any prompt, so they give no scale.")
        return self.scales[self._rows(prompts)]

    def quantile(self, prompts: Prompts, q: float) -> Tensor:
        """(B,) linearly interpolated quantile of each row's base scores."""
        return self.all_samples.nanquantile(q, dim=1)[self._rows(prompts)]

    def refuse(self, prompt: str) -> str | None:
        """Why a prompt cannot be compared, or None."""
        return None if prompt in self.row else f"it is not calibrated in {self.source}"

    def _rows(self, prompts: Prompts) -> list[int]:
        missing = next((text for text in prompts.text if text not in self.row), None)
        if missing is not None:
            raise RewardError(f"The prompt {missing!r} is not calibrated in {self.source}.")
        return [self.row[text] for text in prompts.text]


def _median(values: Tensor) -> Tensor:
    """(P,) medians of rows, NaN left out; of an even number the mean of the middle two."""
    return values.nanquantile(0.5, dim=1)


def find_reference(base: Reference | str | Path | None, scorer: Scorer) -> Reference:
    """A reference as it is, or the calibration of a scorer on a pipeline.

    Args:
        base: a `Reference`, or an alias or folder of a pipeline.
        scorer: whose scores are wanted, with its weights loaded.

    Raises:
        RewardError: no base was named, or it was not calibrated.
    """
    if isinstance(base, Reference):
        return base
    if base is None:
        raise RewardError(
            f"Comparing {scorer.name!r} with the base model needs a base: pass load_reward(..., base='tiny-sd'), or "
            "base=... in the text."
        )
    return read_calibration(base, scorer)


def calibration_folder(pipeline: str | Path, scorer: Scorer) -> Path:
    """Where scores of a pipeline's samples are kept: keyed by the content of the pipeline's files and the scorer's."""
    place = os.environ.get("T2I_ALIGN_CACHE") or Path.home() / ".cache" / "t2i_align"
    return Path(place) / "calibration" / f"{_hash_pipeline(pipeline)}-{_hash_scorer(scorer)}"


def read_calibration(pipeline: str | Path, scorer: Scorer) -> Reference:
    """What `write_calibration` kept.

    Raises:
        RewardError: nothing, a damaged file, or prompts sampled with different settings.
    """
    folder = calibration_folder(pipeline, scorer)
    files = [read_calibration_file(path) for path in sorted(folder.glob("*.json"))]
    command = f"`t2i-align rewards calibrate {pipeline} --rewards '{scorer.name}' --prompts FILE`"
    if _options(scorer):  # which the command line cannot say
        command = f"`t2i_align.calibration.calibrate('{pipeline}', [load_reward({{...}})], prompts)` with its options"
    if not files:
        raise RewardError(f"The scorer {scorer.name!r} is not calibrated on {pipeline}: run {command}.")
    if len({json.dumps(file["settings"], sort_keys=True) for file in files}) > 1:
        raise RewardError(f"The prompts in {folder} were sampled with different settings: delete it and run {command}.")
    scores = {file["prompt"]: [math.nan if v is None else v for v in file["scores"]] for file in files}
    return Reference(scores, f"the calibration of {pipeline} ({command})")


def read_calibration_file(path: Path) -> dict[str, Any]:
    """One prompt's file. Raises RewardError where it is damaged."""
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        return {name: file[name] for name in ("prompt", "scores", "settings")}
    except (ValueError, KeyError, TypeError) as error:
        raise RewardError(f"The calibration file {path} is damaged ({error}): delete it.") from error


def prompt_file(folder: Path, prompt: str) -> Path:
    """The file of a prompt."""
    return folder / f"{key(prompt):016x}.json"


def write_calibration(folder: Path, prompt: str, scores: Sequence[float], settings: Mapping[str, Any]) -> None:
    """Keep one prompt's scores, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = prompt_file(folder, prompt)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    content = {
        "prompt": prompt,
        "settings": dict(settings),
        "scores": [v if math.isfinite(v) else None for v in scores],
    }
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def _hash_pipeline(pipeline: str | Path) -> str:
    from t2i_align.pipelines.loading import find_pipeline

    folder = find_pipeline(pipeline)
    digest = blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".txt", ".bin")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _hash_scorer(scorer: Scorer) -> str:
    digest = blake2b(f"{type(scorer).__module__}.{type(scorer).__qualname__} {scorer.name}".encode(), digest_size=8)
    digest.update(_options(scorer).encode())
    weights = [item for network in scorer.networks() for item in network.state_dict().items()]
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _options(scorer: Scorer) -> str:
    """The options that it and the scorers in it were made with; empty where these are the defaults."""
    parts = [part for part in scorer.modules() if isinstance(part, Scorer) and part.made_with]
    return " ".join(f"{part.name} {part.made_with}" for part in parts)
