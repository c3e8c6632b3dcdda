"""The algorithms in plain NumPy and float64, written from their description alone, for tests to compare with.

Nothing here uses JAX, nothing is fast, and gradients are derived by hand. The model is linear: the sum over kernels of
`inputs @ kernel`, and a bias, fitted by least squares.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

DENSE, SPARSIFICATION, SPARSE = "dense", "sparsification", "sparse"

# Phases ----------------------------------------------------------------------------------------------------------


def percent(value):
    return Fraction(value) / 100


def recipe(algorithm, recipe_name, sparsification=True):
    """The schedule of an algorithm as `(kind, exact fraction of the run)`."""
    imagenet = recipe_name == "imagenet"
    first, last = (percent(10), percent(15)) if imagenet else (percent(20), percent(20))
    if algorithm == "dense":
        return [(DENSE, percent(100))]
    if algorithm in ("magnitude", "powerpropagation"):
        return [(DENSE, 1 - last), (SPARSE, last)]
    if algorithm == "gradual_magnitude":
        return [(DENSE, first), (SPARSIFICATION, 1 - first - last), (SPARSE, last)]
    if algorithm == "acdc" or not sparsification:
        cycles, part = (7, percent(5)) if imagenet else (10, percent(3))
        phases = [(DENSE, first)] + cycles * [(SPARSE, part), (DENSE, part)]
        if imagenet:
            phases[-1] = (DENSE, part + percent(5))
        return [*phases, (SPARSE, last)]
    cycles, cycle, extended = (6, percent(10), percent(15)) if imagenet else (9, percent(6), percent(6))
    phases = [(DENSE, first)] + cycles * [(kind, cycle / 3) for kind in (SPARSIFICATION, SPARSE, DENSE)]
    return [*phases, (SPARSIFICATION, extended), (SPARSE, last)]


def lay_out(fractions, total_steps):
    """`(kind, start, stop)` of each phase, boundaries at `round(fraction * total_steps)`."""
    ends = [sum(share for _, share in fractions[: i + 1]) for i in range(len(fractions))]
    assert ends[-1] == 1
    stops = [round(end * total_steps) for end in ends]
    return [(kind, start, stop) for (kind, _), start, stop in zip(fractions, [0, *stops[:-1]], stops, strict=True)]


def curve(t, exponent=4.0):
    """Share of the target sparsity at position `t` of a sparsification phase."""
    return (1 - math.exp(-exponent * t)) / (1 - math.exp(-exponent))


# Blocks ----------------------------------------------------------------------------------------------------------


def tiles(shape, block):
    """Index of each block in the grid, and its slice of the kernel's matrix."""
    rows, cols = math.prod(shape[:-1]), shape[-1]
    (b_r, b_c) = block
    for i in range(-(-rows // b_r)):
        for j in range(-(-cols // b_c)):
            yield (i, j), np.s_[i * b_r : (i + 1) * b_r, j * b_c : (j + 1) * b_c]


def grid_shape(shape, block):
    return tuple(1 + np.max([index for index, _ in tiles(shape, block)], axis=0))


def as_matrix(kernel):
    return kernel.reshape(-1, kernel.shape[-1])


def per_block(function, *kernels, block):
    """The grid of `function(block of each kernel)`."""
    grid = np.zeros(grid_shape(kernels[0].shape, block))
    for index, tile in tiles(kernels[0].shape, block):
        grid[index] = function(*(as_matrix(kernel)[tile] for kernel in kernels))
    return grid


def spread(grid, shape, block):
    """The kernel that is constant on blocks."""
    kernel = np.zeros(shape, grid.dtype)
    for index, tile in tiles(shape, block):
        as_matrix(kernel)[tile] = grid[index]
    return kernel


def norms(kernel, block):
    return per_block(np.linalg.norm, kernel, block=block)


def inner(one, other, block):
    return per_block(lambda a, b: np.sum(a * b), one, other, block=block)


# Optimizers ------------------------------------------------------------------------------------------------------


@dataclass
class SGD:
    """Momentum with weight decay added to the gradient; Nesterov's is not meant."""

    decay: float
    momentum: float = 0.9
    buffer: dict = field(default_factory=dict)

    def reset(self):
        self.buffer = {}

    def direction(self, gradients, values):
        for key, gradient in gradients.items():
            self.buffer[key] = self.momentum * self.buffer.get(key, 0) + gradient + self.decay * values[key]
        return dict(self.buffer)


@dataclass
class Adam:
    """Adam with weight decay added to the gradient."""

    decay: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    count: int = 0
    first: dict = field(default_factory=dict)
    second: dict = field(default_factory=dict)

    def reset(self):
        self.count, self.first, self.second = 0, {}, {}

    def direction(self, gradients, values):
        self.count += 1
        result = {}
        for key, gradient in gradients.items():
            gradient = gradient + self.decay * values[key]
            self.first[key] = self.b1 * self.first.get(key, 0) + (1 - self.b1) * gradient
            self.second[key] = self.b2 * self.second.get(key, 0) + (1 - self.b2) * gradient**2
            first = self.first[key] / (1 - self.b1**self.count)
            second = self.second[key] / (1 - self.b2**self.count)
            result[key] = first / (np.sqrt(second) + self.eps)
        return result


# The algorithms --------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """`0.5 * mean over rows |sum of inputs[name] @ kernels[name] + bias - targets|^2`."""

    inputs: dict
    targets: np.ndarray
    kernels: dict
    bias: np.ndarray

    def residual(self, kernels, bias):
        return sum(self.inputs[name] @ as_matrix(kernels[name]) for name in kernels) + bias - self.targets

    def loss(self, kernels, bias):
        return 0.5 * np.sum(self.residual(kernels, bias) ** 2) / len(self.targets)

    def gradients(self, kernels, bias):
        residual = self.residual(kernels, bias) / len(self.targets)
        of_kernels = {name: (self.inputs[name].T @ residual).reshape(kernels[name].shape) for name in kernels}
        return of_kernels, residual.sum(0)


@dataclass
class Pruner:
    """Weights, logits and masks of one run, and what happens to them."""

    algorithm: str
    kernels: dict
    block: tuple
    sparsity: float
    phases: list
    clip: object = "density"
    mask_every: int = 1
    monotone: bool = True
    exponent: float = 4.0
    form: str = "pruning"
    alpha: float = 2.0
    scope: str = "layer"
    reset_logits_at: tuple = ()

    def __post_init__(self):
        self.weights, self.logits, self.masks, self.kept = {}, {}, {}, {}
        self.margin, self.clipped = math.inf, 0  # for tests to see that they test something
        for name, kernel in self.kernels.items():
            grid = grid_shape(kernel.shape, self.block)
            self.weights[name] = np.array(kernel, np.float64)
            if self.algorithm == "powerpropagation":
                root = norms(kernel, self.block) ** ((self.alpha - 1) / self.alpha)
                self.weights[name] /= spread(np.where(root > 0, root, 1), kernel.shape, self.block)
            if self.algorithm == "sequential_attention":
                self.logits[name] = np.zeros(grid)
            self.masks[name] = np.ones(grid, bool)
            self.kept[name] = math.floor((1 - Fraction(str(self.sparsity))) * math.prod(grid))

    def forgets(self):
        """Whether masked weights restart from zero."""
        return self.algorithm == "acdc" and self.form == "pruning"

    def attention(self, name):
        """Attention weights, before clipping."""
        powers = np.exp(self.logits[name] - self.logits[name].max())
        return powers.size * powers / powers.sum()

    def clip_range(self):
        if self.clip is None:
            return -math.inf, math.inf
        return (1 - self.sparsity, 1 / (1 - self.sparsity)) if self.clip == "density" else self.clip

    def scale(self, name):
        """The number by which the weights of each block are multiplied, its mask aside."""
        if self.algorithm == "sequential_attention":
            return np.clip(self.attention(name), *self.clip_range())
        if self.algorithm == "powerpropagation":
            return norms(self.weights[name], self.block) ** (self.alpha - 1)
        return np.ones(self.masks[name].shape)

    def takes_part(self, name):
        """The mask of each weight."""
        return spread(self.masks[name], self.weights[name].shape, self.block)

    def effective(self):
        return {name: self.unmasked(name) * self.takes_part(name) for name in self.weights}

    def unmasked(self, name):
        return self.weights[name] * spread(self.scale(name), self.weights[name].shape, self.block)

    def scores(self, name):
        if self.algorithm == "sequential_attention":
            return self.attention(name)
        return norms(self.unmasked(name), self.block)

    def pull_back(self, name, gradient):
        """Gradients of the loss by weights and by logits, from that by the effective kernel."""
        weights, gradient = self.weights[name], gradient * self.takes_part(name)
        by_weights = gradient * spread(self.scale(name), weights.shape, self.block)
        along = inner(gradient, weights, self.block)  # by the block's factor
        if self.algorithm == "powerpropagation":
            norm = norms(weights, self.block)
            # d |w|^(alpha-1) / dw = (alpha-1) |w|^(alpha-3) w; at w = 0 the product with w vanishes
            factor = (self.alpha - 1) * np.where(norm > 0, norm, 1) ** (self.alpha - 3) * (norm > 0)
            by_weights += weights * spread(factor * along, weights.shape, self.block)
        if self.algorithm != "sequential_attention":
            return by_weights, None
        attention = self.attention(name)
        low, high = self.clip_range()
        inside = (attention > low) & (attention < high)
        self.clipped += np.sum(~inside)
        by_attention = along * inside
        # A = N p, dA_i / dL_j = N p_i (delta_ij - p_j)
        by_logits = attention * (by_attention - np.sum(by_attention * attention) / attention.size)
        return by_weights, by_logits

    def select(self, counts, continues):
        """Keep the best `counts[name]` blocks of each layer, or their sum over all layers."""
        names = list(self.weights)
        groups = [names] if self.scope == "global" else [[name] for name in names]
        for group in groups:
            candidates = []
            for name in group:
                scores = self.scores(name)
                for index in np.ndindex(scores.shape):
                    if self.masks[name][index] or not (continues and self.monotone):
                        candidates.append((scores[index], name, index))
            candidates.sort(key=lambda candidate: -candidate[0])
            count = sum(counts[name] for name in group)
            if count < len(candidates):
                self.margin = min(self.margin, candidates[count - 1][0] / candidates[count][0] - 1)
            for name in group:
                self.masks[name] = np.zeros_like(self.masks[name])
            for _, name, index in candidates[:count]:
                self.masks[name][index] = True

    def arrive(self, step):
        """What happens before the (step + 1)-th gradient step; whether a new phase begins."""
        ended = next((kind for kind, _, stop in self.phases if stop == step), None)
        kind, start, stop = next((p for p in self.phases if p[1] <= step < p[2]), (None, None, None))
        if ended == SPARSIFICATION and kind in (SPARSE, None):
            self.select(self.kept, continues=True)  # ends at exactly the target
        if kind in (DENSE, SPARSIFICATION) and step == start:
            if self.forgets():
                self.weights = {name: weights * self.takes_part(name) for name, weights in self.weights.items()}
            self.masks = {name: np.ones_like(mask) for name, mask in self.masks.items()}
        elif kind == SPARSIFICATION and (step - start) % self.mask_every == 0:
            sparsity = self.sparsity * curve((step - start) / (stop - start), self.exponent)
            counts = {name: math.floor((1 - sparsity) * mask.size) for name, mask in self.masks.items()}
            self.select(counts, continues=True)
        elif kind == SPARSE and step == start and ended in (None, DENSE):
            self.select(self.kept, continues=False)
        if step == start and kind in self.reset_logits_at:
            self.logits = {name: np.zeros_like(logits) for name, logits in self.logits.items()}
        return step > 0 and step == start


@dataclass
class State:
    weights: dict
    logits: dict
    masks: dict
    bias: np.ndarray
    boundary: bool
    effective: dict


def train(problem, pruner, optimizer, learning_rate, logit_lr=1.0):
    """The state before each gradient step, and after the last.

    The optimizer does not know the masks; what it would do to masked weights is left undone.
    """
    bias = np.array(problem.bias, np.float64)
    for step in range(pruner.phases[-1][2] + 1):
        boundary = pruner.arrive(step)
        effective = pruner.effective()
        yield State(dict(pruner.weights), dict(pruner.logits), dict(pruner.masks), bias, boundary, effective)
        if boundary:
            optimizer.reset()
        by_kernels, by_bias = problem.gradients(effective, bias)
        gradients, values = {"bias": by_bias}, {"bias": bias}
        for name, weights in pruner.weights.items():
            by_weights, by_logits = pruner.pull_back(name, by_kernels[name])
            gradients["weights", name], values["weights", name] = by_weights, weights
            if by_logits is not None:
                gradients["logits", name], values["logits", name] = by_logits, pruner.logits[name]
        direction = optimizer.direction(gradients, values)
        rate = learning_rate(step)  # of the run, not of the phase
        bias = bias - rate * direction["bias"]
        for name, weights in pruner.weights.items():
            pruner.weights[name] = weights - rate * direction["weights", name] * pruner.takes_part(name)
            if name in pruner.logits:
                pruner.logits[name] = pruner.logits[name] - rate * logit_lr * direction["logits", name]
