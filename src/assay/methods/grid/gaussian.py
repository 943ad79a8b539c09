"""What rounding of Gaussian weights costs."""


def gaussian_distortion(bits: float) -> float:
    """Mean squared error that the trellis code leaves of a unit Gaussian, within 3% of `trellis.encode` from 1 to 6 bits."""
    return (1.055 + 0.0225 * bits) * 2.0 ** (-2 * bits)
