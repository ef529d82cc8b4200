"""What a file may say about a network: names, operations, classes of layers and their arguments.

torch.fx prints the graph of a network as Python and runs that, so that every word of a file that gets into
a graph has to be on a list here, or a name that cannot be anything else, or a number in its range.
"""

import inspect
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsereg.compression.named import KIND, named
from sparsereg.compression.sizes import of_size
from sparsereg.compression.units.rules import RULES
from sparsereg.errors import InputError

LONGEST_NAME = 200
DEEPEST = 16
"""Of names with dots and of arguments in arguments."""
LONGEST_LIST = 10_000
LARGEST = 2**31 - 1
"""Of numbers of channels, dimensions and the like; all of them are C++ integers somewhere."""
LARGEST_SIZE = 2**26
"""Product of the sizes that one operation may ask for by itself, whatever the size of its input is."""
LARGEST_FACTOR = 4096
"""By which one operation may enlarge a map."""

# --- operations -----------------------------------------------------------------------------------------

_HOMES: tuple[tuple[str, Any], ...] = (("operator", operator), ("F", F), ("torch", torch))
_FURTHER = """
    operator.getitem operator.add operator.sub operator.mul operator.truediv operator.floordiv operator.mod
    operator.neg operator.matmul operator.pow
    torch.relu torch.avg_pool1d torch.adaptive_avg_pool1d torch.max_pool2d torch.abs torch.tanh torch.sigmoid
    torch.clamp torch.dropout torch.mean torch.sum torch.amax torch.concat
    F.relu F.leaky_relu F.max_pool1d F.max_pool2d F.max_pool3d F.avg_pool1d F.avg_pool2d F.avg_pool3d
    F.adaptive_avg_pool1d F.adaptive_avg_pool2d F.adaptive_avg_pool3d F.adaptive_max_pool1d
    F.adaptive_max_pool2d F.interpolate F.relu6 F.hardtanh F.gelu F.silu F.elu F.celu F.selu F.mish F.softplus
    F.hardswish F.hardsigmoid F.logsigmoid F.tanh F.sigmoid F.dropout F.dropout1d F.dropout2d F.dropout3d
    F.alpha_dropout
    torch.index_select torch.mul torch.add torch.sub torch.neg torch.div torch.cat torch.stack torch.flatten
    torch.reshape torch.matmul torch.bmm torch.transpose torch.permute torch.chunk torch.split torch.softmax
    torch.exp torch.log torch.sqrt torch.square torch.pow torch.squeeze torch.unsqueeze torch.roll
    torch.maximum torch.minimum torch.where torch.einsum
    F.linear F.conv1d F.conv2d F.conv3d F.softmax F.log_softmax F.layer_norm F.group_norm F.normalize F.pad
    F.scaled_dot_product_attention F.batch_norm F.pixel_shuffle F.glu F.bilinear
""".split()  # noqa: SIM905
"""Functions that a file may name, besides the operations that a network is traced to."""
METHODS = frozenset(
    """
    expand size view reshape permute transpose contiguous flatten mean sum amax squeeze unsqueeze chunk split
    softmax log_softmax add sub mul div neg pow exp sqrt matmul bmm relu sigmoid tanh clamp clone abs t
    index_select unflatten type_as float to
    """.split()  # noqa: SIM905
)
"""Tensor methods that a file may name."""


def _known_functions() -> dict[str, Callable[..., Any]]:
    homes = dict(_HOMES)
    known: dict[str, Callable[..., Any]] = {}
    for name in _FURTHER:
        home, _, attribute = name.partition(".")
        known[name] = getattr(homes[home], attribute)
    return {
        **known,
        **_aten_functions(),
        "sparsereg.of_size": of_size,
        "sparsereg.named": named,
        "getattr": getattr,
    }


