""" Random squeezes, networks and checkpoints (hypothesis)

The default run draws the same few examples every time, `pytest --full` draws many new ones.
"""
import copy
import math
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers import reference
from helpers.common import GOLDEN, NAMES, gradients, images, realistic, tiny, training_step

pytest.importorskip('hypothesis')
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import timm  # noqa: E402
from timm.models.resnet import Bottleneck  # noqa: E402
from timm_sepool import RGSEModule, SEPoolBottleneck, SPSEModule, checkpoint_filter_fn  # noqa: E402
from timm_sepool.squeeze import spatial_kernel, spatial_weighted_sum  # noqa: E402

SEEDS = st.integers(0, 2 ** 32 - 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def examples(factor: float) -> settings:
    """Scale the number of examples of the profile by what one costs."""
    return settings(max_examples=round(factor * settings().max_examples))


# --- squeeze and epilogue

class Layout(NamedTuple):
    """How the values of a tensor lie in memory, by dimension."""
    order: Tuple[int, ...] = (0, 1, 2, 3)  # outermost first
    steps: Tuple[int, ...] = (1, 1, 1, 1)  # of the slice that it is
    expanded: Set[int] = frozenset()  # dimensions of stride 0


LAYOUTS = st.sampled_from((Layout(), Layout((0, 2, 3, 1)))) | st.builds(
    Layout,
    st.permutations(range(4)).map(tuple),
    st.tuples(*[st.integers(1, 2)] * 4),
    st.sets(st.integers(0, 3), max_size=2),
)


def lay_out(shape: Tuple[int, ...], layout: Layout, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    sizes = [step * (1 if d in layout.expanded else size) for d, (size, step) in enumerate(zip(shape, layout.steps))]
    x = torch.randn([sizes[d] for d in layout.order], dtype=torch.float64).to(dtype)
    x = x.permute([layout.order.index(d) for d in range(4)])
    return x[tuple(slice(step - 1, None, step) for step in layout.steps)].expand(shape)


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
        rd_ratio=st.sampled_from((1 / 16, 1 / 4, 0.9, 1)),
        rd_channels=st.integers(1, 8),
        rd_divisor=st.sampled_from((1, 4, 8)),
        norm_layer=st.none(),
    )))
    module = partial(SPSEModule, **kwargs) if grid is None else partial(RGSEModule, grid=grid, **kwargs)
    return module, draw(shapes(grid or 4))


def build(module: partial, channels: int) -> nn.Module:
    """In float64, with nothing at its trivial value."""
    module = module(channels, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
        if isinstance(module.bn, nn.BatchNorm2d):
            module.bn.running_mean.normal_(std=0.1)
            module.bn.running_var.uniform_(0.05, 0.2)
    return module


@examples(2)
@given(modules_and_shapes(), LAYOUTS, LAYOUTS, st.booleans(), st.booleans(), SEEDS)
def test_module_equals_formula(drawn, layout, shortcut_layout, has_shortcut, training, seed) -> None:
    """Output, gradients of x, shortcut and every parameter and the running statistics, float64."""
    (make, shape), _ = drawn, torch.manual_seed(seed)
    ours = build(make, shape[1]).train(training)
    theirs = copy.deepcopy(ours)
    x = lay_out(shape, layout).requires_grad_()
    inputs = [x, lay_out(shape, shortcut_layout).requires_grad_()] if has_shortcut else [x]
    if training and shape[0] == 1 and isinstance(ours.bn, nn.BatchNorm2d):
        with pytest.raises(ValueError, match='larger batch'):
            ours(*inputs)
        return
    values = [t.detach().clone() for t in inputs]
    copies = [t.detach().contiguous().requires_grad_() for t in inputs]

    def formula() -> torch.Tensor:
        y = copies[0] * reference.squeeze_gate(theirs, copies[0])
        return y + copies[1] if has_shortcut else y

    got = gradients(lambda: ours(*inputs), [*inputs, *ours.parameters()])
    expected = gradients(formula, [*copies, *theirs.parameters()])
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for (n, a), b in zip(ours.named_buffers(), theirs.buffers()):
        if not n.endswith('num_batches_tracked'):  # F.batch_norm does not count
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(inputs, values))
    if not make.keywords.get('rd_channels'):
        divisor = make.keywords.get('rd_divisor', 8)
        hidden = shape[1] * make.keywords.get('rd_ratio', 1 / 16)
        assert ours.fc1.out_channels == max(divisor, divisor * int(hidden / divisor + 0.5))


