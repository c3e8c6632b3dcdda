"""Which widths of each network can be cut, and how: the same architecture with narrower layers."""

from collections.abc import Sequence

import flax.linen as nn

from experiments.models.click import ClickNet
from experiments.models.resnet import ResNet
from experiments.models.small import MLP, Autoencoder, ConvNet
from sa_plus_plus.contrib.transformers.layers import Transformer

Widths = dict[str, int | tuple[int, ...]]


def widths_of(model: nn.Module) -> Widths:
    """The options of a model that are widths of its hidden layers, and their values.

    What the data or the task determine are not among them: inputs, classes, embeddings of features, an autoencoder's
    code.

    Raises:
      ValueError: for a model of which no such option is known.
    """
    match model:
        case MLP() | ClickNet():
            return {"widths": tuple(model.widths)}
        case ConvNet():
            return {"widths": tuple(model.widths), "hidden": model.hidden}
        case Autoencoder():
            return {"width": model.width}
        case ResNet():
            return {"widths": model.stage_widths}
        case Transformer():
            return {"width": model.width, "hidden": model.hidden}
    raise ValueError(
        f"it is not known which options of {type(model).__name__} are widths: add it to widths_of in "
        "experiments/models/narrow.py"
    )


def widest(model: nn.Module) -> int:
    """Units of the widest hidden layer."""
    return max(_each(list(widths_of(model).values())))


def narrowed(model: nn.Module, units: int, cut: str = "scale") -> Widths:
    """The options with which the widest hidden layer has `units` units.

    Widths are rounded, and at least 1; a transformer's is a multiple of its heads, whose number stays.

    Args:
      model: of the original widths.
      units: from 1 to `widest(model)`.
      cut: `scale` multiplies all widths by one factor; `cap` cuts those above `units` to it, and leaves the others.

    Raises:
      ValueError: as `widths_of`.
    """
    most = widest(model)
    heads = {"width": model.heads} if isinstance(model, Transformer) else {}

    def cut_to(width: int, multiple: int) -> int:
        wanted = min(width, units) if cut == "cap" else width * units / most
        return multiple * max(1, round(wanted / multiple))

    return {
        name: cut_to(value, heads.get(name, 1)) if isinstance(value, int) else tuple(cut_to(w, 1) for w in value)
        for name, value in widths_of(model).items()
    }


def _each(values: Sequence[int | tuple[int, ...]]) -> list[int]:
    return [width for value in values for width in ((value,) if isinstance(value, int) else value)]
