"""What `nnUNetv2_train -tr BudgetTrainer` runs; nnU-Net looks for it in `nnUNet_extTrainer`.

This folder holds nothing else, since nnU-Net imports all that it finds there.
"""

import os
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from peers.budget import Budget, write_spent


class BudgetTrainer(nnUNetTrainer):
    """nnU-Net's trainer with minutes of the processor, of PEER_MINUTES, in place of its epochs.

    Batches, augmentation, loss, optimizer and the polynomial decay are nnU-Net's; the decay goes
    over the minutes, step by step. Nothing is validated, so all minutes train. What it writes at
    last is what it delivers.
    """

    def run_training(self) -> None:
        """Train until the minutes are spent."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.on_train_start()
        self.network.train()
        self.lr_scheduler.max_steps = 1.0  # so that its steps are fractions of the budget
        budget, steps = Budget(float(os.environ["PEER_MINUTES"])), 0
        while (progress := budget.progress) < 1:
            self.lr_scheduler.step(progress)
            self.train_step(next(self.dataloader_train))
            steps += 1
        spent = budget.spent
        self.on_train_end()
        write_spent(Path(os.environ["PEER_FOLDER"]), steps, spent)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Do nothing: the cases of the fold `all` have been trained on."""