_MAKERS = """
    zeros ones full empty arange scalar_tensor tensor zeros_like ones_like full_like new_zeros new_ones
    new_full eye linspace sym_size
""".split()  # noqa: SIM905
"""Operations that make a tensor, or a size, out of nothing that a rule would say anything about."""
_WITHOUT_RULES = """
    pairwise_distance mse_loss l1_loss smooth_l1_loss huber_loss cross_entropy_loss nll_loss nll_loss_nd
    nll_loss_forward nll_loss2d_forward binary_cross_entropy binary_cross_entropy_with_logits kl_div
    cross linalg_cross outer kron trace det logdet inverse linalg_inv linalg_inv_ex linalg_det linalg_slogdet
    linalg_solve_ex linalg_matrix_norm linalg_cholesky_ex
    bucketize searchsorted one_hot col2im affine_grid_generator max_unpool2d max_unpool3d
    logaddexp logaddexp2 hypot heaviside copysign sinc lgamma digamma xlogy special_xlogy logit frac deg2rad
    rad2deg isfinite isclose bitwise_xor bitwise_left_shift bitwise_right_shift logical_xor __lshift__
    __rshift__ diff quantile nanmedian mode kthvalue aminmax std_mean count_nonzero dstack hsplit vsplit
    dsplit index_put index_fill
    broadcast_tensors diagonal_scatter sgn meshgrid
""".split()  # noqa: SIM905
"""Further operations that compute tensors from tensors, and keep whatever meets them."""


def _aten_functions() -> dict[str, Callable[..., Any]]:
    """The operations that a network is traced to: those that there are rules for, in all of their forms."""
    known: dict[str, Callable[..., Any]] = {}
    for name in (*RULES, *_MAKERS, *_WITHOUT_RULES):
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            function = getattr(packet, overload)
            if not function._schema.is_mutable:
                known[f"aten.{name}.{overload}"] = function
    return known


FUNCTIONS: dict[str, Callable[..., Any]] = _known_functions()
"""Functions that a file may name."""
KEYWORDS = frozenset(
    """
    input other tensors tensor dim dims dim0 dim1 start_dim end_dim keepdim dtype index shape sizes most size
    scale_factor mode align_corners recompute_scale_factor antialias kernel_size stride padding dilation
    groups ceil_mode return_indices count_include_pad divisor_override output_size negative_slope alpha beta
    threshold approximate value eps weight bias normalized_shape num_groups momentum running_mean running_var
    p correction training inplace min max min_val max_val pad chunks split_size split_size_or_sections shifts
    upscale_factor query key attn_mask dropout_p is_causal scale enable_gqa key_padding_mask need_weights
    average_attn_weights device exponent rounding_mode _stacklevel mat2 input1 input2 hx h_0 c_0
    unflattened_size step include_self
    """.split()  # noqa: SIM905
)
"""Names of arguments that a file may use."""
WORDS = frozenset(
    """
    nearest linear bilinear bicubic trilinear area nearest-exact none tanh constant reflect replicate circular
    zeros same valid floor trunc relu sum mean max amax amin prod shape dtype device ortho forward
    backward ij xy
    """.split()  # noqa: SIM905
)
"""Texts that a file may give as an argument."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Types of numbers that a file may name, and that its tensors may have."""
_KEYS = r"[\w .:/+\-]{1,200}"
"""Texts that a dictionary may have as keys, in what a network is given and in what it returns."""
_ARITHMETIC = {name for name in FUNCTIONS if name.startswith("operator.") and name != "operator.getitem"}
_ENLARGING = {"expand", "F.pad", "F.interpolate"} | {n for n in FUNCTIONS if "adaptive" in n}
_EINSUM = ("torch.einsum", "aten.einsum.default")
_SIZED = """
    pad expand repeat repeat_interleave tile broadcast_to zeros ones full empty arange eye linspace new_zeros
    new_ones new_full one_hot col2im affine_grid_generator max_unpool2d max_unpool3d
""".split()  # noqa: SIM905
_ENLARGING |= {
    n
    for n in FUNCTIONS
    if n.startswith("aten.") and (n.split(".")[1] in _SIZED or "upsample" in n or ".fft_" in n)
}
"""Operations whose numbers, and not their input, say how large the result is."""


