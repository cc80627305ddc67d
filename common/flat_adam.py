"""Adam on one flat vector of the trainable parameters: one tensor to reduce over the ranks, to clip and to step."""

import torch
import torch.distributed as dist
import torch.nn as nn

from common.cli import fail


class FlatAdam:
    """One optimiser: views of its parameters, gradient, all-reduce, clipping and step, eager or inside torch.compile.

        optimizer.compute_gradients(loss)
        (kl,) = optimizer.all_reduce(kl)
        norm = optimizer.clip_gradients(max_norm)
        optimizer.step()

    params: those with `requires_grad` are trained, the others are left alone. Parameters in float32 become views of
        the vector; those of a narrower type keep a float32 master in it, from which `step` writes them.
    lr: a tensor on their device, read at every step, so that a schedule is `lr.fill_(...)`.
    """

    def __init__(self, params, lr: torch.Tensor, eps: float = 1e-5, betas: tuple[float, float] = (0.9, 0.999)):
        self.params = [p for p in params if p.requires_grad]
        self.sizes = [p.numel() for p in self.params]
        self.flat = nn.Parameter(torch.cat([p.detach().flatten().float() for p in self.params]))
        self.grad = self.flat.grad = torch.zeros_like(self.flat)
        self.masters = []  # (parameter, its master) where the type is narrower
        for p, part in zip(self.params, self.flat.detach().split(self.sizes), strict=True):
            if p.dtype == torch.float32:
                p.data = part.view_as(p)
            else:
                self.masters.append((p, part.view_as(p)))
        self.lr, self.eps, self.betas = lr, eps, betas
        self.not_finite = torch.zeros((), device=self.flat.device)  # how many gradients were dropped
        capturable = self.flat.is_cuda  # by a CUDA graph
        self.adam = torch.optim.Adam([self.flat], lr=lr, betas=betas, eps=eps, fused=True, capturable=capturable)
        zeros = {name: torch.zeros_like(self.flat.data) for name in ("exp_avg", "exp_avg_sq")}
        self.adam.state[self.flat] = {"step": torch.zeros((), device=self.flat.device)} | zeros

    def compute_gradients(self, loss: torch.Tensor, accumulate: bool = False):
        """The gradient of `loss`, 0 for parameters it does not depend on; with `accumulate` added to the last one."""
        grads = torch.autograd.grad(loss, self.params, materialize_grads=True)
        flat = torch.cat([g.flatten().float() for g in grads])
        self.grad.copy_(self.grad + flat if accumulate else flat)

    def all_reduce(self, *beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Averages the gradient over all ranks, and in the same message the scalars `beside` it, which it returns."""
        if not dist.is_initialized():
            return beside
        message = torch.cat((self.grad, torch.stack(beside))) if beside else self.grad
        _average(message)
        if beside:
            self.grad.copy_(message[: len(self.grad)])
        return tuple(message[len(self.grad) :])

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scales the gradient down to `max_norm`; returns its norm before. One that is not finite becomes zero."""
        norm = self.grad.norm()
        finite = torch.isfinite(norm)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.grad.copy_(torch.where(finite, self.grad * scale, 0.0))
        self.not_finite += ~finite
        return norm

    @torch.no_grad()
    def step(self):
        if torch.compiler.is_compiling():
            self._traced_step()
        else:
            self.adam.step()
        for p, master in self.masters:
            p.copy_(master)

    def _traced_step(self):
        """What `self.adam.step()` does, which would part the compiled graph."""
        step, mean, square = (self.adam.state[self.flat][name] for name in ("step", "exp_avg", "exp_avg_sq"))
        beta1, beta2 = self.betas
        step += 1
        mean.lerp_(self.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(self.grad, self.grad, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt() + self.eps
        change = self.lr / (1 - beta1**step) * mean / denominator
        if self.masters:
            self.flat.sub_(change)
            return
        # The compiler does not know that the parameters are views of the vector, so they are written one by one.
        for p, p_change in zip(self.params, change.split(self.sizes), strict=True):
            p.sub_(p_change.view_as(p))

    def state_dict(self) -> dict:
        return self.adam.state_dict()

    def load_state_dict(self, state: dict):
        """Restores moments and step; a state of other parameters ends with one sentence."""
        try:
            self.adam.load_state_dict(state)
        except ValueError:
            fail("--resume got a checkpoint of an older version; it takes one of this version")
        self.lr.copy_(self.adam.param_groups[0]["lr"])
        self.adam.param_groups[0]["lr"] = self.lr


@torch.compiler.disable
def _average(tensor: torch.Tensor):
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()
