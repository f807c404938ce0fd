"""A tiny random model of any architecture that transformers knows, by its name alone.

A configuration is made of the class's own defaults, each size in it made small by what its field is called. What does
not follow from names stands in `EXCEPTIONS`.
"""

import re
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

HEADS, HEAD_DIM = 4, 16
HIDDEN, VOCABULARY = HEADS * HEAD_DIM, 384
# of each task, the table that says which types of model have its head
TASKS = {
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
# the first pattern that is in a field's name gives its greatest value
SIZES = [
    (r"token_(id|index)s?$|^(image|audio|video|vision)_.*_id$|^(bos|eos|pad|mask|sep|cls|unk)_index", None),
    (r"hash_.*vocab|vocab_?size|^vocabulary|n_words|^n_tokens?$", VOCABULARY),
    (r"max_position|^n_positions$|^n_ctx$|max_seq|max_(source|target)_pos|context_length|max_2d", 512),
    (r"kv_heads|key_value_heads|multi_query_group|n_head_kv|num_key_heads", 2),
    (r"index_topk", 16),
    (r"index_n_heads", 32),  # with few, many scores are exactly 0, and which of those are chosen is chance
    (r"experts_per|top_?k(_experts)?$|topk$|moe_k$|num_selected", 2),
    (r"n_group|topk_group|expert_group", 1),
    (r"shared_experts?$|first_k_dense|dense_layers", 1),
    (r"experts$|num_routed|^moe_num_", 4),
    (r"lora_rank|lora_dim|rank$|low_rank", 16),
    (r"^qk_head_dim", 2 * HEAD_DIM),
    (r"rotary_dim|rope_dim$", 8),
    (r"^v_head_dim", 12),
    (r"head_dim|d_head|head_size|headdim|^d_kv$|kv_channels|(key|value)_dim$", HEAD_DIM),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"heads?$", HEADS),
    (r"d_state|state_size|ssm_state|state_dim|d_conv|conv_kernel|conv_l_cache", 4),
    (r"layers?$|num_blocks$|^depths?$|block_repeats|^n_layer|num_.*_layers", 2),
    (r"window|local_att|chunk|attn_local", 8),
    (
        r"intermediate|ffn|^d_ff|d_ff$|n_inner|d_inner|ff_dim|mlp_dim|expansion_dim|feed_?forward|mamba_expand_dim",
        2 * HIDDEN,
    ),
    (
        r"hidden|d_model|n_embd|embd?_|emb_dim|embedding|width|d_embed|embed_dim|_dim$|^dim$|_dims$|embed_size|in_channels_dim",
        HIDDEN,
    ),
    (r"image_size|crop_size|resolution", 32),
    (r"patch_size", 8),
]
SPECIAL = {"pad": 1, "bos": 2, "eos": 0, "mask": 3, "decoder_start": 2, "forced": 0}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
HYBRID = {"attention_hidden_size": 2 * HIDDEN, "num_hidden_layers": 4}
EXPERTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA_HEADS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "convbert": {"conv_kernel_size": 9},
    "deepseek_v2": EXPERTS,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **EXPERTS},
    "encoder-decoder": {"decoder_start_token_id": 2, "pad_token_id": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "esmc": {"vocab_size": VOCABULARY},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN, **MAMBA_HEADS},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **MAMBA_HEADS},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "visual_embed": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "mobilebert": {"embedding_size": HIDDEN, "intra_bottleneck_size": HIDDEN, "true_hidden_size": HIDDEN},
    "nystromformer": {"conv_kernel_size": 3, "num_landmarks": 32, "segment_means_seq_len": 32},
    "nemotron3_diarization": {"chunk_right_context": 4},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "mistral4": {"qk_head_dim": 2 * HEAD_DIM, "qk_nope_head_dim": HEAD_DIM, "qk_rope_head_dim": HEAD_DIM},
    "perceiver": {"vocab_size": VOCABULARY, "num_latents": 16, "num_self_attends_per_block": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "rwkv": {"rescale_every": 1},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xlstm": {"num_blocks": 2, "ffn_round_up_to_multiple_of": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, **HYBRID},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], **HYBRID},
}


def tiny_config(kind: str, task: str) -> PretrainedConfig:
    """The configuration of a tiny model of type `kind`; one that reads both ways is made a decoder for CAUSAL_LM."""
    config = _tiny(AutoConfig.for_model(kind))
    if task == "CAUSAL_LM" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def _tiny(config: Any) -> Any:
    given = {name: value for name, value in config.to_dict().items() if not name.startswith(("_", "transformers_v"))}
    layers = _layers(config, given)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in config.sub_configs:
            part = getattr(config, name)
            values[name] = _tiny(part) if isinstance(part, PretrainedConfig) else value
        elif name in layers:
            values[name] = layers[name]
        elif name.startswith("rope_") and isinstance(value, dict):
            values[name] = _rope(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = _size(name, value, given)
        elif name.endswith("token_id") and isinstance(value, list):
            values[name] = 0
        else:
            values[name] = value
    values.pop("model_type", None)
    if values.get("is_encoder_decoder"):
        values.setdefault("decoder_start_token_id", 1)
    return type(config)(**values | EXCEPTIONS.get(config.model_type, {}))


def _layers(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Their number, and lists of what each is: one layer of each kind, but two at least."""
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count, own = given.get(name), given.get("per_layer_config") or {}
    if not isinstance(count, int):
        return {}
    lists = {k: v for k, v in given.items() if isinstance(v, (list, tuple)) and len(v) == count > 1}
    each = list(zip(*lists.values(), strict=True)) if lists else [()]
    own = {int(layer): part for layer, part in own.items()}
    each = [(*(each * count if len(each) == 1 else each)[i], own.get(i)) for i in range(count)]
    chosen = sorted({repr(kind): i for i, kind in reversed(list(enumerate(each)))}.values())
    chosen = (chosen + [i for i in range(count) if i not in chosen])[: max(2, len(chosen))][:5]
    small: dict[str, Any] = {k: [v[i] for i in sorted(chosen)] for k, v in lists.items()}
    if own:
        small["per_layer_config"] = {
            str(place): {k: _size(k, v, given) if type(v) is int else v for k, v in own[i].items()}
            for place, i in enumerate(sorted(chosen))
            if i in own
        }
    return small | {name: min(count, len(chosen))}


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    small = {k: _rope(v) if isinstance(v, dict) else v for k, v in values.items()}
    half = int(HEAD_DIM * (values.get("partial_rotary_factor") or 1)) // 2
    if "mrope_section" in small:
        small["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    for name in ("short_factor", "long_factor"):
        if name in small:
            small[name] = small[name][:half]
    return small


def _size(name: str, value: int, given: dict[str, Any]) -> int:
    most = next((size for pattern, size in SIZES if re.search(pattern, name.lower())), value)
    if most is None:
        part = next((v for k, v in SPECIAL.items() if name.startswith(k)), None)
        return value if value < 0 else (part if part is not None else 304 + value % 64)
    if (most == 2 and "heads" in name) or "head_kv" in name:  # as many as queries have, where they have
        heads = [v for k, v in given.items() if isinstance(v, int) and re.search(r"(attention_|^num_|^n_)heads?$", k)]
        if value in heads and "linear" not in name:
            return min(value, HEADS)
    return min(value, most)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    alphabet = ["<end>", "<pad>", "<start>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