@examples(2)
@given(grids_and_shapes(), LAYOUTS, st.sampled_from((torch.float64, *DTYPES)), st.booleans(), SEEDS)
def test_weighted_sum_rounding(drawn, layout, dtype, weights_in_float32, seed) -> None:
    """Value and gradients within 16 roundings of the same formula of magnitudes."""
    (grids, shape), _ = drawn, torch.manual_seed(seed)
    x = lay_out(shape, layout, dtype).requires_grad_()
    weights_dtype = torch.promote_types(dtype, torch.float32) if weights_in_float32 else dtype
    weights = [torch.randn(shape[1], 1, g, g).to(weights_dtype).requires_grad_() for g in grids]
    doubles = [t.detach().double().contiguous().requires_grad_() for t in (x, *weights)]
    magnitudes = [t.detach().abs().requires_grad_() for t in doubles]
    cotangent = torch.randn(*shape[:2], 1, 1).to(weights_dtype)

    def value_and_gradients(f, x, *weights, cotangent):
        s = f(x, weights)
        return [s.detach(), *torch.autograd.grad(s, [x, *weights], cotangent.to(s.dtype))]

    got = value_and_gradients(spatial_weighted_sum, x, *weights, cotangent=cotangent)
    expected = value_and_gradients(reference.weighted_sum, *doubles, cotangent=cotangent)
    scale = value_and_gradients(reference.weighted_sum, *magnitudes, cotangent=cotangent.abs())
    assert got[0].dtype == weights_dtype
    for a, b, c in zip(got, expected, scale):
        assert a.shape == b.shape
        assert ((a.double() - b).abs() <= 16 * torch.finfo(dtype).eps * c + torch.finfo(dtype).tiny).all()


@examples(1)
@given(grids_and_shapes(), SEEDS)
@example(([1, 2, 4], (2, 3, 56, 3)), 0)
@example(([21], (2, 3, 100, 167)), 0)
def test_weighted_sum_invariants(drawn, seed) -> None:
    """The kernel is the gradient of the sum, and the sum is linear and commutes with flips and transposition."""
    (grids, (batch, channels, height, width)), _ = drawn, torch.manual_seed(seed)
    x, y = torch.randn(2, batch, channels, height, width, dtype=torch.float64)
    weights, others = ([torch.randn(channels, 1, g, g, dtype=torch.float64) for g in grids] for _ in range(2))
    f, close = spatial_weighted_sum, partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

    kernel = spatial_kernel(height, width, weights)
    gradient, = torch.autograd.grad(f(x.requires_grad_(), weights).sum(), x)
    x = x.detach()
    close(gradient, kernel.view(1, channels, height, width).expand_as(x))
    close((x.flatten(2) * kernel).sum(2), f(x, weights).flatten(1))
    # every position counts, and each cell is a mean
    close(kernel.sum(1), sum(w.sum((1, 2, 3)) for w in weights))
    means = [torch.full((channels, 1, g, g), 1 / g ** 2, dtype=torch.float64) for g in grids]
    uniform = spatial_kernel(height, width, means)
    assert (uniform > 0).all()
    close(uniform.sum(1), torch.full((channels,), len(grids), dtype=torch.float64))
    if height % grids[-1] == 0 and width % grids[-1] == 0:
        close(f(x, means), len(grids) * x.mean((2, 3), keepdim=True))
        close(f(x.repeat_interleave(3, 2).repeat_interleave(2, 3), weights), f(x, weights))
    close(f(2 * x + y, weights), 2 * f(x, weights) + f(y, weights))
    close(f(x, [2 * v + w for v, w in zip(weights, others)]), 2 * f(x, weights) + f(x, others))
    close(f(x.flip(2), [w.flip(2) for w in weights]), f(x, weights))
    close(f(x.transpose(2, 3), [w.transpose(2, 3) for w in weights]), f(x, weights))


# --- networks

