"""llama.cpp's Q4_K_M: which tensor of a GGUF file gets which type; its kernels come from libgguf and gguf.

The mixture is that of llama.cpp's `src/llama-quant.cpp`, for dense models; what is not named here stays as it is.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = re.compile(r"blk\.(\d+)\.(attn_(?:q|k|v|qkv|output)|ffn_(?:gate|up|down))\.weight")
ENDS = ("token_embd.weight", "output.weight")
# for rows that are no multiple of a type's 256 values: one of 32
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FILE_TYPE = 15  # LLAMA_FTYPE_MOSTLY_Q4_K_M


def q4_k_m(source: Path, target: Path) -> None:
    """Write the GGUF file `source`, whose tensors are float16 or float32, as Q4_K_M."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture, use_temp_file=True)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(FILE_TYPE)
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    for tensor in reader.tensors:
        kind = type_of(tensor.name, tuple(int(n) for n in reversed(tensor.shape)), layers, tied)
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        packed = packed_as(kind, gguf.dequantize(tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def type_of(name: str, shape: tuple[int, ...], layers: int, tied: bool) -> str | None:
    """The type of a tensor of `shape` [rows, columns]; None: it stays as it is.

    Args:
        layers: of the model.
        tied: whether the table of embeddings gives the output too.
    """
    found = LAYERS.fullmatch(name)
    if len(shape) != 2 or not (found or name in ENDS):
        return None
    kind = "Q4_K"
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = "Q6_K"
    elif found and found[2] in ("attn_v", "ffn_down"):
        layer = int(found[1])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        kind = "Q6_K" if more else "Q4_K"
    elif found and found[2] == "attn_qkv":
        kind = "Q5_K"
    if shape[1] % 256:
        kind = FALLBACK[kind]
    return kind if shape[1] % 32 == 0 else None


def packed_as(kind: str, rows: np.ndarray) -> np.ndarray:
    """float [rows, columns] as uint8 [rows, bytes]."""
    import gguf
    import libgguf

    values: Any = np.ascontiguousarray(rows, np.float32)
    number = gguf.GGMLQuantizationType[kind]
    packed = libgguf.quantize_rows(values, int(number)) if kind in FALLBACK else gguf.quantize(values, number)
    return np.asarray(packed).view(np.uint8)