def check_call(kind: str, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Check the arguments of one operation.

    Args:
        kind: of the node, as torch.fx names it.
        name: of the function or method in the lists above, or of the class of the module.
        args: positional ones; other nodes stand for tensors.
        kwargs: by keyword.

    Raises:
        InputError: one of them is not what an operation takes.
    """
    if name == "sparsereg.named":
        if kwargs or len(args) != 2 or not (isinstance(args[0], str) and KIND.fullmatch(args[0])):
            raise InputError(f"the answers are a {short(args[:1])}, which is no class of answers")
        if not isinstance(args[1], dict) or not all(isinstance(key, str) for key in args[1]):
            raise InputError("the answers have no names")
        return check_result(args[1])
    for given in kwargs:
        if given not in KEYWORDS:
            raise InputError(f"{name} has an argument {short(given)}, which is not on the list")
    if not isinstance(kwargs.get("device"), fx.Node | None):
        raise InputError(f"{name} names a device, which only an input can")
    for value in (*args, *kwargs.values()):
        _check_value(name, value, DEEPEST)
    if kind == "call_method" and not (args and isinstance(args[0], fx.Node)):
        raise InputError(f"the tensor method {name!r} needs a tensor")
    if name in _EINSUM and not (args and isinstance(args[0], str)):
        raise InputError("torch.einsum needs an equation")
    if name in _ARITHMETIC:
        if kwargs or any(not isinstance(a, fx.Node | int | float) for a in args):
            raise InputError(f"{name} takes tensors and numbers")
        inspect.signature(FUNCTIONS[name]).bind(*args)
        if name == "operator.pow" and not (isinstance(args[1], int | float) and abs(args[1]) <= 64):
            raise InputError(f"{name} takes an exponent up to 64")
    if name == "getattr":
        attribute = args[1] if len(args) == 2 and not kwargs and isinstance(args[0], fx.Node) else None
        if attribute not in ("shape", "dtype", "device"):
            raise InputError(f"getattr reads {short(attribute)}, which is not on the list")
    if name in _ENLARGING:
        _check_enlarging(name, args, kwargs)


def _check_value(name: str, value: Any, depth: int) -> None:
    if depth < 0:
        raise InputError(f"{name} has arguments in arguments without end")
    if isinstance(value, str):
        equation = name in ("torch.einsum", "aten.einsum.default") and re.fullmatch(
            r"[A-Za-z.,>\- ]{1,200}", value
        )
        key = name == "operator.getitem" and re.fullmatch(_KEYS, value)
        if value not in WORDS and not equation and not key:
            raise InputError(f"{name} has the argument {short(value)}, which is not on the list")
    elif isinstance(value, bool | float | torch.dtype | fx.Node) or value is None:
        pass
    elif isinstance(value, complex):
        if not (math.isfinite(value.real) and math.isfinite(value.imag)):
            raise InputError(f"{name} has the argument {short(value)}, which is not finite")
    elif isinstance(value, int):
        if abs(value) > LARGEST:
            raise InputError(f"{name} has the argument {short(value)}, which is out of range")
    elif isinstance(value, slice):
        for part in (value.start, value.stop, value.step):
            if not (part is None or isinstance(part, fx.Node) or (_whole(part) and abs(part) < 2**63)):
                raise InputError(f"{name} has a slice with {short(part)}")
    elif isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST:
            raise InputError(f"{name} has a list of {len(value)} arguments")
        for part in value:
            _check_value(name, part, depth - 1)
    else:
        raise InputError(f"{name} has an argument of type {type(value).__name__}")


def _check_enlarging(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    product = 1.0
    for value in (*args[1:], *kwargs.values()):
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, int | float) and not isinstance(part, bool) and math.isfinite(part):
                product *= max(abs(part), 1)
    factor = kwargs.get("scale_factor", args[2] if name == "F.interpolate" and len(args) > 2 else None)
    if product > LARGEST_SIZE or not (factor is None or FACTORS.accepts(factor)):
        raise InputError(f"{name} asks for too large a result")


def check_result(value: Any, depth: int = DEEPEST) -> None:
    """Check what a network returns: tensors in lists, tuples and dictionaries.

    Raises:
        InputError: it holds something else.
    """
    if depth < 0:
        raise InputError("the result has lists in lists without end")
    if isinstance(value, dict):
        for key in value:
            if not _whole(key) and not (isinstance(key, str) and re.fullmatch(_KEYS, key)):
                raise InputError(f"the result has the key {short(key)}, which is not a plain name")
        value = list(value.values())
    if isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST:
            raise InputError(f"the result has {len(value)} parts")
        for part in value:
            check_result(part, depth - 1)
    else:
        _check_value("the result", value, 0)


# --- layers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What an argument of a constructor may be.

    Attributes:
        text: in words.
        accepts: whether a value is one.
    """

    text: str
    accepts: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.text} or null", lambda v: v is None or kind.accepts(v))


