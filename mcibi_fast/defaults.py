"""Default values that several parts of the package share."""

IGNORE_INDEX = 255  # the label of pixels without a class
MOMENTUM = 0.1  # m of the memory update (Eq. 6): the share of the new statistics
