"""Class-wise thresholds in a plain torch loop: FlexMatch in forty lines."""

import torch
from monai.networks.nets import UNet

from medssl.config import ThresholdSection
from medssl.data.phantoms import make_phantom
from medssl.losses.ramps import ramp_value
from medssl.losses.supervised import ce, dice_ce
from medssl.pseudo.thresholds import ClassThresholds, measure_coverage

torch.manual_seed(0)
scans = [make_phantom(0, index, (24, 24, 24), "organs") for index in range(4)]
images = torch.stack([torch.as_tensor(image[None]).float() for image, _ in scans])
images = (images - images.mean((2, 3, 4), keepdim=True)) / images.std((2, 3, 4), keepdim=True)
labels = torch.stack([torch.as_tensor(label[None]) for _, label in scans[:2]]).long()
names = ("background", "organ", "lesion", "vessel")

network = UNet(3, in_channels=1, out_channels=4, channels=(8, 16, 32), strides=(2, 2))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
thresholds = ClassThresholds(ThresholdSection(name="flex", start=0.95, end=0.7), num_classes=4)
valid = torch.ones(2, 1, 24, 24, 24, dtype=torch.bool)  # False where a patch is padded

history = []
for step in range(20):
    progress = step / 20
    with torch.no_grad():
        probs = torch.softmax(network(images[2:]), dim=1)
    thresholds.update(probs, valid, progress)
    accepted = thresholds.accept(probs)
    classes = probs.argmax(1, keepdim=True)
    strong = images[2:] + 0.1 * torch.randn_like(images[2:])
    loss = dice_ce(network(images[:2]), labels)
    share = ramp_value("linear", progress, 0.0, 0.5)
    loss = loss + share * ce(network(strong), classes, weight=accepted.float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    shares = measure_coverage(accepted, classes, valid, names)  # NaN of a class without a voxel
    history.append({"loss": float(loss.detach()), **{k: float(v) for k, v in shares.items()}})
