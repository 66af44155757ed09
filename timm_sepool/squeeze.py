""" Squeeze-and-Excitation with Local Spatial Pooling (SPSE, RGSE)

An SE block squeezes each channel to its global average. These two squeeze it to a few local averages, fuse those with
one learned depthwise kernel and excite as SE does:
- SPSE: spatial-pyramid pooling, 1x1 + 2x2 + 4x4 grids
- RGSE: resolution-guided pooling, one grid whose cells are 7x7 windows at 224 px: 8, 4, 2, 1 at stages 1 to 4

Papers / References:
- `Delving deep into spatial pooling for squeeze-and-excitation networks`
    (Jin et al., Pattern Recognition 121, 2022) - https://doi.org/10.1016/j.patcog.2021.108159
- `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507

Up to the fusion's norm the squeeze is linear in x: one weighted sum over the positions of each channel. So x is read
once, whatever the number of grids, see `spatial_weighted_sum`.
"""
from typing import List, Optional, Tuple, Type, Union

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from timm.layers import create_act_layer, make_divisible

__all__ = ['SEPoolModule', 'SPSEModule', 'RGSEModule', 'spatial_kernel', 'spatial_weighted_sum']

# torch < 2.7 can't tell export from compile, there both take the form that serves export
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def _any_size() -> bool:
    """If the graph being recorded has to serve sizes other than its example's."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing() or _is_exporting()


def _axis_windows(size: int, grids: List[int], device: torch.device) -> torch.Tensor:
    """Which of `size` positions the adaptive pooling windows of each grid cover, bool (sum of grids, size).

    Window i of g runs from floor(i * size / g) to ceil((i + 1) * size / g). Built from arange, never from Python
    numbers, so that an exported graph follows the size of its input.
    """
    pos = torch.arange(size, device=device)
    windows: List[torch.Tensor] = []
    for g in grids:
        start = torch.arange(g, device=device).unsqueeze(1) * size
        windows.append((pos >= start // g) & (pos < (start + size + g - 1) // g))
    return torch.cat(windows)


def _power_of_two(windows: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Windows (n, size) of zeros and ones over a power of two near their length, and the scale (n,) to their mean.

    Autocast leaves powers of two exact, where 1 / 49 would be off by 0.2 %.
    """
    length = windows.sum(1)
    power = 2. ** length.log2().floor()  # not exp2, which the TorchScript ONNX exporter lacks
    return windows / power.unsqueeze(1), power / length


def spatial_kernel(height: int, width: int, weights: List[torch.Tensor]) -> torch.Tensor:
    """What a squeeze looks at: the weight of every position in the sum over the weighted cells of all its grids.

    Args:
        height: Height H of the feature map.
        width: Width W of the feature map.
        weights: Depthwise kernels (C, 1, g, g) of adaptive average pooling to g x g cells.

    Returns:
        (C, H * W)
    """
    grids = [w.shape[-1] for w in weights]
    device = weights[0].device
    # an area is not exact in half precision
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    rows = _axis_windows(height, grids, device)
    if not _any_size() and height == width:
        cols = rows
    else:
        cols = _axis_windows(width, grids, device)

    if len(grids) == 1 and not _any_size():
        # axis by axis, the windows of all cells would be a matrix (g * g, H * W). Its reshapes guard an exported size.
        rows, row_scale = _power_of_two(rows.to(dtype))
        cols, col_scale = _power_of_two(cols.to(dtype))
        weight = weights[0].to(dtype).squeeze(1) * (row_scale.unsqueeze(1) * col_scale)
        channels, grid = weight.shape[:2]
        kernel = weight.transpose(1, 2).reshape(channels * grid, grid) @ rows
        kernel = kernel.reshape(channels, grid, height).transpose(1, 2).reshape(channels * height, grid) @ cols
        return kernel.reshape(channels, height * width)

    cells: List[torch.Tensor] = []
    for r, c in zip(rows.split(grids), cols.split(grids)):
        cells.append((r[:, None, :, None] & c[None, :, None, :]).flatten(2).flatten(0, 1))
    matrix, scale = _power_of_two(torch.cat(cells).to(dtype))
    return (torch.cat([w.flatten(1) for w in weights], dim=1).to(dtype) * scale) @ matrix


