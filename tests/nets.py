"""Small networks and synthetic data on which the runtimes' known failures show."""
import numpy as np

CHANNELS, STEPS = 8, 64


def sensor_windows(n: int,    # windows of each kind
                   seed: int
                  ):          # (2n, 8, 64) float32, and (2n,) labels: first n normal, then n with a fault
    """Synthetic windows of eight sensors over 64 time steps. A machine runs at a load that differs from window to window (log-normal, so a few
    windows are far louder than the mean); each sensor sees two oscillations and noise. A fault is a drift, a noisy or a stuck sensor."""
    rng, t = np.random.default_rng(seed), np.arange(STEPS)/STEPS
    mix = np.random.default_rng(0).normal(size=(CHANNELS, 2))      # how each sensor sees the two oscillations: the same machine for every seed
    load, phase = rng.lognormal(0, 0.6, 2*n), rng.uniform(0, 2*np.pi, (2*n, 2))
    waves = np.sin(2*np.pi*np.array([2, 5])[None, :, None]*t + phase[:, :, None])
    x = load[:, None, None]*np.einsum('cw,nwt->nct', mix, waves) + rng.normal(0, 0.1, (2*n, CHANNELS, STEPS))
    for row in x[n:]:
        sensor, start, kind = rng.integers(CHANNELS), rng.integers(8, 40), rng.integers(3)
        tail = row[sensor, start:]
        if kind == 0: tail += np.linspace(0, rng.uniform(1, 2.5), len(tail))*rng.choice([-1, 1])
        elif kind == 1: tail += rng.normal(0, rng.uniform(0.5, 1), len(tail))
        else: tail[:] = tail[0]
    return x.astype(np.float32), np.repeat([0, 1], n)


def conv_autoencoder():
    "A 1-D convolution autoencoder, (n, 8, 64) to (n, 8, 64), weights at random (seed 0)."
    import torch
    from torch import nn
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(CHANNELS, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(24, 32, 5, stride=2, padding=2), nn.ReLU(),
                         nn.Conv1d(32, 4, 3, padding=1), nn.Conv1d(4, 32, 3, padding=1), nn.ReLU(),
                         nn.ConvTranspose1d(32, 24, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose1d(24, CHANNELS, 4, stride=2, padding=1)).eval()


def trained_autoencoder(epochs: int = 30):
    "`conv_autoencoder` trained on 2,000 normal windows (seed 1) on one thread."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, x = conv_autoencoder().train(), torch.from_numpy(sensor_windows(2000, 1)[0][:2000])
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=shuffle).split(64):
            optimizer.zero_grad()
            (net(x[rows]) - x[rows]).square().mean().backward()
            optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return net.eval()
