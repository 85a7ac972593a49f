"""MC dropout, islands and the confidence of a case: what of a pseudo-label can be trusted."""

import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet

from medssl.config import FilterSection, UncertaintySection
from medssl.data.phantoms import make_phantom
from medssl.losses.supervised import dice_ce
from medssl.networks.noise import sample_dropout
from medssl.pseudo.gates import expect_from, find_islands, measure_confidence, sum_classes
from medssl.pseudo.uncertainty import combine, find_limit

torch.manual_seed(0)
scans = [make_phantom(0, index, (32, 32, 32), "organs") for index in range(3)]
images = torch.stack([torch.as_tensor(image[None]).float() for image, _ in scans])
images = (images - images.mean((2, 3, 4), keepdim=True)) / images.std((2, 3, 4), keepdim=True)
labels = torch.stack([torch.as_tensor(label[None]) for _, label in scans[:2]]).long()
network = UNet(3, 1, 4, channels=(8, 16, 32), strides=(2, 2), dropout=0.1)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
for _ in range(20):
    optimizer.zero_grad()
    dice_ce(network(images[:2]), labels).backward()
    optimizer.step()

with torch.no_grad(), sample_dropout(network):  # any module with nn.Dropout in it
    logits = (sliding_window_inference(images[2:], (24, 24, 24), 4, network) for _ in range(4))
    passes = (torch.softmax(scores, dim=1) for scores in logits)
    probs, entropy, information = combine(passes, "MC dropout")
certain = entropy < find_limit(UncertaintySection(start=0.75), num_classes=4, rise=0.0)
expected = expect_from([label[0].numpy() for label in labels], num_classes=4)
cleaned = probs[0].numpy().copy()
for box, islands in find_islands(cleaned.argmax(0), expected.single):  # one piece in every label
    cleaned[(slice(None), *box)][:, islands] = [[1], [0], [0], [0]]  # the others: background
usual = [index for index, share in expected.presence.items() if share > 0.9]
sums = sum_classes([(cleaned, entropy[0, 0].numpy())], FilterSection())
confidence = measure_confidence(sums, usual)  # the Dice that the network expects of itself
