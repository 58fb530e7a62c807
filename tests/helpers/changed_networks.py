"""Networks that differ from another one a little or a lot."""

from dataclasses import replace

from exactprune.network import Network
from exactprune.ops import Affine


def changed(rng, network, size):
    """The same network with some weights changed, a neuron scaled (r z), and one replaced by an unrelated one."""
    nodes = list(network.nodes)
    for i, node in enumerate(nodes):
        if isinstance(node.op, Affine):
            weight, bias = node.op.weight.copy(), node.op.bias.copy()
            weight += size * rng.standard_normal(weight.shape) * (rng.random(weight.shape) < 0.5)
            if i < len(nodes) - 2 and len(bias) > 2:
                weight[0], bias[0] = weight[0] * 1.5, bias[0] * 1.5
                weight[1] = rng.standard_normal(weight[1].shape)
            nodes[i] = replace(node, op=Affine(weight, bias))
    return Network(tuple(nodes), network.input_shape, network.dtype, network.name)
