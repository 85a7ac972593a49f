"""The losses, one by one, in a plain MONAI loop."""

import torch
from monai.data import DataLoader, Dataset
from monai.networks.nets import UNet
from monai.transforms import Compose, NormalizeIntensityd, RandSpatialCropd

from medssl.data.phantoms import make_phantom
from medssl.losses.consistency import consistency_loss
from medssl.losses.entropy import entropy_loss
from medssl.losses.robust import generalized_ce
from medssl.losses.supervised import dice_ce

torch.manual_seed(0)
scans = [make_phantom(0, index, (32, 32, 32), "organs") for index in range(4)]
cases = [{"image": i[None].astype("float32"), "label": y[None].astype("int64")} for i, y in scans]
keys = ("image", "label")
steps = [NormalizeIntensityd("image"), RandSpatialCropd(keys, (24, 24, 24), random_size=False)]
loader = DataLoader(Dataset(cases, Compose(steps)), batch_size=2)
network = UNet(3, in_channels=1, out_channels=4, channels=(8, 16, 32), strides=(2, 2))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)

history = []
for _ in range(6):
    for batch in loader:
        label = batch["label"]
        label[..., :4] = 255  # slices that nobody annotated give no gradient
        logits = network(batch["image"])
        with torch.no_grad():
            other = torch.softmax(network(batch["image"].flip(2)).flip(2), dim=1)
        terms = {
            "supervised": dice_ce(logits, label),
            "robust": generalized_ce(logits, label, q=0.7),
            "entropy": 0.01 * entropy_loss(logits, order=1.0),
            "consistency": 0.1 * consistency_loss(logits, other, "jensen_shannon"),
        }
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: float(term.detach()) for name, term in terms.items()})
