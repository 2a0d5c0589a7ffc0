"""A loop of one's own: `torch.randint` replaced by two lines. python examples/drop_in.py

The loop distils a Gaussian "teacher" into parameters theta, one render and K = 8 noisings a step.
"""

import torch

import carv
from carv.weights import sds

schedule = carv.NoiseSchedule.scaled_linear()
w = sds(schedule)
theta = torch.zeros(16, requires_grad=True)
target = torch.linspace(-1, 1, 16)
optimiser = torch.optim.Adam([theta], lr=0.05)
rng = torch.Generator().manual_seed(0)

base = carv.uniform_steps(20, 980)
sampler = carv.TimestepSampler(base, carv.defensive(base, carv.proportional(base, w)))

for _ in range(200):
    z = theta[None]  # your render and encoder, once
    # was: t = torch.randint(20, 981, (1,)), and one noise
    draws = sampler.sample(renders=1, renoise=8, rng=rng)
    noise = draws.noise(theta.shape, rng)
    with torch.no_grad():  # your teacher: here the exact one of N(target, 0.5^2)
        z_t = schedule.add_noise(z[:, None], draws.t, noise)
        alpha, sigma = (x(draws.t)[..., None] for x in (schedule.alpha, schedule.sigma))
        eps_hat = sigma * (z_t - alpha * target) / ((0.5 * alpha) ** 2 + sigma**2)
        f = w(draws.t).float()[..., None] * (eps_hat - noise)
    # was: f.mean(); now each draw counts p/q
    gradient = (draws.weight[..., None] * f).mean(1)
    optimiser.zero_grad()
    (gradient * z).sum().backward()
    optimiser.step()

distance = (theta - target).norm().item()
print(f"distance from the teacher's mode: {distance:.3f}")
assert distance < 0.5
