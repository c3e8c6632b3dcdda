"""Axes as products of factors, and which factors of different arrays have to be permuted together.

An axis of size `n` is a sequence of factors, slowest first, whose sizes multiply to `n`; an axis of size 1 has none.
A factor starts as the whole axis and is split where a reshape splits the axis, such as `(heads · size)`.
"""

from collections.abc import Sequence

Axis = tuple[int, ...]  # numbers of factors
Array = tuple[Axis, ...]  # of each of its axes


class Factors:
    """Union-find over factors, each of which may be split in two and may be pinned: not to be permuted, for a reason.

    Two arrays that pass through an operation elementwise have their factors united. Where the factors of one do not
    divide those of the other, both are pinned.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._parents: list[int] = []
        self._parts: dict[int, Axis] = {}
        self._reasons: dict[int, str] = {}
        self.pins: list[Axis] = []  # what was pinned, in order
        self.misfits: list[Axis] = []  # axes that correspond without having the same factors

    def new(self, size: int, reason: str = "") -> Axis:
        """An axis of one new factor, pinned if there is a reason; of none if its size is 0 or 1."""
        if size < 2:
            return ()
        self.sizes.append(int(size))
        self._parents.append(len(self._parents))
        if reason:
            self._reasons[len(self._parents) - 1] = reason
        return (len(self._parents) - 1,)

    def array(self, shape: Sequence[int], reason: str = "") -> Array:
        """New axes for an array of this shape."""
        return tuple(self.new(size, reason) for size in shape)

    def resolve(self, axis: Axis) -> Axis:
        """The factors of an axis as they are now: none of them split, each its set's representative."""
        found: list[int] = []
        for factor in axis:
            root = self._root(factor)
            found += self.resolve(self._parts[root]) if root in self._parts else [root]
        return tuple(found)

    def reason(self, factor: int) -> str:
        """Why a resolved factor is pinned; empty if it is not."""
        return self._reasons.get(factor, "")

    def pin(self, axis: Axis, reason: str) -> None:
        """Pin all factors of an axis; the first reason of a factor stays."""
        self.pins.append(axis)
        for factor in self.resolve(axis):
            self._reasons.setdefault(factor, reason)

    def pin_all(self, arrays: Sequence[Array], reason: str) -> None:
        """Pin all factors of some arrays."""
        for array in arrays:
            for axis in array:
                self.pin(axis, reason)

    def unite(self, one: Axis, other: Axis) -> None:
        """Two axes of one size whose elements correspond."""
        left, right = self.resolve(one), self.resolve(other)
        while left and right:
            a, b = left[0], right[0]
            if self.sizes[a] == self.sizes[b]:
                self._join(a, b)
                left, right = left[1:], right[1:]
            elif self.sizes[a] % self.sizes[b] == 0:
                self._split(a, self.sizes[b])
            elif self.sizes[b] % self.sizes[a] == 0:
                self._split(b, self.sizes[a])
            else:
                self.misfits += [one, other]
                for axis in (left, right):
                    self.pin(axis, f"cut into parts of {self.sizes[a]} in one place and of {self.sizes[b]} in another")
                return
            left, right = self.resolve(left), self.resolve(right)

    def cut(self, axis: Axis, sizes: Sequence[int], what: str) -> list[Axis]:
        """An axis as several of given sizes, slowest first, whose product is its size.

        Where a size does not divide the factors, everything from there on is pinned.

        Args:
          axis: its factors.
          sizes: of the parts.
          what: does this, for the reason.
        """
        rest = self.resolve(axis)
        found: list[Axis] = []
        for number, size in enumerate(sizes):
            taken: list[int] = []
            while size > 1:
                first = self.sizes[rest[0]]
                if size % first and first % size:
                    reason = f"{what} does not keep its factor of {first} whole"
                    self.misfits.append((*taken, *rest))
                    self.pin((*taken, *rest), reason)
                    return [*found, *(self.new(n, reason) for n in sizes[number:])]
                if size < first:
                    self._split(rest[0], size)
                    rest = self.resolve(rest)
                    continue  # a factor may be split further than here asked for
                taken.append(rest[0])
                size //= first
                rest = rest[1:]
            found.append(tuple(taken))
        return found

    def _root(self, factor: int) -> int:
        while self._parents[factor] != factor:
            self._parents[factor] = self._parents[self._parents[factor]]
            factor = self._parents[factor]
        return factor

    def _join(self, a: int, b: int) -> None:
        if a == b:
            return
        if b in self._reasons:
            self._reasons.setdefault(a, self._reasons[b])
        self._parents[b] = a

    def _split(self, factor: int, outer: int) -> None:
        """Split a resolved factor into one of size `outer` and the rest."""
        reason = self._reasons.get(factor, "")
        self._parts[factor] = self.new(outer, reason) + self.new(self.sizes[factor] // outer, reason)
