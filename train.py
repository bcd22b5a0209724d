"""Trains a prior: python train.py experiment=ddpm_celeba"""

from diffusion_lab.command.cli import train

if __name__ == "__main__":
    train()
