""" The pictures: their arrays against formulas that do not know of the package, their text, and the command """
import json
import sys
from pathlib import Path
from typing import Dict, List
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import timm
from helpers import reference
from helpers.common import TINY, images, tiny
from timm_sepool import adopt
from timm_sepool.cli._output import CommandError
from timm_sepool.cli.hub import save_folder
from timm_sepool.cli.main import main
from timm_sepool.cli.quickstart import DATA_CFG
from timm_sepool.plot import plot_descriptors, plot_gates, plot_kernels

# two blocks in a stage: the last one is to be drawn
LAST = {'layer1': 'layer1.0.se', 'layer2': 'layer2.1.se', 'layer3': 'layer3.0.se', 'layer4': 'layer4.0.se'}
GRIDS = {'rgse_resnet50': (8, 4, 2, 1), 'spse_resnet50': (4, 4, 4, 4)}
LABELS = torch.tensor([3, 0, 3, 5, 5, 0, 3, 1, 2, 9])


def network(name: str, **kwargs) -> nn.Module:
    return tiny(name, layers=(1, 2, 1, 1), **kwargs)


def squeezed(model: nn.Module, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Input of the SE module of each stage's last block, which is what its last norm puts out."""
    seen = {}
    handles = [
        getattr(model, stage)[-1].bn3.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for stage, name in LAST.items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def lines(ax) -> Dict[str, torch.Tensor]:
    return {line.get_label(): torch.tensor(line.get_ydata()) for line in ax.get_lines()}


def readable(figure) -> None:
    """No text overlaps another, nor a foreign axes, nor leaves the figure; all of it is rendered."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    drawn, draw = [], Text.draw

    def spy(self, renderer) -> None:
        drawn.append(self)
        draw(self, renderer)
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine('none')  # it has done its work, which calls draw too
    with mock.patch.object(Text, 'draw', spy):  # an axis has more labels than it draws
        canvas.draw()
    renderer = canvas.get_renderer()
    texts = [(text, text.get_window_extent(renderer)) for text in drawn if text.get_text() and text.get_visible()]
    assert len(texts) > 10
    for i, (text, box) in enumerate(texts):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        for other, other_box in texts[i + 1:]:
            assert not box.overlaps(other_box), (text, other)
        for ax in figure.axes:
            if ax is not text.axes and ax.get_visible() and ax.axison:
                assert not box.overlaps(ax.get_window_extent(renderer)), (text, ax)


@pytest.mark.parametrize('name', GRIDS)
def test_gates(name: str) -> None:
    """One line per class and one for the mean over the classes, equal to the paper's formula."""
    model, x = network(name), images(10, 64, 64)
    expected = {
        module: reference.squeeze_gate(model.get_submodule(module), seen).flatten(1).detach()
        for module, seen in squeezed(model, x).items()}
    figure = plot_gates(model, x, LABELS, class_names=[f'name{i}' for i in range(10)])
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert len(panels) == 4
    for ax, (module, gate) in zip(panels, expected.items()):
        means = torch.stack([gate[LABELS == c].mean(0) for c in (0, 1, 2, 3, 5, 9)])
        order = means.mean(0).argsort()
        drawn = lines(ax)
        assert list(drawn) == ['class name0', 'class name2', 'class name5', 'mean over all 6 classes']
        for key, mean in zip(drawn, (means[0], means[2], means[4], means.mean(0))):
            torch.testing.assert_close(drawn[key], mean[order])
        assert drawn['mean over all 6 classes'].diff().min() >= 0
        spread = ((means - means.mean(0)) ** 2).mean(0).sqrt().mean().item()
        assert spread > 1e-3
        assert ax.get_title() == f'{module}: standard deviation over classes {spread:.3f}'
        assert ax.get_xlabel() == 'channel, sorted by the mean over all classes' and ax.get_ylim() == (0, 1)
    assert panels[0].get_ylabel() == 'mean gate' and '10 images' in figure.get_suptitle()
    readable(figure)

    one, = (ax for ax in plot_gates(model, x, LABELS, classes=[9]).axes[:1])
    assert list(lines(one)) == ['class 9', 'mean over all 6 classes']


@pytest.mark.parametrize('name', GRIDS)
def test_kernels(name: str) -> None:
    """Each map is the gradient of the sum of the weighted cells, the stage without a kernel a constant."""
    model = network(name)
    figure = plot_kernels(model, (3, 96, 160), num_channels=3)
    maps = [ax for ax in figure.axes if ax.images]
    assert len(maps) == 16 - 3 * (name == 'rgse_resnet50')
    for i, module in enumerate(LAST.values()):
        se = model.get_submodule(module)
        p = dict(se.named_parameters())
        size = (24 >> i, 40 >> i)
        row, maps = maps[:4], maps[4:]
        if GRIDS[name][i] == 1:
            assert row[0].get_title() == f'{module}\nevery channel'
            drawn = torch.tensor(row[0].images[0].get_array())
            torch.testing.assert_close(drawn, torch.full(size, 1 / 15))
            assert any('every weight is 1 / (3 x 5)' in t.get_text() for ax in figure.axes for t in ax.texts)
            continue
        x = torch.randn(1, p['fc2.bias'].numel(), *size, requires_grad=True)
        weights = [p[k] for k in p if k.startswith('weight')]
        s = sum(F.conv2d(F.adaptive_avg_pool2d(x, w.shape[-1]), w, groups=x.shape[1]) for w in weights)
        kernel, = torch.autograd.grad(s.sum(), x)
        channels = kernel[0].pow(2).sum((1, 2)).argsort(descending=True)[:3]
        titles = [f'{module}\nmean of {x.shape[1]} channels', *(f'channel {c}' for c in channels)]
        assert [ax.get_title() for ax in row] == titles
        for ax, expected in zip(row, (kernel[0].mean(0), *kernel[0, channels])):
            drawn = torch.tensor(ax.images[0].get_array())
            torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-7)
            low, high = ax.images[0].get_clim()
            assert -low == high >= drawn.abs().max()
        assert row[0].get_xlabel() == 'column' and row[0].get_ylabel() == 'row'
        assert row[0].images[0].get_clim()[1] == pytest.approx(kernel.mean(1).abs().max().item(), rel=1e-4)
    assert 'input 96 x 160' in figure.get_suptitle()
    readable(figure)
    assert 'input 224 x 224' in plot_kernels(model).get_suptitle()


@pytest.mark.parametrize('name', GRIDS)
def test_descriptors(name: str) -> None:
    """Mean over channels of cell x gate, between the borders of adaptive pooling's windows, over the picture."""
    model, x = network(name), images(2, 72, 104).clamp(-0.4, 0.4)
    seen = squeezed(model, x)
    names = ['short', 'a name, with a synonym', 'x' * 40, 'a fairly long name of many words'] + 6 * ['other']
    figure = plot_descriptors(model, x, torch.tensor([2, 1]), names, names, mean=(0.5,) * 3, std=(0.25,) * 3)
    columns = 5
    assert len(figure.axes) == 2 * columns + columns  # and the row of the colour bars
    for i, (grid, (module, x_se)) in enumerate(zip(GRIDS[name], seen.items()), start=1):
        gate = reference.squeeze_gate(model.get_submodule(module), x_se).detach()
        expected = (F.adaptive_avg_pool2d(x_se, grid) * gate).mean(1)
        title = f'{module}\n{grid} x {grid} cells\nmap {x_se.shape[2]} x {x_se.shape[3]}'
        assert figure.axes[i].get_title() == title
        for j in range(2):
            ax = figure.axes[j * columns + i]
            mesh, horizontal, vertical = ax.collections
            torch.testing.assert_close(torch.tensor(mesh.get_array()), expected[j])
            low, high = mesh.get_clim()
            assert -low == high == pytest.approx(expected.abs().max().item())
            for axis, borders in ((0, horizontal), (1, vertical)):
                size, pixels = x_se.shape[2 + axis], (72, 104)[axis]
                position = torch.arange(float(size))[None]
                starts, ends = -F.adaptive_max_pool1d(-position, grid)[0], F.adaptive_max_pool1d(position, grid)[0] + 1
                drawn = [segment[0][1 - axis] for segment in borders.get_segments()]
                assert drawn == pytest.approx((torch.cat([starts, ends]).unique() * pixels / size).tolist())
                edges = torch.tensor(mesh.get_coordinates()[:, 0, 1] if axis == 0 else mesh.get_coordinates()[0, :, 0])
                middle = torch.cat([torch.zeros(1), (ends[:-1] + starts[1:]) / 2, torch.tensor([float(size)])])
                torch.testing.assert_close(edges.float(), middle * pixels / size)
    probabilities = model(x).softmax(1)
    known = {1: 'a name', 2: 'x' * 17 + '...'}
    for j, label in enumerate((2, 1)):
        ax = figure.axes[j * columns]
        picture = torch.tensor(ax.images[0].get_array()).movedim(2, 0)
        torch.testing.assert_close(picture, x[j] * 0.25 + 0.5)
        text = ax.get_ylabel()
        assert text.startswith(f'class {known[label]}\npredicted ')
        percent = 100 * probabilities[j].max().item()
        assert text.endswith(f'({percent:.0f} %)')
        prediction = names[int(probabilities[j].argmax())]
        assert text.split('predicted ')[1][:4] == prediction[:4]
    assert 'mean over channels of average x gate' in figure.get_suptitle()
    readable(figure)

    # without labels, names or classes
    headless = network(name, num_classes=0, in_chans=1)
    figure = plot_descriptors(headless, images(1, 1, 40, 40), mean=[0.5], std=[0.5])
    assert figure.axes[0].get_ylabel() == ''


def test_plain_se() -> None:
    """timm's own SE has gates and one cell, but no kernel."""
    model, x = timm.create_model('seresnet50', **TINY).eval(), images(3, 64, 64)
    seen = {}
    model.layer3[-1].se.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    figure = plot_gates(model, x, [0, 1, 1], classes=[1])
    se = model.layer3[0].se
    with torch.no_grad():
        gate = se.fc2(se.fc1(seen['x'].mean((2, 3), keepdim=True)).relu()).sigmoid().flatten(1)
    mean = (gate[:1] + gate[1:].mean(0)) / 2
    torch.testing.assert_close(lines(figure.axes[2])['class 1'], gate[1:].mean(0)[mean[0].argsort()])
    cell = plot_descriptors(model, x).axes[3].collections[0].get_array()
    assert cell.shape == (1, 1)
    assert cell.item() == pytest.approx((seen['x'][0].mean((1, 2)) * gate[0]).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match='Every squeeze of this ResNet is the global average'):
        plot_kernels(model)

    # seven columns and the longest names
    model = timm.create_model('efficientnet_b0').eval()
    assert [ax.get_visible() for ax in plot_gates(model, images(2, 32, 32), [0, 1]).axes] == 7 * [True] + [False]
    figure = plot_descriptors(model, images(2, 64, 96), [0, 1], 1000 * ['Long Class Name in Full'])
    assert figure.axes[7].get_title().startswith('blocks.6.0.se')
    readable(figure)


@pytest.mark.parametrize('squeeze', ['rgse', 'spse'])
def test_adopted(squeeze: str) -> None:
    """The kernel of an adopted squeeze contains the mean, its cells are those of its grid."""
    model = adopt(timm.create_model('seresnet50', **TINY).eval(), squeeze)
    module, x = model.layer2[-1].se.squeeze, torch.randn(1, 128, 28, 28, requires_grad=True)
    for p in module.parameters():
        nn.init.normal_(p)
    kernel, = torch.autograd.grad(module(x).sum(), x)
    drawn = plot_kernels(model).axes[5].images[0].get_array()
    torch.testing.assert_close(torch.tensor(drawn), kernel[0].mean(0))
    cells = plot_descriptors(model, images(1, 64, 64)).axes[2].collections[0].get_array()
    assert cells.shape == (4, 4)  # at stage 2 both have 4 x 4


def test_network_is_left_as_it_was() -> None:
    model, x = network('rgse_resnet50').train(), images(2, 64, 64)
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for draw in (lambda: plot_gates(model, x, [0, 1]), lambda: plot_kernels(model), lambda: plot_descriptors(model, x)):
        draw()
        assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_arguments() -> None:
    model, x = network('rgse_resnet50'), images(2, 64, 64)
    for call, message in (
            (lambda: plot_gates(timm.create_model('resnet18'), x, [0, 1]), 'ResNet has no SE module'),
            (lambda: plot_gates(model, x[:, :1], [0, 1]), r'takes images \(N, 3, H, W\), N >= 1, got \(2, 1, 64, 64\)'),
            (lambda: plot_gates(model, x, [0, 1, 2]), 'There are 2 images, so labels'),
            (lambda: plot_gates(model, x, [0, 1], classes=[0, 4]), 'There is no image of class 4'),
            (lambda: plot_descriptors(model, x[0]), r'got \(3, 64, 64\)'),
            (lambda: plot_descriptors(model, x[:0]), r'got \(0, 3, 64, 64\)'),
            (lambda: plot_kernels(model, (1, 64, 64)), r'got \(1, 1, 64, 64\)'),
            (lambda: plot_kernels(model, num_channels=0), 'num_channels has to be at least 1'),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    cbam = timm.create_model('resnet50', block_args=dict(attn_layer='cbam'), **TINY)
    with pytest.raises(ValueError, match='has no gates .B, C, 1, 1.'):
        plot_gates(cbam, x, [0, 1])
    with pytest.raises(ValueError, match='puts out features, a network that classifies is needed'):
        plot_gates(timm.create_model('rgse_resnet50', features_only=True, **TINY), x, [0, 1])
    with pytest.raises(ValueError, match='mean and std are of 1 channels, the images of 3'):
        plot_descriptors(model, x, mean=[0.5], std=[0.5])
    del model.pretrained_cfg
    with pytest.raises(ValueError, match='no pretrained_cfg, so input_size is needed'):
        plot_kernels(model)
    with pytest.raises(ValueError, match='no pretrained_cfg, so mean and std are needed'):
        plot_descriptors(model, x)
    model.layer4[0].se.forward = lambda x, shortcut: x + shortcut
    with pytest.raises(ValueError, match=r'layer4.0.se \(RGSEModule\) is no SE module that uses its gate layer'):
        plot_gates(model, x, [0, 1])


# --- the command

KINDS = ('gates', 'kernels', 'descriptors')
TINY_ARGS = ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(16,32,64,128)']


@pytest.fixture
def folder(tmp_path) -> Path:
    """What quickstart writes."""
    model_args = dict(TINY, in_chans=1)
    model = tiny('spse_resnet50', in_chans=1, pretrained_cfg_overlay=DATA_CFG)
    (tmp_path / 'digits').mkdir()
    cfg = timm.data.resolve_data_config(model=model)
    save_folder(model, tmp_path / 'digits', model_args, cfg, [f'digit {i}' for i in range(10)])
    return tmp_path / 'digits'


@pytest.fixture
def photos(tmp_path) -> Path:
    for i, name in enumerate(('b/x.png', 'a/y.jpg', 'a/x.png', 'c/z.png')):
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (60, 40), (250, 60 * i, 0)).save(path)
    return tmp_path / 'photos'


def files(folder: Path) -> List[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def check_png(path: Path, width: int) -> None:
    with Image.open(path) as image:
        assert image.format == 'PNG' and image.width == width and image.height > 500
        assert len(image.convert('RGB').getcolors(1 << 24)) > 100


@pytest.fixture
def figures(monkeypatch) -> list:
    """Every figure that the command saves."""
    from matplotlib.figure import Figure
    saved, savefig = [], Figure.savefig

    def spy(self, *args, **kwargs) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)
    monkeypatch.setattr(Figure, 'savefig', spy)
    return saved


def test_command_on_digits(tmp_path, capsys, monkeypatch, folder: Path, figures: list) -> None:
    """A folder by its path and as local-dir:, the digits by default, each picture under its kind's name."""
    monkeypatch.chdir(tmp_path)
    for kind, name, width in zip(KINDS, ('./digits', 'local-dir:digits', str(folder)), (1400, 1500, 1400)):
        assert main(['plot', kind, name]) == 0
        assert capsys.readouterr().out == f'wrote {kind}.png\n'
        check_png(tmp_path / f'{kind}.png', width)
    assert '169 images, 28 or more of each' in figures[0].get_suptitle() and len(lines(figures[0].axes[0])) == 6
    assert 'input 32 x 32' in figures[1].get_suptitle()
    truth, prediction, _ = figures[2].axes[0].get_ylabel().split('\n')  # the data's names and the network's
    assert truth.removeprefix('class ').isdecimal() and prediction.startswith('predicted digit ')

    argv = ['plot', 'gates', './digits', '--classes', '3', '7', '--num-images', '100', '--out', 'gates.svg']
    assert main(argv) == 0
    assert (tmp_path / 'gates.svg').read_text().startswith('<?xml')
    assert list(lines(figures[3].axes[0])) == ['class 3', 'class 7', 'mean over all 2 classes']
    assert '78 images, 36 or more' in figures[3].get_suptitle()


def test_command_on_checkpoint_and_folder(tmp_path, capsys, monkeypatch, photos: Path, figures: list) -> None:
    """A training checkpoint with the preprocessing of its args.yaml, and a folder of images by class."""
    monkeypatch.chdir(tmp_path)
    model = network('rgse_resnet50', num_classes=3)
    run = tmp_path / 'run'
    run.mkdir()
    torch.save({'state_dict': model.state_dict()}, run / 'last.pth.tar')
    args = dict(model='rgse_resnet50', model_kwargs=dict(TINY, layers=[1, 2, 1, 1]), img_size=64, in_chans=None)
    (run / 'args.yaml').write_text(json.dumps(args))
    argv = ['rgse_resnet50', '--checkpoint', 'run/last.pth.tar', '--data', 'photos']
    assert main(['plot', 'descriptors', *argv]) == 0
    figure, = figures
    assert figure.axes[0].get_title() == 'input\n64 x 64'
    assert [figure.axes[5 * i].get_ylabel().split('\n')[0] for i in range(4)] == [f'class {c}' for c in 'aabc']
    greens = [figure.axes[5 * i].images[0].get_array()[32, 32, 1] for i in range(4)]
    assert greens == pytest.approx([120 / 255, 60 / 255, 0, 180 / 255], abs=0.02)  # the files' order within a class

    assert main(['plot', 'descriptors', *argv, '--num-images', '2', '--out', 'two.png']) == 0  # spread over the data
    assert [ax.get_ylabel().split('\n')[0] for ax in figures[1].axes[::5]] == ['class a', 'class c', '']

    # a network of other classes than the folder's, an official size is read off the flag
    state = network('rgse_resnet50', num_classes=7).state_dict()
    torch.save(state, 'other.pth')
    capsys.readouterr()
    flags = ['--model-kwargs', 'layers=(1,2,1,1)', 'channels=(16,32,64,128)', '--img-size', '32', '--out', 'other.png']
    assert main(['plot', 'descriptors', 'rgse_resnet50', '--checkpoint', 'other.pth', '--data', 'photos', *flags]) == 0
    truth, prediction, _ = figures[-1].axes[0].get_ylabel().split('\n')
    assert truth == 'class a' and prediction.removeprefix('predicted ').isdecimal()
    assert '32 x 32' in figures[-1].axes[0].get_title()

    Path('map.txt').write_text('z\na\nb\nc\n')
    assert main(['plot', 'gates', *argv, '--class-map', str(tmp_path / 'map.txt'), '--classes', 'b', 'c']) == 0
    assert list(lines(figures[-1].axes[0])) == ['class b', 'class c', 'mean over all 2 classes']
    check_png(tmp_path / 'gates.png', 1400)

    # a network of timm itself, with the names of ImageNet's classes
    torch.save({'state_dict': timm.create_model('seresnet50', **TINY).state_dict()}, 'se.pth')
    argv = ['seresnet50', *TINY_ARGS, '--checkpoint', 'se.pth', '--data', 'photos', '--img-size', '32']
    assert main(['plot', 'descriptors', *argv, '--out', 'se.png']) == 0
    prediction = figures[-1].axes[0].get_ylabel().split('\n')[1].removeprefix('predicted ')
    info = timm.data.ImageNetInfo()
    names = [info.index_to_description(i) for i in range(1000)]
    assert any(name.startswith(prediction.removesuffix('...')) for name in names)


def test_command_bad_input(tmp_path, capsys, monkeypatch, folder: Path, photos: Path) -> None:
    """One clear line each, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    torch.save(tiny('rgse_resnet50', num_classes=3).state_dict(), 'rgse.pth')
    torch.save(tiny('rgse_resnet50', num_classes=3, in_chans=1).state_dict(), 'grey.pth')
    torch.save(tiny('rgse_resnet50', num_classes=3, in_chans=4).state_dict(), 'four.pth')
    torch.save(timm.create_model('resnet18').state_dict(), 'resnet18.pth')
    resnet = timm.create_model('resnet18')
    (tmp_path / 'resnet').mkdir()
    save_folder(resnet, tmp_path / 'resnet', {})
    (tmp_path / 'empty' / 'class').mkdir(parents=True)
    (tmp_path / 'broken' / 'class').mkdir(parents=True)
    (tmp_path / 'broken' / 'class' / 'x.png').write_text('no image')
    (tmp_path / 'existing.png').write_text('precious')
    (tmp_path / 'map.txt').write_text('z\na\nb\nc\n')
    before = files(tmp_path)

    def fails(message: str, *argv: str, kinds=KINDS) -> None:
        for kind in kinds:
            assert main(['plot', kind, *argv]) == 2
            err = capsys.readouterr().err
            assert err.startswith('timm-sepool plot: error: ') and err.count('\n') == 1, err
            assert message in err, err
            assert files(tmp_path) == before

    rgse = ['rgse_resnet50', *TINY_ARGS, '--checkpoint', 'rgse.pth']
    fails('existing.png exists and is left as it is', 'resnet', '--out', 'existing.png')
    fails('out.txt has to be named .png', './digits', '--out', 'out.txt')
    fails('is no writable folder', './digits', '--out', 'no/out.png')
    fails('The checkpoint does not fit spse_resnet50', 'spse_resnet50', *rgse[1:])
    fails('resnet18.pth holds no rgse_resnet50 weights', 'rgse_resnet50', *TINY_ARGS, '--checkpoint', 'resnet18.pth')
    fails('There is no checkpoint none.pth', 'rgse_resnet50', '--checkpoint', 'none.pth')
    fails('resnet18.pth can not be loaded as a seresnet18', 'seresnet18', '--checkpoint', 'resnet18.pth')
    fails('nope can not be loaded', 'nope')
    fails('local-dir:digits has weights of its own', 'local-dir:digits', *rgse[1:])
    fails('ResNet has no SE module with a gate layer', 'resnet')
    fails('its preprocessing is for 3', 'rgse_resnet50', *TINY_ARGS, '--checkpoint', 'grey.pth')
    four = ['--checkpoint', 'four.pth', '--img-size', '32', '--mean', *4 * ['0.5'], '--std', *4 * ['0.5']]
    pictures = ('gates', 'descriptors')
    fails('The network takes images of 4 channels', 'rgse_resnet50', *TINY_ARGS, *four, kinds=pictures)
    fails('makes no sense', *rgse, '--img-size', '0')
    fails('There is no folder none', *rgse, '--data', 'none', kinds=pictures)
    fails('empty is no folder of images by class: Found 0 images', *rgse, '--data', 'empty', kinds=pictures)
    fails('The images of broken can not be read', *rgse, '--data', 'broken', kinds=pictures)
    fails('photos is no folder of images', *rgse, '--data', 'photos', '--class-map', 'no.txt', kinds=pictures)
    fails('--num-images must be at least 1, got 0', *rgse, '--num-images', '0', kinds=pictures)
    fails('photos has no image of class d', *rgse, '--data', 'photos', '--classes', 'a', 'd', kinds=('gates',))
    mapped = ['--data', 'photos', '--class-map', str(tmp_path / 'map.txt'), '--classes', 'z']
    fails('photos has no image of class z', *rgse, *mapped, kinds=('gates',))
    assert Path('existing.png').read_text() == 'precious'

    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    fails('pip install "timm_sepool[plot]"', './digits')
    with pytest.raises(CommandError, match='timm_sepool'):
        plot_kernels(network('rgse_resnet50'))
