""" Compilers and exporters: each must compute what eager mode computes, at sizes it was not traced at """
import random
from typing import List, Optional, Tuple

import pytest
import torch
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import timm
from helpers.common import FULL, images, tiny, training_step
from timm_sepool.squeeze import RGSEModule, SPSEModule

FAMILIES = ['rgse_resnext50', 'spse_resnet50']


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding of the largest value: train mode's norms amplify it in the small ones."""
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3 * max(1., expected.abs().max().item()))


@pytest.mark.parametrize('name', FAMILIES)
def test_torchscript(name: str) -> None:
    model = tiny(name, scriptable=True)
    scripted = torch.jit.script(model)
    for batch, size in ((2, (64, 64)), (1, (97, 131)), (3, (224, 224))):
        assert_same(scripted(images(batch, *size)), model(images(batch, *size)))
    loss, grads = training_step(model.train(), images(3, 97, 131))
    loss_scripted, grads_scripted = training_step(scripted.train(), images(3, 97, 131))
    assert_same(loss_scripted, loss)
    for n in grads:
        assert_same(grads_scripted[n], grads[n])


@pytest.mark.parametrize('attn_layer', [None, 'eca', pytest.param('se', marks=pytest.mark.full)])
def test_torchscript_of_other_blocks(attn_layer: str) -> None:
    model = tiny('rgse_resnet50', block_args=dict(attn_layer=attn_layer))
    assert_same(torch.jit.script(model)(images(2, 64, 64)), model(images(2, 64, 64)))


@pytest.mark.parametrize('name', FAMILIES)
def test_torch_jit_trace(name: str) -> None:
    """A trace follows the size of its input too."""
    model = tiny(name)
    traced = torch.jit.trace(model, images(2, 64, 64))
    for batch, size in ((2, (64, 64)), (1, (97, 131)), (3, (224, 224))):
        assert_same(traced(images(batch, *size)), model(images(batch, *size)))


@pytest.mark.parametrize('name', FAMILIES)
def test_fx(name: str) -> None:
    """Symbolic trace, torchvision's feature extractor and timm's, each at two sizes, and a traced model scripted."""
    model = tiny(name)
    graphs = [
        fx.symbolic_trace(model),
        lambda x: create_feature_extractor(model, ['fc'])(x)['fc'],
        lambda x: timm.models.create_feature_extractor(model, ['fc'])(x)['fc'],
        torch.jit.script(fx.symbolic_trace(model)),
    ]
    for graph in graphs:
        for size in ((64, 64), (97, 131)):
            assert_same(graph(images(2, *size)), model(images(2, *size)))
    maps = create_feature_extractor(model, ['layer2', 'layer3.0.se.gate'])(images(2, 97, 131))
    assert maps['layer3.0.se.gate'].shape == (2, 256, 1, 1)


@pytest.mark.parametrize('name', FAMILIES)
def test_compile_fullgraph(name: str) -> None:
    """No graph break, in eval and train mode, when the size and the batch change."""
    model = tiny(name)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for batch, size in ((2, (64, 64)), (2, (97, 131)), (3, (224, 224))):
        with torch.no_grad():
            assert_same(compiled(images(batch, *size)), model(images(batch, *size)))
    model.train()
    for size in ((64, 64), (97, 131)):
        loss, grads = training_step(model, images(3, *size))
        loss_compiled, grads_compiled = training_step(compiled, images(3, *size))
        assert_same(loss_compiled, loss)
        for n in grads:
            assert_same(grads_compiled[f'_orig_mod.{n}'], grads[n])


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


@pytest.mark.parametrize('dynamic', [True, None])
def test_compile_many_sizes(dynamic: Optional[bool]) -> None:
    """One dynamic graph serves all sizes, as in seresnet50: the squeezes add no guards on them."""
    rng = random.Random(0)
    inputs = [images(2, rng.randint(33, 160), rng.randint(33, 160)) for _ in range(25 if FULL else 8)]
    most = len(compiled_graphs(tiny('seresnet50'), dynamic, inputs)) + 1
    for name in FAMILIES:
        assert len(compiled_graphs(tiny(name), dynamic, inputs)) <= most, name


@pytest.mark.parametrize('module', [SPSEModule(8), RGSEModule(8, grid=4)], ids=['spse', 'rgse'])
def test_compile_static_sizes(module: nn.Module) -> None:
    """Static graphs pool where the grid divides the map: they build no window matrices, which dynamic graphs need."""
    inputs = [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 24)]
    for dynamic, number in ((False, 2), (None, 1), (True, 1)):
        graphs = compiled_graphs(module.eval(), dynamic, inputs[:number])
        assert len(graphs) == number
        assert all(any(n.target is torch.arange for n in graph.graph.nodes) == (dynamic is True) for graph in graphs)


@pytest.mark.full
@pytest.mark.parametrize('name', FAMILIES)
def test_compile_inductor(name: str) -> None:
    """torch.compile's default backend, which takes about a minute for one graph.

    In float64: rounding in float32 can move a value across a ReLU's 0, which changes its gradient.
    """
    model = tiny(name).double()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((64, 64), (97, 131)):
            assert_same(compiled(images(2, *size, dtype=torch.float64)), model(images(2, *size, dtype=torch.float64)))
    torch.compiler.reset()
    compiled = torch.compile(model.train(), fullgraph=True)
    x = images(3, 64, 64, dtype=torch.float64)
    loss, grads = training_step(model, x)
    loss_compiled, grads_compiled = training_step(compiled, x)
    assert_same(loss_compiled, loss)
    for n in grads:
        assert_same(grads_compiled[f'_orig_mod.{n}'], grads[n])


def dynamic_shapes(how: str) -> Tuple:
    if how == 'auto':
        return ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    dim = torch.export.Dim
    return ({0: dim('batch'), 2: dim('height', min=64, max=2048), 3: dim('width', min=64, max=2048)},)


@pytest.mark.parametrize('how', ['auto', pytest.param('range', marks=pytest.mark.full)])
@pytest.mark.parametrize('name', FAMILIES)
def test_torch_export(name: str, how: str) -> None:
    """One exported program for every batch and size."""
    if how == 'range':
        try:
            torch.export.export(tiny('resnet50'), (images(2, 224, 224),), dynamic_shapes=dynamic_shapes(how))
        except Exception:
            pytest.skip(f'torch {torch.__version__} cannot do this for a plain resnet50 either')
    model = tiny(name)
    program = torch.export.export(model, (images(2, 224, 224),), dynamic_shapes=dynamic_shapes(how)).module()
    for batch, size in ((2, (224, 224)), (1, (97, 131)), (5, (64, 320))):
        assert_same(program(images(batch, *size)), model(images(batch, *size)))


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='the exporter of torch < 2.7 fails')
@pytest.mark.parametrize('name', FAMILIES)
def test_onnx(name: str, tmp_path) -> None:
    """The same through ONNX, computed by onnxruntime."""
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = tiny(name)
    torch.onnx.export(
        model, (images(2, 224, 224),), tmp_path / 'model.onnx', dynamo=True, verbose=False,
        input_names=['images'], dynamic_shapes=dynamic_shapes('auto'))
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    for batch, size in ((2, (224, 224)), (1, (97, 131)), (5, (64, 320))):
        x = images(batch, *size)
        got, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same(torch.from_numpy(got), model(x).detach())


def test_exported_norms_are_not_trained() -> None:
    """Exporting in train mode and back leaves the model as it was."""
    model = tiny('spse_resnet50').train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.export.export(model, (images(2, 64, 64),))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(model.layer1[0].se.bn, nn.BatchNorm2d) and model.layer1[0].se.bn.training