def _either(a: Kind, b: Kind) -> Kind:
    return Kind(f"{a.text} or {b.text}", lambda v: a.accepts(v) or b.accepts(v))


def _one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda v: isinstance(v, str) and v in words)


def _some(part: Kind, product: float, alone: float | None = None) -> Kind:
    """Up to eight numbers, or one that stands for several and has a bound of its own."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list | tuple):
            return part.accepts(value) and (value is None or alone is None or abs(value) <= alone)
        parts = value
        if not 0 < len(parts) <= 8 or not all(part.accepts(p) for p in parts):
            return False
        return bool(math.prod(max(1, abs(p)) for p in parts if p is not None) <= product)

    return Kind(f"{part.text}, or several of them", accepts)


COUNT = Kind("a whole number from 0 to 2147483647", lambda v: _whole(v) and 0 <= v <= LARGEST)
DIMENSION = Kind("a dimension", lambda v: _whole(v) and -64 <= v <= 64)
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind(
    "a number", lambda v: (isinstance(v, float) and not math.isnan(v)) or (_whole(v) and abs(v) <= LARGEST)
)
_FACTOR = Kind("a factor", lambda v: NUMBER.accepts(v) and 0 < v <= LARGEST_FACTOR)
FACTORS = _some(_FACTOR, LARGEST_FACTOR)
_SIZE = Kind("a size", lambda v: _whole(v) and abs(v) <= LARGEST_SIZE)
SIZES = _some(_SIZE, LARGEST_SIZE, 2**13)
CUBE_SIZES = _some(_optional(_SIZE), LARGEST_SIZE, 2**8)
SHAPE = _some(Kind("a size", lambda v: _whole(v) and -1 <= v <= LARGEST), float(LARGEST))

ARGUMENTS: dict[str, Kind] = {
    **dict.fromkeys(("in_channels", "out_channels", "in_features", "out_features", "num_features"), COUNT),
    **dict.fromkeys(("num_channels", "num_parameters", "input_size", "hidden_size", "proj_size"), COUNT),
    **dict.fromkeys(("num_embeddings", "embedding_dim", "embed_dim", "in1_features", "in2_features"), COUNT),
    **dict.fromkeys(("groups", "num_groups", "num_heads", "upscale_factor", "downscale_factor"), COUNT),
    **dict.fromkeys(("kdim", "vdim", "divisor_override"), _optional(COUNT)),
    "num_layers": Kind("a number of layers up to 1000", lambda v: _whole(v) and 0 < v <= 1000),
    "padding_idx": _optional(Kind("an index", lambda v: _whole(v) and abs(v) <= LARGEST)),
    **dict.fromkeys(("dim", "start_dim", "end_dim"), _optional(DIMENSION)),
    **dict.fromkeys(("kernel_size", "dilation", "output_padding"), SIZES),
    "stride": _optional(SIZES),
    "padding": _either(SIZES, _one_of("same", "valid")),
    "output_size": _some(_optional(_SIZE), LARGEST_SIZE, 2**13),
    "size": _optional(SIZES),
    "scale_factor": _optional(FACTORS),
    "normalized_shape": SHAPE,
    "unflattened_size": SHAPE,
    **dict.fromkeys(("p", "dropout", "negative_slope", "alpha", "beta", "lambd", "threshold"), NUMBER),
    **dict.fromkeys(("value", "min_val", "max_val", "norm_type", "init", "lower", "upper", "k"), NUMBER),
    **dict.fromkeys(("eps", "momentum", "max_norm"), _optional(NUMBER)),
    **dict.fromkeys(("bias", "affine", "track_running_stats", "elementwise_affine", "inplace"), SWITCH),
    **dict.fromkeys(("ceil_mode", "count_include_pad", "return_indices", "batch_first"), SWITCH),
    "bidirectional": SWITCH,
    **dict.fromkeys(("add_bias_kv", "add_zero_attn", "scale_grad_by_freq", "sparse"), SWITCH),
    **dict.fromkeys(("align_corners", "recompute_scale_factor"), _optional(SWITCH)),
    "padding_mode": _one_of("zeros", "reflect", "replicate", "circular"),
    "mode": _one_of("nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"),
    "approximate": _one_of("none", "tanh"),
    "nonlinearity": _one_of("tanh", "relu"),
    # Old names, which every version of the format has written with nothing in them.
    **dict.fromkeys(("min_value", "max_value", "_weight"), Kind("null", lambda v: v is None)),
    "_freeze": SWITCH,
}
"""What each argument of a constructor may be; a name means the same in all of torch.nn."""
_OF_CLASS: dict[tuple[str, str], Kind] = {
    ("LocalResponseNorm", "size"): COUNT,
    **{(f"{pad}Pad3d", "padding"): CUBE_SIZES for pad in ("Zero", "Constant", "Reflection", "Replication")},
    **{(f"Adaptive{pool}Pool3d", "output_size"): CUBE_SIZES for pool in ("Avg", "Max")},
}
"""Where a name means something else in one class."""
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_CLASSES = """
    Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Embedding
    BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm LayerNorm
    RMSNorm LocalResponseNorm MultiheadAttention LSTMCell GRUCell RNNCell
    Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
    ReLU ReLU6 LeakyReLU PReLU RReLU Hardtanh GELU Tanh Sigmoid SiLU ELU CELU SELU Mish Softplus Softsign
    Softshrink Hardshrink Hardswish Hardsigmoid LogSigmoid Tanhshrink Threshold GLU Softmax Softmax2d Softmin
    LogSoftmax
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle
    ChannelShuffle ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
    ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
    ConstantPad1d ConstantPad2d ConstantPad3d Flatten Unflatten Fold Unfold
