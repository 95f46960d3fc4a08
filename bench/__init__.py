"""Speed and memory of the loss against eager PyTorch and torch.compile, side by side in one process."""
