"""Show what a config prunes, layer by layer, without data or training.

    python -m experiments.inspect --config=configs/resnet50_block8.py --config.sparsifier.sparsity=0.95
    python -m experiments.inspect --config=configs/resnet50_block8.py --sparsities=0.7,0.8,0.9,0.95

The first prints the phases and, for each kernel, grid, kept blocks, and weights and multiply-adds before and after. The
second prints the whole network's sparsity at each of several targets.
"""

import ml_collections
from absl import flags
from rich.console import Console

import sa_plus_plus as sapp
from experiments import cli, tasks
from experiments.outputs import progress
from experiments.training.setup import Setup, blank, prepare_without_data

flags.declare_key_flag("config")  # for --help
_SPARSITIES = flags.DEFINE_list("sparsities", [], "Target sparsities to tabulate instead of showing each layer.")


def main(argv: list[str]) -> None:
    del argv  # cli.run has refused any
    config, console = cli.CONFIG.value, progress.console()
    with cli.input_errors():
        if _SPARSITIES.value:
            dataset = blank(config)
            setups = [prepare_without_data(_at_sparsity(config, float(s)), dataset) for s in _SPARSITIES.value]
            cost = tasks.multiply_adds(setups[0].task)  # the same whatever is pruned
            rows = [_totals(setup, cost) for setup in setups]
            console.print(progress.table(_title(config), rows))
        else:
            show(prepare_without_data(config), console)


def show(setup: Setup, console: Console) -> None:
    """Print the plan and the phases of a run."""
    cost = tasks.multiply_adds(setup.task)
    rows = [_cells(layer, cost.get(layer.path, 0)) for layer in setup.plan.leaves if layer.is_kernel]
    console.print(progress.table(_title(setup.config), rows))
    console.print(progress.table("The whole network", [_totals(setup, cost)]))
    console.print(f"{setup.config.steps:,} steps of {setup.config.batch_size} examples\n", highlight=False)
    console.print(str(setup.phases), highlight=False)


def _at_sparsity(config: ml_collections.ConfigDict, sparsity: float) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    config.sparsifier.sparsity = sparsity
    return config


def _title(config: ml_collections.ConfigDict) -> str:
    sparsifier = config.sparsifier
    return f"{config.name}, {config.model}: {sparsifier.name}, blocks {progress.sizes(sparsifier.block)}"


def _cells(layer: sapp.LeafPlan, cost: int) -> dict[str, str]:
    share = layer.kept / layer.blocks
    return {
        "kernel": layer.path.removesuffix("/kernel"),
        "shape": progress.sizes(layer.shape),
        "grid": "-" if layer.skip_reason else progress.sizes(layer.grid),
        "kept blocks": "-" if layer.skip_reason else f"{layer.kept:,} of {layer.blocks:,}",
        "weights": f"{layer.weights:,}",
        "M multiply-adds": f"{cost / 1e6:.2f}",
        "after": f"{cost * share / 1e6:.2f}",
        "sparsity": layer.skip_reason or f"{1 - share:.2%}",
    }


def _totals(setup: Setup, cost: dict[str, int]) -> dict[str, str]:
    plan = setup.plan
    share = {layer.path: layer.kept / layer.blocks for layer in plan.leaves if layer.is_kernel}
    table = setup.task.table  # its size depends on the data
    layers = [layer for layer in plan.leaves if table is None or layer.path != table.path]
    return {
        "target": f"{setup.config.sparsifier.sparsity:.0%}",
        "parameters": f"{sum(layer.weights for layer in layers):,}",
        "kernels": str(len(share)),
        "pruned": str(len(plan.pruned)),
        "kernel weights": f"{plan.kernel_weights:,}",
        "sparsity": f"{plan.sparsity:.2%}",
        "G multiply-adds": f"{sum(cost.values()) / 1e9:.3f}",
        "after": f"{sum(n * share.get(path, 1) for path, n in cost.items()) / 1e9:.3f}",
    }


if __name__ == "__main__":
    cli.run(main)
