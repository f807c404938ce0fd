"""AdaLoRA's rank allocation (https://arxiv.org/abs/2303.10512) under DeepSpeed.

PEFT's `update_and_allocate` reads `p.grad` after the optimiser step and zeroes singular values in place. ZeRO
keeps gradients and weights elsewhere, so both go through DeepSpeed's `safe_get/set` functions.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import AdaLoraConfig, PeftModel


def orthogonality(factors: list[torch.Tensor]) -> torch.Tensor:
    """The paper's regularisation (its equation 4), as PEFT weighs it: mean distance of A Aᵀ and Bᵀ B from one.

    PEFT adds it to the loss that the model returns; here the loss is computed outside of the model.

    Args:
        factors: all `lora_A` [rank, in] and `lora_B` [out, rank].
    """
    grams = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
    return torch.stack([torch.linalg.norm(g - torch.eye(len(g), device=g.device)) for g in grams]).mean()


class RankAllocation:
    """Calls `update_and_allocate` around `engine.step()`; does nothing for other methods."""

    def __init__(self, engine: "DeepSpeedEngine", model: "PeftModel"):
        self.engine, self.model = engine, model
        self.tuner: Any = model.base_model
        self.active = hasattr(self.tuner, "update_and_allocate")
        self.zero = engine.zero_optimization_stage() > 0
        self.weight = self._config().orth_reg_weight if self.active else 0.0
        self.gradients: dict[str, torch.Tensor] = {}

    def _config(self) -> "AdaLoraConfig":
        return self.tuner.peft_config[self.tuner.trainable_adapter_name]

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def penalty(self) -> torch.Tensor | float:
        """The weighted :func:`orthogonality`, to be added to the loss; 0 for other methods."""
        if not self.active:
            return 0.0
        import deepspeed

        factors = [p for n, p in self._parameters() if "lora_A" in n or "lora_B" in n]
        partitioned = self.engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters(factors, enabled=partitioned):
            whole = [p.clone() for p in factors]  # the backward pass needs them when they are partitioned again
        return self.weight * orthogonality(whole)

    def before_step(self) -> None:
        """Keep the gradients, which the step will clear."""
        if self.active:
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in self._parameters():
                gradient = safe_get_full_grad(parameter) if self.zero else parameter.grad
                self.gradients[name] = gradient.clone()  # type: ignore[union-attr]  # backward has just filled it

    def after_step(self, step: int) -> None:
        """Update importances with the kept gradients; mask the ranks beyond the budget at `step` (from 0)."""
        if not self.active:
            return
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = self._parameters()
        with deepspeed.zero.GatheredParameters(
            [p for _, p in parameters], enabled=self.engine.zero_optimization_stage() == 3
        ):
            for name, parameter in parameters:
                parameter.grad = self.gradients.pop(name)
            self.tuner.update_and_allocate(step)
            masked = {}
            for name, parameter in parameters:
                parameter.grad = None
                if "lora_E" in name:
                    masked[name] = parameter.detach().clone()
        if self.zero:
            for name, parameter in parameters:
                if name in masked:
                    safe_set_full_fp32_param(parameter, masked[name])

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, without the weights: smoothed importances and the rank pattern."""
        if not self.active:
            return {}
        allocator = self.tuner.rankallocator
        names = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        return {
            "importance": {n: getattr(allocator, n) for n in names if hasattr(allocator, n)},
            "rank_pattern": self._config().rank_pattern,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        if self.active:
            for name, value in state["importance"].items():
                setattr(self.tuner.rankallocator, name, value)
            self._config().rank_pattern = state["rank_pattern"]
