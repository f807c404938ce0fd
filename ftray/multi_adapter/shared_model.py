"""A base model whose parameters many adapters share, and the layers that an adapter changes."""

import copy
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ftray.compat.transformers import set_attention
from ftray.models.sharding import sharded_leaves
from ftray.multi_adapter.shared_linear import PackingUnsupported

Shared = TypeVar("Shared", bound=nn.Module)


def share(model: Shared) -> Shared:
    """A copy of the module structure whose parameters and buffers are those of `model` itself.

    So are the modules whose weights are shared out over workers: gathering changes what they hold.
    """
    for module in model.modules():  # some keep the state of their last pass, and a part of a graph can't be copied
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    own = (*model.parameters(), *model.buffers(), *sharded_leaves(model))
    return copy.deepcopy(model, {id(part): part for part in own})


def shared_model(base: PreTrainedModel, implementation: str | None) -> PreTrainedModel:
    """A :func:`share` of the base that runs the rows of many adapters; the attention is of that name, None: its own."""
    shared = share(base)
    kept = {id(getattr(module, "config", None)) for module in sharded_leaves(base)}
    for module in shared.modules():
        own = getattr(module, "config", None)  # a copy too, and that of a language model may be a part of the whole's
        if implementation and isinstance(own, PretrainedConfig) and id(own) not in kept:
            set_attention(own, implementation)
    return shared


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the order in which gradients are given."""
    return [p for p in model.parameters() if p.requires_grad]


def train_mode(model: nn.Module) -> None:
    """As `model.train()`, but frozen modules stay in evaluation mode, but for layers that recompute their activations.

    In evaluation mode routers draw no random numbers, and no fused kernel replaces an adapted layer.
    """
    model.train()
    adapters = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    own = {
        part
        for wrapper in model.modules()
        if isinstance(wrapper, adapters)
        for name, child in wrapper.named_children()
        if name not in ("base_layer", "original_module")
        for part in child.modules()
    }
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in inner.modules():
        if (
            module is not model
            and module not in own
            and not isinstance(module, (*adapters, GradientCheckpointingLayer))
        ):
            module.training = False


def tuner_layers(model: PeftModel, shared: PreTrainedModel) -> dict[str, BaseTunerLayer]:
    """The adapted layers of `model`, by their path in the base model `shared`.

    Raises:
        PackingUnsupported: it trains more than adapters of linear layers in front of the head.
    """
    method = model.active_peft_config.peft_type.value
    if model.active_peft_config.is_prompt_learning:
        raise PackingUnsupported(f"{method} adds tokens or activations to the model's input")
    if getattr(model.active_peft_config, "alora_invocation_tokens", None) is not None:
        raise PackingUnsupported("aLoRA looks for its invocation tokens in a text by itself")
    inner: Any = model.get_base_model()
    layers = {path: module for path, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    if any(id(p) not in inside for p in trainable(model)):
        raise PackingUnsupported(f"{method} trains parameters outside of the layers that it adapts")
    for path, layer in layers.items():
        base = layer.get_base_layer()
        if isinstance(layer, ParamWrapper):
            raise PackingUnsupported(f"{method} adapts a parameter of {path}, which is no linear layer")
        if isinstance(base, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d) or layer is inner.get_output_embeddings():
            raise PackingUnsupported(f"{method} adapts {path}, which is no linear layer in front of the head")
        weights = zip(base.parameters(), shared.get_submodule(path).parameters(), strict=True)
        if any(own is not theirs for own, theirs in weights):
            raise PackingUnsupported(f"{method} starts from a changed copy of {path}")
    return layers
