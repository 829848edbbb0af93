"""A vision-language model as judge, behind any endpoint that speaks OpenAI's chat API (vLLM, SGLang, a service).

    yes_no           P(Yes) / (P(Yes) + P(No)) of the first token, from the 20 likeliest (Flow-Factory's form)
    rubric           a number from 1 to 5 in the reply, with our rubric or yours
    unified_reward   the same with the words that UnifiedReward was trained on (arXiv 2503.05236)

A reply that cannot be read is NaN, with a warning that says how many and why, and never 0: an error must not look like
the worst picture. What can be read is kept on disk by picture, prompt, template, model and parameters.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from t2i_align.config import nearest
from t2i_align.data.images import tensor_to_pil
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.judge_forms import FORMS

URL, KEY, MODEL = "OPENAI_BASE_URL", "OPENAI_API_KEY", "T2I_ALIGN_JUDGE"  # environment variables
HOPELESS = {401: "the key is refused", 403: "the key is refused", 404: "it knows no such model or address"}
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # worth another try


class Unreadable(Exception):
    """One picture cannot be judged; the message says why."""


class VLMJudge(Scorer):
    """What a vision-language model behind an OpenAI-compatible endpoint says of a picture.

    Args:
        model: its name at the endpoint; "" is $T2I_ALIGN_JUDGE.
        url: up to and with /v1; "" is $OPENAI_BASE_URL. The key, if one is needed, is $OPENAI_API_KEY.
        form: `yes_no` (0 to 1), `rubric` or `unified_reward` (1 to 5).
        template: the question instead of the form's; {prompt} stands for the prompt.
        max_tokens: of a reply; 0 is the form's. Models that think first need room: `yes_no` then reads the last token
            where Yes or No was likely.
        parameters: more of the request's body, such as {seed: 1}.
        size: pictures are squashed to squares of so many pixels (Flow-GRPO with UnifiedReward: 512); 0 leaves them.
        tries: of one request.
        wait: seconds before the second try; it doubles.
        timeout: seconds of one request.
        workers: requests at a time.
        cache: False asks again; True keeps replies below ~/.cache/t2i_align (or $T2I_ALIGN_CACHE).
        label: the scorer's name in sums and tables; needed where one sum has two.

    Raises:
        RewardError: no endpoint or model is named, an unknown form, or a template without {prompt}.
    """

    name = "vlm_judge"
    needs_prompt = True
    tolerance: ClassVar[float] = 0.0
    without_std = True
    unit: ClassVar[str] = "probability or points"
    license: ClassVar[str] = "the model's"
    source: ClassVar[str] = "an endpoint"
    summary: ClassVar[str] = "a vision-language model's opinion, over an OpenAI-compatible endpoint"

    def __init__(
        self,
        model: str = "",
        url: str = "",
        form: str = "yes_no",
        template: str = "",
        max_tokens: int = 0,
        parameters: Mapping[str, Any] | None = None,
        size: int = 0,
        tries: int = 4,
        wait: float = 1.0,
        timeout: float = 60.0,
        workers: int = 8,
        cache: bool = True,
        label: str = "",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise RewardError(f"Unknown form {form!r} of vlm_judge.{nearest(form, FORMS)} Expected {', '.join(FORMS)}.")
        if template and "{prompt}" not in template:
            raise RewardError(f"Expected the template of vlm_judge to have {{prompt}} but got {template!r:.80}.")
        if missing := self.missing(url=url, model=model):
            raise RewardError(f"The scorer {self.name!r} cannot be used: {missing}")
        self.name, self.form = label or self.name, FORMS[form]
        self.range = self.form.range
        self.model, self.url = model or os.environ[MODEL], (url or os.environ[URL]).rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise RewardError(f"Expected the url of vlm_judge to start with http:// or https:// but got {self.url!r}.")
        self.template = template or self.form.template
        self.settings: dict[str, Any] = {"temperature": 0, **self.form.parameters, **(parameters or {})}
        if max_tokens:
            self.settings["max_tokens"] = max_tokens
        self.size, self.tries, self.wait, self.timeout = size, tries, wait, timeout
        self.workers, self.cache = workers, cache
        self.asked, self.unread = 0, 0  # pictures so far, and those that could not be read
        facts = json.dumps((self.url, self.model, self.template, sorted(self.settings.items()), size))
        digest = torch.tensor(list(hashlib.sha256(facts.encode()).digest()), dtype=torch.uint8)
        self.register_buffer("identity", digest)  # tells calibrations of two judges apart

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        absent = [
            f"{option} (or ${variable})"
            for option, variable in (("url", URL), ("model", MODEL))
            if not (options.get(option) or os.environ.get(variable))
        ]
        return f"name the endpoint by {' and '.join(absent)}." if absent else None

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        pairs = zip(map(tensor_to_pil, images), prompts.text, strict=True)
        with ThreadPoolExecutor(self.workers) as pool:
            asked = [pool.submit(self._judge, image, prompt) for image, prompt in pairs]
            try:
                values = [one.result() for one in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what cannot judge one cannot judge the others
                raise
        reasons = [value for value in values if isinstance(value, str)]
        self.asked, self.unread = self.asked + len(values), self.unread + len(reasons)
        if reasons:
            warnings.warn(
                f"{self.name} could not read {len(reasons)} of {len(values)} replies ({self.unread} of {self.asked} so "
                f"far): NaN; the first because {reasons[0]}.",
                stacklevel=2,
            )
        numbers = [math.nan if isinstance(value, str) else value for value in values]
        return torch.tensor(numbers, dtype=torch.float32, device=images.device)

    def _judge(self, image: Image.Image, prompt: str) -> float | str:
        """The value, or why there is none."""
        if self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        kept = _folder() / f"{self.key(image, prompt)}.json"
        try:
            if self.cache and kept.is_file():
                return float(json.loads(kept.read_text(encoding="utf-8"))["value"])
        except (OSError, ValueError, KeyError, TypeError):
            kept.unlink(missing_ok=True)  # cut off while it was written
        try:
            value = self._ask(self.request(image, prompt))
        except Unreadable as reason:
            return str(reason)
        if self.cache:
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({"value": value, "model": self.model, "prompt": prompt}), encoding="utf-8")
            part.replace(kept)
        return value

    def key(self, image: Image.Image, prompt: str) -> str:
        """Of the cache: all that a reply depends on."""
        facts = (image.size, self.url, self.model, self.template, prompt, sorted(self.settings.items()))
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(image.tobytes())
        return digest.hexdigest()

    def request(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        """The body of a request: the picture as PNG, then the question."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.template.replace("{prompt}", prompt)},
        ]
        return {"model": self.model, "messages": [{"role": "user", "content": content}], **self.settings}

    def _ask(self, body: Mapping[str, Any]) -> float:
        """The value of a reply.

        Raises:
            Unreadable: no reply to be read after all tries.
            RewardError: the endpoint cannot judge anything.
        """
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        data, reason = json.dumps(body).encode(), ""
        for attempt in range(self.tries):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    choice = json.load(reply)["choices"][0]
                value = self.form.read(choice)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(300).decode(errors="replace").split())
                if error.code in HOPELESS:
                    raise RewardError(
                        f"The judge at {self.url} answers {error.code}, {HOPELESS[error.code]}: {said}"
                    ) from error
                reason = f"the endpoint answered {error.code}: {said}"
                if error.code not in PASSING:
                    break
            except urllib.error.URLError as error:
                reason = f"no connection to {self.url}: {error.reason}"
                if isinstance(error.reason, ConnectionRefusedError) and attempt == self.tries - 1:
                    raise RewardError(f"There is no judge at {self.url}: {error.reason}.") from error
            except (OSError, HTTPException) as error:
                reason = f"the connection broke off: {type(error).__name__}"
            except (ValueError, LookupError, TypeError) as error:
                reason = f"the reply is malformed: {type(error).__name__}"
            else:
                if isinstance(value, float):
                    return value
                reason = value
                if not self.settings.get("temperature"):
                    break  # it would say the same again
        raise Unreadable(reason)


def _folder() -> Path:
    return Path(os.environ.get("T2I_ALIGN_CACHE") or Path.home() / ".cache" / "t2i_align") / "judge"
