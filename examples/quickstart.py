"""The ten lines of the README: a recipe fine-tunes with half of the channels, and gives the model back."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # where the package is not installed, the sources beside this folder

import fx_approx

layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]
model = nn.Sequential(*layers, nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
images, labels, steps = torch.randn(16, 3, 12, 12), torch.randint(10, (16,)), 80

optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
recipe = fx_approx.recipes.finetune(model, images, steps, ratio=0.5, optimizer=optimizer)
print(recipe)  # what it chose, and why; whether it pays on this machine
for _ in range(steps):
    optimizer.zero_grad()
    nn.functional.cross_entropy(recipe.model(images), labels).backward()
    optimizer.step()
    recipe.step()
model = recipe.finish()  # your own model, trained
