"""Keys and values that a cache of transformers keeps in the codes of their format.

A :class:`PackedStates` stands in for the tensor of keys, or values, that an attention gives its cache. What caches do
with it (join, cut, select, move) is done with the codes, so that any cache that is made of tensors keeps codes: none of
transformers' classes is replaced. What an attention does for a single token is computed from codes as well. Every other
function gets the values: those that the attention has without a cache, bit for bit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from mxlab.errors import ConversionError
from mxlab.model.nn.packed_tokens import PackedTokens
from mxlab.model.nn.states import StateGrid
from mxlab.numerics.kernels import attention

_HEADS, _TOKENS, _AXES = 1, 2, 4

# How the axes are seen: as they are stored; with an axis for the query heads of a head; with the last two exchanged.
Form = Literal["tokens", "split", "transposed"]


class PackedStates(Tensor):
    """Keys or values [batch, heads, tokens, head_dim] in codes.

    Codes are never written to, and what indexing gives shares none of its values with the tensor.

    Attributes:
        tokens: the codes.
        form: how the axes are seen.
        repeats: how often each head comes.
    """

    tokens: PackedTokens
    form: Form
    repeats: int

    @staticmethod
    def __new__(cls: type[PackedStates], tokens: PackedTokens, form: Form = "tokens", repeats: int = 1) -> PackedStates:
        """Return the tensor that stands for codes."""
        batch, heads, count, head_dim = tokens.shape
        shape = {
            "tokens": (batch, heads * repeats, count, head_dim),
            "split": (batch, heads, repeats, count, head_dim),
            "transposed": (batch, heads * repeats, head_dim, count),
        }[form]
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=tokens.dtype, device=tokens.room.device)
        made.tokens, made.form, made.repeats = tokens, form, repeats
        return made

    @classmethod
    def from_float(cls, x: Tensor, grid: StateGrid) -> PackedStates:
        """Quantize what an attention gives its cache, float [batch, heads, tokens, head_dim]."""
        return cls(PackedTokens.from_float(x, grid))

    def values(self) -> Tensor:
        """Return the values, as the attention computes with them: a new tensor."""
        found = self.tokens.values()
        if self.repeats > 1:
            found = found.repeat_interleave(self.repeats, dim=_HEADS)
        if self.form == "split":
            return found.unflatten(_HEADS, (-1, self.repeats))
        return found.mT if self.form == "transposed" else found

    @property
    def is_plain(self) -> bool:
        """Whether the axes are those that are stored."""
        return self.form == "tokens" and self.repeats == 1

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        if func in _COMPUTED and (found := _computed(_COMPUTED[func], args, given)) is not None:
            return found
        written = given.get("out", args[0] if args and _writes(func) else None)
        if isinstance(written, PackedStates):
            raise ConversionError(
                f"{written.tokens.grid.attention} keeps its K or V packed, and {func.__name__} would write to them: "
                "make a new cache, or convert the model with storage='grid'"
            )
        return func(*_unpacked(args), **_unpacked(given))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return func(*_unpacked(args), **_unpacked(kwargs or {}))


def packed_bytes(x: Tensor) -> int:
    """Return the bytes of memory that a tensor of a cache takes."""
    return x.tokens.room.codes.nbytes if isinstance(x, PackedStates) else x.nbytes


def unpacked(x: Any) -> Any:
    """Return the values of packed states; anything else as it is."""
    return x.values() if isinstance(x, PackedStates) else x


def _unpacked(given: Any) -> Any:
    return tree_map(unpacked, given)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.startswith("__") and func is not Tensor.requires_grad_
    return name == "__setitem__" or in_place


def _computed(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return what is computed with codes; None where values are needed, or arguments are given in a rarer way."""
    try:
        return function(*args, **kwargs)
    except TypeError:
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError:
            return None
        raise


# What is computed with codes. Each function takes the arguments of torch's; None says that values are needed.


