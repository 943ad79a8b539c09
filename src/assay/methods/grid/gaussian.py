"""What rounding of Gaussian weights costs."""


def gaussian_distortion(bits: float) -> float:
    """Mean squared error of a good code for unit Gaussians at so many bits."""
    return 1.15 * 2 ** (-2 * bits)
