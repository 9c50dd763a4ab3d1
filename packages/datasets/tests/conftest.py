import torch

# The machines that run these tests have few cores and several test processes.
torch.set_num_threads(1)
