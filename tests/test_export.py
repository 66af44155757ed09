""" Compilers and exporters: each must compute what eager mode computes, at sizes it was not traced at """
import copy
import random
from typing import Callable, Dict, List, Optional, Tuple

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes

import timm
from helpers.common import FULL, images, tiny, training_step
from timm.layers import SEModule
from timm_sepool import squeeze
from timm_sepool.squeeze import RGSEModule, SPSEModule

FAMILIES = ['rgse_resnext50', 'spse_resnet50']
EXAMPLE = images(2, 224, 224)
AUTO_SHAPES = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
INPUTS = [EXAMPLE, images(1, 97, 131), images(5, 64, 320)]


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding of the largest value: train mode's norms amplify it in the small ones."""
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3 * max(1., expected.abs().max().item()))


def assert_same_step(got: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    """Loss and gradients of a training step; a compiled module puts a prefix before the names of its parameters."""
    (got_loss, got_grads), (loss, grads) = training_step(got, x), training_step(model, x)
    assert_same(got_loss, loss)
    for n, grad in got_grads.items():
        assert_same(grad, grads[n.replace('_orig_mod.', '')])


def onnx(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Computed by onnxruntime."""
    if not hasattr(torch.compiler, 'is_exporting'):
        pytest.skip('the exporter of torch < 2.7 fails')
    pytest.importorskip('onnxscript')
    program = torch.onnx.export(
        model, (EXAMPLE,), dynamo=True, verbose=False, input_names=['images'], dynamic_shapes=AUTO_SHAPES)
    session = pytest.importorskip('onnxruntime').InferenceSession(program.model_proto.SerializeToString())
    return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


CONVERTERS = {
    'torchscript': torch.jit.script,
    'trace': lambda model: torch.jit.trace(model, EXAMPLE),
    'fx': fx.symbolic_trace,
    'fx_torchscript': lambda model: torch.jit.script(fx.symbolic_trace(model)),
    'fx_timm': lambda model: lambda x: timm.models.create_feature_extractor(model, ['fc'])(x)['fc'],
    'export': lambda model: torch.export.export(model, (EXAMPLE,), dynamic_shapes=AUTO_SHAPES).module(),
    'onnx': onnx,
}


@pytest.mark.parametrize('name, converter', [
    pytest.param(name, converter, marks=pytest.mark.full if full else ())
    for name in FAMILIES for converter in CONVERTERS
    for full in [converter == 'onnx' or (name, converter) == (FAMILIES[0], 'export')]
])
def test_convert(name: str, converter: str) -> None:
    """One program for every batch and size."""
    model = tiny(name, scriptable=converter == 'torchscript')
    converted = CONVERTERS[converter](model)
    with torch.no_grad():
        for x in INPUTS:
            assert_same(converted(x), model(x))


@pytest.mark.parametrize('name, kwargs', [
    *((name, dict(scriptable=True)) for name in FAMILIES),
    *(('rgse_resnet50', dict(block_args=dict(attn_layer=attn_layer))) for attn_layer in (None, 'eca', 'se'))], ids=str)
def test_torchscript_trains(name: str, kwargs: Dict) -> None:
    model = tiny(name, **kwargs).train()
    assert_same_step(torch.jit.script(copy.deepcopy(model)), model, images(3, 97, 131))


@pytest.mark.parametrize('name, backend', [
    (FAMILIES[1], 'aot_eager'), *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (FAMILIES[0], 'aot_eager'), (FAMILIES[0], 'inductor'), (FAMILIES[1], 'inductor')))])
def test_compile(name: str, backend: str) -> None:
    """No graph break in train mode when the size changes; inductor, which takes a minute a graph, in eval mode too.
    In float64: rounding in float32 can move a value across a ReLU's 0, which changes its gradient."""
    model = tiny(name).double().train()
    inputs = [images(3, 64, 64).double(), images(3, 97, 131).double()]
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for x in inputs if FULL and backend != 'inductor' else inputs[1:]:
        assert_same_step(compiled, model, x)
    if backend == 'inductor':
        torch.compiler.reset()
        compiled = torch.compile(model.eval(), fullgraph=True, dynamic=True)
        with torch.no_grad():
            for x in inputs:
                assert_same(compiled(x), model(x))


def compiled_graphs(model: nn.Module, dynamic: Optional[bool], inputs: List[torch.Tensor]) -> List[fx.GraphModule]:
    """The graphs that torch.compile makes for these inputs, after a comparison with eager mode for each."""
    graphs: List[fx.GraphModule] = []
    torch.compiler.reset()
    compiled = torch.compile(
        model, fullgraph=True, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        for x in inputs:
            assert_same(compiled(x), model(x))
    return graphs


@pytest.mark.parametrize('dynamic, batches', [(True, (1,)), (None, (2, 3))])
def test_compile_many_sizes(dynamic: Optional[bool], batches: Tuple[int, ...]) -> None:
    """One dynamic graph serves all sizes, as in timm's SE: the squeezes add no guards on them. Networks with --full."""
    rng = random.Random(0)
    # maps that a grid of 4 divides or not, square ones, and narrow ones: eager mode has a form for each
    sizes = [(32, 48), (8, 12), (33, 47), (37, 37), (40, 40), (12, 12), (9, 13), (64, 16), (7, 7), (21, 5)]
    if FULL:
        sizes = [(rng.randint(33, 160), rng.randint(33, 160)) for _ in range(25)]
    inputs = [images(rng.choice(batches), 3 if FULL else 8, *size) for size in sizes]
    peer, *ours = map(tiny, ('seresnet50', *FAMILIES)) if FULL else (SEModule(8), SPSEModule(8), RGSEModule(8, grid=4))
    most = len(compiled_graphs(peer.eval(), dynamic, inputs)) + 1
    for model in ours:
        assert len(compiled_graphs(model.eval(), dynamic, inputs)) <= most, model


@pytest.mark.parametrize('module', [SPSEModule(8), RGSEModule(8, grid=4)], ids=['spse', 'rgse'])
def test_compile_static_sizes_and_export_in_train_mode(module: nn.Module) -> None:
    """Static graphs pool where the grid divides the map: they build no window matrices, which exported and dynamic
    graphs need. Torch that cannot tell them apart (before 2.8) gets the dynamic form for all graphs."""
    always = not hasattr(symbolic_shapes, 'has_static_value')
    inputs = [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 24)]
    for dynamic, number in ((False, 2), (None, 1), (True, 1)):
        graphs = compiled_graphs(module.eval(), dynamic, inputs[:number])
        assert len(graphs) == number
        for graph in graphs:
            assert any(n.target is torch.arange for n in graph.graph.nodes) == (always or dynamic is True)
    exported = torch.export.export(module, tuple(inputs[:1]))
    assert any(n.target is torch.ops.aten.arange.default for n in exported.graph.nodes)
    # an export in train mode leaves the norm's statistics and mode as they were
    before = copy.deepcopy(module.state_dict())
    torch.export.export(module.train(), tuple(inputs[:1]))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert isinstance(module.bn, nn.BatchNorm2d) and module.bn.training


@pytest.mark.skipif(not hasattr(symbolic_shapes, 'has_static_value'), reason='torch < 2.8 has one form for all graphs')
@pytest.mark.parametrize(
    'training, large, expected', [(True, 0, 'mean'), (False, squeeze.LARGE, 'avg_pool2d'), (False, 0, 'and_')])
def test_compile_for_gpu(monkeypatch, training: bool, large: int, expected: str) -> None:
    """The forms of docs/speed.md. This needs no GPU, as the tensors are fake."""
    monkeypatch.setattr(squeeze, 'LARGE', large)
    graphs: List[fx.GraphModule] = []
    torch.compiler.reset()
    compiled = torch.compile(
        squeeze.spatial_weighted_sum, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with FakeTensorMode(), torch.set_grad_enabled(training):
        compiled(torch.ones(2, 8, 8, 8, device='cuda'), [torch.ones(8, 1, 4, 4, device='cuda')])
    called = {getattr(node.target, '__name__', node.target) for node in graphs[0].graph.nodes}
    assert called & {'mean', 'avg_pool2d', 'and_'} == {expected}