@torch.fx.wrap  # a leaf to fx, whose proxies can't take the branches
def spatial_weighted_sum(x: torch.Tensor, weights: List[torch.Tensor]) -> torch.Tensor:
    """Sum over k of the full-size depthwise convolution of `adaptive_avg_pool2d(x, g_k)` with `weights[k]`.

    Equals `sum(F.conv2d(F.adaptive_avg_pool2d(x, w.shape[-1]), w, groups=C) for w in weights)` with one read of x.
    The backward keeps no other tensor of the size of x (where cells overlap one of the size of a single image's x).

    Args:
        x: Features (B, C, H, W), any H, W >= 1.
        weights: Depthwise kernels (C, 1, g, g), the finest grid last and a multiple of every other.

    Returns:
        (B, C, 1, 1)
    """
    height, width = x.shape[-2:]
    grid = weights[-1].shape[-1]
    nhwc = x.stride(1) == 1 and not x.is_contiguous()  # vmap can't tell is_contiguous(memory_format=...)

    if not _any_size() and height % grid == 0 and width % grid == 0:
        # the cells of the finest grid tile those of the others, whose weights are spread over it
        weight = weights[-1]
        for w in weights[:-1]:
            ratio = grid // w.shape[-1]
            weight = weight + F.interpolate(w, size=(grid, grid)) / (ratio * ratio)
        weight = weight.transpose(0, 1)
        if nhwc:
            # else the gradient arrives in the other format and avg_pool2d's backward copies all of x
            weight = weight.contiguous(memory_format=torch.channels_last)
        if nhwc or width < 16:
            cells = F.avg_pool2d(x, (height // grid, width // grid))
        else:
            # vectorized along the rows, where avg_pool2d goes window by window
            cells = x.unflatten(2, (grid, height // grid)).mean(3).unflatten(3, (grid, width // grid)).mean(4)
        return (cells * weight).sum((2, 3), keepdim=True)

    # cheaper than pooling to cells that overlap: one product with the weight of every position
    if torch.jit.is_scripting():
        kernel = spatial_kernel(height, width, weights)
    elif x.is_meta or not torch.is_autocast_enabled(x.device.type):
        kernel = spatial_kernel(height, width, weights)
    else:
        # weight / area falls below the normal range of float16
        with torch.autocast(x.device.type, enabled=False):
            kernel = spatial_kernel(height, width, weights)
    x = x.flatten(2)
    if nhwc:
        s = (x.transpose(1, 2) * kernel.t().contiguous()).sum(1)
    else:
        s = (x * kernel).sum(2)
    return s.to(torch.promote_types(x.dtype, weights[-1].dtype)).unsqueeze(-1).unsqueeze(-1)


class SEPoolModule(nn.Module):
    """Base of SPSE and RGSE: the excitation, which is that of `timm.layers.SEModule`, and the squeeze's fusion norm.

    Subclasses define `squeeze`. `forward` is a drop-in for timm's SE module. As in that `gate` is the gate's activation
    layer, `forward_gate` computes the gate.
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
            rd_channels: Explicit number of hidden channels, overrides rd_ratio if set.
            rd_divisor: Divisor the hidden channels are rounded to.
            act_layer: Activation after the fusion and between fc1 and fc2.
            norm_layer: Normalization of the fused descriptor (B, C, 1, 1), None for no normalization.
            gate_layer: Gate activation.
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
        """Initialize as the official code does: torch's default for every weight, zero for every bias."""
        for module in (self.bn, self.fc1, self.fc2):
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()  # type: ignore[operator]
        self._init_own()

    def _init_own(self) -> None:
        """What torch's layers do not do for themselves."""
        for name, param in self.named_parameters():
            if name.startswith('weight'):
                # torch's default for a depthwise conv of this kernel, uniform in +-1 / sqrt(fan_in)
                bound = 1. / param.shape[-1]
                nn.init.uniform_(param, -bound, bound)
            elif name.startswith('bias') or name in ('fc1.bias', 'fc2.bias'):
                nn.init.zeros_(param)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.bn(x)
        return self._norm_checked(x)

    @torch.jit.unused
    def _norm_checked(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.bn(x)
        except ValueError as e:
            if x.shape[0] > 1:
                raise
            raise ValueError(
                'The squeeze of an SPSE / RGSE block normalizes one value per channel and image over the batch, so '
                'training needs more than one image per device. Use a larger batch, SyncBatchNorm over several '
                "devices, or freeze the norms of the squeeze: timm.utils.freeze(model, [n for n, _ in "
                "model.named_modules() if n.endswith('.se.bn')])."
            ) from e

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to one fused descriptor per channel (B, C, 1, 1)."""
        raise NotImplementedError

    def forward_gate(self, x: torch.Tensor) -> torch.Tensor:
        """Gate of x (B, C, H, W): squeeze and excitation without the scaling, (B, C, 1, 1).

        Raises:
            ValueError: If the fusion's batch norm is in train mode and the batch is one image on one device.
        """
        x_se = self.squeeze(x)
        x_se = self.fc1(x_se)
        x_se = self.act(x_se)
        x_se = self.fc2(x_se)
        return self.gate(x_se)

    def forward(self, x: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Scale x (B, C, H, W) by its gate and add shortcut if there is one, same shape. Raises as `forward_gate`."""
        gate = self.forward_gate(x)
        if shortcut is None:
            return x * gate
        if self.training:
            # addcmul's backward takes a pass over x more than those of the two steps
            return (x * gate).add_(shortcut)
        return torch.addcmul(shortcut, x, gate)


class SPSEModule(SEPoolModule):
    """Spatial-pyramid squeeze-and-excitation: average pooling to 1x1, 2x2 and 4x4 grids.

    The three grids go through depthwise convolutions of their size with bias, whose results are summed, normalized and
    rectified. Correct at every input size: cells are adaptive pooling's windows.
    """

    def __init__(self, channels: int, device=None, dtype=None, **kwargs):
        """
        Args:
            channels: Number of input channels.
            device: Device to place tensors on.
            dtype: Data type for tensors.
            **kwargs: Excitation and norm arguments of `SEPoolModule`.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, **kwargs, **dd)
        self.weight1 = nn.Parameter(torch.empty(channels, 1, 1, 1, **dd))
        self.bias1 = nn.Parameter(torch.empty(channels, **dd))
        self.weight2 = nn.Parameter(torch.empty(channels, 1, 2, 2, **dd))
        self.bias2 = nn.Parameter(torch.empty(channels, **dd))
        self.weight4 = nn.Parameter(torch.empty(channels, 1, 4, 4, **dd))
        self.bias4 = nn.Parameter(torch.empty(channels, **dd))
        self._init_own()

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to one fused descriptor per channel (B, C, 1, 1)."""
        x_se = spatial_weighted_sum(x, [self.weight1, self.weight2, self.weight4])
        x_se = x_se + (self.bias1 + self.bias2 + self.bias4).view(1, -1, 1, 1)
        return self.act(self._norm(x_se))


class RGSEModule(SEPoolModule):
    """Resolution-guided squeeze-and-excitation: average pooling to one grid that belongs to the stage.

    The grid goes through a depthwise convolution of its size without bias, normalized and rectified. A grid of 1 is the
    global average, only rectified. The paper pools 7x7 windows at 224 px; pooling adaptively to the same grid is
    identical there and defined at every size.
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
        """
        Args:
            channels: Number of input channels.
            grid: Cells per side of the pooling grid, the paper's is 8, 4, 2, 1 at stages 1 to 4.
            norm_layer: Normalization of the fused descriptor. A grid of 1 has none.
            device: Device to place tensors on.
            dtype: Data type for tensors.
            **kwargs: Excitation arguments of `SEPoolModule`.

        Raises:
            ValueError: If grid is not a positive integer.
        """
        if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
            raise ValueError(f'grid must be a positive integer (cells per side), got {grid!r}.')
        dd = {'device': device, 'dtype': dtype}
        super().__init__(channels, norm_layer=norm_layer if grid > 1 else None, **kwargs, **dd)
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(channels, 1, grid, grid, **dd)) if grid > 1 else None
        self._init_own()

    def extra_repr(self) -> str:
        return f'grid={self.grid}'

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Squeeze x (B, C, H, W) to one fused descriptor per channel (B, C, 1, 1)."""
        if self.weight is None:
            return self.act(x.mean((2, 3), keepdim=True))
        return self.act(self._norm(spatial_weighted_sum(x, [self.weight])))
