"""Hugging Face checkpoints in and out, beside transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from nb_lightning.checkpoints.gguf import from_gguf, to_gguf
from nb_lightning.checkpoints.hf_config import config_from_shape, shape_from_config
from nb_lightning.checkpoints.hf_weights import from_hf, to_hf
from nb_lightning.model.transformer import ModelShape
from nb_lightning.model.weights import parameter_shapes
from tests.checkpoints.harness import NANBEIGE, load, write
from tests.harness import ROOT
from tests.model.harness import TINY, ids


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_logits_are_those_of_transformers(tmp_path: Path, tied: bool, shard: str) -> None:
    reference = write(tmp_path, {**NANBEIGE, "tie_word_embeddings": tied}, shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    tokens = ids(2, 50, 96)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-5)


def test_names_are_each_others_inverse() -> None:
    names = list(parameter_shapes(TINY))
    assert [from_hf(to_hf(name)) for name in names] == names
    assert [from_gguf(to_gguf(name)) for name in names] == names
    assert from_hf("layers.0.mlp.up_proj.weight") is None and from_gguf("output.bias") is None


# config.json --------------------------------------------------------------------------------------------------------


def test_the_released_config_is_the_shipped_shape() -> None:
    released = {**NANBEIGE, "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 20, "head_dim": 128,
                "num_key_value_heads": 4, "intermediate_size": 10496, "vocab_size": 166144}  # fmt: skip
    ours = {
        key: value for key, value in OmegaConf.load(ROOT / "conf/model/nanbeige4_3b.yaml").items() if key != "defaults"
    }
    assert shape_from_config(released) == ModelShape(**ours, rope_theta=70e6)


@pytest.mark.parametrize(
    "rope, theta",
    [
        ({"rope_theta": 5e6}, 5e6),
        ({"rope_theta": 70000000, "rope_scaling": None}, 70e6),
        ({"rope_theta": 5e6, "rope_scaling": {"rope_type": "default"}}, 5e6),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, 5e6),
        ({"rope_theta": 5e6, "rope_parameters": {"rope_theta": 5e6}}, 5e6),
        ({}, 1e4),
    ],
)
def test_both_spellings_of_the_rope_base(rope: dict[str, Any], theta: float) -> None:
    config = {key: value for key, value in NANBEIGE.items() if not key.startswith("rope_")}
    assert shape_from_config({**config, **rope}).rope_theta == theta


def test_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig

    config = {key: NANBEIGE[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                                             "num_hidden_layers", "num_attention_heads")}  # fmt: skip
    shape, theirs = shape_from_config(config), LlamaConfig(**config)
    assert (shape.n_kv_heads, shape.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (10, 4)
    assert (shape.norm_eps, shape.tie_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert shape.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("version", [4, 5])
def test_config_from_shape_is_read_by_transformers_4_and_5(version: int) -> None:
    """What 4 reads is `rope_theta`; 5 moves it into `rope_parameters`, and so do we, either way."""
    shape = shape_from_config(NANBEIGE)
    written = config_from_shape(shape, torch.bfloat16)
    del written["rope_parameters" if version == 4 else "rope_theta"]
    assert shape_from_config(written) == shape
    from transformers import LlamaConfig

    assert LlamaConfig(**written).rope_parameters["rope_theta"] == 70e6


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only 'llama' and 'nanbeige' are supported"),
        ({"model_type": None}, "model_type is None; only 'llama' and 'nanbeige' are supported"),
        ({"architectures": ["EvilForCausalLM"]}, "architectures is ['EvilForCausalLM']; only ['LlamaForCausalLM']"),
        ({"attention_bias": True}, "attention_bias is True; the backbone has no biases"),
        ({"mlp_bias": True}, "mlp_bias is True; the backbone has no biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling asks for 'llama3'; only plain rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for 'linear'; only plain rotary"),
        ({"rope_scaling": "yarn"}, "rope_scaling asks for 'yarn'; only plain rotary"),
        ({"rope_scaling": "default"}, "rope_scaling asks for 'default'; only plain rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 7e7}}, "rope_parameters asks for 'yarn'; only plain"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5, not 1"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "rope_theta is given as 7e+07 and as 5e+06"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; it must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; it must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a positive number"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number from 1 to 10,000,000"),
        ({"vocab_size": 10**18}, "vocab_size is 1000000000000000000; it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a whole number"),
        ({"intermediate_size": None}, "intermediate_size is None; it must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; num_attention_heads is 10, not a multiple of it"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set; export the weights in"),
    ],
)
def test_a_config_that_the_backbone_cannot_be_is_refused_by_its_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"there/config.json: {words}")) as caught:
        shape_from_config({**NANBEIGE, **change}, "there/config.json")
    assert "\n" not in str(caught.value)


# Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_streaming_takes_one_copy_and_one_tensor(tmp_path: Path) -> None:
    """Measured: the process's resident memory, mapped files included, against the parameters' own size."""
    shape = ModelShape(32_000, 1024, 5, 8, 8, 128, 4096)
    tensors = {to_hf(name): torch.randn(dims) for name, dims in parameter_shapes(shape).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_from_shape(shape, torch.float32)))
    copy, largest = 4 * shape.count_parameters(), 4 * 32_000 * 1024
    assert copy > 500e6
    code = """if True:
        import json, sys, threading, time
        from pathlib import Path
        import psutil
        import torch
        from nb_lightning.checkpoints.hf_config import shape_from_config
        from nb_lightning.checkpoints.hf_weights import HFWeights
        from nb_lightning.model.transformer import Transformer
        from nb_lightning.model.weights import load_weights

        def watch():
            while not done.is_set():
                peaks.append(process.memory_info().rss)
                time.sleep(0.001)

        folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
        shape = shape_from_config(json.loads((folder / "config.json").read_text()))
        process = psutil.Process()
        peaks, done = [process.memory_info().rss], threading.Event()
        threading.Thread(target=watch).start()
        with torch.device("meta"):
            model = Transformer(shape).to(dtype)
        load_weights(model.to_empty(device="cpu"), HFWeights(folder))
        done.set()
        print(max(peaks) - peaks[0])
    """
    for dtype, size in (("float32", copy), ("bfloat16", copy // 2)):
        command = [sys.executable, "-c", code, str(tmp_path), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert size <= int(done.stdout) < size + largest + 50e6, (dtype, int(done.stdout), size)
