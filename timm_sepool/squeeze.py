""" Squeeze-and-Excitation with Local Spatial Pooling (SPSE, RGSE)

An SE block squeezes each channel to its global average. SPSE and RGSE average it over the cells of one or more grids,
fuse these averages with learned depthwise kernels, and excite as SE does:
- SPSE: spatial-pyramid pooling, 1x1 + 2x2 + 4x4 grids
- RGSE: resolution-guided pooling, one grid whose cells are 7x7 windows at 224 px: 8, 4, 2, 1 at stages 1 to 4

Papers / References:
- `Delving deep into spatial pooling for squeeze-and-excitation networks`, section 3
    (Jin et al., Pattern Recognition 121, 2022) - https://doi.org/10.1016/j.patcog.2021.108159
- `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507

Up to the fusion's norm the squeeze is linear in x, so one read of x is enough for any number of grids.
"""
from typing import List, Optional, Tuple, Type, Union

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental import symbolic_shapes

from timm.layers import create_act_layer, make_divisible

from . import fused, inference
from ._private import is_exporting

__all__ = ['SEPoolModule', 'SPSEModule', 'RGSEModule', 'spatial_kernel', 'spatial_weighted_sum']

LARGE = 2 ** 25  # numbers of a map, 42 images at stage 1 of ResNet-50 and 224 px
# torch before 2.8 lacks it, so its compiled graphs take the form that fits all sizes
_has_static_value = getattr(symbolic_shapes, 'has_static_value', lambda size: False)


def _size_may_vary(height: int, width: int) -> bool:
    """Whether the traced graph must work at other input sizes."""
    if torch.jit.is_scripting():
        return False
    if torch.jit.is_tracing() or is_exporting():
        return True
    return torch.compiler.is_compiling() and not (_has_static_value(height) and _has_static_value(width))


