""" Random squeezes, networks and checkpoints (hypothesis)

The default run draws the same few examples every time, `pytest --full` draws many new ones.
"""
import copy
import math
from functools import partial
from typing import List, Tuple

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import timm
from helpers import reference
from helpers.common import tiny
from timm_sepool import RGSEModule, SPSEModule
from timm_sepool.squeeze import spatial_kernel, spatial_weighted_sum

SEEDS = st.integers(0, 2 ** 32 - 1)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def examples(factor: float) -> settings:
    """Scale the number of examples of the profile by what one costs."""
    return settings(max_examples=round(factor * settings().max_examples))


# dimensions from the outermost, steps of the slice that the tensor is, dimensions of stride 0
NCHW, NHWC = (((0, 1, 2, 3), (1,) * 4, ()), ((0, 2, 3, 1), (1,) * 4, ()))
LAYOUTS = st.sampled_from((NCHW, NHWC)) | st.tuples(
    st.permutations(range(4)), st.tuples(*[st.integers(1, 2)] * 4), st.sets(st.integers(0, 3), max_size=2))


def lay_out(shape: Tuple[int, ...], layout: Tuple, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    order, steps, expanded = layout
    sizes = [step * (1 if d in expanded else size) for d, (size, step) in enumerate(zip(shape, steps))]
    x = torch.randn([sizes[d] for d in order], dtype=torch.float64).to(dtype)
    x = x.permute([order.index(d) for d in range(4)])
    return x[tuple(slice(step - 1, None, step) for step in steps)].expand(shape)


def shapes(grid: int) -> st.SearchStrategy:
    """(B, C, H, W), each side of any length or a multiple of the grid."""
    side = st.integers(1, 36) | st.integers(1, 5).map(lambda n: n * grid)
    return st.tuples(st.integers(0, 4), st.integers(1, 12), side, side)


@st.composite
def grids_and_shapes(draw) -> Tuple[List[int], Tuple[int, ...]]:
    """Grids as `spatial_weighted_sum` wants them: the finest last and a multiple of every other."""
    finest = draw(st.integers(1, 12))
    coarser = draw(st.lists(st.sampled_from([g for g in range(1, finest + 1) if finest % g == 0]), max_size=3))
    return [*coarser, finest], draw(shapes(finest))


@st.composite
def modules_and_shapes(draw) -> Tuple[partial, Tuple[int, ...]]:
    grid = draw(st.none() | st.integers(1, 9))
    kwargs = draw(st.fixed_dictionaries({}, optional=dict(
        rd_ratio=st.sampled_from((1 / 16, 1 / 4, 0.9, 1)), rd_channels=st.integers(1, 8),
        rd_divisor=st.sampled_from((1, 4, 8)), norm_layer=st.none())))
    module = partial(SPSEModule, **kwargs) if grid is None else partial(RGSEModule, grid=grid, **kwargs)
    return module, draw(shapes(grid or 4))


def with_gradients(out: torch.Tensor, inputs: List[torch.Tensor], cotangent: torch.Tensor) -> List[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))]


@examples(2)
@given(modules_and_shapes(), st.lists(LAYOUTS, min_size=1, max_size=2), st.booleans(), SEEDS)
def test_module_equals_formula(drawn, layouts, training, seed) -> None:
    """Output, gradients of x, shortcut and every parameter and the running statistics, float64."""
    (make, shape), _ = drawn, torch.manual_seed(seed)
    ours = reference.randomize(make(shape[1], dtype=torch.float64)).train(training)
    theirs = copy.deepcopy(ours)
    inputs = [lay_out(shape, layout).requires_grad_() for layout in layouts]  # x, or x and shortcut
    if training and shape[0] == 1 and isinstance(ours.bn, nn.BatchNorm2d):
        with pytest.raises(ValueError, match='larger batch'):
            ours(*inputs)
        return
    values = [t.detach().clone() for t in inputs]
    copies = [t.detach().contiguous().requires_grad_() for t in inputs]
    cotangent = torch.randn(shape, dtype=torch.float64)
    got = with_gradients(ours(*inputs), [*inputs, *ours.parameters()], cotangent)
    expected = copies[0] * reference.squeeze_gate(theirs, copies[0]) + sum(copies[1:])
    expected = with_gradients(expected, [*copies, *theirs.parameters()], cotangent)
    statistics = [[b for b in m.buffers() if b.ndim] for m in (ours, theirs)]  # F.batch_norm does not count batches
    for a, b in zip(got + statistics[0], expected + statistics[1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(inputs, values))


@examples(2.5)
@given(grids_and_shapes(), LAYOUTS, st.sampled_from(DTYPES), st.booleans(), SEEDS)
@example(([1, 2, 4], (2, 3, 56, 3)), NCHW, torch.float64, False, 0)
@example(([21], (2, 3, 100, 167)), NCHW, torch.float64, False, 0)
@example(([1, 2, 4], (3, 12, 150, 150)), NCHW, torch.float32, False, 0)
@example(([1], (1, 1, 11, 15)), ([0, 1, 2, 3], (1, 1, 1, 1), {2, 3}), torch.float64, False, 0)
def test_weighted_sum_and_kernel(drawn, layout, dtype, weights_in_float32, seed) -> None:
    """Value and gradients are those of the formula, the kernel is the gradient of x.

    The bound is in roundings of the formula of magnitudes: 16, and n / 4 for a sum of n equal values one by one, which
    torch does in float32 and float64."""
    (grids, shape), _ = drawn, torch.manual_seed(seed)
    x = lay_out(shape, layout, dtype).requires_grad_()
    weights_dtype = torch.promote_types(dtype, torch.float32) if weights_in_float32 else dtype
    weights = [torch.randn(shape[1], 1, g, g).to(weights_dtype).requires_grad_() for g in grids]
    doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, *weights)]
    magnitudes = [t.detach().abs().requires_grad_() for t in doubles]
    cotangent = torch.randn(*shape[:2], 1, 1).to(weights_dtype)
    got = with_gradients(spatial_weighted_sum(x, weights), [x, *weights], cotangent)
    expected = with_gradients(reference.weighted_sum(doubles[0], doubles[1:]), doubles, cotangent)
    scale = with_gradients(reference.weighted_sum(magnitudes[0], magnitudes[1:]), magnitudes, cotangent.abs())
    assert got[0].dtype == weights_dtype
    roundings = 16 + (shape[2] * shape[3] / 4 if dtype.itemsize > 2 else 0)
    kernel = spatial_kernel(*shape[2:], weights).detach().view(1, *shape[1:])
    with torch.no_grad():
        inference = [torch.cat([spatial_weighted_sum(image, weights) for image in x.split(size)]) for size in (1, 3)]
    for a, b, c in zip(
            [*got, kernel * cotangent, *inference], [*expected, *expected[1::-1], expected[0]],
            [*scale, *scale[1::-1], scale[0]]):
        assert a.shape == b.shape
        assert ((a.double() - b).abs() <= roundings * torch.finfo(dtype).eps * c + torch.finfo(dtype).tiny).all()