def _joined(tensors: Any, dim: int = 0, **options: Any) -> PackedStates | None:
    kept = [x for x in tensors if x.shape != (0,)]  # caches begin with such a tensor
    first = kept[0]
    if options or not isinstance(first, PackedStates) or not first.is_plain or dim not in (_TOKENS, _TOKENS - _AXES):
        return None
    if not all(isinstance(x, PackedStates) and x.is_plain and first.tokens.is_continued_by(x.tokens) for x in kept[1:]):
        return None
    return PackedStates(first.tokens.followed([x.tokens for x in kept[1:]]))


def _item(x: PackedStates, index: Any) -> PackedStates | None:
    if not isinstance(x, PackedStates) or not x.is_plain:
        return None
    whole = slice(None)
    full = _without_ellipsis(index if isinstance(index, tuple) else (index,))
    if full == [whole, whole, None, whole, whole]:
        return PackedStates(x.tokens, "split")
    if len(full) != _AXES or full[_HEADS] != whole or full[3] != whole:
        return None
    batch, tokens = full[0], full[_TOKENS]
    if isinstance(tokens, slice) and isinstance(batch, slice) and batch == whole and tokens.step in (None, 1):
        return PackedStates(x.tokens.narrowed(tokens))
    is_selection = isinstance(batch, Tensor) and batch.ndim == 1 and isinstance(tokens, slice) and tokens == whole
    return PackedStates(x.tokens.mapped(lambda part: part[batch])) if is_selection else None


def _without_ellipsis(index: tuple) -> list[Any]:
    """Return an index of four axes written out."""
    places = [i for i, x in enumerate(index) if x is Ellipsis]
    at = places[0] if places else len(index)
    before, after = list(index[:at]), list(index[at + 1 :])
    given = sum(x is not None for x in before + after)
    return before + [slice(None)] * (_AXES - given) + after


def _selected(x: PackedStates, dim: int, index: Tensor) -> PackedStates | None:
    return (
        PackedStates(x.tokens.mapped(lambda part: part.index_select(0, index)))
        if x.is_plain and dim in (0, -_AXES)
        else None
    )


def _repeated(x: PackedStates, repeats: Any, dim: int | None = None, **options: Any) -> PackedStates | None:
    if not x.is_plain or dim not in (0, -_AXES) or options:
        return None
    return PackedStates(x.tokens.mapped(lambda part: part.repeat_interleave(repeats, dim=0)))


def _expanded(x: PackedStates, *sizes: Any) -> PackedStates | None:
    wanted = _sizes(sizes)
    if x.form != "split" or x.repeats != 1 or len(wanted) != _AXES + 1:
        return None
    same = all(n in (-1, m) for n, m in zip(wanted[:2] + wanted[3:], (*x.shape[:2], *x.shape[3:]), strict=True))
    return PackedStates(x.tokens, "split", wanted[2]) if same and wanted[2] > 0 else None


def _reshaped(x: PackedStates, *sizes: Any) -> PackedStates | None:
    merged = x.shape[0], x.shape[1] * x.repeats, *x.shape[3:]
    return PackedStates(x.tokens, "tokens", x.repeats) if x.form == "split" and _sizes(sizes) == merged else None


def _sizes(given: tuple) -> tuple[int, ...]:
    return tuple(given[0]) if len(given) == 1 and not isinstance(given[0], int) else tuple(given)


def _transposed(x: PackedStates, first: int, second: int) -> PackedStates | None:
    if x.form == "split" or {first % _AXES, second % _AXES} != {_TOKENS, _AXES - 1}:
        return None
    return PackedStates(x.tokens, "transposed" if x.form == "tokens" else "tokens", x.repeats)


def _moved(x: PackedStates, *args: Any, **options: Any) -> PackedStates | None:
    wanted = {"non_blocking": False, **options}
    if not isinstance(x, PackedStates) or any(isinstance(value, Tensor | bool) for value in args):
        return None
    for value in args:
        wanted["dtype" if isinstance(value, torch.dtype) else "device"] = value
    if not set(wanted) <= {"dtype", "device", "non_blocking"} or wanted.get("dtype", x.dtype) != x.dtype:
        return None
    device = wanted.get("device")
    if device is None or torch.device(device) == x.device:
        return x
    return PackedStates(x.tokens.to(device, wanted["non_blocking"])) if x.is_plain else None