def _axis_windows(size: int, grids: List[int], device: torch.device) -> torch.Tensor:
    """Whether each adaptive pooling window covers each position of an axis, bool (sum of grids, size).

    Window i of g runs from floor(i * size / g) to ceil((i + 1) * size / g). Built from arange, it follows traced sizes.
    """
    pos = torch.arange(size, device=device)
    windows: List[torch.Tensor] = []
    for g in grids:
        start = torch.arange(g, device=device).unsqueeze(1) * size
        windows.append((pos >= start // g) & (pos < (start + size + g - 1) // g))
    return torch.cat(windows)


def _power_of_two(windows: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Split windows (n, size) of zeros and ones, divided by their lengths, into (n, size) and a scale (n,).

    The first factor holds powers of two, which autocast keeps exact. It would round 1 / 49 by 0.2 %.
    """
    length = windows.sum(1)
    power = 2. ** length.log2().floor()  # the TorchScript ONNX exporter lacks exp2
    return windows / power.unsqueeze(1), power / length


def _axes_serve(height: int, width: int, device: torch.device) -> bool:
    """Whether `spatial_kernel` goes axis by axis. Its matrix products do not fuse in compiled graphs on a GPU."""
    if torch.jit.is_scripting():
        return True
    return not _size_may_vary(height, width) and not (device.type == 'cuda' and torch.compiler.is_compiling())


def _averages_serve(height: int, width: int, device: torch.device) -> bool:
    """Whether `cell_averages` serves: for a small map, in eager mode on a CPU and in the precision of the tensors."""
    if torch.jit.is_scripting():
        return False
    if device.type != 'cpu' or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled('cpu') and height * width <= 1024


def spatial_kernel(
        height: int, width: int, weights: List[torch.Tensor], channels_last: bool = False,
) -> torch.Tensor:
    """Weight of every position in `spatial_weighted_sum`: sum of weight / area over the cells that cover it.

    Args:
        height: Height H of the feature map.
        width: Width W of the feature map.
        weights: Depthwise kernels (C, 1, g, g) of adaptive average pooling to g x g cells, for any grids g.
        channels_last: Whether to lay the weights of several grids out position by position.

    Returns:
        Weights (C, H * W), in float32 at least, or in the dtype of the autocast context if there is one.
    """
    grids = [w.shape[-1] for w in weights]
    device = weights[0].device
    dtype = torch.promote_types(weights[0].dtype, torch.float32)  # half precision rounds the areas
    if len(grids) == 1 and _axes_serve(height, width, device):
        # Axis by axis, as the windows of all cells would fill a matrix (g * g, H * W). The reshapes fix traced sizes.
        rows, row_scale = _power_of_two(_axis_windows(height, grids, device).to(dtype))
        cols, col_scale = rows, row_scale
        if width != height:
            cols, col_scale = _power_of_two(_axis_windows(width, grids, device).to(dtype))
        weight = weights[0].to(dtype).squeeze(1) * (row_scale.unsqueeze(1) * col_scale)
        channels, grid = weight.shape[:2]
        kernel = weight.transpose(1, 2).reshape(channels * grid, grid) @ rows
        kernel = kernel.reshape(channels, grid, height).transpose(1, 2).reshape(channels * height, grid) @ cols
        return kernel.reshape(channels, height * width)

    weight = torch.cat([w.flatten(1) for w in weights], dim=1).to(dtype)
    if _averages_serve(height, width, device):
        # to build the matrix by operations takes about 50 of them, longer than the squeeze of a small map
        matrix = inference.cell_averages(height, width, [(g, g) for g in grids], dtype)
    else:
        rows = _axis_windows(height, grids, device)
        is_square = not _size_may_vary(height, width) and height == width
        cols = rows if is_square else _axis_windows(width, grids, device)
        cells: List[torch.Tensor] = []
        for r, c in zip(rows.split(grids), cols.split(grids)):
            cells.append((r.unsqueeze(1).unsqueeze(3) & c.unsqueeze(1)).flatten(2).flatten(0, 1))
        matrix, scale = _power_of_two(torch.cat(cells).to(dtype))
        weight = weight * scale
    return (matrix.t() @ weight.t()).t() if channels_last else weight @ matrix


def _is_gpu_training(x: torch.Tensor) -> bool:
    """Whether gradients are enabled on a GPU. Those of avg_pool2d are slow there, and keep x in compiled graphs."""
    if torch.jit.is_scripting():
        return False
    return x.is_cuda and torch.is_grad_enabled()


def _is_large_compiled_inference(x: torch.Tensor) -> bool:
    """Whether torch.compile compiles inference on a GPU for large maps x, where a product is faster than pooling."""
    if torch.jit.is_scripting():
        return False
    is_inference = x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return is_inference and _has_static_value(x.shape[0]) and x.numel() >= LARGE


@torch.fx.wrap  # a leaf of fx graphs, as fx cannot trace the branches
def spatial_weighted_sum(x: torch.Tensor, weights: List[torch.Tensor]) -> torch.Tensor:
    """Pool x to grids, weight the cells of each channel and add them up.

    Equals `sum(F.conv2d(F.adaptive_avg_pool2d(x, w.shape[-1]), w, groups=C) for w in weights)`, the paper's section 3
    before bias and norm. The backward keeps x and, where cells overlap, a tensor of the size of one image.

    Args:
        x: Features (B, C, H, W), any H, W >= 1.
        weights: Depthwise kernels (C, 1, g, g). The finest grid comes last and is a multiple of every other.

    Returns:
        Fused descriptor (B, C, 1, 1), in the common dtype of x and weights.
    """
    if not torch.jit.is_scripting():
        fast = inference.weighted_sum(x, weights, spatial_kernel)
        if fast is None:
            fast = fused.weighted_sum(x, weights, _weighted_sum)
        if fast is not None:
            return fast
    return _weighted_sum(x, weights)


def _weighted_sum(x: torch.Tensor, weights: List[torch.Tensor]) -> torch.Tensor:
    """`spatial_weighted_sum` by operations of torch."""
    height, width = x.shape[-2:]
    grid = weights[-1].shape[-1]
    nhwc = x.stride(1) == 1 and not x.is_contiguous()  # vmap lacks is_contiguous(memory_format=...)

    is_tiled = not _size_may_vary(height, width) and height % grid == 0 and width % grid == 0
    if is_tiled and not _is_large_compiled_inference(x):
        # each coarser cell is a block of cells of the finest grid, so its weight is spread over them
        weight = weights[-1]
        for w in weights[:-1]:
            g, ratio = w.shape[-1], grid // w.shape[-1]
            weight = torch.add(
                weight.reshape(-1, g, ratio, g, ratio), w.reshape(-1, g, 1, g, 1), alpha=1. / (ratio * ratio))
        weight = weight.reshape(1, -1, grid, grid)
        if nhwc:
            # A gradient in NCHW would make avg_pool2d's backward copy all of x. vmap lacks memory formats.
            weight = weight.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if (nhwc or width < 16) and not _is_gpu_training(x):
            cells = F.avg_pool2d(x, (height // grid, width // grid))
        else:
            # vectorized along the rows, avg_pool2d goes window by window
            cells = x.reshape(x.shape[0], x.shape[1], grid, height // grid, grid, width // grid).mean(3).mean(4)
        return (cells * weight).sum((2, 3), keepdim=True)

    # where cells may overlap, one product with the weight of every position has the fastest backward
    if torch.jit.is_scripting():
        kernel = spatial_kernel(height, width, weights, nhwc)
    elif x.is_meta or not torch.is_autocast_enabled(x.device.type):
        kernel = spatial_kernel(height, width, weights, nhwc)
    else:
        with torch.autocast(x.device.type, enabled=False):  # weight / area can be below float16's normal range
            kernel = spatial_kernel(height, width, weights, nhwc)
    x = x.flatten(2)
    if nhwc:
        s = (x.transpose(1, 2) * kernel.t().contiguous()).sum(1)
    else:
        s = (x * kernel).sum(2)
    return s.to(torch.promote_types(x.dtype, weights[-1].dtype)).unsqueeze(-1).unsqueeze(-1)


class SEPoolModule(nn.Module):
    """Base of SPSE and RGSE: norm of the squeeze, then `timm.layers.SEModule`'s excitation and names of layers.

    gate = sigmoid(fc2(relu(fc1(squeeze(x))))), and the output is x * gate. Subclasses define `forward_squeeze`.
    """

    def __init__(
            self,
            channels: int,
            rd_ratio: float = 1. / 16,
            rd_channels: Optional[int] = None,
            rd_divisor: int = 8,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Optional[Type[nn.Module]] = nn.BatchNorm2d,
            gate_layer: Union[str, Type[nn.Module]] = 'sigmoid',
            device=None,
            dtype=None,
    ):
        """
        Args:
            channels: Number of input channels.
            rd_ratio: Ratio of the excitation's hidden channels to channels.
            rd_channels: Number of hidden channels, overrides rd_ratio if set.
            rd_divisor: Round the hidden channels to a multiple of this.
            act_layer: Activation after the fusion and between fc1 and fc2.
            norm_layer: Norm of the fused descriptor (B, C, 1, 1), None for no norm.
            gate_layer: Activation of the gate.
            device: Device to place tensors on.
            dtype: Data type for tensors.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if not rd_channels:
            rd_channels = make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.)
        self.bn = norm_layer(channels, **dd) if norm_layer else nn.Identity()
        self.fc1 = nn.Conv2d(channels, rd_channels, kernel_size=1, **dd)
        self.act = create_act_layer(act_layer, inplace=True)
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, **dd)
        self.gate = create_act_layer(gate_layer)

    def init_weights(self) -> None:
        """Initialize as the official code does: torch's default for every weight, 0 for every bias."""
        for module in (self.bn, self.fc1, self.fc2):
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # type: ignore[operator]
        self._init_kernels_and_biases()

    def _init_kernels_and_biases(self) -> None:
        """Initialize what the `reset_parameters` of torch's layers leave out."""
        for name, param in self.named_parameters():
            if name.startswith('weight'):
                # torch's default for a depthwise conv with this kernel: uniform in +-1 / sqrt(fan_in)
                bound = 1. / param.shape[-1]
                nn.init.uniform_(param, -bound, bound)
            elif name.startswith('bias') or name in ('fc1.bias', 'fc2.bias'):
                nn.init.zeros_(param)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.bn(x)
        return self._norm_or_explain(x)

    @torch.jit.unused
    def _norm_or_explain(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.bn(x)
        except ValueError as e:
            if x.shape[0] > 1:
                raise
            raise ValueError(
                'The squeeze of an SPSE / RGSE block normalizes one value per image and channel over the batch, so '
                'training needs more than one image per device. Use a larger batch, SyncBatchNorm over several '
                "devices, or freeze the norms of the squeeze: timm.utils.freeze(model, [n for n, _ in "
                "model.named_modules() if n.endswith('.se.bn')]). Adopted networks have norm=False."
            ) from e

    def forward_squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to the fused descriptor (B, C, 1, 1). Raises as `forward_gate`."""
        raise NotImplementedError

    def forward_gate(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the gate (B, C, 1, 1) of x (B, C, H, W): squeeze and excitation without the scaling.

        Raises:
            ValueError: If the fusion's batch norm is in train mode and gets a single image.
        """
        x_se = self.act(self.fc1(self.forward_squeeze(x)))
        return self.gate(self.fc2(x_se))

    def forward(self, x: torch.Tensor, shortcut: Optional[torch.Tensor] = None, relu: bool = False) -> torch.Tensor:
        """Return x * gate, plus shortcut if given, all (B, C, H, W). Raises as `forward_gate`.

        With relu, it is the ReLU of this sum. Pass it only with a shortcut and where `fused.serves_residual_relu`.
        """
        gate = self.forward_gate(x)
        if shortcut is None:
            return x * gate
        if not torch.jit.is_scripting():
            if relu:
                return fused.residual_relu(x, gate, shortcut)
        if self.training:
            # the backward of addcmul makes one more pass over x than that of the two steps
            return (x * gate).add_(shortcut)
        return torch.addcmul(shortcut, x, gate)


class SPSEModule(SEPoolModule):
    """Spatial-pyramid squeeze-and-excitation: average pooling to 1x1, 2x2 and 4x4 grids.

    Paper, section 3: descriptor = relu(norm(sum over g = 1, 2, 4 of weight_g * pool_g(x) + bias_g)), where * is a
    depthwise g x g convolution and pool_g adaptive average pooling to g x g cells, defined at every input size.
    """

    def __init__(self, channels: int, device=None, dtype=None, **kwargs):
        """The arguments are those of `SEPoolModule`."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, **kwargs, **dd)
        self.weight1 = nn.Parameter(torch.empty(channels, 1, 1, 1, **dd))
        self.bias1 = nn.Parameter(torch.empty(channels, **dd))
        self.weight2 = nn.Parameter(torch.empty(channels, 1, 2, 2, **dd))
        self.bias2 = nn.Parameter(torch.empty(channels, **dd))
        self.weight4 = nn.Parameter(torch.empty(channels, 1, 4, 4, **dd))
        self.bias4 = nn.Parameter(torch.empty(channels, **dd))
        self._init_kernels_and_biases()

    def forward_squeeze(self, x: torch.Tensor) -> torch.Tensor:
        x_se = spatial_weighted_sum(x, [self.weight1, self.weight2, self.weight4])
        x_se = x_se + (self.bias1 + self.bias2 + self.bias4).view(1, -1, 1, 1)
        return self.act(self._norm(x_se))


class RGSEModule(SEPoolModule):
    """Resolution-guided squeeze-and-excitation: average pooling to one grid that belongs to the stage.

    Paper, section 3: descriptor = relu(norm(weight * pool_g(x))), where * is a depthwise g x g convolution (no bias).
    For g = 1 it is relu(mean(x)). Adaptive pooling equals the paper's 7x7 windows at 224 px and fits every input size.
    """

    def __init__(
            self,
            channels: int,
            grid: int,
            norm_layer: Optional[Type[nn.Module]] = nn.BatchNorm2d,
            device=None,
            dtype=None,
            **kwargs,
    ):
        """The arguments are those of `SEPoolModule` and grid, the cells per side. A grid of 1 has no norm.

        Raises:
            ValueError: If grid is not a positive integer.
        """
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
            raise ValueError(f'grid must be a positive integer (cells per side), got {grid!r}.')
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, norm_layer=norm_layer if grid > 1 else None, **kwargs, **dd)
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(channels, 1, grid, grid, **dd)) if grid > 1 else None
        self._init_kernels_and_biases()

    def extra_repr(self) -> str:
        return f'grid={self.grid}'

    def forward_squeeze(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return self.act(x.mean((2, 3), keepdim=True))
        return self.act(self._norm(spatial_weighted_sum(x, [self.weight])))
