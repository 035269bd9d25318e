"""Default values that several parts of the package share."""

IGNORE_INDEX = 255  # the label of pixels without a class
MOMENTUM = 0.1  # m of the memory update (Eq. 6): the share of the new statistics
LARGE_IMAGE = 2048 * 1024  # pixels; a larger image is predicted in windows
LARGE_WINDOW = (1024, 1024)  # (height, width) of these windows