FAMILIES = st.sampled_from(('rgse_resnet50', 'spse_resnet50'))
BODY = dict(
    layers=st.tuples(*[st.integers(1, 2)] * 4),
    channels=st.tuples(*[st.sampled_from((8, 16, 24))] * 4),
    cardinality=st.sampled_from((1, 2, 4)),
    base_width=st.sampled_from((32, 64)),
    num_classes=st.integers(1, 12),
)
TOPOLOGY = dict(
    BODY,
    stem_type=st.sampled_from(('', 'deep', 'deep_tiered')),
    stem_width=st.sampled_from((4, 8)),
    replace_stem_pool=st.booleans(),
    avg_down=st.booleans(),
    down_kernel_size=st.sampled_from((1, 3)),
    block_reduce_first=st.sampled_from((1, 2)),
)
BODIES = st.fixed_dictionaries(BODY)
TOPOLOGIES = st.fixed_dictionaries(TOPOLOGY)
STRIDES = st.sampled_from((8, 16, 32))
CHANNELS_LAST = dict(memory_format=torch.channels_last)


@examples(0.3)
@given(FAMILIES, TOPOLOGIES, STRIDES, st.integers(1, 5), st.integers(1, 3), st.tuples(*[st.integers(1, 90)] * 2), SEEDS)
def test_network_in_eval_mode(name, kwargs, stride, in_chans, batch, size, seed) -> None:
    """Strides and shapes of the features, and neither the memory format nor the rest of the batch matters."""
    torch.manual_seed(seed)
    kwargs = dict(kwargs, output_stride=stride, in_chans=in_chans)
    model = tiny(name, **kwargs).double()
    x = torch.randn(batch, in_chans, *size, dtype=torch.float64)
    extractor = timm.create_model(name, features_only=True, **kwargs).double().eval()
    extractor.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith('fc.')}, strict=True)
    strides = [min(s, stride) for s in (2, 4, 8, 16, 32)]
    widths = [2 * kwargs['stem_width'] if kwargs['stem_type'] else 64, *(4 * c for c in kwargs['channels'])]
    assert extractor.feature_info.reduction() == strides and extractor.feature_info.channels() == widths
    with torch.no_grad():
        features, logits = extractor(x), model(x)
        assert [f.shape for f in features] == [
            (batch, w, math.ceil(size[0] / s), math.ceil(size[1] / s)) for w, s in zip(widths, strides)]
        assert torch.equal(features[-1], model.forward_features(x))
        assert logits.shape == (batch, kwargs['num_classes'])
        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
        close(torch.cat([model(image) for image in x.split(1)]), logits)
        close(model.to(**CHANNELS_LAST)(x.contiguous(**CHANNELS_LAST)), logits)


def by_formula(model: nn.Module) -> nn.Module:
    """The same network with timm's own bottleneck around the gate that is written out."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, SEPoolBottleneck):
            block.forward = partial(Bottleneck.forward, block)
            block.se.forward = partial(lambda se, x: x * reference.squeeze_gate(se, x), block.se)
    return model


@examples(0.3)
@given(FAMILIES, TOPOLOGIES, STRIDES, st.booleans(), st.tuples(*[st.integers(33, 80)] * 2), SEEDS)
def test_network_equals_formula(name, kwargs, stride, training, size, seed) -> None:
    """Loss and every gradient, float64."""
    torch.manual_seed(seed)
    model = tiny(name, **{**kwargs, 'output_stride': stride, 'num_classes': 10}).double().train(training)
    x = images(4, *size, dtype=torch.float64)
    expected_loss, expected = training_step(by_formula(model), x)
    loss, grads = training_step(model, x)
    torch.testing.assert_close(loss, expected_loss)
    for n in grads:
        atol = 1e-7 * expected[n].abs().max().item() + 1e-10
        torch.testing.assert_close(grads[n], expected[n], rtol=0, atol=atol, msg=lambda m: f'{n}: {m}')


# --- checkpoints

REFUSED = r'does not fit {} \(.*\)\. Use an undamaged checkpoint of'


# ours -> official, within a block
OFFICIAL = {
    'spse': {r'^se\.bn': 'fc_bn', r'^se\.(weight|bias)(\d)$': r'fc_spatial\2.\1'},
    'rgse': {r'^se\.bn': 'fc_spatial.bn_spatial', r'^se\.weight$': 'fc_spatial.fc_spatial.weight'},
    'both': {
        r'^(conv|bn)(\d)': r'\1_\1\2',
        r'^downsample\.0': 'shortcut.shortcut_conv',
        r'^downsample\.1': 'shortcut.shortcut_bn',
        r'^se\.fc1': 'fc_reduction',
        r'^se\.fc2': 'fc_extention',
    },
}


def official(state_dict: Dict[str, torch.Tensor], family: str) -> Dict[str, torch.Tensor]:
    """The same weights by the names and shapes of the official code."""
    out = {}
    for k, v in state_dict.items():
        if k.startswith('layer'):
            stage, block, k = k.split('.', 2)
            for pattern, repl in {**OFFICIAL[family], **OFFICIAL['both']}.items():
                k = re.sub(pattern, repl, k)
            if re.match('fc_(reduction|extention).weight', k):
                v = v.flatten(1)  # 1x1 conv to Linear
            k = f'{stage}.{stage}_block_{block}.{k}'
        out[k] = v
    return out


@pytest.mark.parametrize('name', NAMES)
def test_names_of_the_official_code(name: str) -> None:
    """`official` makes the keys and shapes of the official code's checkpoints."""
    with torch.device('meta'):
        state_dict = official(timm.create_model(name).state_dict(), name[:4])
    assert {k: ','.join(str(n) for n in v.shape) for k, v in state_dict.items()} == dict(
        zip(GOLDEN[f'{name}/keys'].tolist(), GOLDEN[f'{name}/shapes'].tolist()))


