"""The policy: a pipeline's own network under training, by LoRA or in full, with the base model one context away.

    policy = Policy.lora(pipe, rank=16)
    driver = Driver(pipe)                      # sees the policy: modules are shared
    with policy.reference():
        base = driver.step(x, row, cond).q     # what the base model would do
    kl = driver.step(x, row, cond).q.kl(base)

Contexts change which weights the forward pass uses and nothing else: not `requires_grad`, not train or eval mode.
They nest, and hold a lock of the network. A backward pass that reaches the policy's weights, or the `yield` of a loss
term, inside one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from t2i_align.policy.adapters import Adapters
from t2i_align.policy.artefacts import describe, new_folder, read_note
from t2i_align.policy.component import trainable_network
from t2i_align.policy.existing import existing_lora
from t2i_align.policy.full import FullWeights
from t2i_align.policy.lora import adapter_names, find_targets, same_for_all
from t2i_align.policy.path import PolicyError, switch_of
from t2i_align.policy.sharded import ShardedWeights

NEW = "policy"  # name of the trained adapter unless another is given


class Policy(nn.Module):
    """A network under training; made by `Policy.lora`, `Policy.full` or `Policy.load`.

    A method that holds it as a module exposes its trainable parameters to `fit`.

    Args:
        pipe: the pipeline; only its network is written to.
        component: name of the network in the pipeline.
        weights: what is trained of it.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        component: str,
        weights: Adapters | FullWeights | ShardedWeights,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.pipe, self.component, self.weights = pipe, component, weights
        self.network = getattr(pipe, component)
        self.switch = switch_of(self.network)
        for p in weights.trainable:
            p.register_hook(self.switch.refuse_backward)
        if gradient_checkpointing:
            self.network.enable_gradient_checkpointing(self.switch.checkpointed)

    @classmethod
    def lora(
        cls,
        pipe: DiffusionPipeline,
        rank: int | None = None,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        component: str | None = None,
        start: str | Path | None = None,
        adapters: Sequence[str] = (NEW,),
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> Policy:
        """Train a LoRA: fp32 weights over a frozen base of any number type.

        At the start the policy is the base model, bit for bit. LoRA that the pipeline has loaded before counts as
        base. A later policy on the same network stands on top of an earlier one, which it freezes.

        Args:
            pipe: the pipeline.
            rank: of the update of each layer; 16 if None.
            alpha: the update is alpha / rank B A; the rank if None.
            targets: endings of the names of layers to adapt (`to_q`); the linear layers of attention if None.
            component: which of the pipeline's networks; its denoiser if None.
            start: an existing LoRA to go on from, with its own rank, alpha and layers: a folder that `save` wrote,
                peft's folder, or a file (or its folder) that the pipeline's `load_lora_weights` opens.
            adapters: names; the first is trained, others start as frozen copies of it.
            gradient_checkpointing: see `Policy`.
            seed: of the starting weights, keyed by layer.

        Raises:
            PolicyError: a network, layers, rank or LoRA that does not fit; with what there is.
        """
        if start is not None and not (rank is None and alpha is None and targets is None):
            raise PolicyError("Expected rank, alpha and targets from start= but they were given too: leave them out.")
        if isinstance(adapters, str) or not adapters:
            raise PolicyError(f"Expected adapters= to be a list of names but got {adapters!r}.")
        component, network = trainable_network(pipe, component, gradient_checkpointing)
        name, *others = adapters
        weights: Mapping[str, Tensor] = {}
        if start is not None:
            layers, weights = existing_lora(pipe, component, network, start)
        else:
            layers = same_for_all(find_targets(network, targets), rank, alpha)
        policy = cls(pipe, component, Adapters(network, name, layers, seed, weights), gradient_checkpointing)
        for other in others:
            policy.add_adapter(other, like=name)
        return policy

    @classmethod
    def full(
        cls,
        pipe: DiffusionPipeline,
        component: str | None = None,
        gradient_checkpointing: bool = False,
        shard: bool = False,
        device: torch.device | None = None,
    ) -> Policy:
        """Train all weights of a network, in its own number type.

        The starting weights are kept for `reference()`, which takes the memory of the network once more; an average
        takes it a third time. Contexts put other parameter objects into the modules, so that wrappers that own them
        do not fit, but for FSDP2 by `shard`.

        Args:
            pipe: the pipeline.
            component: which of its networks; its denoiser if None.
            gradient_checkpointing: see `Policy`.
            shard: deal the weights out over the processes (`ShardedWeights`).
            device: of weights in shards, where the network lies elsewhere, such as in main memory for want of room.

        Raises:
            PolicyError: a network that cannot be trained so (quantised, or with LoRA in it), or shards of one process.
        """
        component, network = trainable_network(pipe, component, gradient_checkpointing)
        if adapter_names(network):
            raise PolicyError(
                f"Expected a {component} without LoRA, since all its weights are trained and saved, but it has "
                f"{', '.join(adapter_names(network))}: fuse it into the weights, or unload it."
            )
        if shard:
            return cls(pipe, component, ShardedWeights(pipe, component, device), gradient_checkpointing)
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        return cls(pipe, component, FullWeights(network, networks), gradient_checkpointing)

    @classmethod
    def load(cls, pipe: DiffusionPipeline, folder: str | Path, gradient_checkpointing: bool = False) -> Policy:
        """Open what `save` wrote over the same base pipeline: the same weights, bit for bit if saved in fp32.

        Raises:
            PolicyError: not a policy's folder, or one of another network.
        """
        note = read_note(folder)
        component = note["component"]
        if note["kind"] == "lora":
            names = (note["adapter"],)
            return cls.lora(
                pipe, component=component, start=folder, adapters=names, gradient_checkpointing=gradient_checkpointing
            )
        policy = cls.full(pipe, component, gradient_checkpointing)
        policy.read(folder)
        return policy

    def read(self, folder: str | Path) -> None:
        """Go on from all weights that `save` wrote of such a policy. Raises PolicyError for another network's."""
        try:
            saved = type(self.network).from_pretrained(folder, subfolder=self.component)
            self.network.load_state_dict(saved.state_dict())
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise PolicyError(f"Cannot open {folder} in {self.component}: {' '.join(str(error).split())}.") from error

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters. Raises PolicyError for full weights."""
        if not isinstance(self.weights, Adapters):
            raise PolicyError("Expected a policy with LoRA adapters but all weights are trained.")
        return self.weights

    @property
    def sharded(self) -> bool:
        """Whether the weights lie in shards over several processes, which must then make the same passes."""
        return isinstance(self.weights, ShardedWeights)

    def trainable(self) -> list[nn.Parameter]:
        """What is trained: the LoRA weights of the first adapter, or all weights."""
        return list(self.weights.trainable)

    # Contexts

    def reference(self) -> AbstractContextManager[None]:
        """The base model: without the policy's LoRA, or with the starting weights."""
        return self.switch.use(self.weights.reference())

    def averaged(self) -> AbstractContextManager[None]:
        """The average of the weights that `update_average` keeps. Raises PolicyError before its first call."""
        if not self.weights.has_average:
            raise PolicyError("Expected update_average to have been called: there is no average of the weights yet.")
        return self.switch.use(self.weights.averaged())

    def adapter(self, name: str) -> AbstractContextManager[None]:
        """Another adapter in the place of the trained one."""
        return self.switch.use(self.adapters.adapter(name))

    def refuse_open_context(self) -> None:
        """For training loops, after each loss term.

        Raises:
            PolicyError: a context is open (a `yield` inside one), or the pipeline does not use the policy any more.
        """
        self.switch.refuse_open("the yield of a loss term")
        if isinstance(self.weights, Adapters):
            self.weights.refuse_inactive()

    # Weights

    def update_average(self, decay: float) -> None:
        """Move the average: decay * average + (1 - decay) * weights. The first call starts it at the weights."""
        self.switch.refuse_open("update_average")
        self.weights.update_average(decay)

    def add_adapter(
        self,
        name: str,
        like: str | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """Add a frozen adapter, for `adapter(name)`: a copy of another, or a new one.

        Args:
            name: of the new adapter.
            like: whose weights, layers, rank and alpha it gets.
            rank, alpha, targets, seed: as for `lora`, of a new one.
        """
        self.switch.refuse_open("add_adapter")
        lora = self.adapters
        if like is None:
            lora.add(name, same_for_all(find_targets(self.network, targets), rank, alpha), seed)
        else:
            lora.add(name, lora.shape(lora.known(like)))
            lora.copy(like, name)

    def copy_adapter(self, source: str, target: str) -> None:
        """Give the adapter `target` the weights of `source`; both must have the same layers, ranks and alphas."""
        lora = self.adapters
        lora.copy(lora.known(source), lora.known(target))

    def save(
        self,
        folder: str | Path,
        averaged: bool = False,
        dtype: torch.dtype | None = None,
        holds_average: bool = False,
    ) -> None:
        """Write the trained weights so that stock software opens them (see `artefacts`), with a card.

        Of weights in shards all processes must call it; the first one writes.

        Args:
            folder: new, empty, or written by this before, in which case it is replaced.
            averaged: the average in the place of the weights.
            dtype: of a LoRA's weights; fp32 if None. Full weights are written as they are.
            holds_average: the weights themselves are an average, which a training loop has put there; for the note.

        Raises:
            PolicyError: the folder holds other files, there is no average, or dtype is given for full weights.
        """
        self.switch.refuse_open("save")
        network = self.network
        if isinstance(self.weights, ShardedWeights):
            network = self.weights.blank
            if not self.weights.gather(averaged):
                return
        note = describe(self.pipe, self.component, network, self.weights.kind, averaged or holds_average)
        with new_folder(Path(folder)) as new, self.averaged() if averaged else nullcontext():
            self.weights.write(new, self.pipe, note, averaged, dtype)
