"""What compiled and exported networks promise, whichever network it is."""

import torch


def assert_one_graph_each(network, images, settings):
    """A network compiles to one graph for each setting, keeps them, and scores as before."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(specialize_float=True):  # as the training module has it
        for name in [*settings, *settings]:
            with network.using(name):
                torch.testing.assert_close(compiled(images), network(images))
    assert len(graphs) == len(settings)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


@torch.no_grad()
def assert_baked_into_export(network, images, setting):
    """What is exported under a setting scores as the network does under it, ever after."""
    with network.using(setting):
        exported = torch.export.export(network, (images,)).module()
        reduced = network(images)
    torch.testing.assert_close(exported(images), reduced)
    if setting != network.setting.name:
        assert not torch.equal(exported(images), network(images))