def as_saved(state_dict: Dict[str, torch.Tensor], kind: str, name: str) -> Dict[str, torch.Tensor]:
    """Weights of a network as a checkpoint of ours, of the official code, or of the plain network."""
    if kind == 'official':
        return official(state_dict, name[:4])
    return {k: v for k, v in state_dict.items() if kind == 'native' or '.se.' not in k}


@pytest.fixture(scope='module')
def file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield str(Path(folder) / 'checkpoint.safetensors')


def from_file(name: str, file: str, state_dict: Dict[str, torch.Tensor], classes: int, **kwargs) -> nn.Module:
    """A network with these weights as its pretrained ones, whose config declares this number of classes."""
    safetensors.torch.save_file({k: v.contiguous() for k, v in state_dict.items()}, file)
    overlay = dict(file=file, num_classes=classes, first_conv='conv1.0' if kwargs['stem_type'] else 'conv1')
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


@examples(0.4)
@given(
    FAMILIES, BODIES, st.integers(1, 5), st.sampled_from(('native', 'official')), st.booleans(), st.booleans(), SEEDS)
def test_checkpoint_round_trip(name, kwargs, in_chans, kind, parallel, nested, seed) -> None:
    """Bit by bit, with DataParallel's prefixes and inside a training checkpoint."""
    torch.manual_seed(seed)
    model, other = (tiny(name, in_chans=in_chans, **kwargs) for _ in range(2))
    checkpoint = as_saved(model.state_dict(), kind, name)
    checkpoint = {f'module.{k}': v for k, v in checkpoint.items()} if parallel else checkpoint
    checkpoint = {'state_dict': checkpoint, 'epoch': 3} if nested else checkpoint
    filtered = checkpoint_filter_fn(checkpoint, other)
    assert list(filtered) == list(model.state_dict())
    assert all(torch.equal(filtered[k], v) for k, v in model.state_dict().items())
    other.load_state_dict(filtered, strict=True)
    x = images(2, in_chans, 40, 40)
    assert torch.equal(other(x), model(x))


