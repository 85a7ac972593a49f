"""The whole objective, of any method, in a plain loop with a network of MONAI."""

import torch
from monai.networks.nets import UNet

from medssl.data.phantoms import make_phantom
from medssl.objective import Objective
from medssl.settings import load_config
from medssl.transforms.intensity import build_intensity

torch.manual_seed(0)
scans = [make_phantom(0, index, (24, 24, 24), "organs") for index in range(4)]
images = torch.stack([torch.as_tensor(image[None]).float() for image, _ in scans])
images = (images - images.mean((2, 3, 4), keepdim=True)) / images.std((2, 3, 4), keepdim=True)
labels = torch.stack([torch.as_tensor(label[None]) for _, label in scans[:2]])
weight = torch.ones(2, 1, 24, 24, 24)  # 0 where a patch is padded

config = load_config(None, ["method=default", "teacher.ema_decay=0.9"]).config
network = UNet(3, 1, 4, channels=(8, 16, 32), strides=(2, 2), dropout=0.1)  # any nn.Module
names = ("background", "organ", "lesion", "vessel")
objective = Objective(network, config, names, flips=(0, 1, 2)).train()
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
strong = build_intensity(strength=2.0)
generator = torch.Generator().manual_seed(0)  # of CutMix and the mirrorings

history = []
for step in range(20):
    labeled = {"image": images[:2], "label": labels, "weight": weight}
    weak = images[2:]
    views = torch.stack([strong(patch) for patch in weak])
    unlabeled = {"weak": weak, "strong": views, "weight": weight}
    terms = objective(labeled, unlabeled, progress=step / 20, generator=generator)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    objective.after_step()  # the teacher follows
    history.append({name: float(term.detach()) for name, term in terms.items()})

teacher = objective.predictor  # what is validated and delivered