""".split()  # noqa: SIM905


def _arguments(name: str) -> tuple[str, ...]:
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = inspect.signature(getattr(nn, name)).parameters.values()
    return tuple(p.name for p in known if p.kind not in variable and p.name not in ("device", "dtype"))


CLASSES: dict[str, tuple[str, ...]] = {
    **{name: _arguments(name) for name in _CLASSES},
    "RNN": (*_RECURRENT, "nonlinearity"),
    "GRU": _RECURRENT,
    "LSTM": (*_RECURRENT, "proj_size"),
}
"""Classes of torch.nn that a file may name, with the arguments of their constructors."""


def make_module(name: Any, settings: Any, path: str) -> nn.Module:
    """Make a layer on the meta device, where its weights take no memory.

    Args:
        name: its class in torch.nn.
        settings: arguments of the constructor.
        path: its place in the network, for messages.

    Raises:
        InputError: the class is not on the list, or an argument is not what it takes.
    """
    if not isinstance(name, str) or name not in CLASSES:
        raise InputError(f"the class {short(name)} of {path!r} is not on the list")
    if not isinstance(settings, dict):
        raise InputError(f"{name} {path!r} has no settings but {short(settings)}")
    for argument, value in settings.items():
        if argument not in CLASSES[name]:
            raise InputError(f"{name} {path!r} has no argument {short(argument)}")
        kind = _OF_CLASS.get((name, argument), ARGUMENTS[argument])
        if not kind.accepts(value):
            raise InputError(f"{name} {path!r}: {argument} must be {kind.text}, got {short(value)}")
    try:
        with torch.device("meta"):
            made: nn.Module = getattr(nn, name)(**settings)
    except Exception as error:
        # What torch.nn says about settings that do not go together.
        raise InputError(f"{name} {path!r} cannot be made: {short(error)}") from error
    return made


# --- names and numbers ----------------------------------------------------------------------------------


def check_name(name: Any, what: str) -> str:
    """Return a name that is a Python identifier and nothing else.

    Raises:
        InputError: it is not.
    """
    if not _identifier(name) or name == "self":
        raise InputError(f"{what} is called {short(name)}, which is not a plain name")
    return str(name)


def check_path(path: Any, what: str) -> str:
    """Return the place of a layer or tensor in a network: names with dots in between.

    Raises:
        InputError: it is something else, or the name of what every module has.
    """
    parts = path.split(".") if isinstance(path, str) and len(path) < LONGEST_NAME * DEEPEST else []
    plain = all(_identifier(part) or re.fullmatch(r"[0-9]{1,9}", part) for part in parts)
    if not 0 < len(parts) <= 4 * DEEPEST or not plain:
        raise InputError(f"{what} lies at {short(path)}, which is not a plain name")
    if parts[0] in reserved(fx.GraphModule) or any(part in reserved(nn.Module) for part in parts):
        raise InputError(f"{what} lies at {short(path)}, which is a name that every network has")
    return str(path)


@cache
def reserved(cls: type[nn.Module]) -> frozenset[str]:
    """Names that no layer in a module can have, since the module itself has them."""
    return frozenset(dir(cls() if cls is nn.Module else fx.GraphModule(nn.Module(), fx.Graph())))


def _identifier(name: Any) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST_NAME
        and name.isidentifier()
        and not keyword.iskeyword(name)
        and not (name.startswith("__") and name.endswith("__"))
        and unicodedata.normalize("NFKC", name) == name
    )


def check_weights(weights: Any) -> dict[str, Tensor]:
    """Return the tensors of a file if they are plain ones that the file holds in full.

    Raises:
        InputError: one is not.
    """
    if not isinstance(weights, dict):
        raise InputError("it holds no weights")
    storages: dict[int, int] = {}
    total = 0
    for name, value in weights.items():
        check_path(name, "a tensor")
        plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
        if not plain or value.device.type == "meta" or value.dtype not in DTYPES.values():
            raise InputError(f"{name!r} is no plain tensor")
        size = value.numel() * value.element_size()
        storage = value.untyped_storage()
        if size > storage.nbytes():
            raise InputError(f"{name!r} claims to be larger than what the file holds of it")
        storages[storage.data_ptr()] = storage.nbytes()
        total += size
    if total > 16 * sum(storages.values()):
        raise InputError("its tensors claim to be larger than what the file holds of them")
    return weights


def short(value: Any) -> str:
    """A value from a file in a message: on one line, and not longer than that."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    text = (text.strip().splitlines() or [type(value).__name__])[0]
    return text if len(text) <= 80 else f"{text[:77]}..."