def _same(x: PackedStates, *_: Any, **__: Any) -> PackedStates:
    """Return the tensor: its codes are never written to, so that nobody needs one of his own."""
    return x


def _multiplied(x: Tensor, other: PackedStates) -> Tensor | None:
    if not isinstance(other, PackedStates) or isinstance(x, PackedStates) or other.form == "split":
        return None
    is_keys = other.form == "transposed"
    rows = _rows(x, other)
    if rows is None or x.shape[-1] != other.shape[-2] or x.dtype != other.dtype:
        return None
    found = other.tokens.scores(rows) if is_keys else other.tokens.mixed(rows)
    return found.reshape(*x.shape[:-1], -1).to(x.dtype)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Return what ``F.scaled_dot_product_attention`` does, in float32 up to the last rounding."""
    rows, probable = _rows(query, key, enable_gqa), _rows(query, value, enable_gqa)
    if rows is None or probable is None or dropout_p or (is_causal and key.shape[-2] > 1):
        return None
    if key.shape[-1] != query.shape[-1] or key.shape[-2] != value.shape[-2] or _is_seen_otherwise(query, key, value):
        return None
    if attn_mask is not None and torch.is_grad_enabled() and attn_mask.requires_grad:
        return None
    if rows.shape != probable.shape[:-1] + rows.shape[-1:]:
        return None
    shape = *query.shape[:-1], key.shape[-2]
    scores = _scores(rows, key).mul_(query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        mask = attn_mask.expand(shape).reshape(scores.shape)
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
    # A row that is masked as a whole is zero, as torch has it.
    masked = None if attn_mask is None else scores.amax(-1, keepdim=True) == -torch.inf
    probabilities = scores.softmax(-1)
    found = _mixed(probabilities if masked is None else probabilities.masked_fill_(masked, 0.0), value)
    return found.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)


def _is_seen_otherwise(query: Tensor, *states: Tensor) -> bool:
    return isinstance(query, PackedStates) or any(isinstance(x, PackedStates) and x.form != "tokens" for x in states)


def _rows(x: Tensor, other: Tensor, enable_gqa: bool = False) -> Tensor | None:
    """Return queries, or probabilities, as rows of the heads of K or V; None where values must be multiplied."""
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    if x.ndim != _AXES or other.ndim != _AXES or x.shape[0] != other.shape[0] or x.device != other.device:
        return None
    heads = other.shape[_HEADS]
    if x.shape[_HEADS] % heads or (x.shape[_HEADS] != heads and not enable_gqa):
        return None
    if isinstance(other, PackedStates):
        heads //= other.repeats
        if attention.obstacle(other.tokens.heads, x.shape[_HEADS] // heads * x.shape[_TOKENS]):
            return None
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _scores(rows: Tensor, key: Tensor) -> Tensor:
    return key.tokens.scores(rows) if isinstance(key, PackedStates) else rows.float() @ key.float().mT


def _mixed(probabilities: Tensor, value: Tensor) -> Tensor:
    return value.tokens.mixed(probabilities) if isinstance(value, PackedStates) else probabilities @ value.float()


def _getter(name: str) -> Any:
    """Return the function that torch calls for an attribute of a tensor."""
    return getattr(Tensor, name).__get__


_METADATA = frozenset(
    [_getter(name) for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")]
    + [Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous]
)
_COMPUTED: dict[Any, Callable[..., Any]] = {
    torch.cat: _joined,
    Tensor.__getitem__: _item,
    Tensor.index_select: _selected,
    torch.index_select: _selected,
    Tensor.repeat_interleave: _repeated,
    torch.repeat_interleave: _repeated,
    Tensor.expand: _expanded,
    Tensor.reshape: _reshaped,
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    _getter("mT"): functools.partial(_transposed, first=-1, second=-2),
    Tensor.to: _moved,
    **dict.fromkeys((Tensor.contiguous, Tensor.detach, Tensor.clone, Tensor.__deepcopy__), _same),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _multiplied),
    F.scaled_dot_product_attention: _attended,
}
