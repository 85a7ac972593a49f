"""The whole objective in a loop of ignite, with an event for the teacher and metrics of its own."""

import torch
from ignite.engine import Engine, Events
from ignite.metrics import ConfusionMatrix, DiceCoefficient
from monai.networks.nets import UNet

from medssl.data.phantoms import make_phantom
from medssl.objective import Objective
from medssl.settings import load_config

torch.manual_seed(0)
scans = [make_phantom(0, index, (24, 24, 24), "organs") for index in range(4)]
images = torch.stack([torch.as_tensor(image[None]).float() for image, _ in scans])
images = (images - images.mean((2, 3, 4), keepdim=True)) / images.std((2, 3, 4), keepdim=True)
labels = torch.stack([torch.as_tensor(label[None]) for _, label in scans]).long()
labeled = {"image": images[:2], "label": labels[:2], "weight": torch.ones(2, 1, 24, 24, 24)}
unlabeled = {"weak": images[2:], "strong": images[2:] + 0.1, "weight": labeled["weight"]}
config = load_config(None, ["method=mean_teacher", "teacher.ema_decay=0.9"]).config
network = UNet(3, 1, 4, channels=(8, 16, 32), strides=(2, 2), dropout=0.1)
objective = Objective(network, config, ("background", "organ", "lesion", "vessel")).train()
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)


def train(engine, batch):
    """Take a step."""
    terms = objective(*batch, engine.state.iteration / 20, torch.default_generator)
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()
    history.append({name: float(term.detach()) for name, term in terms.items()})


trainer, history = Engine(train), []
trainer.add_event_handler(Events.ITERATION_COMPLETED, objective.after_step)  # the teacher follows
trainer.run([(labeled, unlabeled)], max_epochs=20)
teacher = objective.predictor.eval()
evaluator = Engine(lambda _, batch: (teacher(batch[0]).detach(), batch[1][:, 0]))
DiceCoefficient(ConfusionMatrix(num_classes=4)).attach(evaluator, "dice")
dice = evaluator.run([(images[2:], labels[2:])]).metrics["dice"]