FAMILIES = st.sampled_from(('rgse_resnet50', 'spse_resnet50'))
TOPOLOGIES = st.fixed_dictionaries(dict(
    layers=st.tuples(*[st.integers(1, 2)] * 4), channels=st.tuples(*[st.sampled_from((8, 16, 24))] * 4),
    cardinality=st.sampled_from((1, 2, 4)), base_width=st.sampled_from((32, 64)), num_classes=st.integers(1, 12),
    stem_type=st.sampled_from(('', 'deep', 'deep_tiered')), stem_width=st.sampled_from((4, 8)),
    replace_stem_pool=st.booleans(), block_reduce_first=st.sampled_from((1, 2)),
    avg_down=st.booleans(), down_kernel_size=st.sampled_from((1, 3))))
STRIDES = st.sampled_from((8, 16, 32))


@examples(0.3)
@given(FAMILIES, TOPOLOGIES, STRIDES, st.integers(1, 5), st.integers(1, 3), st.tuples(*[st.integers(1, 90)] * 2), SEEDS)
def test_network_in_eval_mode(name, kwargs, stride, in_chans, batch, size, seed) -> None:
    """Features and their strides and shapes, and neither the memory format nor the rest of the batch matters."""
    torch.manual_seed(seed)
    kwargs = dict(kwargs, output_stride=stride, in_chans=in_chans)
    model = tiny(name, **kwargs).double()
    x = torch.randn(batch, in_chans, *size, dtype=torch.float64)
    extractor = timm.create_model(name, features_only=True, **kwargs).double().eval()
    extractor.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}, strict=True)
    strides, widths = extractor.feature_info.reduction(), extractor.feature_info.channels()
    assert strides == [min(s, stride) for s in (2, 4, 8, 16, 32)]
    assert widths[1:] == [4 * c for c in kwargs['channels']]
    with torch.no_grad():
        features, logits = extractor(x), model(x)
        assert [f.shape for f in features] == [
            (batch, w, math.ceil(size[0] / s), math.ceil(size[1] / s)) for w, s in zip(widths, strides)]
        assert all(map(torch.equal, features, model.forward_intermediates(x, intermediates_only=True)))
        assert torch.equal(features[-1], model.forward_features(x))
        assert logits.shape == (batch, kwargs['num_classes'])
        single = torch.cat([model(image) for image in x.split(1)])
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        for other in (single, last):
            torch.testing.assert_close(other, logits, rtol=1e-9, atol=1e-9)


@examples(0.5)
@given(FAMILIES, TOPOLOGIES, st.sampled_from(('native', 'donor')), st.integers(1, 12), st.just(-1) | st.integers(1, 12))
def test_classifier_of_a_file(tmp_path_factory, name, kwargs, kind, classes, declared) -> None:
    """Loaded where the config declares as many classes as the network has, else new; -1 is train.py's declaration."""
    model, own = tiny(name, **kwargs), kwargs['num_classes']
    state_dict = {k: v.contiguous() for k, v in model.state_dict().items() if kind == 'native' or '.se.' not in k}
    file = tmp_path_factory.getbasetemp() / 'random.safetensors'
    safetensors.torch.save_file(state_dict, file)
    overlay = dict(file=str(file), num_classes=declared, first_conv='conv1.0' if kwargs['stem_type'] else 'conv1')
    load = partial(
        timm.create_model, name, pretrained=True, pretrained_cfg_overlay=overlay, **{**kwargs, 'num_classes': classes})
    if declared >= 0 and own not in (classes, declared):
        with pytest.raises(RuntimeError, match=f'a classifier of {own} classes instead of {declared}'):
            load()
    else:
        loaded = load()
        assert loaded.fc.out_features == classes
        assert torch.equal(loaded.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
        if classes == own:
            assert torch.equal(loaded.fc.weight, model.fc.weight) is (declared == own)
