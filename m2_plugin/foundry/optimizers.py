"""Composer's decoupled AdamW in fused kernels; `fused_decoupled_adamw` in a YAML."""

from collections.abc import Callable
from typing import Any

import composer.optim
import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["DecoupledAdamW"]


# The class has the name of its base, because Composer finds an optimizer's state in a checkpoint by
# it: a run may change from one to the other.
class DecoupledAdamW(composer.optim.DecoupledAdamW):
    """AdamW whose weight decay does not grow with the learning rate (arXiv 1711.05101).

    A step shrinks weights by `weight_decay · lr / initial_lr`. Updates and states are the same as
    of Composer's optimizer to the rounding, and so are the arguments. Composer's launches a dozen
    kernels for each parameter and waits for the GPU to read each step count; this one launches a
    few for each group, and never waits.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: A function that computes the loss and the gradients anew, or None.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None and p.requires_grad]
            if params:
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        names = ["step", "exp_avg", "exp_avg_sq"]
        if group["amsgrad"]:
            names.append("max_exp_avg_sq")
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state |= {name: torch.zeros_like(p) for name in names[1:]}
            elif state["step"].device != p.device:  # a checkpoint's, read to the CPU
                state["step"] = state["step"].to(p.device)
        lr = group["lr"]
        initial_lr, decay = group.setdefault("initial_lr", lr), group["weight_decay"]
        if not initial_lr:  # as Composer has it
            torch._foreach_mul_(params, 1 - decay)
            decay = 0.0
        states = {name: [self.state[p][name] for p in params] for name in names}
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            states["exp_avg"],
            states["exp_avg_sq"],
            states.get("max_exp_avg_sq", []),
            states["step"],
            fused=True,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=decay / initial_lr if initial_lr else 0.0,  # which it multiplies by lr
            eps=group["eps"],
            maximize=False,
        )
