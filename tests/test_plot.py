""" The pictures: their arrays against formulas that do not know of the package, and their text """
from copy import deepcopy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import timm
from helpers import reference
from helpers.common import TINY, images, tiny
from timm_sepool import adopt
from timm_sepool.plot import plot_descriptors, plot_gates, plot_kernels

LAST = ('layer1.0.se', 'layer2.1.se', 'layer3.0.se', 'layer4.0.se')  # of each stage
GRIDS = {'rgse_resnet50': (8, 4, 2, 1), 'spse_resnet50': (4, 4, 4, 4), 'seresnet50': (1, 1, 1, 1)}
network = partial(tiny, layers=(1, 2, 1, 1))
LABELS = torch.tensor([3, 0, 3, 5, 5, 0, 3, 1, 2, 9])


@torch.no_grad()
def run_stages(model: nn.Module, x: torch.Tensor) -> list:
    """Name, input and gate of the SE module of each stage's last block. The input is the output of the last norm."""
    stages = []

    def add(name: str, x: torch.Tensor) -> None:
        se = model.get_submodule(name)
        senet = se.fc2(se.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        stages.append((name, x, reference.squeeze_gate(se, x) if hasattr(se, 'forward_gate') else senet))

    for name in LAST:
        model.get_submodule(name[:-2] + 'bn3').register_forward_hook(lambda m, args, out, name=name: add(name, out))
    model(x)
    return stages


def check_readable(figure) -> None:
    """No text overlaps another, nor a foreign axes, nor leaves the figure; all of it is rendered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    drawn, draw, canvas = [], Text.draw, FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # it has done its work, which calls draw too
    with mock.patch.object(Text, 'draw', lambda self, renderer: (drawn.append(self), draw(self, renderer))):
        canvas.draw()  # an axis has more labels than it draws
    texts = [(text, text.get_window_extent()) for text in drawn if text.get_text() and text.get_visible()]
    axes = [(ax, ax.get_window_extent()) for ax in figure.axes if ax.get_visible() and ax.axison]
    for i, (text, box) in enumerate(texts):
        assert (figure.bbox.min <= box.min).all() and (box.max <= figure.bbox.max).all(), text
        others = texts[i + 1:] + [(ax, other) for ax, other in axes if ax is not text.axes]
        assert not any(box.overlaps(other) for _, other in others), text


@pytest.mark.parametrize('name,levels', [('rgse_resnet50', ('',)), ('spse_resnet50', (1, 2, 4))])
def test_kernels(name: str, levels: tuple) -> None:
    """Each map is the gradient of the sum of the weighted cells, the stage without a kernel a constant."""
    model = network(name)
    prune.random_unstructured(model.layer1[-1].se, f'weight{levels[-1]}', 0.5)
    figure = plot_kernels(model, (3, 96, 160), num_channels=3)
    maps = [ax for ax in figure.axes if ax.images]
    assert len(maps) == 16 - 3 * (name == 'rgse_resnet50')
    for i, module in enumerate(LAST):
        size, se = (24 >> i, 40 >> i), model.get_submodule(module)
        row, maps = maps[:4], maps[4:]
        drawn = [torch.tensor(ax.images[0].get_array()) for ax in row]
        if GRIDS[name][i] == 1:
            torch.testing.assert_close(drawn[0], torch.full(size, 1 / 15))
            assert any('every weight is 1 / (3 x 5)' in t.get_text() for ax in figure.axes for t in ax.texts)
            continue
        x = torch.randn(1, len(se.fc2.bias), *size, requires_grad=True)
        weights = [getattr(se, f'weight{level}') for level in levels]
        kernel, = torch.autograd.grad(reference.weighted_sum(x, weights).sum(), x)
        channels = kernel[0].pow(2).sum((1, 2)).argsort(descending=True)[:3]
        titles = [f'{module}\nmean of {x.shape[1]} channels', *(f'channel {c}' for c in channels)]
        assert [ax.get_title() for ax in row] == titles
        torch.testing.assert_close(drawn, [kernel[0].mean(0), *kernel[0, channels]], rtol=1e-4, atol=1e-7)
        mean, *others = [m.abs().max() for m in drawn]  # one scale for the mean, one for the channels
        assert [ax.images[0].get_clim() for ax in row] == [(-limit, limit) for limit in (mean, *3 * [max(others)])]
    check_readable(figure)


@pytest.mark.parametrize('name', GRIDS)
def test_gates_and_descriptors(name: str) -> None:
    """A line per class and one for their mean; mean over channels of cell x gate, drawn over the picture."""
    model, x, names = network(name), images(10, 72, 104).clamp(-0.4, 0.4), [f'name{i}' for i in range(10)]
    gates = plot_gates(model, x, LABELS, class_names=names)
    panels = [ax for ax in gates.axes if ax.get_visible()]
    figure = plot_descriptors(model, x[:2], LABELS[:2], names, names, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert len(panels) == 4 and len(figure.axes) == 2 * 5 + 5  # the last row are the colour bars
    for i, (grid, ax, (module, x_se, gate)) in enumerate(zip(GRIDS[name], panels, run_stages(model, x)), start=1):
        means = torch.stack([gate.flatten(1)[LABELS == c].mean(0) for c in (0, 1, 2, 3, 5, 9)])
        mean, drawn = means.mean(0), {line.get_label(): torch.tensor(line.get_ydata()) for line in ax.get_lines()}
        assert list(drawn) == ['class name0', 'class name2', 'class name5', 'mean over all 6 classes']
        torch.testing.assert_close([*drawn.values()], [m[mean.argsort()] for m in (*means[:5:2], mean)])
        spread = ((means - mean) ** 2).mean(0).sqrt().mean().item()
        assert ax.get_title() == f'{module}: standard deviation over classes {spread:.3f}'
        expected = (F.adaptive_avg_pool2d(x_se, grid) * gate).mean(1)[:2]
        height, width = x_se.shape[2:]
        assert figure.axes[i].get_title() == f'{module}\n{grid} x {grid} cells\nmap {height} x {width}'
        for ax, cells in zip(figure.axes[i::5], expected):
            mesh, horizontal, vertical = ax.collections
            torch.testing.assert_close(torch.tensor(mesh.get_array()), cells)
            assert mesh.get_clim() == pytest.approx((-expected.abs().max().item(), expected.abs().max().item()))
            edges = (mesh.get_coordinates()[:, 0, 1], mesh.get_coordinates()[0, :, 0])
            for axis, size, pixels, borders in ((0, height, 72, horizontal), (1, width, 104, vertical)):
                position = torch.arange(float(size))[None]
                starts, ends = -F.adaptive_max_pool1d(-position, grid)[0], F.adaptive_max_pool1d(position, grid)[0] + 1
                drawn = [segment[0][1 - axis] for segment in borders.get_segments()]
                assert drawn == pytest.approx((torch.cat([starts, ends]).unique() * pixels / size).tolist())
                middle = [0., *((ends[:-1] + starts[1:]) / 2).tolist(), size]
                assert edges[axis].tolist() == pytest.approx([m * pixels / size for m in middle])
    for ax, image, label, probability in zip(figure.axes[:10:5], x, LABELS, model(x).detach().softmax(1)):
        torch.testing.assert_close(torch.tensor(ax.images[0].get_array()).movedim(2, 0), image * 0.25 + 0.5)
        prediction, percent = f'predicted name{probability.argmax()}', f'({100 * probability.max():.0f} %)'
        assert ax.get_ylabel().split('\n') == [f'class name{label}', prediction, percent]


def test_forms() -> None:
    """Without classes, and the network is left as it was; seven stages with the longest names."""
    model, x = network('rgse_resnet50', num_classes=0, in_chans=1).train(), images(2, 1, 64, 64)
    model.layer1.eval()
    before = deepcopy(model)
    plot_gates(model, x, [0, 1])
    plot_kernels(model, (1, 64, 64))
    assert plot_descriptors(model, x, mean=[0.5], std=[1]).axes[0].get_ylabel() == ''
    for module, original in zip(model.modules(), before.modules()):
        assert module.training == original.training and not (module._forward_hooks or module._forward_pre_hooks)
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    model = timm.create_model('efficientnet_b0').eval()
    assert [ax.get_visible() for ax in plot_gates(model, images(2, 32, 32), [0, 1]).axes] == 7 * [True] + [False]
    figure = plot_descriptors(model, images(2, 64, 96), [0, 1], 1000 * ['Long Class Name in Full'])
    assert figure.axes[7].get_title().startswith('blocks.6.0.se')
    check_readable(figure)


def test_adopted() -> None:
    """The kernel of an adopted squeeze contains the mean, also with weights that are pruned and normed."""
    model = adopt(timm.create_model('seresnet50', **TINY).eval(), 'spse')
    module, x = model.layer2[-1].se.squeeze, torch.randn(1, 128, 28, 28, requires_grad=True)
    for p in module.parameters():
        nn.init.normal_(p)
    parametrizations.weight_norm(module, 'weight2')
    module.parametrizations.weight2.original0.data.mul_(3)
    drawn = plot_kernels(model).axes[5].images[0].get_array()  # at 224 px, the size of its config
    kernel, = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(torch.tensor(drawn), kernel[0].mean(0))
    assert plot_descriptors(model, images(1, 64, 64)).axes[2].collections[0].get_array().shape == (4, 4)


def test_bad_arguments() -> None:
    model, x = network('rgse_resnet50'), images(2, 64, 64)
    cbam = timm.create_model('resnet50', block_args=dict(attn_layer='cbam'), **TINY)
    features = timm.create_model('rgse_resnet50', features_only=True, **TINY)
    bare, unused = deepcopy(model), deepcopy(model)
    del bare.pretrained_cfg
    unused.layer4[0].se.forward = lambda x, shortcut: x + shortcut
    for message, draw, *args in (
            ('ResNet has no SE module', plot_gates, timm.create_model('resnet18'), x, [0, 1]),
            ('Every squeeze of this ResNet is the global average', plot_kernels, network('seresnet50')),
            (r'takes images \(N, 3, H, W\), N >= 1, got \(2, 1, 64, 64\)', plot_gates, model, x[:, :1], [0, 1]),
            (r'labels must have shape \(2,\), one per image, got \(3,\)', plot_gates, model, x, [0, 1, 2]),
            ('There is no image of class 4', plot_gates, model, x, [0, 1], None, [0, 4]),
            (r'got \(0, 3, 64, 64\)', plot_descriptors, model, x[:0]),
            (r'got \(0, 3, 64, 64\)', plot_gates, model, x[:0], []),
            ('images have 3 channels, so mean', plot_descriptors, model, x, None, None, None, [0.5], [0.5]),
            (r'got \(1, 1, 64, 64\)', plot_kernels, model, (1, 64, 64)),
            ('num_channels must be at least 1', plot_kernels, model, None, 0),
            (r'The gate of layer1.0.se.\S+ \(\w+\) is .*, not one per channel', plot_gates, cbam, x, [0, 1]),
            ('returns features. Create it without features_only', plot_gates, features, x, [0, 1]),
            ('no pretrained_cfg. Pass input_size', plot_kernels, bare),
            ('no pretrained_cfg. Pass mean and std', plot_descriptors, bare, x),
            (r'layer4.0.se \(RGSEModule\) does not use its gate layer', plot_gates, unused, x, [0, 1]),
    ):
        pytest.raises(ValueError, draw, *args).match(message)
    with mock.patch.dict('sys.modules', {'matplotlib.figure': None}):
        pytest.raises(ImportError, plot_kernels, model).match('timm_sepool.plot')