@examples(0.5)
@given(FAMILIES, TOPOLOGIES, st.sampled_from(('native', 'donor')), st.integers(1, 12), st.just(-1) | st.integers(1, 12))
def test_classifier_of_a_file(file, name, kwargs, kind, classes, declared) -> None:
    """Loaded where the config declares as many classes as the network has, else new; -1 is train.py's declaration."""
    model, own = tiny(name, **kwargs), kwargs['num_classes']
    state_dict = as_saved(model.state_dict(), kind, name)
    load = partial(from_file, name, file, state_dict, declared, **{**kwargs, 'num_classes': classes})
    if declared >= 0 and own not in (classes, declared):
        with pytest.raises(RuntimeError, match=f'a classifier of {own} classes instead of {declared}'):
            load()
    else:
        loaded = load()
        assert loaded.fc.out_features == classes
        assert torch.equal(loaded.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
        if classes == own:
            assert torch.equal(loaded.fc.weight, model.fc.weight) is (declared == own)


def mutate(state_dict: Dict[str, torch.Tensor], how: str, key: str) -> Dict[str, torch.Tensor]:
    """One tensor dropped, renamed, reshaped or added."""
    out = dict(state_dict)
    v = out[key]
    if how == 'added':
        out[f'{key}_'] = v.clone()
    else:
        del out[key]
    if how == 'renamed':
        out[f'{key}_'] = v
    elif how == 'longer':
        out[key] = torch.cat([v, v[:1]]) if v.ndim else v[None]
    elif how == 'scalar':
        out[key] = torch.zeros((2,) if v.ndim == 0 else (), dtype=v.dtype)
    elif how == 'flat':
        out[key] = v.flatten() if v.ndim > 1 else v[None]
    return out


@examples(1)
@given(
    st.data(), FAMILIES, TOPOLOGIES, st.sampled_from(('native', 'official', 'donor')),
    st.sampled_from(('added', 'dropped', 'renamed', 'longer', 'scalar', 'flat')),
    st.sampled_from((dict(), dict(num_classes=20), dict(features_only=True))),
)
def test_mutated_checkpoint(file, data, name, kwargs, kind, how, loading) -> None:
    """A tensor too many, too few or of another shape is refused, also where timm itself would load a part."""
    if kind == 'official':
        kwargs = {**{k: kwargs[k] for k in BODY}, 'stem_type': ''}
    model = tiny(name, **kwargs)
    state_dict = as_saved(model.state_dict(), kind, name)
    # every other time of the classifier
    key = data.draw(st.sampled_from(list(state_dict)) | st.sampled_from(('fc.weight', 'fc.bias')), 'key')
    load = partial(
        from_file, name, file, mutate(state_dict, how, key), kwargs['num_classes'], **{**kwargs, **loading})
    if not (loading and key.startswith('fc.')):
        with pytest.raises(RuntimeError, match=rf'{REFUSED.format(name)}|fc\.(weight|bias)'):
            load()
        return
    try:
        loaded = load()
    except RuntimeError as e:
        assert 'a classifier of' in str(e)
    else:  # a new classifier, or none
        loaded, expected = loaded.state_dict(), checkpoint_filter_fn(state_dict, model)
        body = {k for k in expected if not k.startswith('fc.')}
        assert {k for k in loaded if not k.startswith('fc.')} == body
        assert all(torch.equal(loaded[k], expected[k]) for k in body if kind != 'donor' or '.se.' not in k)


@examples(0.5)
@given(st.data(), FAMILIES, BODIES, st.sampled_from(('native', 'official', 'donor')))
def test_name_twice(data, name, kwargs, kind) -> None:
    """After the renaming two tensors have one name."""
    model = timm.create_model(name, **kwargs)
    native = as_saved(model.state_dict(), kind if kind == 'donor' else 'native', name)
    state_dict = as_saved(model.state_dict(), kind, name)
    pairs = [(k, alias) for k, n in zip(state_dict, native) for alias in (f'module.{k}', n) if alias != k]
    key, alias = data.draw(st.sampled_from(pairs), 'key and alias')
    state_dict[alias] = state_dict[key]
    with pytest.raises(RuntimeError, match='tensors named twice'):
        checkpoint_filter_fn(state_dict, model)


@examples(0.4)
@given(
    FAMILIES, TOPOLOGIES, STRIDES, st.integers(1, 4), st.integers(2, 3), st.tuples(*[st.integers(1, 80)] * 2),
    st.booleans(), st.booleans(), st.sampled_from((torch.float32, torch.float64, torch.bfloat16)), SEEDS,
)
def test_computes_what_the_donor_computes(
        file, name, kwargs, stride, in_chans, batch, size, training, channels_last, dtype, seed) -> None:
    """Difference exactly 0.0, of the gradients too but for those of bn3, which is doubled."""
    torch.manual_seed(seed)
    kwargs['output_stride'] = stride
    weights = realistic(timm.create_model('resnet50', **kwargs)).state_dict()
    load = partial(
        from_file, file=file, state_dict=weights, classes=kwargs['num_classes'], in_chans=in_chans, **kwargs)
    x = torch.randn(batch, in_chans, *size).to(dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    results = []
    for n in ('resnet50', name):
        model = load(n).to(dtype).to(memory_format=memory_format).train(training)
        logits = model(x.contiguous(memory_format=memory_format))
        logits.square().sum().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())))
    (theirs, their_grads, their_buffers), (ours, grads, buffers) = results
    assert theirs.isfinite().all() and torch.equal(ours, theirs)
    assert all(torch.equal(buffers[n], b) for n, b in their_buffers.items())
    # oneDNN leaves parts of the bfloat16 gradient of a weight unwritten where a strided conv sees a width of 1
    for n, g in (their_grads if dtype != torch.bfloat16 else {}).items():
        assert torch.equal(grads[n] * (2 if '.bn3.' in n else 1), g), n
