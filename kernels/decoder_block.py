"""A block of the decoder, attention and feed-forward: the kernels of its parts and matrix products.

One operator for the whole, because launches are short: with one per part, training waits for the
host. What is saved for the derivative is what the parts would save.
"""

import torch
from torch import Tensor

from . import gqa_attention as attention
from .rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from .rope import rope_
from .swiglu import swiglu, swiglu_backward, swiglu_saving


def decoder_block(
    x: Tensor,
    input_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    post_norm: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    save: bool = False,
) -> tuple[Tensor, ...]:
    """Attend and feed forward, each on the normed residual stream and added to it.

    Args:
        x: (batch, seq, n) bfloat16 or float16 (float32: slow), contiguous; so are all.
        input_norm, post_norm: (n,), dtype of `x`.
        q_weight: (heads * head_dim, n); k_weight, v_weight: (kv_heads * head_dim, n).
        o_weight: (n, heads * head_dim); gate_weight, up_weight: (m, n); down_weight: (n, m).
        cos, sin: as for `rope`.
        head_dim: of an attention head.
        eps: as for `rms_norm`.
        save: for `decoder_block_backward`.

    Returns:
        (batch, seq, n), dtype of `x`; with `save` what that wants, behind it.

    Numerics: those of the parts; the last product is added to the residual before it is rounded.
    """
    batch, seq, width = x.shape
    flat = x.view(batch * seq, width)
    normed = rms_norm(flat, input_norm, eps)
    # one product for all: joining the weights takes less than the two small ones
    qkv = torch.mm(normed, torch.cat((q_weight, k_weight, v_weight)).t())
    heads, kv_heads = q_weight.shape[0] // head_dim, k_weight.shape[0] // head_dim
    per_head = qkv.view(batch, seq, heads + 2 * kv_heads, head_dim)
    rope_(per_head.narrow(2, 0, heads + kv_heads), cos, sin)
    q, k, v = per_head.split_with_sizes((heads, kv_heads, kv_heads), 2)
    attended, lse = attention.forward(q, k, v, head_dim**-0.5)
    projected = torch.mm(attended.view(batch * seq, o_weight.shape[1]), o_weight.t())
    middle_normed, middle = add_rms_norm(projected, flat, post_norm, eps)
    if save:
        inner, gate, up = swiglu_saving(middle_normed, gate_weight, up_weight)
    else:
        inner = swiglu(middle_normed, gate_weight, up_weight)
    out = torch.empty_like(x)  # no view, which autograd would not let anybody change in place
    torch.addmm(middle, inner, down_weight.t(), out=out.view(flat.shape))
    if not save:
        return (out,)
    return out, normed, qkv, attended, lse, middle, middle_normed, inner, gate, up


def decoder_block_backward(
    grad: Tensor,
    x: Tensor,
    input_norm: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    o_weight: Tensor,
    post_norm: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    eps: float,
    normed: Tensor,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    middle: Tensor,
    middle_normed: Tensor,
    inner: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, ...]:
    """Differentiate `decoder_block`.

    Args:
        grad: the gradient of its result.
        x, ..., eps: its arguments.
        normed, ..., up: what it saved.

    Returns:
        Gradients of `x` and of the nine weights, in the order of the arguments.
    """
    batch, seq, width = x.shape
    flat = x.view(batch * seq, width)
    grad = grad.view(flat.shape)
    grad_down = torch.mm(grad.t(), inner)
    grad_inner = torch.mm(grad, down_weight)
    grad_normed, grad_gate, grad_up = swiglu_backward(
        grad_inner, middle_normed, gate_weight, up_weight, gate, up
    )
    grad_middle, grad_post = rms_norm_backward(grad_normed, middle, post_norm, eps, grad)
    grad_o = torch.mm(grad_middle.t(), attended.view(batch * seq, o_weight.shape[1]))
    grad_attended = torch.mm(grad_middle, o_weight).view(attended.shape)
    heads, kv_heads = q_weight.shape[0] // head_dim, k_weight.shape[0] // head_dim
    per_head = batch, seq, heads + 2 * kv_heads, head_dim
    q, k, v = qkv.view(per_head).split_with_sizes((heads, kv_heads, kv_heads), 2)
    grad_qkv = torch.empty_like(qkv)
    grad_per_head = grad_qkv.view(per_head)
    into = grad_per_head.split_with_sizes((heads, kv_heads, kv_heads), 2)
    attention.backward(grad_attended, q, k, v, attended, lse, head_dim**-0.5, into=into)
    rope_(grad_per_head.narrow(2, 0, heads + kv_heads), cos, sin, back=True)
    grad_normed = torch.mm(grad_qkv, torch.cat((q_weight, k_weight, v_weight)))
    sizes = q_weight.shape[0], k_weight.shape[0], k_weight.shape[0]
    grad_q, grad_k, grad_v = (torch.mm(t.t(), normed) for t in grad_qkv.split_with_sizes(sizes, 1))
    grad_x, grad_input = rms_norm_backward(grad_normed, flat, input_norm, eps, grad_middle)
    return (
        grad_x.view(x.shape),
        *(grad_input, grad_q, grad_k, grad_v, grad_o),
        *(grad_post, grad_gate, grad_up, grad_down),
    )
