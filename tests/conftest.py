"""Settings of all tests; its place also makes the helpers beside it (`gaussian`) importable."""

import torch

# Tensors are tiny here: threads that wait for each other on a busy machine cost up to 50 x.
torch.set_num_threads(1)
