"""The surface of the ``grouped_gemm`` package over our ops, so that code written for it runs on them unchanged.

    from omnimoe.ops import gmm as grouped_gemm

    y = grouped_gemm.ops.gmm(a, b, batch_sizes, trans_b=True)

MegaBlocks and Megatron import the package by its name: ``sys.modules["grouped_gemm"] = omnimoe.ops.gmm``, before they
do, puts this in its place. ``ops.gmm`` and ``backend.gmm`` are those of grouped_gemm 0.3, ``ops.permute`` and
``ops.unpermute`` those of NVIDIA's fork, whose ``groupedgemm`` and ``sinkhorn`` are not here. What differs: any device
and dtype that our ops take; ``batch_sizes`` may lie on the device, and nothing is read back from it on CUDA; rows past
their sum come out as zeros.

Sources: https://github.com/tgale96/grouped_gemm and https://github.com/fanshiqing/grouped_gemm.
"""

from omnimoe.ops.gmm import backend, ops
from omnimoe.ops.gmm.ops import permute, unpermute

__all__ = ["backend", "ops", "permute", "unpermute"]
