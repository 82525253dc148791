"""`config.json` of a Mamba checkpoint, of either kind, to and from `MambaConfig`.

Original (github.com/state-spaces/mamba): d_model, n_layer, vocab_size, ssm_cfg, …, with what is left out at its default.
-hf (transformers): model_type "mamba", or "falcon_mamba" for norms on dt, B and C, with hidden_size, state_size, …
"""

import math

from mambacupy.models.config import MambaConfig
from mambacupy.stored_tensors import is_size, one_line, shown

_ORIGINAL_FIELDS = (
    "d_model", "n_layer", "vocab_size", "rms_norm", "residual_in_fp32", "tie_embeddings", "pad_vocab_size_multiple",
)  # fmt: skip
_ORIGINAL_SSM_FIELDS = (
    "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_bias", "bias",
)  # fmt: skip
_HF_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "time_step_rank": "dt_rank",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_init_scheme": "dt_init",
    "time_step_scale": "dt_scale",
    "time_step_floor": "dt_init_floor",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "residual_in_fp32": "residual_in_fp32",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "mixer_rms_eps": "bc_dt_norm_eps",
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_HF_MODELS = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM"}


def from_json(path, found, has_bias, has_inner_norms):
    """The configuration that the content of a `config.json` describes.

    Parameters
    ----------
    path : Path
        Named in errors.
    found : dict
        The file's content.
    has_bias : bool
        Whether the checkpoint has biases of the projections, for an -hf file that does not say: versions of transformers differ
        in what they then take.
    has_inner_norms : bool
        Whether the checkpoint has weights of norms on dt, B and C.

    Raises
    ------
    ValueError
        It describes another model, or one that cannot be.
    """
    model = found.get("model_type", "mamba")
    if not isinstance(model, str) or model not in _HF_MODELS:
        raise ValueError(f"{path}: model_type is {shown(model)}, wanted {' or '.join(_HF_MODELS)}")
    if "hidden_size" in found:
        fields = _fields_of_hf(path, found, has_bias)
    elif "d_model" in found:
        fields = _fields_of_original(path, found)
    else:
        raise ValueError(f"{path}: has neither hidden_size (-hf) nor d_model (original), wanted the config of a Mamba model")
    fields |= {name: _token(found[name]) for name in _TOKENS if name in found}
    fields["bc_dt_norm"] = model == "falcon_mamba" or has_inner_norms
    missing = [name for name in ("d_model", "n_layer", "vocab_size") if name not in fields]
    if missing:
        spelled = {field: name for name, field in _HF_FIELDS.items()} if "hidden_size" in found else {}
        raise ValueError(f"{path}: has no {', '.join(spelled.get(name, name) for name in missing)}")
    for name, value in fields.items():
        if isinstance(value, (int, float)) and not abs(value) < 1 << 40:
            raise ValueError(f"{path}: {name} is {shown(value)}, more than any model has")
    try:
        return MambaConfig(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def _fields_of_original(path, found):
    ssm = found.get("ssm_cfg")
    ssm = {} if ssm is None else ssm
    if not isinstance(ssm, dict):
        raise ValueError(f"{path}: ssm_cfg is {shown(ssm)}, wanted a JSON object")
    if ssm.get("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"{path}: the layers are {shown(ssm['layer'])}, wanted Mamba1")
    unknown = ssm.keys() - {*_ORIGINAL_SSM_FIELDS, "layer", "use_fast_path"}
    if unknown:
        raise ValueError(f"{path}: ssm_cfg has {shown(sorted(unknown))}, which Mamba's block has not")
    for name in ("attn_layer_idx", "d_intermediate"):
        if found.get(name):
            raise ValueError(f"{path}: {name} is {shown(found[name])}, wanted a model of Mamba blocks alone")
    fields = {name: found[name] for name in _ORIGINAL_FIELDS if name in found}
    fields |= {name: ssm[name] for name in _ORIGINAL_SSM_FIELDS if name in ssm}
    if "norm_epsilon" in found:  # ours: the original has it as an argument, and nowhere in the file
        fields["norm_eps"] = found["norm_epsilon"]
    return fields


def _fields_of_hf(path, found, has_bias):
    activation = found.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"{path}: hidden_act is {shown(activation)}, wanted silu")
    fields = {field: found[name] for name, field in _HF_FIELDS.items() if name in found}
    fields.setdefault("bias", has_bias)
    fields |= dict.fromkeys(_TOKENS, 0)  # where transformers leaves them out
    if "vocab_size" in found:
        fields |= _vocabulary(path, found)
    d_model, d_inner = found["hidden_size"], found.get("intermediate_size")
    if "expand" in found:
        fields["expand"] = found["expand"]
    if d_inner is not None and is_size(d_model) and d_model:
        # falcon-mamba-7b says expand 16 beside a hidden_size of 4096 and the intermediate_size 8192 that its tensors have.
        if not is_size(d_inner):
            raise ValueError(f"{path}: intermediate_size is {shown(d_inner)}, wanted a number of channels")
        fields["expand"] = _ratio(d_inner, d_model)
    if is_size(d_model) and fields.get("dt_rank") == math.ceil(d_model / 16):
        fields["dt_rank"] = "auto"
    return fields


def _token(value):
    """A token, or several: JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def _vocabulary(path, found):
    """In -hf files vocab_size counts the rows; that some of them are padding is a note of ours in two more entries."""
    rows, multiple = found["vocab_size"], found.get("pad_vocab_size_multiple", 1)
    tokens = found.get("unpadded_vocab_size", rows)
    if not all(is_size(x) and x for x in (rows, multiple, tokens)):
        raise ValueError(f"{path}: vocab_size is {shown(rows)}, wanted a number of tokens")
    if -(-tokens // multiple) * multiple == rows:
        return {"vocab_size": tokens, "pad_vocab_size_multiple": multiple}
    if "unpadded_vocab_size" in found:
        raise ValueError(f"{path}: {tokens} tokens padded to a multiple of {multiple} are not vocab_size {rows}")
    return {"vocab_size": rows, "pad_vocab_size_multiple": 1}


def _ratio(d_inner, d_model):
    """The number expand for which int(expand * d_model) is d_inner."""
    expand = d_inner / d_model
    while int(expand * d_model) < d_inner:
        expand = math.nextafter(expand, math.inf)
    return int(expand) if expand == int(expand) else expand


def to_json(config, dtype):
    """The content of a `config.json` for a model with weights of a dtype, of the -hf kind.

    transformers has no Mamba with LayerNorm; such a model is described as the original does it.

    Raises
    ------
    ValueError
        Neither kind can describe the model.
    """
    if not config.rms_norm:
        if config.bc_dt_norm:
            raise ValueError("config: LayerNorm together with norms on dt, B and C is in no checkpoint format")
        found = {name: getattr(config, name) for name in (*_ORIGINAL_FIELDS, *_TOKENS)}
        found |= {"fused_add_norm": True, "norm_epsilon": config.norm_eps}
        return found | {"ssm_cfg": {name: getattr(config, name) for name in _ORIGINAL_SSM_FIELDS}}
    model = "falcon_mamba" if config.bc_dt_norm else "mamba"
    found = {"architectures": [_HF_MODELS[model]], "model_type": model, "dtype": dtype.name, "torch_dtype": dtype.name}
    found |= {name: getattr(config, name) for name in _TOKENS}
    found |= {name: getattr(config, field) for name, field in _HF_FIELDS.items()}
    if not config.bc_dt_norm:
        del found["mixer_rms_eps"]
    found |= {"vocab_size": config.padded_vocab_size, "pad_vocab_size_multiple": config.pad_vocab_size_multiple}
    if config.vocab_size != config.padded_vocab_size:
        found["unpadded_vocab_size"] = config.vocab_size
    expand = int(config.expand) if config.expand == int(config.expand) else config.expand
    found |= {"expand": expand, "intermediate_size": config.d_inner, "time_step_rank": config.rank}
    # It concerns initial weights only, and ours are rescaled; but where it is true, transformers 5.23 rescales what it loads.
    return found | {"hidden_act": "silu", "rescale_prenorm_residual": False}
