"""A pipeline as a `TeacherGradient`: three methods, then any (R, K) and sampler. python examples/your_pipeline.py"""

import torch

import carv
from carv.weights import sds


class Pipeline:
    """A linear "renderer" with random cameras, and an exact Gaussian teacher. Put your own in the three methods."""

    latent_shape = (16,)
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self):
        self.schedule = carv.NoiseSchedule.scaled_linear()
        self.w = sds(self.schedule)
        self.theta = torch.zeros(16, requires_grad=True)

    def upstream(self, renders):
        """Expensive: one state for each stream of randomness; keeps the graph."""
        gain = [1 + 0.2 * torch.randn((), generator=stream.child("camera").generator()) for stream in renders]
        return torch.stack(gain)[:, None] * self.theta

    def contribution(self, state, t, noise):
        """Cheap: f(x_r, t_rk, eps_rk) for all K noisings of all R states; no gradients."""
        alpha, sigma = (x(t)[..., None] for x in (self.schedule.alpha, self.schedule.sigma))
        z_t = alpha * state[:, None] + sigma * noise
        eps_hat = sigma * (z_t - alpha) / (alpha**2 + sigma**2)
        return self.w.unchecked(t).float()[..., None] * (eps_hat - noise)

    def pull_back(self, state, f, retain=False):
        """One backward pass: sum_r J_r^T f_r."""
        return torch.autograd.grad(state, [self.theta], f, retain_graph=retain)


pipeline = Pipeline()
base = carv.uniform_steps(20, 980)
for name, sampler, renders, renoise in (
    ("standard (4, 1)", carv.TimestepSampler(base, coupling=carv.iid), 4, 1),
    ("carv (1, 16)", carv.TimestepSampler(base, carv.defensive(base, carv.proportional(base, pipeline.w))), 1, 16),
):
    estimator = carv.HierarchicalEstimator(sampler, renders, renoise)
    g = torch.stack([estimator.estimate(pipeline, carv.stream(0, i)).gradient[0] for i in range(400)])
    squares = (g - g.mean(0)).square().sum(1)
    print(f"{name}: variance {squares.mean():.4f} +- {squares.std() / 20:.4f}")
