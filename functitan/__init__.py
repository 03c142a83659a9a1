"""Named-axis, functional distributed training on torch: the axis pattern of a tensor is its type."""
