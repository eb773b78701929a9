"""The names of the rules, by which each can be switched off: what it is worth is what a prediction loses without it."""

from __future__ import annotations

from collections.abc import Collection

RULES: dict[str, str] = {
    "attention-backend": "which kernel scaled_dot_product_attention runs, what it saves and how it prepares its mask",
    "autocast": "CUDA's list of what autocast casts, and the casts it keeps",
    "bias-in-place": "linear adds a bias in place to the product of a strided input",
    "bitsandbytes": "dequantised weights and other temporaries of bitsandbytes' kernels",
    "convolution-workspace": "copies of a convolution's tensors in cuDNN's workspace",
    "cublas-workspace": "the workspace of cuBLAS, one for each thread",
    "cublaslt-workspace": "a workspace of its own for cuBLASLt, one for each thread",
    "cudnn-attention": "the workspace of cuDNN's attention, forward and backward",
    "efficient-attention": "temporaries and workspace of memory-efficient attention, forward and backward",
    "embedding-backward": "sorted indices and partial sums of an embedding's gradient",
    "flash-attention": "accumulators and temporaries of flash attention, forward and backward",
    "foreach-norm": "partial norms of a norm over a list of tensors",
    "grouped-products": "arguments and tensor maps of CUTLASS' grouped matrix products",
    "half-to-float-softmax": "softmax of fp16 with an fp32 result is one kernel",
    "host-seeds": "seed and offset of memory-efficient attention lie on the host",
    "index-backward": "sorted indices of an accumulating index_put",
    "mask-coordinates": "coordinates, counts and prefix sums of boolean masks",
    "native-dropout": "dropout keeps a mask of bools",
    "norm-kernels": "layer norm saves fp32 statistics, RMS norm is one kernel",
    "norm-temporaries": "copies of strided inputs and partial gradients of layer norm and RMS norm",
    "one-hot": "one_hot does not read its indices",
    "packed-mask-dropped": "transformers drops the mask of sequences that turn out not to be packed",
    "reductions": "partial results of reductions that are split over blocks, casts before them",
    "softmax-backward-temporary": "a product as large as the probabilities in softmax's backward",
    "softmax-temporaries": "what the softmax of the math attention and logsumexp hold besides their results",
    "sorts-and-scans": "scratch of sort, topk and cumsum",
    "strided-copies": "copies that matrix products and softmax make of strided inputs",
    "unwatched-in-place": "gradients that autograd adds and scatters in place unless a dispatch mode watches",
}


def switched_off(names: Collection[str]) -> frozenset[str]:
    """The names as a set.

    Raises:
        ValueError: one of them names no rule.
    """
    unknown = sorted(set(names) - RULES.keys())
    if unknown:
        raise ValueError(f"no CUDA rule is called {', '.join(unknown)}")
    return frozenset(names)
