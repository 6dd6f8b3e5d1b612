"""NATTEN on the CPU: what it documents of its windows, pair by pair, in plain torch.

From the documentation and the mask of its FlexAttention backend (NATTEN 0.21.7,
`backends/flex.py`): the window of a query lies about the middle query of its stride, the right one
of two, and is moved inwards where it would leave its dilation group; a causal one ends at the
query and has the window's size from the last query of its stride.
"""

from math import prod

import torch


def library(calls=None):
    """What `gen_accel.kernels.natten._library` is.

    Args:
        calls: gets the number of axes of each call.
    """

    def of(axes):
        if calls is not None:
            calls.append(axes)
        return lambda *given, **options: attend(axes, *given, **options)

    return of


def attend(
    axes,
    query,
    key,
    value,
    *,
    kernel_size,
    stride,
    dilation,
    is_causal,
    scale,
    additional_keys=None,
    additional_values=None,
    return_lse=False,
):
    """`na1d`, `na2d` and `na3d`: (B, sizes of the axes, H, D), with `return_lse` the natural
    log-sum-exp too, (B, sizes of the axes, H)."""
    assert query.shape == key.shape == value.shape
    assert all(x.ndim == axes + 3 for x in (query, key, value))
    sizes = query.shape[1 : axes + 1]
    along = list(zip(sizes, kernel_size, stride, dilation, is_causal, strict=True))
    assert all(k > 1 and s <= k and k * d <= size for size, k, s, d, _ in along)
    seen = torch.ones(1, 1, dtype=torch.bool)
    for options in along:
        seen = torch.kron(seen, axis(*options))
    q, k, v = (x.flatten(1, axes).transpose(1, 2) for x in (query, key, value))
    if additional_keys is not None:
        assert additional_keys.is_contiguous()
        assert additional_values.is_contiguous()
        k = torch.cat([k, additional_keys.transpose(1, 2)], 2)
        v = torch.cat([v, additional_values.transpose(1, 2)], 2)
        more = torch.ones(prod(sizes), additional_keys.shape[1], dtype=torch.bool)
        seen = torch.cat([seen, more], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT * scale).masked_fill(~seen, -torch.inf)
    out = (scores.softmax(-1) @ v.to(wide)).transpose(1, 2).reshape(query.shape).to(query.dtype)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).transpose(1, 2).reshape(query.shape[:-1])


def dense(query, key, value, *, scale, return_lse):
    """`attention`: (B, N, H, D), and the log-sum-exp, (B, N, H)."""
    assert return_lse
    assert all(x.is_contiguous() for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    out = (scores.softmax(-1) @ v.to(wide)).to(q.dtype)
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def axis(size, window, stride, dilation, is_causal):
    """(size, size) bool, token by token."""
    seen = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        group = range(i % dilation, size, dilation)
        place, most = i // dilation, len(group) - 1
        start = place // stride * stride
        if is_causal:
            leader = min(start + stride - 1, most)
            places = [j for j in range(place + 1) if leader - j < window]
        else:
            leader = min(start + stride // 2, most)
            left, right = window // 2, window // 2 + window % 2 - 1
            center = max(left, min(leader, most - right))
            places = range(center - left, center + right + 1)
        for j in places:
            seen[i, group[j]] = True
    return seen
