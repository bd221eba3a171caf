"""The one shape check that the algorithm's functions share."""

from torch import Tensor


def check_same_shape(num_dims: int, **tensors: Tensor) -> None:
    """Refuse tensors that do not all have one shape with num_dims dimensions.

    Args:
        num_dims: 1 for values a sequence, 2 for values a token.
        **tensors: the tensors by the name the user knows them by.
    Raises:
        ValueError: the shapes differ, or have another number of dimensions.
    """
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1 or any(len(shape) != num_dims for shape in shapes):
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"expected {num_dims}-D tensors of one shape, found {found}")
