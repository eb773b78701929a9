"""Bytes of cuDNN's workspaces. PyTorch takes them from the caching allocator for one call (MHA.cpp, Conv_v8.cpp).

cuDNN 9.20 was asked without a GPU: given a card's properties as JSON, it builds execution plans and says what they need. The
formulas of attention give what it answered for all cards and shapes asked about. Those of convolutions are the part that they
have in common.
"""

from __future__ import annotations

_SHORT = 128


def cudnn_attention_forward(sm: int) -> int:
    """A constant on sm_90, nothing on sm_10x."""
    return 256 if sm // 10 == 9 else 0


def cudnn_attention_backward(
    sm: int, batch: int, heads: int, key_heads: int, queries: int, keys: int, head: int, value_head: int
) -> int:
    """Backward of attention in half precision.

    - cudnn-frontend makes an fp32 query gradient and an fp32 sum for each row
      (``scaled_dot_product_flash_attention.h``, ``CompositeSDPABackwardNode::get_fe_workspace_size_node``).
    - Grouped heads: key and value gradients of every query head, before they are summed.
    - sm_10x: up to 128 tokens, the same once more with the tokens rounded up to 8, for heads of one size.
    """
    rows, columns = batch * heads * queries, batch * heads * (head + value_head) * 2
    size = 4 * rows * (head + 1)
    grouped, short = key_heads != heads, max(queries, keys) <= _SHORT and head == value_head
    size += columns * keys if grouped else 0
    if sm // 10 == 9:
        return size + 256
    size += columns * -(-keys // 8) * 8 if short else 0
    return size + (128 if grouped or short else 0)


def convolution_copies(images: int, channels: int, pixels: int, filters: int, taps: int, places: int, itemsize: int) -> int:
    """Copies of input, weight and, where there is more than one place, output with channels last.

    The kernels of tensor cores read 16 bytes of channels at a time, so that three channels become eight (four in fp32).

    Args:
        images: samples of the convolution.
        channels: of the input.
        pixels: of one channel of an image.
        filters: channels of the output.
        taps: elements of one channel of a filter.
        places: of one channel of the output.
        itemsize: bytes of an element.
    """
    padded = -(-channels * itemsize // 16) * 16
    return images * pixels * padded + filters * taps * padded + (images * filters * places * itemsize if places > 1 else 0) + 16
