"""How each operation of JAX relates the axes of its results to those of its arguments.

A rule takes the factors of all axes, the operation, and its arguments' axes; it unites and pins factors so that the
operation commutes with any permutation of those left, and returns the axes of the results.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from sa_plus_plus.reordering.factors import Array, Axis, Factors

Rule = Callable[[Factors, Any, list[Array]], list[Array]]
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex
    conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul mulhi name ne neg nextafter not
    or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sharding_constraint sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeta
"""
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
_ALONG_AN_AXIS = "cumsum cumprod cummax cummin cumlogsumexp"
_SCATTERS = "scatter scatter-add scatter-mul scatter-max scatter-min"
_WINDOWS = "reduce_window reduce_window_max reduce_window_min reduce_window_sum"


def results(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    """The axes of an operation's results; for an operation without a rule, everything is pinned.

    Args:
      factors: of all axes.
      eqn: the equation of a jaxpr.
      arguments: the axes of its arguments.
    """
    name = eqn.primitive.name
    empty = any(0 in v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    if empty and name not in ("concatenate", "slice", *_ELEMENTWISE.split()):
        return _pinned(factors, eqn, arguments, f"{name} of an empty array")
    rule = _RULES.get(name)
    return rule(factors, eqn, arguments) if rule else _pinned(factors, eqn, arguments, f"{name} has no rule")


def pairs(eqn: Any, arguments: list[Array]) -> tuple[Axis, ...] | None:
    """The axes that are contracted or batch axes, if the operation is a product; else None."""
    if eqn.primitive.name == "dot_general":
        (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
        return tuple(arguments[0][axis] for axis in (*contracted, *batch))
    if eqn.primitive.name == "conv_general_dilated":
        return (arguments[0][eqn.params["dimension_numbers"].lhs_spec[1]],)
    return None


def contracted(eqn: Any, arguments: list[Array]) -> tuple[Axis, ...]:
    """The axes that a product contracts; none of another operation."""
    if eqn.primitive.name == "dot_general":
        return tuple(arguments[0][axis] for axis in eqn.params["dimension_numbers"][0][0])
    if eqn.primitive.name == "conv_general_dilated":
        return (arguments[1][eqn.params["dimension_numbers"].rhs_spec[1]],)
    return ()


def _shape(eqn: Any, result: int = 0) -> tuple[int, ...]:
    return tuple(eqn.outvars[result].aval.shape)


def _without(array: Array, axes: Sequence[int]) -> Array:
    return tuple(axis for i, axis in enumerate(array) if i not in axes)


def _pinned(factors: Factors, eqn: Any, arguments: list[Array], reason: str) -> list[Array]:
    factors.pin_all(arguments, reason)
    return [factors.array(_shape(eqn, i), reason) for i in range(len(eqn.outvars))]


def _unite(factors: Factors, one: Array, other: Array) -> None:
    for a, b in zip(one, other, strict=True):
        factors.unite(a, b)


def _elementwise(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    shape = _shape(eqn)
    full = [array for array in arguments if len(array) == len(shape)]  # others are scalars
    if not all(len(array) in (0, len(shape)) for array in arguments):
        return _pinned(factors, eqn, arguments, f"{eqn.primitive.name} of several ranks")
    found = []
    for axes in zip(*full, strict=True) if shape else ():
        present = [axis for axis in axes if axis]  # axes of size 1 are broadcast
        for other in present[1:]:
            factors.unite(present[0], other)
        found.append(present[0] if present else ())
    return [tuple(found) for _ in eqn.outvars]


def _separately(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    return arguments


def _reduction(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    return [_without(arguments[0], eqn.params["axes"])]


def _along_an_axis(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    factors.pin(arguments[0][eqn.params["axis"]], f"{eqn.primitive.name} along it")
    return [arguments[0]]


def _transpose(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    return [tuple(arguments[0][axis] for axis in eqn.params["permutation"])]


def _squeeze(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    return [_without(arguments[0], eqn.params["dimensions"])]


def _broadcast(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    found = list(factors.array(_shape(eqn)))
    for axis, here in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[axis] > 1:
            found[here] = arguments[0][axis]
    return [tuple(found)]


def _reshape(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    if eqn.params.get("dimensions") is not None:
        return _pinned(factors, eqn, arguments, "reshape in another order")
    flat = tuple(factor for axis in arguments[0] for factor in axis)
    return [tuple(factors.cut(flat, _shape(eqn), "a reshape"))]


def _iota(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    shape, along = _shape(eqn), eqn.params["dimension"]
    return [tuple(factors.new(n, "its positions are counted" if i == along else "") for i, n in enumerate(shape))]


def _dot(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    x, y = arguments
    for a, b in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        factors.unite(x[a], y[b])
    free = _without(x, (*left, *left_batch)) + _without(y, (*right, *right_batch))
    return [tuple(x[a] for a in left_batch) + free]


def _conv(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    params, (x, kernel) = eqn.params, arguments
    if params["batch_group_count"] != 1:
        return _pinned(factors, eqn, arguments, "a convolution with groups in the batch")
    (batch, channels, *places), (outputs, inputs, *window), result = params["dimension_numbers"]
    factors.pin_all([tuple(x[a] for a in places), tuple(kernel[a] for a in window)], "positions of a convolution")
    groups = params["feature_group_count"]
    if groups == 1:
        factors.unite(x[channels], kernel[inputs])
        made = kernel[outputs]
    else:
        of_input = factors.cut(x[channels], (groups, eqn.invars[1].aval.shape[inputs]), "a grouped convolution")
        per_group = eqn.invars[1].aval.shape[outputs] // groups
        of_output = factors.cut(kernel[outputs], (groups, per_group), "a grouped convolution")
        factors.unite(of_input[0], of_output[0])
        factors.unite(of_input[1], kernel[inputs])
        made = of_output[0] + of_output[1]
    shape = _shape(eqn)
    found = list(factors.array(shape))
    for axis in result[2:]:
        factors.pin(found[axis], "positions of a convolution")
    found[result[0]], found[result[1]] = x[batch], made
    return [tuple(found)]


def _windows(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    params, count = eqn.params, len(eqn.outvars)
    found = []
    for axis, (n, size) in enumerate(zip(_shape(eqn), params["window_dimensions"], strict=True)):
        dilations = (params["base_dilation"][axis], params["window_dilation"][axis], params["window_strides"][axis])
        if size == 1 and dilations == (1, 1, 1) and tuple(params["padding"][axis]) == (0, 0):
            for other in arguments[1:count]:
                factors.unite(arguments[0][axis], other[axis])
            found.append(arguments[0][axis])
        else:
            for array in arguments[:count]:
                factors.pin(array[axis], "windows along it")
            found.append(factors.new(n, "windows along it"))
    return [tuple(found)] * count


def _part(factors: Factors, axis: Axis, size: int, start: int, length: int) -> Axis:
    """The axis of `[start : start + length]`, in pieces of the largest size that cuts none of them."""
    if length in (0, size):
        return axis if length else ()
    piece = math.gcd(size, start, length)
    if piece == 1:
        factors.pin(axis, "sliced")
        return factors.new(length, "sliced")
    parts, inner = factors.cut(axis, (size // piece, piece), "slicing")
    factors.pin(parts, "its parts are sliced")
    return factors.new(length // piece, "its parts are sliced") + inner


def _slice(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    params, shape = eqn.params, eqn.invars[0].aval.shape
    found = []
    for axis, (n, start, stop) in enumerate(zip(shape, params["start_indices"], params["limit_indices"], strict=True)):
        if params["strides"] is None or params["strides"][axis] == 1:
            found.append(_part(factors, arguments[0][axis], n, start, stop - start))
        else:
            factors.pin(arguments[0][axis], "sliced in strides")
            found.append(factors.new(_shape(eqn)[axis], "sliced in strides"))
    return [tuple(found)]


def _split(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    axis, sizes, start, found = eqn.params["axis"], eqn.params["sizes"], 0, []
    n = eqn.invars[0].aval.shape[axis]
    for size in sizes:
        part = _part(factors, arguments[0][axis], n, start, size)
        found.append((*arguments[0][:axis], part, *arguments[0][axis + 1 :]))
        start += size
    return found


def _concatenate(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    along = eqn.params["dimension"]
    for other in arguments[1:]:
        _unite(factors, _without(arguments[0], (along,)), _without(other, (along,)))
    sizes = [v.aval.shape[along] for v in eqn.invars]
    if sum(sizes) == max(sizes):  # the others are empty
        return [arguments[sizes.index(max(sizes))]]
    piece = math.gcd(*sizes)
    pieces = []
    for array, size in zip(arguments, sizes, strict=True):
        if size:
            parts, inner = factors.cut(array[along], (size // piece, piece), "concatenation")
            factors.pin(parts, "concatenated")
            pieces.append(inner)
    for inner in pieces[1:]:
        factors.unite(pieces[0], inner)
    found = list(arguments[0])
    found[along] = factors.new(sum(sizes) // piece, "its parts are concatenated") + pieces[0]
    return [tuple(found)]


def _stack(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    for other in arguments[1:]:
        _unite(factors, arguments[0], other)
    along = eqn.params["axis"]
    stacked = factors.new(len(arguments), "arrays are stacked along it")
    return [(*arguments[0][:along], stacked, *arguments[0][along:])]


def _unstack(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    factors.pin(arguments[0][eqn.params["axis"]], "its parts are sliced")
    return [_without(arguments[0], (eqn.params["axis"],))] * len(eqn.outvars)


def _tile(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    repeats = eqn.params["reps"]
    if len(repeats) != len(arguments[0]):
        return _pinned(factors, eqn, arguments, "tile to more axes")
    return [tuple(factors.new(n) + axis for n, axis in zip(repeats, arguments[0], strict=True))]


def _pad(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    found = []
    for axis, padding in enumerate(eqn.params["padding_config"]):
        if tuple(padding) != (0, 0, 0):
            factors.pin(arguments[0][axis], "padded")
            found.append(factors.new(_shape(eqn)[axis], "padded"))
        else:
            found.append(arguments[0][axis])
    return [tuple(found)]


def _reverse(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    for axis in eqn.params["dimensions"]:
        factors.pin(arguments[0][axis], "reversed")
    return [arguments[0]]


def _dynamic_slice(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    return [_where_whole(factors, arguments[0], eqn.invars[0].aval.shape, _shape(eqn), "sliced at a computed place")]


def _where_whole(factors: Factors, array: Array, before: Sequence[int], after: Sequence[int], reason: str) -> Array:
    """The axes of a part: those that it has whole, and pinned ones."""
    found = []
    for axis, n, m in zip(array, before, after, strict=True):
        if n != m:
            factors.pin(axis, reason)
        found.append(axis if n == m else factors.new(m, reason))
    return tuple(found)


def _dynamic_update_slice(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    whole, update = (tuple(v.aval.shape) for v in eqn.invars[:2])
    for a, b, n, m in zip(arguments[0], arguments[1], whole, update, strict=True):
        if n == m:
            factors.unite(a, b)
        else:
            factors.pin_all([(a, b)], "updated at a computed place")
    return [arguments[0]]


def _gather(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    (operand, places), shape = arguments, eqn.invars[0].aval.shape
    absent = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = [axis for axis in range(len(shape)) if axis not in absent]
    whole = {axis for axis in windows if sizes[axis] == shape[axis]}
    for axis in set(range(len(shape))) - whole:
        factors.pin(operand[axis], "looked up by number")
    for axis in (*numbers.start_indices_batching_dims, len(places) - 1):
        factors.pin(places[axis], "places to look up")
    found = list(factors.array(_shape(eqn), "looked up by number"))
    for axis, here in zip(windows, numbers.offset_dims, strict=True):
        if axis in whole:
            found[here] = operand[axis]
    others = (here for here in range(len(found)) if here not in numbers.offset_dims)
    for place, here in zip(places[:-1], others, strict=True):  # a table of places is permuted with what it looks up
        found[here] = place
    return [tuple(found)]


def _scatter(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    """Axes that the updates have whole correspond; along all others places are numbered."""
    numbers, (operand, places, updates) = eqn.params["dimension_numbers"], arguments
    shape, update = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    absent = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = zip([axis for axis in range(len(shape)) if axis not in absent], numbers.update_window_dims, strict=True)
    whole = {axis: here for axis, here in windows if shape[axis] == update[here]}
    for axis, here in whole.items():
        factors.unite(operand[axis], updates[here])
    others = [_without(operand, tuple(whole)), _without(updates, tuple(whole.values())), places]
    factors.pin_all(others, "places are numbered along it")
    return [operand]


def _fft(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    array, first = arguments[0], len(arguments[0]) - len(eqn.params["fft_lengths"])
    factors.pin_all([array[first:]], "fft along it")
    return [(*array[:first], *factors.array(_shape(eqn)[first:], "fft along it"))]


def _sort(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    for other in arguments[1:]:
        _unite(factors, arguments[0], other)
    factors.pin(arguments[0][eqn.params["dimension"]], "sorted")
    return [arguments[0] for _ in eqn.outvars]


def _arg(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    for axis in eqn.params["axes"]:
        factors.pin(arguments[0][axis], f"{eqn.primitive.name} along it")
    return [_without(arguments[0], eqn.params["axes"])]


def _top_k(factors: Factors, eqn: Any, arguments: list[Array]) -> list[Array]:
    axis = eqn.params.get("axis", -1) % len(arguments[0])
    factors.pin(arguments[0][axis], "top_k along it")
    found = [(*arguments[0][:axis], factors.new(_shape(eqn)[axis], "top_k along it"), *arguments[0][axis + 1 :])]
    return found * len(eqn.outvars)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_ALONG_AN_AXIS.split(), _along_an_axis),
    **dict.fromkeys(_WINDOWS.split(), _windows),
    **dict.fromkeys(_SCATTERS.split(), _scatter),
    "argmax": _arg,
    "argmin": _arg,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _separately,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
