"""Evaluates a trained prior: python eval.py task=denoise sigma_t=0.5"""

from diffusion_lab.command.cli import evaluate

if __name__ == "__main__":
    evaluate()
