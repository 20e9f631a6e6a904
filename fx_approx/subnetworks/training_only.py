"""A graph that serves training only says so where it is run otherwise, and where it is exported, too."""

from __future__ import annotations

from torch import fx


def refuse_evaluation(module: fx.GraphModule) -> None:
    """Has the graph of ``module`` begin with a check of its mode.

    It stands in the graph, since ``torch.export`` runs no hooks of the module that it is given.
    """
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    with module.graph.inserting_before(first):
        flag = module.graph.create_node("get_attr", "training")
        module.graph.call_function(check_training, (flag,))
    module.recompile()


def check_training(training: bool) -> None:
    """Lets a graph that serves training only go on.

    Raises:
        RuntimeError: The subnetwork is in evaluation mode.
    """
    if not training:
        raise RuntimeError(
            "sub: its graph serves training only, since the model's Python does something else in eval(): evaluate and "
            "export fx_approx.subnetworks.restore(sub, model), which is of full size and computes the same, or merge it"
        )
