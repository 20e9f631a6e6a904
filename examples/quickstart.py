"""The smallest complete use: transform, train as always, recalibrate, evaluate, look at the savings."""

import torch
from torch import nn

import fx_approx

model = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
)  # fmt: skip
images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))

approx = fx_approx.transform(model, example_inputs=images)  # same parameters: `model` learns with it
optimizer = torch.optim.SGD(approx.parameters(), lr=0.1, momentum=0.9)

approx.train()
for _ in range(10):
    optimizer.zero_grad()
    nn.functional.cross_entropy(approx(images), labels).backward()
    optimizer.step()

fx_approx.recalibrate(approx, [images])  # BatchNorm statistics of sampled steps do not fit exact evaluation
approx.eval()  # exact
print(f"accuracy {(approx(images).argmax(1) == labels).float().mean():.2f}")
print(fx_approx.report(approx).to_text(width=110))
