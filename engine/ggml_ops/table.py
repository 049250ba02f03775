"""The table of operations: which function computes which `ggml_op`."""

from functools import partial
from math import inf

from checkpoints.errors import ModelError

from . import (
    activations,
    elementwise,
    hyper_connections,
    indexer,
    linear_attention,
    norms,
    products,
    reductions,
    rope,
    rows,
    soft_max,
    sorting,
    state_space,
)
from . import shape as shapes
from .params import Operation

OPERATIONS: dict[str, Operation] = {
    "ACC": shapes.add_part,
    "ADD": elementwise.add,
    "ADD1": elementwise.add_one_value,
    "ADD_ID": elementwise.add_id,
    "ARANGE": shapes.arange,
    "ARGMAX": reductions.argmax,
    "ARGSORT": sorting.argsort,
    "CLAMP": elementwise.clamp,
    "CONCAT": shapes.concat,
    "CONT": shapes.copy,
    "COS": elementwise.cosine,
    "COUNT_EQUAL": reductions.count_equal,
    "CPY": shapes.copy,
    "CUMSUM": reductions.running_sum,
    "DIAG": shapes.diagonal,
    "DIAG_MASK_INF": partial(shapes.diagonal_mask, -inf),
    "DIAG_MASK_ZERO": partial(shapes.diagonal_mask, 0.0),
    "DIV": elementwise.divide,
    "DSV4_HC_COMB": hyper_connections.hc_combination,
    "DSV4_HC_POST": hyper_connections.hc_after,
    "DSV4_HC_PRE": hyper_connections.hc_before,
    "DUP": shapes.copy,
    "FILL": shapes.fill,
    "GATED_DELTA_NET": linear_attention.gated_delta_net,
    "GATED_LINEAR_ATTN": linear_attention.gated_linear_attention,
    "GET_ROWS": rows.get_rows,
    "GLU": activations.glu,
    "GROUP_NORM": norms.group_norm,
    "IM2COL": shapes.image_to_columns,
    "L2_NORM": norms.l2_norm,
    "LEAKY_RELU": activations.leaky_relu,
    "LIGHTNING_INDEXER": indexer.lightning_indexer,
    "LOG": elementwise.logarithm,
    "MEAN": reductions.mean,
    "MUL": elementwise.multiply,
    "MUL_MAT": products.mul_mat,
    "MUL_MAT_ID": products.mul_mat_id,
    "NORM": norms.norm,
    "OUT_PROD": products.outer_product,
    "PAD": shapes.pad,
    "PAD_REFLECT_1D": shapes.pad_reflect_1d,
    "POOL_1D": reductions.pool_1d,
    "POOL_2D": reductions.pool_2d,
    "REPEAT": shapes.repeat,
    "REPEAT_BACK": shapes.repeat_back,
    "RMS_NORM": norms.rms_norm,
    "ROLL": shapes.roll,
    "ROPE": rope.rope,
    "ROPE_BACK": rope.rope_back,
    "RWKV_WKV6": linear_attention.rwkv_wkv6,
    "RWKV_WKV7": linear_attention.rwkv_wkv7,
    "SCALE": elementwise.scale,
    "SET": shapes.set_part,
    "SET_ROWS": rows.set_rows,
    "SIN": elementwise.sine,
    "SOFT_MAX": soft_max.soft_max,
    "SOLVE_TRI": products.solve_triangular,
    "SQR": elementwise.square,
    "SQRT": elementwise.square_root,
    "SSM_CONV": state_space.ssm_conv,
    "SSM_SCAN": state_space.ssm_scan,
    "SUB": elementwise.subtract,
    "SUM": reductions.sum_all,
    "SUM_ROWS": reductions.sum_rows,
    "TIMESTEP_EMBEDDING": shapes.timestep_embedding,
    "TOP_K": sorting.top_k,
    "TRI": shapes.triangle,
    "UNARY": activations.unary,
}


def operation(name: str, where: str = "") -> Operation:
    """The function of a `ggml_op`; `where` names the node in the error.

    Raises:
        ModelError: the engine has no such operation.
    """
    try:
        return OPERATIONS[name]
    except KeyError:
        place = f" of {where}" if where else ""
        raise ModelError(
            f"the operation {name}{place} cannot be computed here.",
            "`parity dump ref` and `parity diff` don't need it; please report the model.",
            code="operation",
        ) from None
