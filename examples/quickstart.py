"""The ten lines of the README: transform, train as always, evaluate exactly, look at the savings."""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx

model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
images, labels = torch.randn(64, 784), torch.randint(10, (64,))

approx = fx_approx.transform(model, fx_approx.policies.Uniform(0.5), example_inputs=images)
optimizer = torch.optim.SGD(approx.parameters(), lr=0.1)  # the model's own parameters
for _ in range(10):
    optimizer.zero_grad()
    F.cross_entropy(approx(images), labels).backward()
    optimizer.step()
approx.eval()  # exact from here on
print(fx_approx.report(approx))
