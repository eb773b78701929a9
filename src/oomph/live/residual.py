"""A dense feed-forward network (FFN) that stays beside the experts that were made of it, as in DeepSpeed's residual MoE."""

from __future__ import annotations

from torch import Tensor, nn

from oomph.live.ffn import known_form


class ResidualExperts(nn.Module):
    """Takes the place of a dense FFN: keeps it as ``dense``, beside its mixture of experts, ``mixture``.

    A token's output is c0 · mixture(x) + c1 · dense(x), where (c0, c1) is the softmax of ``coefficient``, a linear map of x
    with bias (DeepSpeed 0.9.5, deepspeed/moe/layer.py, MoE.forward). c0 + c1 = 1, so as long as the experts are copies of the
    dense FFN, the output is what the dense FFN computed.
    """

    def __init__(self, dense: nn.Module, mixture: nn.Module) -> None:
        """Keeps `dense`, in whose dtype and on whose device the coefficient is.

        Raises:
            UserError: `dense` is not a plain or gated FFN.
        """
        super().__init__()
        form = known_form(dense)
        self.dense, self.mixture = dense, mixture
        like = dense.get_submodule(form.parts["up_proj"]).get_parameter("weight")
        self.coefficient = nn.Linear(like.shape[1], 2, device=like.device, dtype=like.dtype)
        self.train(dense.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to the same shape. Coefficients are float32 until they are applied."""
        shares = self.coefficient(hidden).float().softmax(dim=-1)
        routed, dense = self.mixture(hidden), self.dense(hidden)
        first, second = shares.to(dense.dtype).unbind(dim=-1)
        combined: Tensor = routed * first[..., None] + dense * second[..., None]
        return combined
