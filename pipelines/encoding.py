"""What the network is told: prompts through the pipeline's own encoders, once each, or ready-made embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from t2i_align.pipelines.calling import Caller, DriverError
from t2i_align.pipelines.cond import Cond, Tree, ambiguous, rows_of, split_rows
from t2i_align.pipelines.driven import no_rows
from t2i_align.prompts import MORE_TEXTS, NEGATIVE, Prompts, negatives


class Encoder(Caller):
    """Makes the conditions (`Cond`) of a pipeline."""

    @torch.no_grad()
    def encode(
        self,
        prompts: str | Sequence[str] | Prompts,
        negative: str | Sequence[str | None] | None = None,
        given: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        **call: Any,
    ) -> Cond:
        """Run the text encoders once per different prompt, for both branches of guidance.

        Args:
            prompts: one row per sample.
            negative: what guidance points away from, one text or one per sample. If None the column `negative_prompt`
                of the prompts, and where that says nothing the driver's `negative_prompt` or the pipeline's default.
            given: other keywords of `__call__` with one row per sample, such as a control image `image=(B, 3, H, W)`.
            batch_size: prompts that go through the encoders together.
            call: keywords of `__call__` that matter for the encoding.

        Raises:
            DriverError: the text encoders were freed, or the pipeline takes no negative prompt.
        """
        if self.freed:
            raise DriverError(f"The text encoders of {self.family} were freed: encode all prompts before.")
        table = Prompts.of(prompts)
        if negative is None:
            general = call.pop(NEGATIVE, self.defaults.get(NEGATIVE))
            negative = negatives(table, general, self.accepts) or general
        if negative is not None and NEGATIVE not in self.accepts:
            raise DriverError(f"{self.family} takes no negative prompt: leave it, or the column {NEGATIVE}, out.")
        against = [negative] * len(table) if negative is None or isinstance(negative, str) else list(negative)
        rows = rows_of(dict(given or {}), len(table), self.second_axis)
        pairs = list(zip(table.text, against, strict=True))
        unique = {pair: pairs.index(pair) for pair in dict.fromkeys(pairs)}
        apart = [[(p, row) for p, row in unique.items() if (p[1] is None) is missing] for missing in (False, True)]
        chunks = [part[i : i + batch_size] for part in apart for i in range(0, len(part), batch_size)]
        encoded = tuple(
            tree
            for chunk in chunks
            for tree in self._encode([pair for pair, _ in chunk], [rows[row] for _, row in chunk], call)
        )
        order = {pair: i for i, (pair, _) in enumerate(pair for chunk in chunks for pair in chunk)}
        cond = Cond(encoded, tuple(order[pair] for pair in pairs), table, tuple(rows))
        if negative is not None:
            cond = cond.having(negative_prompt=[""] * len(table))  # for pipelines that ask whether there is one
        self._remember(cond)
        self._release()
        return cond

    def _encode(
        self, pairs: list[tuple[str, str | None]], rows: list[dict[str, Tree]], call: dict[str, Any]
    ) -> list[tuple[Tree, ...]]:
        """Outputs of every `encode_prompt` call, for each pair (prompt, negative prompt)."""
        outputs: list[Tree] = []
        pipe = self._copy(no_rows)
        original = pipe.encode_prompt
        names = list(inspect.signature(original).parameters)

        def record(*args: Any, **options: Any) -> Tree:
            options = dict(zip(names, args, strict=False)) | options
            if "do_classifier_free_guidance" in options:
                options["do_classifier_free_guidance"] = True  # keep both branches, whatever this call's guidance is
            outputs.append(original(**options))
            return outputs[-1]

        pipe.__dict__["encode_prompt"] = record
        texts = {name: value for name, value in (self.defaults | call).items() if isinstance(value, str)}
        told: dict[str, Any] = {
            name: [text] * len(pairs) for name, text in texts.items() if name.startswith(MORE_TEXTS)
        }
        told |= self._draws(len(pairs)) | Cond((), (0,) * len(pairs), Prompts.of(""), tuple(rows)).keywords()
        if pairs[0][1] is not None:
            told["negative_prompt"] = [text or "" for _, text in pairs]
            if "true_cfg_scale" in self.accepts:  # above 1, or the negative prompt would not be encoded
                told["true_cfg_scale"] = 2.0
        self._run(pipe, 1, {**call, **told, "prompt": [text for text, _ in pairs], "output_type": "latent"})
        if any(ambiguous(output, len(pairs)) for output in outputs):
            half = len(pairs) // 2
            return self._encode(pairs[:half], rows[:half], call) + self._encode(pairs[half:], rows[half:], call)
        return list(zip(*(split_rows(output, len(pairs), self.second_axis) for output in outputs), strict=True))

    def condition(self, prompts: Sequence[str] | None = None, **given: Any) -> Cond:
        """A condition of ready-made keywords of `__call__`: `prompt_embeds=(B, ...)`, a list of B tensors, and so on.

        Args:
            prompts: what the rows say, for scorers that read it; empty texts if None.
            given: keywords with B rows each.
        """
        if not given:
            raise DriverError("Expected keywords such as prompt_embeds=(B, ...) but got none.")
        rows = len(next(iter(self._known(given).values())))
        per_row = rows_of(given, rows, self.second_axis)
        cond = Cond((), (0,) * rows, Prompts.of(prompts, rows), tuple(per_row))
        self._remember(cond)
        return cond

    def free_text_encoders(self, drop: bool = False) -> int:
        """Move the pipeline's text encoders off its device, once all prompts are encoded.

        The one call that changes the user's pipeline, which could not encode then: on request, to make room.

        Args:
            drop: discard their weights instead of keeping them in main memory.

        Returns:
            Bytes of weights that were moved or discarded.
        """
        if not self.stays:
            raise DriverError(f"{self.family} is offloaded: its text encoders are off the device already.")
        found = {
            n: m for n, m in self.pipe.components.items() if "text_encoder" in n and isinstance(m, torch.nn.Module)
        }
        self._blank()
        freed = sum(p.numel() * p.element_size() for m in found.values() for p in m.parameters())
        for module in found.values():
            module.to("meta" if drop else "cpu")
        self.freed = tuple(found)
        return freed

    def _remember(self, cond: Cond) -> None:
        if self.any_cond is None and len(cond):
            self.any_cond = Cond(cond.encoded[:1], (0,), cond.prompts[:1], cond.given[:1])

    def _blank(self) -> Cond:
        if self.any_cond is None:
            self.any_cond = self.encode("")
        return self.any_cond
